"""Recognizes steps of a loop by their calls of torch functions."""
