"""Optimizer call: the next step of one of torch's own optimizers, and everything it depends on."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from itertools import chain, repeat
from operator import is_, itemgetter
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
import typing_extensions
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from everystep.gradient_descent import GradientDescent
from everystep.ops.operators import leaves
from everystep.program.number_slots import Number
from everystep.program.optimizer_operator import OPTIMIZERS, OptimizerOperator
from everystep.step.own_state import entries_of
from everystep.step.torchs_own import is_torchs_function, replaces_method

__all__ = [
    "HOOKS_OF_ALL",
    "OptimizerCall",
    "OptimizerCalls",
    "has_own_zero_grad",
    "is_ours",
    "is_torchs_optimizer",
    "is_written_by_torch",
]

_BY_KIND = {operator.kind: operator for operator in OPTIMIZERS.values()}
#: The attributes of an optimizer, without those that other code has set on it.
_OWN = {
    *("defaults", "state", "param_groups", "step", "_zero_grad_profile_name", "_opt_called"),
    *("_warned_capturable_if_run_uncaptured", "_step_supports_amp_scaling", "_step_count"),
    "_need_device_dtype_check_for_fused",
}
#: Settings that Adagrad reads from its defaults, not from its param groups, when it creates its state.
_FROM_DEFAULTS = "initial_accumulator_value"
_NOTHING: dict[str, Any] = {}
_TRUSTED = str(Path(torch.__file__).parent), str(Path(__file__).parent.parent)
_STANDARD_LIBRARY = str(Path(inspect.__file__).parent)
#: The hooks on the steps of all optimizers.
HOOKS_OF_ALL = _global_optimizer_pre_hooks, _global_optimizer_post_hooks


class OptimizerCall(NamedTuple):
    """A step of an optimizer that is one operation.

    operator: of a program; settings: by key, a list by param group; numbers: of these, in the order in
    which a program has them; layout: all else of these, and how many parameters are in each group,
    comparable; parameters: by group, those that have a gradient; kept: the optimizer's state of each, by
    key; keys: of that; tensors: all of these, those of the settings, and the gradients.
    """

    operator: OptimizerOperator
    settings: dict[str, tuple[Any, ...]]
    numbers: list[Number]
    layout: tuple[Any, ...]
    parameters: list[list[Tensor]]
    kept: list[dict[str, Tensor]]
    keys: tuple[tuple[str, ...], ...]
    tensors: list[Tensor]

    def made(self, state: Mapping[Tensor, Mapping[str, Any]]) -> list[tuple[int, int, str, Tensor]]:
        """Return the group, the place in it, the key and the tensor of all that is new in the state."""
        kept = iter(self.kept)
        return [
            (number, index, key, tensor)
            for number, group in enumerate(self.parameters)
            for index, (parameter, known) in enumerate(zip(group, kept, strict=False))
            for key, tensor in state.get(parameter, _NOTHING).items()
            if known.get(key) is not tensor
        ]


class OptimizerCalls:
    """Determines the next step of an optimizer."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[Any], OptimizerCall | None]] = {}
        self._code: dict[type, _Code] = {}
        self._names = _OWN.copy()

    def of(self, optimizer: torch.optim.Optimizer) -> OptimizerCall | None:
        """Return the next step of an optimizer, None if it runs code that is not torch's."""
        operator = _BY_KIND.get(type(optimizer))
        if operator is None or not self.is_torchs(optimizer):
            return None
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"]]
        # All that the call depends on, flat, so that one comparison in C finds it unchanged.
        given = [operator, optimizer.defaults.get(_FROM_DEFAULTS), *map(is_, gradients, repeat(None))]
        for group in groups:
            given += (*group["params"], group, *map(group.get, operator.settings))
        for parameter, entries in entries_of(optimizer):
            given += (parameter, *entries, *entries.values())
        # They are mostly the same objects as before, and the settings are immutable.
        known = self._known.get(id(optimizer))
        if known is None or len(known[0]) != len(given) or not all(map(is_, known[0], given)):
            known = self._known[id(optimizer)] = given, _call_of(operator, optimizer)
        call = known[1]
        # Gradients are other tensors at each step, so they are not part of what is kept.
        made = [gradient for gradient in gradients if gradient is not None]
        return None if call is None else call._replace(tensors=call.tensors + made)

    def is_torchs(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether its step runs only torch's code, and a closure before all else."""
        kind, own = type(optimizer), vars(optimizer)
        if kind not in _BY_KIND or own["_optimizer_step_pre_hooks"] or own["_optimizer_step_post_hooks"]:
            return False
        for hooks in HOOKS_OF_ALL:  # one is everystep's, and each training in another thread has one
            if len(hooks) > 1 and not all(map(is_ours, [*hooks.values()])):
                return False
        if not own.keys() <= self._names:
            # torch's tables of hooks have such names; those of steps were looked at above.
            if not all(key.startswith("_optimizer_") for key in own.keys() - _OWN):
                return False
            self._names |= own.keys()
        if kind not in self._code:
            self._code[kind] = _Code(kind)
        return self._code[kind].is_torchs()


def _call_of(operator: OptimizerOperator, optimizer: torch.optim.Optimizer) -> OptimizerCall | None:
    """Return the next step of an optimizer, without its gradients; None if a program cannot hold it."""
    groups, default = optimizer.param_groups, optimizer.defaults.get(_FROM_DEFAULTS)
    values = {key: tuple([group.get(key) for group in groups]) for key in operator.settings}
    has_defaults = all(value == default for value in values.get(_FROM_DEFAULTS, ()))
    # A differentiable step is a part of the graph, so its operations must be seen.
    is_usual = all(map(_is_setting, values.values())) and not any(values.get("differentiable", ()))
    parameters = [[p for p in group["params"] if p.grad is not None] for group in groups]
    # Copies, since the step adds what it creates to the same dicts, and `made` compares.
    kept = [optimizer.state.get(p, _NOTHING).copy() for group in parameters for p in group]
    tensors = [*chain(*parameters), *chain(*[entries.values() for entries in kept])]
    if not is_usual or not has_defaults or not all(isinstance(each, Tensor) for each in tensors):
        return None
    numbers: list[Number] = []
    given = (*values.values(),)
    # A parameter may move to another group, with other settings.
    layout = _layout(given, numbers), *map(len, parameters)
    keys = tuple(map(tuple, kept))
    tensors += leaves(given)
    return OptimizerCall(operator, values, numbers, layout, parameters, kept, keys, tensors)


def is_torchs_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's class is torch's, or the chapter's, with no method replaced."""
    kind: Any = type(optimizer)
    step: Any = vars(optimizer).get("step")
    is_own = kind is GradientDescent or getattr(torch.optim, kind.__name__, None) is kind
    # A scheduler wraps the step of the class.
    is_wrapped = is_torchs_function(step) and inspect.unwrap(step) is inspect.unwrap(kind.step)
    is_usual = (step is None or is_wrapped) and not replaces_method(optimizer, but="step")
    return is_own and is_usual and _Code(kind).is_torchs()


def has_own_zero_grad(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer has a custom zero_grad."""
    usual = torch.optim.Optimizer.zero_grad
    return type(optimizer).zero_grad is not usual or "zero_grad" in vars(optimizer)


class _Code:
    """The functions that the step of a class may run: its own, and those of its modules.

    A program names the class only, so a replaced function must be watched.
    """

    def __init__(self, kind: type[torch.optim.Optimizer]) -> None:
        bases = kind.__mro__[: kind.__mro__.index(torch.optim.Optimizer) + 1]
        tables: list[Mapping[str, Any]] = [vars(base) for base in bases]
        tables += [vars(sys.modules[base.__module__]) for base in bases]
        self._kind = kind
        #: What reads the functions of each table at once. torch wraps `step` once there is an object.
        self._functions = []
        for table in tables:
            names = [n for n, each in table.items() if type(each) is FunctionType and n != "step"]
            if names:
                read = itemgetter(*names, names[0])  # for a single name, it would return no tuple
                self._functions.append((table, read, read(table)))
        functions = (each for _, _, known in self._functions for each in known)
        self._is_known = all(map(is_written_by_torch, functions))
        self._step: Any = None

    def is_torchs(self) -> bool:
        """Return whether all of them are torch's, now."""
        if not self._is_known:
            return False
        try:
            for table, read, known in self._functions:
                if not all(map(is_, read(table), known)):
                    return False
        except KeyError:  # somebody has deleted one
            return False
        step = self._kind.step
        if step is not self._step:
            if not is_written_by_torch(step):
                return False
            self._step = step
        return True


def is_ours(hook: Any) -> bool:
    """Return whether a hook is everystep's."""
    return str(getattr(hook, "__module__", "")).startswith("everystep.")


def is_written_by_torch(function: Any) -> bool:
    """Return whether a function, and one it wraps, is torch's, everystep's or the standard library's."""
    while type(function) is FunctionType:
        file = function.__code__.co_filename
        if not file.startswith(_TRUSTED) and file != typing_extensions.__file__:
            return "site-packages" not in file and file.startswith(_STANDARD_LIBRARY)
        function = getattr(function, "__wrapped__", None)
    # None, or a function in C, such as that of torch in `Tensor.__pow__`.
    return type(function).__module__ == "builtins"


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return value is None or type(value) in (bool, int, float) or isinstance(value, Tensor)


def _layout(value: Any, numbers: list[Number]) -> Any:
    """Return settings without their numbers, which are added to others."""
    # e.g. (0.1, (0.9, 0.999), None, False) -> (float, (float, float), None, False)
    if isinstance(value, tuple):
        return tuple([_layout(item, numbers) for item in value])
    if type(value) in (int, float):
        numbers.append(value)
        return type(value)
    return type(value) if isinstance(value, Tensor) else value
