"""Interrupts: Ctrl-C and SIGTERM end a training after the step in progress, and close its run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupt"]

#: Reasons, as a run has them.
_REASONS = {signal.SIGINT: "by the user (Ctrl-C)", signal.SIGTERM: "by the system (SIGTERM)"}


class Interrupt:
    """Defers Ctrl-C and SIGTERM to the end of the step; records which one ended the training, if any.

    Use it as a context manager: it catches signals in the main thread, SIGTERM only if the caller has no
    handler for it. When nested, the outer one catches them. A second signal is not deferred. After a
    SIGTERM, the process ends at the end of the context.

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
        return None if self._signal is None else _REASONS[signal.Signals(self._signal)]

    @property
    def is_by_user(self) -> bool:
        """Whether it was Ctrl-C."""
        return self._signal == signal.SIGINT

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        before = {number: signal.getsignal(number) for number in _REASONS}
        if isinstance(getattr(before[signal.SIGINT], "__self__", None), Interrupt):
            return self
        if callable(before[signal.SIGINT]):
            self._before[signal.SIGINT] = before[signal.SIGINT]
        if before[signal.SIGTERM] is signal.SIG_DFL:
            self._before[signal.SIGTERM] = signal.SIG_DFL
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
        if self._signal == signal.SIGTERM:  # the run is closed now
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._defers(number):
            self._before[number](number, frame)
            return
        signal.signal(number, self._before[number])  # a second one is not deferred
        self._signal = number
        self._received()
