"""Rules of operators: the rows that the results of an operation belong to.

A rule is exact or refuses. Where an operator adds up numbers of several rows, the term of a row is the
same operator on the numbers of this row alone.
"""

from __future__ import annotations

from everystep.replay.rows.call import Rule
from everystep.replay.rows.elementwise import ELEMENTWISE
from everystep.replay.rows.layers import LAYERS
from everystep.replay.rows.losses import LOSSES
from everystep.replay.rows.places import PLACES
from everystep.replay.rows.recurrent import RECURRENT
from everystep.replay.rows.scaling import SCALING
from everystep.replay.rows.sums import SUMS

__all__ = ["RULES"]

#: By the operator's name.
RULES: dict[str, Rule] = ELEMENTWISE | SUMS | LAYERS | LOSSES | RECURRENT | PLACES | SCALING
