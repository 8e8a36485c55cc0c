"""Optimizer numbers: those that torch's optimizers pass to their operations, without watching them.

Adam's bias corrections, for example, differ at every step. They depend on the settings of a param group
and on the number of steps, not on the parameter: so torch's own code runs the step of a parameter with
one element, which is watched in place of the whole group.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from everystep.gradient_descent import GradientDescent
from everystep.program.operator_mode import OperatorMode
from everystep.step.known_operators import known_operator

__all__ = ["OptimizerNumbers", "Predicted"]

Number = int | float
#: Optimizers that treat each parameter of a group alike, whatever its shape and its numbers.
_ALIKE = (
    *(GradientDescent, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam),
    *(torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adagrad, torch.optim.Adadelta),
    *(torch.optim.RMSprop, torch.optim.Rprop),
)
#: The attributes of an optimizer, without those that other code has set on it.
_OWN = {
    *(
        "defaults",
        "state",
        "param_groups",
        "_zero_grad_profile_name",
        "_warned_capturable_if_run_uncaptured",
        "step",
    ),
    *("_step_supports_amp_scaling", "_need_device_dtype_check_for_fused", "_step_count", "_opt_called"),
}
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_HOOKS_OF_ALL = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
_MOST_KEPT = 64


class _Operation(NamedTuple):
    """An operator, and its numbers; whether each is in a list with one for each parameter."""

    operator: Any
    numbers: tuple[tuple[Number, bool], ...]
    reads: bool


class _Block(NamedTuple):
    """What an optimizer does to each of several adjacent parameters of a group."""

    operations: tuple[_Operation, ...]
    times: int


class Predicted(NamedTuple):
    """The predicted step of an optimizer, group by group.

    is_constant: the next step has the same numbers as long as the settings stay as they are.
    """

    groups: tuple[tuple[_Block, ...], ...]
    is_constant: bool

    @property
    def structure(self) -> Any:
        """All but the numbers, comparable."""
        return tuple(
            tuple(
                (block.times, *[(id(o.operator), *map(_kind_of, o.numbers)) for o in block.operations])
                for block in group
            )
            for group in self.groups
        )

    def operators(self, way: str) -> list[tuple[Any, tuple[Number, ...]]]:
        """Return the operators with their numbers.

        way: `loop`, parameter by parameter, or `list`, all parameters of a group at once.
        """
        found: list[tuple[Any, tuple[Number, ...]]] = []
        for group in self.groups:
            for block in group:
                if way == "loop":
                    alone = [(o.operator, tuple(n for n, _ in o.numbers)) for o in block.operations]
                    found += alone * block.times
                else:
                    found += [each for o in block.operations for each in _listed(o, block.times)]
        return found


class OptimizerNumbers:
    """Predicts the numbers of the steps of torch's optimizers."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[_Operation, ...]] = {}
        self._last: dict[Any, tuple[list[Any], tuple[_Operation, ...]]] = {}
        self._alone: dict[Any, _Alone] = {}

    def predict(
        self, optimizer: torch.optim.Optimizer, gradients: Mapping[int, torch.dtype] | None = None
    ) -> Predicted | None:
        """Predict the next step of an optimizer, None if nothing is known of it.

        gradients: the dtypes of the expected gradients, by the id of their parameter; default: those of
        the current ones.
        """
        kind = type(optimizer)
        if kind not in _ALIKE or any(getattr(optimizer, name) for name in _HOOKS):
            return None
        if any(len(hooks) > 1 for hooks in _HOOKS_OF_ALL):  # one is everystep's
            return None
        if any(key not in _OWN and not key.startswith("_optimizer_") for key in vars(optimizer)):
            return None
        groups = []
        is_constant = True
        for group in optimizer.param_groups:
            if group.get("differentiable"):
                return None
            blocks: list[_Block] = []
            before: Any = None
            for parameter in group["params"]:
                if gradients is None:
                    dtype = None if parameter.grad is None else parameter.grad.dtype
                else:
                    dtype = gradients.get(id(parameter))
                if dtype is None:
                    continue
                state = optimizer.state.get(parameter, {})
                counts = [_count_in(value) for value in state.values()]
                is_constant &= _depends_on_settings_alone(group, counts)
                alike = parameter.dtype, dtype, parameter.device, [*state], counts
                if alike == before:
                    blocks[-1] = blocks[-1]._replace(times=blocks[-1].times + 1)
                else:
                    blocks.append(_Block(self._operations(optimizer, group, parameter, alike), 1))
                before = alike
            groups.append(tuple(blocks))
        return Predicted(tuple(groups), is_constant)

    def _operations(
        self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, alike: Any
    ) -> tuple[_Operation, ...]:
        settings = [each for item in group.items() if item[0] != "params" for each in item]
        if not _depends_on_settings_alone(group, alike[-1]):
            return self._taken_alone(optimizer, group, parameter, alike[1])
        # Settings are mostly the same objects as before, which is quick to find out.
        place, given = (type(optimizer), id(group)), [alike, *settings]
        known = self._last.get(place)
        if known is not None and known[0][0] == alike and _are_the_objects(known[0], given):
            return known[1]
        key = repr((type(optimizer), settings, alike))
        if key not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[key] = self._taken_alone(optimizer, group, parameter, alike[1])
        self._last[place] = given, self._kept[key]
        return self._kept[key]

    def _taken_alone(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        parameter: Tensor,
        dtype: torch.dtype,
    ) -> tuple[_Operation, ...]:
        key = type(optimizer), parameter.dtype, parameter.device, parameter.ndim == 0, dtype
        if key not in self._alone:
            self._alone[key] = _Alone(optimizer, parameter, dtype)
        return self._alone[key].take(optimizer, group, parameter)


def _depends_on_settings_alone(group: Mapping[str, Any], counts: Sequence[Any]) -> bool:
    """Tell whether an optimizer keeps no number for a parameter, and reads none from its settings."""
    is_counting = any(count is not None for count in counts)
    return not is_counting and not any(isinstance(value, Tensor) for value in group.values())


def _are_the_objects(one: list[Any], two: list[Any]) -> bool:
    """Tell whether two lists hold the same objects after their first, all immutable."""
    return len(one) == len(two) and all(
        a is b and type(a) is not list for a, b in zip(one[1:], two[1:], strict=True)
    )


def _count_in(value: Any) -> Any:
    """Return a number that an optimizer keeps for a parameter, None for a tensor of more."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else None
    return repr(value)


class _Alone:
    """A parameter of one number, in place of those of a group that an optimizer treats alike.

    Args:
        optimizer: the optimizer; it is not touched.
        parameter: any of them.
        dtype: of their gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: Tensor, dtype: torch.dtype) -> None:
        shape = (1,) if parameter.ndim else ()
        alone = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        alone.grad = torch.zeros_like(alone, dtype=dtype)
        self._parameter = alone
        self._optimizer = object.__new__(type(optimizer))
        self._step = inspect.unwrap(type(optimizer).step)
        self._state: dict[str, Any] = {}

    def take(
        self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor
    ) -> tuple[_Operation, ...]:
        """Return what the optimizer does to a parameter with the counts of the given one."""
        self._set_state(optimizer.state.get(parameter, {}))
        other = self._optimizer
        vars(other).update(vars(optimizer))
        other.param_groups = [{**group, "params": [self._parameter]}]
        other.state = defaultdict(dict)
        if self._state:
            other.state[self._parameter] = self._state
        with torch.no_grad(), _Numbers() as numbers:
            self._step(other)
        return tuple(numbers.operations)

    def _set_state(self, known: Mapping[str, Any]) -> None:
        """Set counts; a tensor of more numbers stays, since none of them is read."""
        if known.keys() != self._state.keys():
            self._state = {key: _small(value) for key, value in known.items()}
        for key, value in known.items():
            own = self._state[key]
            if not isinstance(value, Tensor) or not isinstance(own, Tensor):
                self._state[key] = _small(value)
            elif value.ndim == 0:
                own.copy_(value)


def _small(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.ndim == 0 else torch.zeros(1, dtype=value.dtype, device=value.device)


class _Numbers(OperatorMode):  # type: ignore[no-untyped-call]
    """Notes the operators that compute, and their numbers, as `Watch` does."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        known = known_operator(func)
        result = func(*args, **keywords)
        if known.how not in ("pass", "make"):
            numbers: list[tuple[Number, bool]] = []
            for value, (_, is_slot) in zip(args, known.places, strict=False):
                if is_slot:
                    _collect(value, False, numbers)
            for key, value in keywords.items():
                if key in known.slots:
                    _collect(value, False, numbers)
            if known.is_read:
                numbers.append((result, False))
            self.operations.append(_Operation(func, tuple(numbers), known.is_read))
        return result


def _collect(value: Any, is_listed: bool, numbers: list[tuple[Number, bool]]) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _collect(item, True, numbers)
    elif type(value) in (int, float):
        numbers.append((value, is_listed))


def _kind_of(number: tuple[Number, bool]) -> Any:
    return type(number[0]), number[1]


def _listed(operation: _Operation, count: int) -> list[tuple[Any, tuple[Number, ...]]]:
    """Return an operation on a list of parameters; numbers are read of each by itself."""
    if operation.reads:
        return [(operation.operator, tuple(n for n, _ in operation.numbers))] * count
    numbers = [n for n, is_listed in operation.numbers for _ in range(count if is_listed else 1)]
    return [(operation.operator, tuple(numbers))]
