"""Gathered: operations that cut numbers out of data that is no part of the training, or put some in.

A loop without a loader cuts its batches out of one long tensor, at other places at each step. What it
gets is an input of the step, kept by content as a batch is; the operations are left out. So steps that
read other places have the same path, and the long tensor itself is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from everystep.step.known_operators import KnownOperator
from everystep.step.seen_tensors import is_plain

__all__ = ["gathers_data"]


def gathers_data(
    known: KnownOperator,
    tensors: Iterable[Tensor],
    is_met: Callable[[Tensor], bool],
    is_drawn: Callable[[Tensor], bool],
) -> bool:
    """Tell whether an operation cuts numbers out of data from outside, or writes into a part of it.

    A read counts where it is given nothing else, and its places may change: a part of a tensor, or
    numbers that an index picks.

    Args:
        known: what is known of its operator.
        tensors: that it is given.
        is_met: tells whether a tensor is on memory that the step knows.
        is_drawn: tells whether the step has drawn such a tensor at random, from nothing else.
    """
    if known.how not in ("see", "pass") or known.draws or (known.writes and not known.copies):
        return False
    is_outside, reads_places = False, known.picks or known.how == "pass"
    for tensor in tensors:
        if not is_plain(tensor) or tensor.requires_grad:
            return False
        if is_met(tensor):
            is_index = not (tensor.is_floating_point() or tensor.is_complex())
            if not (known.picks and is_index and is_drawn(tensor)):
                return False
            continue
        is_outside = True
        is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize
        if known.copies:
            return is_part
        reads_places = reads_places or is_part
    return is_outside and reads_places
