"""What a case of users' Python is, and when its behaviour changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, product
from typing import Any

from tests.training.by_hand import Made, mlp
from torch import nn

__all__ = ["NEVER", "WHEN", "Case", "Network", "Table", "moments"]

#: A step that no training reaches: a case made with it does not change.
NEVER = 10**9


@dataclass(frozen=True)
class Case:
    """A training in which Python does something at a step between two checks of a program.

    make: gives new objects, the same at every call, from the step of the change; at: that step, or
    None where nothing changes; raises: whether the loop by hand ends with an error; options: further
    ones of `train` and of the loop by hand.
    """

    name: str
    make: Callable[[int], Made]
    at: int | None = None
    raises: bool = False
    options: dict[str, Any] = field(default_factory=dict)


class Table(dict[str, Callable[..., Any]]):
    """Functions by their name in words; a decorator adds one."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", function.__name__).lower()
        name = words.replace("_", " ").strip()
        assert name not in self
        self[name] = function
        return function


#: When a count of calls means a change at the step `at`.
WHEN = {
    "from": lambda calls, at: calls >= at,
    "once at": lambda calls, at: calls == at,
    "five times from": lambda calls, at: at <= calls < at + 5,
    "every": lambda calls, at: calls % at == 0,
}

#: None is a power of two, at which programs are checked, or the last step.
STEPS = (7, 9, 12, 14, 5, 10, 13)


def moments() -> Iterator[tuple[str, int]]:
    """Give a key of `WHEN` and a step, another pair for each case of a table."""
    whens = [*WHEN]
    pairs = [(when, step) for step, when in product(STEPS, whens)]
    return cycle(pairs[0::5] + pairs[1::5] + pairs[2::5] + pairs[3::5] + pairs[4::5])


class Network(nn.Module):
    """A small network; what is derived from it changes what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x)
