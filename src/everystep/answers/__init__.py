"""Answers: the questions about runs, each of which computes its answer and returns it as data."""
