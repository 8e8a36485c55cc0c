"""Trainings and questions on a device that is not the CPU: `python -m benchmarks.device`."""
