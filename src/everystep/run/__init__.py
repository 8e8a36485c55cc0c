"""A recorded run: to open, question, continue and show."""

from everystep.run.questions import Steps
from everystep.run.run import Run, diagnosis_of, progress_of, run_from_objects, run_of

__all__ = ["Run", "Steps", "diagnosis_of", "progress_of", "run_from_objects", "run_of"]
