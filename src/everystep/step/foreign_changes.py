"""Foreign changes: what code between two steps, such as a metric, has changed of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from everystep.step.check import same_bits
from everystep.step.eager import Training
from everystep.step.generators import Generators

__all__ = ["Change", "ChangeLog"]


class Change(NamedTuple):
    """What changed.

    tensors: their current values, by the names of a `State`; lost: what is not a tensor, in words, or
    None.
    """

    tensors: dict[str, Tensor]
    lost: str | None


class _Contents:
    """A copy of the state of a training, to be compared with what it is later."""

    def __init__(self, training: Training) -> None:
        live = _tensors(training)
        self._tensors = {name: tensor.detach().clone() for name, tensor in live.items()}
        self._parameters = _parameters(live)
        self._data = _data_versions(training)

    def change(self, training: Training) -> Change | None:
        """Return what differs from before, or None."""
        now, before = _tensors(training), self._tensors
        tensors = {
            name: tensor.detach().cpu().clone()
            for name, tensor in now.items()
            if name not in before or not same_bits(tensor, before[name])
        }
        lost = None
        if _data_versions(training) != self._data:
            lost = "the data"
        elif _parameters(now) != self._parameters:
            lost = "the set of parameters"
        else:
            # A gradient that no longer exists is like one that a loop dropped.
            gone = [name for name in before if name not in now and not name.startswith("gradient/")]
            other = [n for n, t in now.items() if n in before and t.shape != before[n].shape]
            lost = next((name.partition("/")[2] for name in (*gone, *other)), None)
        return Change(tensors, lost) if tensors or lost else None


class ChangeLog:
    """What code between steps has changed, by the step before it, until it is collected."""

    def __init__(self) -> None:
        self._changes: list[tuple[int, Change]] = []

    @contextmanager
    def noting(self, training: Training, step: int) -> Iterator[None]:
        """Note what the code within changes, after a step."""
        before = _Contents(training)
        yield
        change = before.change(training)
        if change is not None:
            self._changes.append((step, change))

    def collect(self) -> list[tuple[int, Change]]:
        """Return what was not collected before."""
        found, self._changes = self._changes, []
        return found

    def forget_after(self, step: int) -> None:
        """Forget what was changed after later steps than this."""
        self._changes = [each for each in self._changes if each[0] <= step]


def _tensors(training: Training) -> dict[str, Tensor]:
    generators = Generators.capture(training.device).tensors()
    return training.named_state() | {f"generator/{name}": each for name, each in generators.items()}


def _parameters(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return which tensor each parameter is."""
    return {name: id(each) for name, each in tensors.items() if name.startswith("parameter/")}


def _data_versions(training: Training) -> list[int]:
    return [part._version for part in training.batch(1)] if training.batch.is_fixed else []
