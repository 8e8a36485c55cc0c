"""Collective calls: those that torch makes to other ranks, in the form in which a program has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from everystep.errors import UsageError
from everystep.ops.operators import leaves
from everystep.program.collectives import COLLECTIVES

__all__ = [
    *("CollectiveCall", "NotedCalls", "finish_calls", "has_ranks", "how_collective"),
    *("receiving", "shows_reductions"),
]


class _NotedCall(NamedTuple):
    """A call whose end the loop may wait for later, even in another step."""

    work: Any
    tensors: Sequence[Tensor]


#: Collectives, which all ranks begin, and receives, whose messages the other rank may send much later.
_under_way: list[_NotedCall] = []
_receives: list[_NotedCall] = []


def has_ranks() -> bool:
    """Return whether torch.distributed runs several processes."""
    return _is_running() and torch.distributed.get_world_size() > 1


def _is_running() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def how_collective(func: Any, is_ready: bool) -> str:
    """Return how a watch sees a call to other ranks.

    `known` (a program has it), `pass` (it computes nothing), or `unseen`: what it writes is kept by
    content, as of a group of one process.

    is_ready: whether there were several processes when the recording began.

    Raises:
        UsageError: the processes began to communicate after the recording.
    """
    name = func.overloadpacket.__name__
    if not is_ready:
        if has_ranks():
            raise UsageError(
                "the processes began to communicate after the recording; call "
                "torch.distributed.init_process_group before everystep.record"
            )
        return "unseen"
    is_passed = name in _BARRIERS or name in _BETWEEN_TWO  # the latter are refused as they begin
    return "known" if name in _TRANSLATED else "pass" if is_passed else "unseen"


def _works_of(result: Any) -> list[Any]:
    """Return the handles of the work of a call, which returns one, or tensors and one."""
    # Boxed, as torch's dispatcher has it.
    boxed = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.ScriptObject)]
    return [torch.distributed.Work.unbox(each) for each in boxed if "Work" in str(each._type())]


class NotedCalls:
    """Notes all calls by which processes exchange tensors, until it is removed.

    It lies below all modes, where torch's functions, its functional collectives, which call no method of
    a group in Python, and its reducers of gradients come together.

    before: is called with the tensors that a call may write into, which torch does not count, and with
    what refuses the call within a step; it returns whether the work of the call must be noted.
    """

    def __init__(self, before: Callable[[Sequence[Tensor], str | None], bool]) -> None:
        library: Any = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
        own = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)

        def noted(operator: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
            name = operator.overloadpacket.__name__
            tensors = [] if name == "send" else leaves([*args, *kwargs.values()])
            is_noted = before(tensors, _BETWEEN_TWO.get(name))
            result = operator.redispatch(keys - own, *args, **kwargs)
            if is_noted:
                of_kind = _receives if name in _BETWEEN_TWO else _under_way
                of_kind[:] = [each for each in of_kind if not each.work.is_completed()]
                of_kind += [_NotedCall(work, tensors) for work in _works_of(result)]
            return result

        # Also of a group of one process, whose calls write into tensors, too.
        names = (*_TRANSLATED, *_UNTRANSLATED, *_BETWEEN_TWO) if _is_running() else ()
        for name in names:
            operator = getattr(torch.ops.c10d, name).default
            library.impl(name, partial(noted, operator), "BackendSelect", with_keyset=True)
        self._library = library

    def remove(self) -> None:
        """Note no further calls, and forget those so far, which a forked process would wait for."""
        self._library = None
        _under_way.clear()
        _receives.clear()


def finish_calls() -> None:
    """Wait for the end of collectives, which write into their tensors until then."""
    # Once: if a rank has died, the first raises, and so would the others as the recording is closed.
    works = [each.work for each in _under_way]
    _under_way.clear()
    for work in works:
        work.wait()


def receiving() -> set[int]:
    """Return the memory into which receives are under way, by its `_cdata`.

    To wait for one would be to wait for a message that the other rank may send only once this one has
    continued. A receive of gloo is completed once the loop has waited for it, not when it arrives.
    """
    _receives[:] = [each for each in _receives if not each.work.is_completed()]
    return {tensor.untyped_storage()._cdata for each in _receives for tensor in each.tensors}


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
#: Collectives that no program has.
_UNTRANSLATED = (
    *("gather_", "scatter_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"),
    *("alltoall_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"),
)
#: They pass tensors between two ranks, which need not do so in the same order; why steps have none.
_BETWEEN_TWO = dict.fromkeys(
    ("send", "recv_", "recv_any_source_"),
    "send and recv pass tensors between two processes, which everystep cannot record yet; use "
    "collectives of all (all_reduce, broadcast, all_gather), or do it between two steps",
)
_BARRIERS = {"barrier", "monitored_barrier_"}
