"""Notices: what a person should know of a loop that is recorded, on stderr, each kind once or so."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Protocol

__all__ = ["Notices", "say"]

#: What is not seen is said so often; the rest is in the run's facts.
MOST_SAID = 3


class _Seen(Protocol):
    """What is known of a step."""

    @property
    def unseen(self) -> Iterable[str]: ...
    @property
    def surprise(self) -> str | None: ...
    @property
    def changed_elsewhere(self) -> str | None: ...


class Notices:
    """Says what of a loop is lost, or may be another than without everystep.

    unseen: what was not seen, in words.
    """

    def __init__(self) -> None:
        self.unseen: set[str] = set()
        self._said: set[str] = set()

    def changed_between(self, step: int, name: str) -> None:
        """The loop has changed a tensor after a step, outside of any."""
        self._once(
            "between",
            f"after step {step} the loop changes {name} outside of a step; what it is then is "
            "kept, but no step shows how that came",
        )

    def of_step(self, step: int, seen: _Seen, *, is_compiled: bool) -> None:
        """Say what is lost of a step. is_compiled: torch.compile was at work in it."""
        if seen.surprise is not None:
            say(f"step {step}: {seen.surprise}; each step from here on is watched in full")
        for reason in seen.unseen:
            if reason not in self.unseen and len(self.unseen) < MOST_SAID:
                self.unseen.add(reason)
                say(
                    f"step {step}: {reason}; what it gives is kept as numbers, and no view shows how "
                    "it was made"
                )
        if is_compiled:
            self._once(
                "compiled",
                f"step {step} calls a function of torch.compile, which torch runs uncompiled while "
                "it is watched: the bits may differ from those of the loop without everystep; use the "
                "function itself in the loop",
            )
        if seen.changed_elsewhere is not None:
            self._once(
                "elsewhere",
                f"step {step} changes {seen.changed_elsewhere} that is in no part; it is "
                "kept again at every step, unless you give what holds it to everystep.record(...)",
            )

    def _once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            say(message)


def say(message: str) -> None:
    """Tell the user, on stderr."""
    print(f"everystep: {message}", file=sys.stderr)
