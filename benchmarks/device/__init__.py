"""Trainings and questions on a device that is not the CPU: `python -m benchmarks.device`."""

#: Steps of each training, and the one that is looked at.
STEPS, LOOKED_AT = 24, 13
