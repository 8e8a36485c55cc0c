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
    first_names,
    named_state,
    parameter_names,
    state_dict_of,
)
from everystep.step.optimizer_state import optimizer_settings, restore_optimizer
from everystep.step.own_state import PREFIX, captured, keeps_own_state, live_tensors, restore
from everystep.step.plain_data import plain, update_plain

__all__ = ["State", "copy_of"]


@dataclass(frozen=True)
class State:
    """A copy, on the CPU, of everything that a training carries from one step to the next.

    step: 0 before the first step; parameters: exactly `model.state_dict()`; rest: buffers outside it,
    optimizer tensors and generators, by `kind/name`; settings: everything that is not a tensor (param
    groups, schedule), in JSON form, and in `live` the names of the tensors that a step can use.
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
        live = named_state(model, loss, optimizer)
        rest = {
            name: copy_of(value)
            for name, value in live.items()
            if name.partition("/")[2] not in parameters or not name.startswith(("parameter/", "buffer/"))
        }
        generators = Generators.capture(device).tensors()
        names = parameter_names(model, optimizer)
        settings: dict[str, Any] = {"step": step, "optimizer": optimizer_settings(optimizer, names)}
        if keeps_own_state(optimizer):
            own, settings["own"] = captured(optimizer, names, live)
            rest |= {name: copy_of(value) for name, value in own.items()}
        settings["live"] = [*live, *live_tensors(optimizer, names, live)]
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
            self._restore_optimizer(saved, optimizer, parameter_names(model, optimizer))
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

    def _restore_optimizer(
        self,
        saved: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        names: dict[Tensor, str],
    ) -> None:
        if "own" in self.settings:
            known = self.settings["optimizer"]["class"]
            if type(optimizer).__qualname__ != known:
                kinds = f"{type(optimizer).__qualname__}, but the state belongs to {known}"
                raise ValueError(f"the optimizer is {kinds}")
            restore(optimizer, names, self.rest | dict(saved), self.settings["own"])
            return
        own = {name for name in names.values() if name.startswith("#")}
        if own - {name.partition("/")[2] for name in saved}:
            raise ValueError("the optimizer has parameters that are not the model's")
        restore_optimizer(optimizer, names, self.settings["optimizer"], saved)


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
    update_plain(vars(schedule), saved)


def _geometry(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, row after row."""
    detached = tensor.detach()
    if detached.is_cpu:
        return detached.clone(memory_format=torch.contiguous_format)
    return detached.cpu().contiguous()
