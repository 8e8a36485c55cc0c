"""Kills trainings, cuts their files, and looks whether they resume to the bits of a whole run."""
