"""Continuing from a state of a run: in the run itself (resume), or in a new one (fork)."""

from everystep.replay.continuing.fork import Fork, fork
from everystep.replay.continuing.resume import Resume, resume, resume_experiment, resume_objects

__all__ = ["Fork", "Resume", "fork", "resume", "resume_experiment", "resume_objects"]
