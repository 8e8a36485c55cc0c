"""Collective calls: those that torch makes to other ranks, in the form in which a program has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from everystep.errors import UsageError
from everystep.program.collectives import COLLECTIVES

__all__ = [
    *("CollectiveCall", "exchanging_methods", "finish_calls", "has_ranks", "how_collective"),
    *("note_works", "shows_reductions", "works_of"),
]

#: The work of calls that the loop may wait for later, even in another step.
_under_way: list[Any] = []


def has_ranks() -> bool:
    """Return whether torch.distributed runs several processes."""
    distributed = torch.distributed
    is_running = distributed.is_available() and distributed.is_initialized()
    return bool(is_running and distributed.get_world_size() > 1)


def how_collective(func: Any, is_ready: bool) -> str:
    """Return how a watch sees a call to other ranks.

    `known` (a program has it), `pass` (it computes nothing), or `unseen`: what it writes is kept by
    content, as of a group of one process.

    is_ready: whether there were several processes when the recording began.

    Raises:
        UsageError: it passes tensors between two ranks, or they came after the recording began.
    """
    name = func.overloadpacket.__name__
    if not is_ready:
        if has_ranks():
            raise UsageError(
                "the processes began to communicate after the recording; call "
                "torch.distributed.init_process_group before everystep.record"
            )
        return "unseen"
    if name in _BETWEEN_TWO:
        raise UsageError(
            f"{name.rstrip('_')} passes tensors between two processes, which everystep cannot record "
            "yet; use collectives of all (all_reduce, broadcast, all_gather), or do it between two steps"
        )
    return "known" if name in _TRANSLATED else "pass" if name in _BARRIERS else "unseen"


def works_of(result: Any) -> list[Any]:
    """Return the handles of the work of a call, which returns one, or tensors and one."""
    # Boxed, as torch's dispatcher has it.
    boxed = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.ScriptObject)]
    return [torch.distributed.Work.unbox(each) for each in boxed if "Work" in str(each._type())]


def exchanging_methods() -> dict[str, Any]:
    """Return the methods by which groups of processes write into tensors, which torch does not count."""
    methods = vars(torch.distributed.ProcessGroup) if has_ranks() else {}
    return {name: method for name, method in methods.items() if _EXCHANGING.search(name)}


def note_works(works: Sequence[Any]) -> None:
    """Note works that have begun. Ranks may begin those of several groups in different orders."""
    _under_way[:] = [work for work in _under_way if not work.is_completed()] + [*works]


def finish_calls(works: list[Any] = _under_way) -> None:
    """Wait for the end of calls to other ranks, which write into their tensors until then."""
    while works:
        works.pop().wait()


def shows_reductions() -> bool:
    """Return whether this torch shows which reduction a collective computes; 2.9 does not."""
    return bool(torch.classes.c10d.ReduceOp()._has_method("op"))


class CollectiveCall:
    """A call of one of torch's collectives.

    operator, arguments: as a program has them; result: of the call, once it was made.
    """

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._call = partial(func, *args, **kwargs)
        self.result: Any = None
        # e.g. allreduce_([t], group, op, ...) -> everystep.all_reduce_([t], "sum", [0, 1])
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        name, translated = _TRANSLATED[func.overloadpacket.__name__]
        self.operator = COLLECTIVES[f"everystep.{name}.default"]
        self.arguments = (*translated(given), _ranks(given["process_group"]))

    def __call__(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Make the call, in place of the operator."""
        self.result = self._call()
        note_works(works_of(self.result))


def _ranks(group: Any) -> list[int]:
    """Return the ranks of a group of processes, in its order."""
    distributed = torch.distributed
    return [*distributed.get_process_group_ranks(distributed.ProcessGroup.unbox(group))]


def _source(given: dict[str, Any]) -> int:
    """Return the rank that a collective begins or ends at: its place in the group is given."""
    return _ranks(given["process_group"])[int(given["root_rank"])]


def _reduce(given: dict[str, Any]) -> str:
    return str(torch.distributed.ReduceOp.RedOpType(given["reduce_op"].op()).name).lower()


def _reduced(given: dict[str, Any]) -> tuple[Any, ...]:
    return [*given["tensors"]], _reduce(given)


#: By torch's name: the name in a program, and what returns the arguments, without the ranks.
_TRANSLATED: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
    "allreduce_": ("all_reduce_", _reduced),
    "allreduce_coalesced_": ("all_reduce_coalesced_", _reduced),
    "reduce_": ("reduce_", lambda given: (*_reduced(given), _source(given))),
    "broadcast_": ("broadcast_", lambda given: ([*given["tensors"]], _source(given))),
    "allgather_": (
        "all_gather_",
        lambda given: ([*given["output_tensors"][0]], given["input_tensors"][0]),
    ),
    "_allgather_base_": (
        "all_gather_into_",
        lambda given: ([given["output_tensor"]], given["input_tensor"]),
    ),
    "_reduce_scatter_base_": (
        "reduce_scatter_from_",
        lambda given: ([given["output_tensor"]], given["input_tensor"], _reduce(given)),
    ),
    "alltoall_base_": (
        "all_to_all_from_",
        lambda given: (
            *([given["output"]], given["input"]),
            *([*given["output_split_sizes"]], [*given["input_split_sizes"]]),
        ),
    ),
}
_EXCHANGING = re.compile("broadcast|gather|reduce|scatter|all_?to_?all|recv")
#: They pass tensors between two ranks, which need not do so in the same order.
_BETWEEN_TWO = {"send", "recv_", "recv_any_source_"}
_BARRIERS = {"barrier", "monitored_barrier_"}
