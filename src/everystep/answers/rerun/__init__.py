"""The same run elsewhere: its programs under other numerics, in another precision, by another torch."""

from everystep.answers.rerun.place import Conditions
from everystep.answers.rerun.rerun import Rerun, relative_distance, rerun

__all__ = ["Conditions", "Rerun", "relative_distance", "rerun"]
