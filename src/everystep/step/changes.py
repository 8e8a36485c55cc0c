"""Changes: what code between two steps has made of a training's state, so that a run can hold it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from everystep.step.check import same_bits
from everystep.step.eager import Training
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

    def __init__(self, training: Training) -> None:
        live = _tensors(training)
        self._tensors = {name: tensor.detach().clone() for name, tensor in live.items()}
        self._parameters = _parameters(live)
        self._data = _data_versions(training)

    def change(self, training: Training) -> Change | None:
        """Return what is not as it was, or None."""
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
            lost = "which parameters there are"
        else:
            # A gradient that is not there any more is as good as one that a loop has dropped.
            gone = [name for name in before if name not in now and not name.startswith("gradient/")]
            other = [n for n, t in now.items() if n in before and t.shape != before[n].shape]
            lost = next((name.partition("/")[2] for name in (*gone, *other)), None)
        return Change(tensors, lost) if tensors or lost else None


def _tensors(training: Training) -> dict[str, Tensor]:
    generators = Generators.capture(training.device).tensors()
    return training.named_state() | {f"generator/{name}": each for name, each in generators.items()}


def _parameters(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return which tensor each parameter is."""
    return {name: id(each) for name, each in tensors.items() if name.startswith("parameter/")}


def _data_versions(training: Training) -> list[int]:
    return [part._version for part in training.batch(1)] if training.batch.is_fixed else []
