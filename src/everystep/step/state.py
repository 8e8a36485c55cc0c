"""The state of a training: parameters, buffers, optimizer tensors and random generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from everystep.program.memory import copy_into
from everystep.step.generators import Generators
from everystep.step.named_state import (
    entries_of,
    first_names,
    named_state,
    parameter_names,
    state_dict_of,
)
from everystep.step.own_state import PREFIX, captured, keeps_own_state, restore

__all__ = ["State", "copy_of", "optimizer_settings", "plain"]


@dataclass(frozen=True)
class State:
    """A copy, on the CPU, of everything that a training carries from one step to the next.

    step: 0 before the first step; parameters: exactly `model.state_dict()`; rest: buffers outside it,
    optimizer tensors and generators, by `kind/name`; settings: everything that is not a tensor (param
    groups, schedule), in JSON form.
    """

    step: int
    parameters: dict[str, Tensor]
    rest: dict[str, Tensor]
    settings: dict[str, Any]

    @classmethod
    def capture(
        cls,
        step: int,
        model: nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler | None,
        device: torch.device,
    ) -> State:
        """Copy the state after `step`; touches neither the training nor its generators."""
        parameters = {name: copy_of(value) for name, value in state_dict_of(model).items()}
        rest = {
            name: copy_of(value)
            for name, value in named_state(model, loss, optimizer).items()
            if name.partition("/")[2] not in parameters or not name.startswith(("parameter/", "buffer/"))
        }
        generators = Generators.capture(device).tensors()
        settings: dict[str, Any] = {"step": step, "optimizer": optimizer_settings(model, optimizer)}
        if keeps_own_state(optimizer):
            live = named_state(model, loss, optimizer)
            own, settings["own"] = captured(optimizer, parameter_names(model, optimizer), live)
            rest |= {name: copy_of(value) for name, value in own.items()}
        if schedule is not None:
            settings["schedule"] = plain(schedule.state_dict())
        return cls(
            step=step,
            parameters=parameters,
            rest=rest | {f"generator/{name}": copy_of(value) for name, value in generators.items()},
            settings=settings,
        )

    @property
    def generators(self) -> Generators:
        """The random generators, ready to restore."""
        prefix = "generator/"
        named = {n.removeprefix(prefix): t for n, t in self.rest.items() if n.startswith(prefix)}
        return Generators.from_tensors(named)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by the names of `named_state`; those of a state_dict under both kinds."""
        kinds = ("parameter", "buffer")
        found = {f"{kind}/{name}": t for name, t in self.parameters.items() for kind in kinds}
        others = ("generator/", PREFIX)
        return found | {name: t for name, t in self.rest.items() if not name.startswith(others)}

    def restore(
        self,
        model: nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer | None,
        schedule: LRScheduler | None,
        device: torch.device,
    ) -> None:
        """Restore this state in a training's own tensors and in the random generators.

        Settings of the optimizer and the schedule that are not plain numbers stay unchanged. Without an
        optimizer, only the model and the loss are restored.

        Raises:
            ValueError: it is the state of another training; names the first tensor that does not fit.
        """
        saved = self.named()
        if optimizer is not None:
            _restore_optimizer(self, saved, model, optimizer)
            _restore_gradients(saved, model, optimizer)
        live = named_state(model, loss, optimizer)
        for name, tensor in live.items():
            given = saved.get(name)
            if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
                kind = "does not have it" if given is None else f"has {_geometry(given)}"
                raise ValueError(f"{name} is {_geometry(tensor)} here, but the state {kind}")
        with torch.no_grad():
            for name, tensor in live.items():
                copy_into(tensor, saved[name])
        if schedule is not None and "schedule" in self.settings:
            _restore_schedule(schedule, self.settings["schedule"])
        self.generators.restore(device)


def optimizer_settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what the optimizer holds besides tensors."""
    names = parameter_names(model, optimizer)
    values = {
        f"{names.get(parameter, '#')}/{key}": plain(value)
        for parameter, entries in entries_of(optimizer)
        for key, value in entries.items()
        if not isinstance(value, Tensor)
    }
    groups = [
        {k: plain(v) for k, v in group.items() if k != "params" and not isinstance(v, Tensor)}
        | {"params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__qualname__, "groups": groups, "values": values}


def _restore_optimizer(
    state: State, saved: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore the settings and the entries of the optimizer; tensors are filled in later."""
    names = parameter_names(model, optimizer)
    settings = state.settings["optimizer"]
    if type(optimizer).__qualname__ != settings["class"]:
        kinds = f"{type(optimizer).__qualname__}, but the state belongs to {settings['class']}"
        raise ValueError(f"the optimizer is {kinds}")
    if "own" in state.settings:
        restore(optimizer, names, state.rest | dict(saved), state.settings["own"])
        return
    own = {name for name in names.values() if name.startswith("#")}
    if own - {name.partition("/")[2] for name in saved}:
        raise ValueError("the optimizer has parameters that are not the model's")
    if [len(g["params"]) for g in settings["groups"]] != [
        len(g["params"]) for g in optimizer.param_groups
    ]:
        raise ValueError("the optimizer has different param groups")
    for group, known in zip(optimizer.param_groups, settings["groups"], strict=True):
        _update_plain(group, {key: value for key, value in known.items() if key != "params"})
    for parameter, name in names.items():
        prefix = f"optimizer/{name}/"
        tensors = {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
        values = {
            key.removeprefix(f"{name}/"): value
            for key, value in settings["values"].items()
            if key.rpartition("/")[0] == name
        }
        if not tensors and not values:
            optimizer.state.pop(parameter, None)
            continue
        entries = optimizer.state[parameter]
        for key in entries.keys() - tensors.keys() - values.keys():
            del entries[key]
        entries.update(values)
        for key, tensor in tensors.items():
            there = entries.get(key)
            if not isinstance(there, Tensor) or there.shape != tensor.shape:
                # A count of steps stays on the CPU, where torch's optimizers look for it.
                on_cpu = tensor.ndim == 0 and not any(
                    group.get("fused") or group.get("capturable") for group in optimizer.param_groups
                )
                if tensor.shape == parameter.shape:  # kernels go through both in the same order
                    like = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
                    entries[key] = like.copy_(tensor)
                else:
                    entries[key] = tensor.clone() if on_cpu else tensor.to(parameter.device, copy=True)


def _restore_gradients(
    saved: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore gradients that nothing zeroes, which are state."""
    names = parameter_names(model, optimizer)
    for parameter, name in first_names(model).items():
        gradient = saved.get(f"gradient/{name}")
        if parameter in names:
            continue
        if gradient is None or parameter.grad is None:
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)


def _restore_schedule(schedule: LRScheduler, saved: Mapping[str, Any]) -> None:
    """Set the numbers of a schedule, and of its inner schedules."""
    inner = getattr(schedule, "_schedulers", ())
    for each, numbers in zip(inner, saved.get("_schedulers", ()), strict=False):
        _restore_schedule(each, numbers)
    _update_plain(vars(schedule), saved)


def _update_plain(target: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Set numbers, strings and lists of these; everything else was written only as text."""
    for key, value in saved.items():
        there = target.get(key)
        if isinstance(there, Mapping | Tensor) or callable(there):
            continue
        if isinstance(value, list):
            items = [*value, *there] if isinstance(there, list | tuple) else value
            if all(isinstance(item, bool | int | float | None) for item in items):
                target[key] = tuple(value) if isinstance(there, tuple) else value
        elif not isinstance(value, Mapping) and not (isinstance(value, str) and there != value):
            target[key] = value


def _geometry(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, row after row."""
    detached = tensor.detach()
    return (
        detached.cpu()
        if detached.device.type != "cpu"
        else detached.clone(memory_format=torch.contiguous_format)
    )


def plain(value: Any) -> Any:
    """Return the value as JSON can hold it; of what it cannot hold, the class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return type(value).__name__  # a user's object may count how often it is printed
