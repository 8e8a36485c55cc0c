"""The same run under different conditions: other numerics, another precision, another torch."""

from everystep.answers.rerun.place import Place
from everystep.answers.rerun.rerun import Rerun, relative_distance, rerun

__all__ = ["Place", "Rerun", "relative_distance", "rerun"]
