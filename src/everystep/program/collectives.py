"""Collectives: operations in which several processes (ranks) of a training take part.

torch's own (`c10d.allreduce_`) take a live group of processes. In a program they are operators with the
ranks as numbers, and each thread determines how it takes part: a recording makes torch's call, and a
replay computes with the other ranks' programs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from everystep.ops.operator_record import Given, are_dense
from everystep.ops.operators import leaves

__all__ = ["COLLECTIVES", "FITS", "taking_part"]

#: Takes part in a collective: is called with its name and its arguments.
Part = Callable[[str, tuple[Any, ...]], None]

_NAMESPACE = "everystep"
#: The first argument is written into, and the last has the ranks.
_SCHEMAS = {
    "all_reduce_": "Tensor(a!)[] tensors, str reduce",
    "all_reduce_coalesced_": "Tensor(a!)[] tensors, str reduce",
    "reduce_": "Tensor(a!)[] tensors, str reduce, int target",
    "broadcast_": "Tensor(a!)[] tensors, int source",
    "all_gather_": "Tensor(a!)[] results, Tensor given",
    "all_gather_into_": "Tensor(a!)[] results, Tensor given",
    "reduce_scatter_from_": "Tensor(a!)[] results, Tensor given, str reduce",
    "all_to_all_from_": "Tensor(a!)[] results, Tensor given, int[] result_sizes, int[] given_sizes",
}
#: Each rank of a replay has a thread of this process, with a part of its own.
_here = threading.local()


@contextmanager
def taking_part(part: Part) -> Iterator[None]:
    """Let this thread take part in collectives by `part` inside."""
    before = getattr(_here, "part", None)
    _here.part = part
    try:
        yield
    finally:
        _here.part = before


def _take_part(name: str, *arguments: Any) -> None:
    part = getattr(_here, "part", None)
    if part is None:
        raise RuntimeError("it needs the other ranks, which this replay does not have")
    part(name, arguments)


_library: Any = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _library.define(f"{_name}({_schema}, int[] ranks) -> ()")
    # A kernel for all devices; it computes nothing itself.
    _library.impl(_name, partial(_take_part, _name), "CompositeExplicitAutograd")
    _library.impl(_name, lambda *_: None, "Meta")  # shapes stay as they are

#: The operators by their names in a program.
COLLECTIVES = {
    f"{_NAMESPACE}.{name}.default": getattr(getattr(torch.ops, _NAMESPACE), name).default
    for name in _SCHEMAS
}


def _exchanged_fit(given: Given, results: int = 1, each: int = 1) -> bool:
    """Ranks exchange as many bytes as tensors have numbers, from the first on.

    results, each: how many times the numbers of all results those of what is given are; of the ranks, 0.
    """
    tensors = leaves([*given.values()])
    are_alike = len({tensor.dtype for tensor in tensors}) == 1 and are_dense(given)
    if "given" not in given or not are_alike:
        return are_alike
    *written, own = (tensor.numel() for tensor in tensors)
    count = len(given["ranks"])
    return sum(written) * (each or count) == own * (results or count)


#: Whether what they are given fits together, by their names.
FITS: dict[str, Callable[[Given], bool]] = {
    **dict.fromkeys(("all_reduce_", "all_reduce_coalesced_", "reduce_", "broadcast_"), _exchanged_fit),
    **dict.fromkeys(("all_gather_", "all_gather_into_"), partial(_exchanged_fit, results=0)),
    "reduce_scatter_from_": partial(_exchanged_fit, each=0),
    "all_to_all_from_": lambda given: are_dense(given, "results"),
}
