"""Optimizer call: the next step of one of torch's own optimizers, with all that it depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from everystep.program.operators import leaves
from everystep.program.optimizers import OPTIMIZERS, OptimizerOperator

__all__ = ["OptimizerCall"]

Number = int | float
_BY_KIND = {operator.kind: operator for operator in OPTIMIZERS.values()}
#: The attributes of an optimizer, without those that other code has set on it.
_OWN = {
    *("defaults", "state", "param_groups", "step", "_zero_grad_profile_name", "_opt_called"),
    *("_warned_capturable_if_run_uncaptured", "_step_supports_amp_scaling", "_step_count"),
    "_need_device_dtype_check_for_fused",
}
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_HOOKS_OF_ALL = _global_optimizer_pre_hooks, _global_optimizer_post_hooks


class OptimizerCall(NamedTuple):
    """A step of an optimizer that is one operation.

    operator: of a program; settings: by key, a list by param group; parameters: by group, those that
    have a gradient; state: of the optimizer.
    """

    operator: OptimizerOperator
    settings: dict[str, tuple[Any, ...]]
    parameters: list[list[Tensor]]
    state: Mapping[Tensor, dict[str, Any]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> OptimizerCall | None:
        """Return the next step of an optimizer, None if it is not of torch's own code alone."""
        operator = _BY_KIND.get(type(optimizer))
        if operator is None or any(getattr(optimizer, name) for name in _HOOKS):
            return None
        if any(len(hooks) > 1 for hooks in _HOOKS_OF_ALL):  # one is everystep's
            return None
        if any(key not in _OWN and not key.startswith("_optimizer_") for key in vars(optimizer)):
            return None
        groups = optimizer.param_groups
        if any(group.get("differentiable") for group in groups):
            return None
        settings = {key: tuple([group[key] for group in groups]) for key in operator.settings}
        if not all(map(_is_setting, settings.values())):
            return None
        parameters = [[p for p in group["params"] if p.grad is not None] for group in groups]
        call = cls(operator, settings, parameters, optimizer.state)
        return call if call._keeps_tensors() else None

    def tensors(self) -> Iterator[Tensor]:
        """Yield the parameters, their gradients, what the optimizer keeps of them, and its settings."""
        for parameter in (p for group in self.parameters for p in group):
            yield parameter
            yield parameter.grad  # type: ignore[misc]
            yield from (t for t in self.state.get(parameter, {}).values() if t is not None)
        yield from leaves([*self.settings.values()])

    def _keeps_tensors(self) -> bool:
        kept = (v for group in self.parameters for p in group for v in self.state.get(p, {}).values())
        return all(value is None or isinstance(value, Tensor) for value in kept)

    def kept(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return what the optimizer keeps of a parameter, by key."""
        own = self.state.get(parameter, {})
        return {key: value for key, value in own.items() if value is not None}

    @property
    def layout(self) -> tuple[Any, ...]:
        """What a step depends on besides numbers and tensors, comparable."""
        keys = tuple(tuple([(*self.kept(p),) for p in group]) for group in self.parameters)
        return keys, self.settings_layout

    @property
    def settings_layout(self) -> tuple[Any, ...]:
        """What a step depends on of the settings besides numbers, comparable."""
        return tuple(map(_without_numbers, self.settings.values()))

    def numbers(self) -> list[Number]:
        """Return the numbers among the settings, in the order in which a program has them."""
        found: list[Number] = []
        for values in self.settings.values():
            _collect(values, found)
        return found


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return value is None or type(value) in (bool, int, float) or isinstance(value, Tensor)


def _without_numbers(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_numbers, value))
    return type(value) if type(value) in (int, float) or isinstance(value, Tensor) else value


def _collect(value: Any, numbers: list[Number]) -> None:
    if isinstance(value, tuple):
        for item in value:
            _collect(item, numbers)
    elif type(value) in (int, float):
        numbers.append(value)
