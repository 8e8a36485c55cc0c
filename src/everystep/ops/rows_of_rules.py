"""Rules of operators: the rows that the results of an operation belong to.

A rule is exact or refuses. Where an operator adds up numbers of several rows, the term of a row is the
same operator on the numbers of this row alone.
"""

from __future__ import annotations

from everystep.ops.rows import RowsRule
from everystep.ops.rows_of_elementwise import ELEMENTWISE
from everystep.ops.rows_of_layers import LAYERS
from everystep.ops.rows_of_losses import LOSSES
from everystep.ops.rows_of_places import PLACES
from everystep.ops.rows_of_recurrent import RECURRENT
from everystep.ops.rows_of_scaling import SCALING
from everystep.ops.rows_of_sums import SUMS

__all__ = ["RULES"]

#: By the operator's name.
RULES: dict[str, RowsRule] = ELEMENTWISE | SUMS | LAYERS | LOSSES | RECURRENT | PLACES | SCALING
