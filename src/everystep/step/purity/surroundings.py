"""Surroundings: what the operations of a step depend on besides its code."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from everystep.step.hooks import has_hooks_on_node
from everystep.step.purity.guards import ABSENT, Guards, held
from everystep.step.purity.process import (
    functions_of_torch,
    process_settings,
    reason_against_process,
)
from everystep.step.purity.torchs_own import HOOKS, hook_on, own_modules

__all__ = ["Surroundings"]

_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Surroundings:
    """The modules, optimizers and tensors of a training, and the settings of the process.

    Args:
        modules: what is trained, and a loss that is a module; by what messages call it.
        optimizers: by what messages call them.
        named_state: returns the live tensors that are carried from step to step, by name, as far as
            code needs them as they are.
        device: of the training.

    guards: what must stay as it is, besides what is always compared.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        named_state: Callable[[], Mapping[str, Tensor]],
        device: torch.device,
    ) -> None:
        self.guards = Guards()
        self._modules = modules
        self._optimizers = optimizers
        self._named_state = named_state
        self._device = device
        self._settings: dict[str, Any] = {}
        self._functions: list[Any] = []
        self._state: Mapping[str, Tensor] | None = None

    def reasons(self) -> Iterator[str]:
        """Yield why Python must run at every step, whatever its code is."""
        against = reason_against_process()
        if against is not None:
            yield against
        for name, part in self._modules.items():
            for path, module in own_modules(part):
                where = f"module {path}" if path and name == "the model" else name
                kind = hook_on(module)
                if kind is not None:
                    yield f"{where} has {kind}"
                if type(module).__module__.startswith("torch._dynamo"):
                    yield f"{where} is compiled (torch.compile)"
                if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
                    yield f"{where} is a {type(module).__name__}"
        for name, tensor in self._named_state().items():
            path = name.partition("/")[2]
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                yield f"{path} has no shape before the first step (a lazy module)"
            elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
                yield f"{path} has a hook on its gradient"
        for name, optimizer in self._optimizers.items():
            if any(getattr(optimizer, hooks, None) for hooks in _OPTIMIZER_HOOKS):
                yield f"{name} has a hook on its step"

    def begin(self) -> None:
        """Note everything again, before capturing a program that depends on it."""
        guards = self.guards = Guards()
        for part in self._modules.values():
            for _, module in own_modules(part):
                _guard_registered(module, guards)
        for name, tensor in self._named_state().items():
            guards.tensor(tensor, name.partition("/")[2], is_state=True)
        guards.read("storages", "the sharing of memory between tensors", self._shared)
        self._settings = process_settings(self._device)
        self._functions = functions_of_torch()

    def guard_optimizer(self, name: str) -> None:
        """Note what makes an optimizer torch's own, and which parameters it has."""
        optimizer, guards = self._optimizers[name], self.guards
        key = id(optimizer)
        guards.read((key, "class"), f"the class of {name}", type, optimizer)
        guards.read((key, "groups"), f"the parameters of {name}", _parameters_of, optimizer)
        for hooks in _OPTIMIZER_HOOKS:
            guards.contents(getattr(optimizer, hooks, []), f"{hooks} of {name}")
        module = sys.modules[type(optimizer).__module__]
        guards.read((key, "functions"), f"a function used by {name}", _functions_in, module)
        for method in ("step", "zero_grad"):
            where = f"{method} of {name}"
            guards.read((key, "own", method), where, held, optimizer, method)
            guards.read((key, "class", method), where, getattr, type(optimizer), method)

    def guard_settings(self, name: str, *, but_lr: bool) -> None:
        """Note the settings of an optimizer, which are among the operations of its update.

        but_lr: except for the learning rate, which they read at every step.
        """
        optimizer = self._optimizers[name]
        for index, group in enumerate(optimizer.param_groups):
            for key in group:
                if key != "params" and not (key == "lr" and but_lr):
                    where = f"{key} of param group {index}"
                    self.guards.read((id(optimizer), index, key), where, _setting, optimizer, index, key)

    def guard_shared(self, others: tuple[Tensor, ...]) -> None:
        """Note which tensors, including other ones from outside, share memory."""
        where = "the sharing of memory between tensors"
        self.guards.read(("shared", len(others)), where, self._shared, others)

    def difference(self, state: Mapping[str, Tensor] | None = None) -> str | None:
        """Return in words what changed since programs were captured, or None.

        state: of the training now, if already known.
        """
        self._state = state
        try:
            return self._difference()
        finally:
            self._state = None

    def _difference(self) -> str | None:
        now = process_settings(self._device)
        if not all(map(is_, functions_of_torch(), self._functions)):
            return "a function of torch changes"
        changed = (f"{name} changes" for name, value in self._settings.items() if now[name] != value)
        return next(changed, None) or self.guards.difference() or self._hooked_node()

    def _hooked_node(self) -> str | None:
        """Return in words which parameter has a hook on its node in the graph, or None.

        Only a backward pass shows such a hook. It stays as long as other code keeps a graph.
        """
        named = (self._state or self._named_state()).items()
        with torch._C.DisableTorchFunctionSubclass():
            hooked = (
                name.partition("/")[2]
                for name, tensor in named
                if name.startswith("parameter/") and has_hooks_on_node(tensor)
            )
            found = next(hooked, None)
        return None if found is None else f"other code has a hook on the graph node of {found}"

    def _shared(self, others: tuple[Tensor, ...] = ()) -> str:
        """Return, for each tensor of the state and of others, the first that uses the same memory."""
        first: dict[int, int] = {}
        state = (self._state or self._named_state()).items()
        places = (tensor.untyped_storage()._cdata for tensor in (*(t for _, t in state), *others))
        return str([first.setdefault(place, index) for index, place in enumerate(places)])


def _parameters_of(optimizer: torch.optim.Optimizer) -> str:
    """Return which parameters are in which group."""
    return str([list(map(id, group["params"])) for group in optimizer.param_groups])


def _functions_in(module: types.ModuleType) -> str:
    """Return which functions a module of Python has."""
    return str([id(value) for value in vars(module).values() if type(value) is types.FunctionType])


def _setting(optimizer: torch.optim.Optimizer, index: int, key: str) -> Any:
    """Return the current value of a setting of a param group."""
    groups = optimizer.param_groups
    found = groups[index].get(key, ABSENT) if index < len(groups) else ABSENT
    return tuple(found) if type(found) is list else found


def _guard_registered(module: nn.Module, guards: Guards) -> None:
    own = vars(module)
    where = f"a {type(module).__name__}"
    for name in ("_parameters", "_buffers", "_modules", *HOOKS):
        if name in own:
            guards.contents(own[name], f"{name} of {where}")
