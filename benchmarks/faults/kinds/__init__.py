"""Kinds of differences between two runs, planted by a script that knows where and why they part."""
