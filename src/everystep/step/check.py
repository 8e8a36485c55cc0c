"""Check: the state of a training saved, restored and compared, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everystep.program.memory import copy_into
from everystep.step.eager import Training
from everystep.step.own_state import captured, keeps_own_state, restore
from everystep.step.state import Generators, entries_of, parameter_names

__all__ = ["Saved", "as_integers", "bytes_of", "difference", "distance", "same_bits"]

#: How far a folded program may be from the eager step, relative to the largest number of a tensor.
FOLD_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


#: Tensors that the optimizer keeps.
_OF_OPTIMIZER = ("optimizer/", "group/")


class Saved:
    """A copy of all that a training carries from one step to the next, where it was made.

    Unlike a `State`, which is for the disk, it holds objects as they are, on their device.

    Args:
        training: what is trained.
        has_optimizer: whether to hold what the optimizer keeps, too.
    """

    def __init__(self, training: Training, has_optimizer: bool = True) -> None:
        optimizer = training.optimizer
        self.tensors = {
            name: tensor.detach().clone()
            for name, tensor in training.named_state().items()
            if has_optimizer or not name.startswith(_OF_OPTIMIZER)
        }
        self.generators = Generators.capture(training.device)
        self._has_optimizer = has_optimizer
        self._names = parameter_names(training.model, optimizer) if has_optimizer else {}
        self._own: tuple[dict[str, Tensor], Any] | None = None
        if has_optimizer and keeps_own_state(optimizer):
            own, data = captured(optimizer, self._names, training.named_state())
            self._own = {name: tensor.detach().clone() for name, tensor in own.items()}, data
        elif has_optimizer:
            self._entries = {p: _plain_data(entries) for p, entries in entries_of(optimizer)}
            self._groups = [_plain_data(group) for group in optimizer.param_groups]
        self._schedules = [_plain_data(vars(each)) for each in _schedules(training.schedule)]

    def restore(self, training: Training, *, forget_new: bool, has_schedule: bool = False) -> None:
        """Bring the training back to this state, in its own tensors where it has them.

        forget_new: whether to drop optimizer state created since; has_schedule: whether to bring the
        schedule back, too.
        """
        if self._own is not None:
            own, data = self._own
            restore(training.optimizer, self._names, self.tensors | own, data)
        elif self._has_optimizer:
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


def difference(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, folded: bool = False
) -> str | None:
    """Return the name of the first tensor whose bits differ (or numbers, if `folded`), or None."""
    for name in expected.keys() | found.keys():
        if name not in expected or name not in found:
            return name
    for name, tensor in expected.items():
        same = _is_close if folded else same_bits
        if not same(tensor, found[name]):
            return name
    return None


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Tell whether two tensors are the same, bit for bit: NaN like NaN, -0.0 unlike 0.0."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(as_integers(one), as_integers(two))


def as_integers(tensor: Tensor) -> Tensor:
    """Return the bits of floats as integers of their size; what is no float stays as it is."""
    whole = tensor.detach()
    if whole.is_complex():
        whole = torch.view_as_real(whole)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    is_float = whole.is_floating_point()
    return whole.view(integers[whole.element_size()]) if is_float else whole


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor as an array of NumPy's, in the order of its elements."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def distance(one: Tensor, two: Tensor) -> int | None:
    """Return how many floats of their kind lie between two numbers at most: units in the last place.

    None where that has no meaning: for integers, empty tensors and NaNs.
    """
    if not (one.is_floating_point() and one.numel()) or bool((one.isnan() | two.isnan()).any()):
        return None
    sign = 1 << (8 * one.element_size() - 1)
    bits = [as_integers(tensor).long() for tensor in (one, two)]
    # Negative floats count down from -0.0, which is 0.0.
    in_order = [torch.where(each < 0, -(each & (sign - 1)), each) for each in bits]
    return int((in_order[0] - in_order[1]).abs().max())


def _is_close(one: Tensor, two: Tensor) -> bool:
    if not one.is_floating_point():
        return same_bits(one, two)
    largest = one.detach().abs().max() if one.numel() else 0
    tolerance = FOLD_TOLERANCE.get(one.dtype, 1e-4)
    return bool(((one - two).abs() <= tolerance * largest).all()) or same_bits(one, two)


def _schedules(schedule: Any) -> list[Any]:
    """Return a schedule, and those that it is made of."""
    if schedule is None:
        return []
    inner = getattr(schedule, "_schedulers", ())
    return [schedule, *(each for other in inner for each in _schedules(other))]


def _plain_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of what is made of numbers and texts alone; other objects stay as they are."""
    return {key: copy.deepcopy(value) for key, value in settings.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
