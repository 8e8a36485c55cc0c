"""The kernel by which a GradScaler divides gradients by its scale."""

from __future__ import annotations

import torch

from everystep.ops.labels import SHARED, Tracked
from everystep.ops.rows import Result, RowsCall, RowsRule

__all__ = ["SCALING"]


def _unscaled(call: RowsCall) -> list[Result]:
    """Gradients, in place, and whether one of them is not finite."""
    call.require_shared("inv_scale")
    scale = call["inv_scale"].value

    def of(gradient: Tracked) -> Result:
        return Result(gradient.labels, lambda row: gradient.term(row) * scale, gradient.is_mean)

    shared = torch.full((), SHARED, dtype=torch.int32)
    return [*map(of, call["self"]), Result(shared.expand(call["found_inf"].labels.shape))]


SCALING: dict[str, RowsRule] = {"_amp_foreach_non_finite_check_and_unscale": _unscaled}
