"""Changes: what code between two steps has made of a training's state, so that a run can hold it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from everystep.step.check import same_bits
from everystep.step.eager import Trainee
from everystep.step.state import Generators

__all__ = ["Change", "Contents"]


class Change(NamedTuple):
    """What has changed. tensors: as they are now, by the names of a `State`; lost: what is no tensor, in
    words, None if nothing.
    """

    tensors: dict[str, Tensor]
    lost: str | None


class Contents:
    """A copy of the state of a training, to be compared with what it is later."""

    def __init__(self, trainee: Trainee) -> None:
        self._tensors = {n: t.detach().clone() for n, t in _tensors(trainee).items()}
        self._data = _data_versions(trainee)

    def change(self, trainee: Trainee) -> Change | None:
        """Return what is not as it was, or None."""
        now, before = _tensors(trainee), self._tensors
        tensors = {
            name: tensor.detach().cpu().clone()
            for name, tensor in now.items()
            if name not in before or not same_bits(tensor, before[name])
        }
        # A gradient that is not there any more is as good as one that a loop has dropped.
        gone = {name for name in before.keys() - now.keys() if not name.startswith("gradient/")}
        lost = None
        if _data_versions(trainee) != self._data:
            lost = "the data"
        elif gone:
            lost = min(gone).partition("/")[2]
        return Change(tensors, lost) if tensors or lost else None


def _tensors(trainee: Trainee) -> dict[str, Tensor]:
    generators = Generators.capture(trainee.device).tensors()
    return trainee.named_state() | {f"generator/{name}": each for name, each in generators.items()}


def _data_versions(trainee: Trainee) -> list[int]:
    return [part._version for part in trainee.batch(1)] if trainee.batch.is_fixed else []
