"""Answers: the questions about a run or a step, each of which computes and returns data."""
