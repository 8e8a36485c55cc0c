"""Interrupts: Ctrl-C and SIGTERM end a training after the step in progress, and close its run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

__all__ = ["REASONS", "Interrupt"]

#: Reasons, as a run has them.
REASONS = {signal.SIGINT: "by the user (Ctrl-C)", signal.SIGTERM: "by the system (SIGTERM)"}


class Interrupt:
    """Defers Ctrl-C and SIGTERM to the end of the step; records which one ended the training, if any.

    Use it as a context manager: it catches signals in the main thread, SIGTERM only if the caller has no
    handler for it. When nested, the outer one catches them. A second signal is not deferred. After a
    SIGTERM, the process ends at the end of the context. A child that the process forks, such as a worker
    of `multiprocessing.Pool`, gets the handlers of before: it has no training to end.

    received: called when one arrives; defers: whether a signal waits now, or acts as by default.
    """

    def __init__(
        self,
        received: Callable[[], None] = lambda: None,
        defers: Callable[[int], bool] = lambda number: True,
    ) -> None:
        self._received, self._defers = received, defers
        self._before: dict[int, Any] = {}
        self._signal: int | None = None

    def __bool__(self) -> bool:
        return self._signal is not None

    @property
    def reason(self) -> str | None:
        """Why the training ends, None if no signal arrived."""
        return None if self._signal is None else REASONS[signal.Signals(self._signal)]

    @property
    def is_by_user(self) -> bool:
        """Whether it was Ctrl-C."""
        return self._signal == signal.SIGINT

    def __enter__(self) -> Self:
        # Python runs handlers in the main thread only, and refuses to set them in another.
        if threading.current_thread() is not threading.main_thread():
            return self
        before = {number: signal.getsignal(number) for number in REASONS}
        # The outer one catches them.
        if isinstance(getattr(before[signal.SIGINT], "__self__", None), Interrupt):
            return self
        # Not where Ctrl-C is ignored, as in a process in the background (SIG_IGN is not a function).
        if callable(before[signal.SIGINT]):
            self._before[signal.SIGINT] = before[signal.SIGINT]
        if before[signal.SIGTERM] is signal.SIG_DFL:
            self._before[signal.SIGTERM] = signal.SIG_DFL
        for number in self._before:
            signal.signal(number, self._note)
        _in_force.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        if self in _in_force:
            _in_force.remove(self)
        # The run is closed now. By the signal itself, so that the parent sees which one has ended it.
        if self._signal == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    def restore(self) -> None:
        """Set the handlers of before, which a second signal may have done."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._defers(number):
            self._before[number](number, frame)
            return
        signal.signal(number, self._before[number])  # a second one is not deferred
        self._signal = number
        self._received()


#: Those that catch signals, the outermost first.
_in_force: list[Interrupt] = []
_forking = threading.local()


def _before_fork() -> None:
    """Hold signals back: the child would lose one that comes before it has handlers of its own."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, REASONS if _in_force else ())


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    # The innermost first: each restores what it found.
    while _in_force:
        _in_force.pop().restore()
    _after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )
