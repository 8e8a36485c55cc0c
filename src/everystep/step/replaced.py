"""Replaced: the two functions of torch that are replaced while steps are watched, in any thread.

torch has no hook where `backward` and `grad` start the engine (`torch.autograd._engine_run_backward`),
nor where `tensor.data = other` gives a tensor other memory, which no call of the dispatcher shows. The
functions belong to the process, but a watch to its thread: each watched thread has its own, and others
get torch's functions.

Each optimizer marks its time for a profiler. That is no operation, and no mode sees it meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["OF_WATCHES", "Replacement", "begin", "end", "run_engine"]

#: Their names; another thread may be the reason that they are replaced.
OF_WATCHES = {"_engine_run_backward", "data"}

_DATA = torch._C.TensorBase.data


class _OfThread(threading.local):
    """The watches of a thread, the innermost last: what `begin` was given."""

    def __init__(self) -> None:
        self.watches: list[tuple[Callable[..., Any], Callable[[Tensor], None]]] = []


_here = _OfThread()
#: torch's own, or a replacement by other code.
_engine: Any = None
_MARKS = "_record_function_enter_new", "_record_function_exit._RecordFunction"


class Replacement:
    """Replaces the two functions until it is removed; there is one at a time in the process.

    A change of `torch.Tensor` makes Python forget where it found the methods of all tensors, so a
    recording does this once, and not at each step.
    """

    def __init__(self) -> None:
        global _engine
        library: Any = torch.library.Library("profiler", "IMPL")  # type: ignore[no-untyped-call]
        for name in _MARKS:
            library.impl(name, torch.library.fallthrough_kernel, "Python")
        #: Keeps the marks of a profiler from modes, as long as it exists.
        self._unmarked = library
        _engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
        torch.autograd._engine_run_backward = _run  # type: ignore[attr-defined,assignment]
        torch.Tensor.data = property(_DATA.__get__, _set_data, _DATA.__delete__)  # type: ignore

    def remove(self) -> None:
        """Restore torch's functions."""
        self._unmarked = None
        torch.autograd._engine_run_backward = _engine  # type: ignore[attr-defined]
        del torch.Tensor.data


def begin(run: Callable[..., Any], moves: Callable[[Tensor], None]) -> None:
    """Let a watch run the backward passes of this thread, and know of tensors with other memory."""
    _here.watches.append((run, moves))


def end() -> None:
    """End what `begin` began last in this thread."""
    _here.watches.pop()


def run_engine(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a backward pass as torch does."""
    return _engine(outputs, *args, **kwargs)


def _run(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    run = _here.watches[-1][0] if _here.watches else _engine
    return run(outputs, *args, **kwargs)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    _DATA.__set__(tensor, value)  # type: ignore[attr-defined]
    if _here.watches:
        _, moves = _here.watches[-1]
        moves(tensor)
