"""Answers: the questions about a run or a step; each computes and returns data."""
