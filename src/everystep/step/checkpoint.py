"""Checkpoint: the state of a training kept in memory, to restore and to compare with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.memory import copy_into
from everystep.step.check import same_bits
from everystep.step.eager import Training
from everystep.step.generators import Generators
from everystep.step.named_state import entries_of, parameter_names
from everystep.step.own_state import captured, keeps_own_state, restore

__all__ = ["Change", "ChangeLog", "Checkpoint"]


class Checkpoint:
    """A copy of everything that a training carries from one step to the next, in memory.

    Unlike a `State`, which is for the disk, it holds objects unchanged, on their device.

    Args:
        training: the training.
    """

    def __init__(self, training: Training) -> None:
        optimizer = training.optimizer
        self.tensors = {name: tensor.detach().clone() for name, tensor in training.named_state().items()}
        self.generators = Generators.capture(training.device)
        self._names = parameter_names(training.model, optimizer)
        self._own: tuple[dict[str, Tensor], Any] | None = None
        if keeps_own_state(optimizer):
            own, data = captured(optimizer, self._names, training.named_state())
            self._own = {name: tensor.detach().clone() for name, tensor in own.items()}, data
        else:
            self._entries = {p: _plain_data(entries) for p, entries in entries_of(optimizer)}
            self._groups = [_plain_data(group) for group in optimizer.param_groups]
        self._schedules = [_plain_data(vars(each)) for each in _schedules(training.schedule)]

    def restore(self, training: Training, *, forget_new: bool, has_schedule: bool = False) -> None:
        """Restore this state, in the training's own tensors if it has them.

        forget_new: whether to drop optimizer state created since; has_schedule: whether to restore the
        schedule, too.
        """
        if self._own is not None:
            own, data = self._own
            restore(training.optimizer, self._names, self.tensors | own, data)
        else:
            self._restore_optimizer(training.optimizer, forget_new)
        with torch.no_grad():
            for name, tensor in training.named_state().items():
                if name in self.tensors:
                    copy_into(tensor, self.tensors[name])
        if has_schedule:
            for each, numbers in zip(_schedules(training.schedule), self._schedules, strict=True):
                vars(each).update(_plain_data(numbers))
        self.generators.restore(training.device)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, forget_new: bool) -> None:
        for group, saved in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(_plain_data(saved))
        for parameter, _ in list(entries_of(optimizer)):
            if forget_new and parameter not in self._entries:
                del optimizer.state[parameter]
        for parameter, entries in self._entries.items():
            self._restore_entries(parameter, optimizer.state[parameter], entries, forget_new)

    def _restore_entries(
        self, parameter: Tensor, entries: dict[str, Any], saved: dict[str, Any], forget_new: bool
    ) -> None:
        entries.update(_plain_data(saved))
        prefix = f"optimizer/{self._names.get(parameter, '#')}/"
        tensors = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        for key, tensor in tensors.items():
            if not isinstance(entries.get(key), Tensor):
                entries[key] = tensor.clone()
        if forget_new:
            for key in entries.keys() - saved.keys() - tensors.keys():
                del entries[key]


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


def _schedules(schedule: Any) -> list[Any]:
    """Return a schedule and its inner schedules."""
    if schedule is None:
        return []
    inner = getattr(schedule, "_schedulers", ())
    return [schedule, *(each for other in inner for each in _schedules(other))]


def _plain_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of data made only of numbers and strings; other objects are not copied."""
    return {key: copy.deepcopy(value) for key, value in settings.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
