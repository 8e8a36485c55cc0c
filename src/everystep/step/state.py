"""The state of a training: parameters, buffers, optimizer tensors and random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from everystep.program.memory import copy_into
from everystep.step.own_state import PREFIX, captured, keeps_own_state, restore

__all__ = [
    "Generators",
    "State",
    "copy_of",
    "entries_of",
    "first_names",
    "generators_preserved",
    "named_state",
    "optimizer_settings",
    "parameter_names",
    "plain",
    "registered",
    "state_dict_of",
]


@dataclass(frozen=True)
class Generators:
    """The random generators that a step can draw from: torch's, Python's and NumPy's global ones."""

    torch_cpu: Tensor
    torch_device: Tensor | None
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    @classmethod
    def capture(cls, device: torch.device) -> Generators:
        """Read all of them; draws from none."""
        return cls(
            torch_cpu=torch.get_rng_state(),
            torch_device=_device_generator_state(device),
            python=random.getstate(),
            numpy=np.random.get_state(),  # type: ignore[arg-type]  # the legacy tuple
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Generators:
        """Return what `tensors` was made from."""
        gauss = tensors["python.gauss"].tolist()
        position, has_gauss = tensors["numpy.position"].tolist()
        keys = tensors["numpy"].numpy().astype(np.uint32)
        return cls(
            torch_cpu=tensors["torch"].cpu(),
            torch_device=tensors.get("device"),
            python=(
                random.Random.VERSION,
                tuple(tensors["python"].tolist()),
                gauss[0] if gauss else None,
            ),
            numpy=("MT19937", keys, position, has_gauss, tensors["numpy.gauss"].item()),
        )

    def restore(self, device: torch.device) -> None:
        """Set all of them to what `capture` read; torch's own of another kind of device stays."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_device is not None and device.type != "cpu":
            module = torch.cuda if device.type == "cuda" else torch.mps
            module.set_rng_state(self.torch_device, *([device] if device.type == "cuda" else []))
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def same_as(self, other: Generators) -> bool:
        """Tell whether torch's generators were the same when these were read."""
        one, two = self.torch_device, other.torch_device
        same_on_device = one is two or (one is not None and two is not None and torch.equal(one, two))
        return same_on_device and torch.equal(self.torch_cpu, other.torch_cpu)

    def tensors(self) -> dict[str, Tensor]:
        """Return the states as tensors, by name."""
        _, words, gauss = self.python
        _, keys, position, has_gauss, cached = self.numpy
        found = {
            "torch": self.torch_cpu,
            "python": torch.tensor(words, dtype=torch.int64),
            "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor(keys.astype(np.int64)),
            "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
            "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        }
        return found if self.torch_device is None else found | {"device": self.torch_device}


@contextmanager
def generators_preserved(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within, the generators are afterwards as they were."""
    before = Generators.capture(device)
    try:
        yield
    finally:
        before.restore(device)


@dataclass(frozen=True)
class State:
    """A copy, on the CPU, of all that a training carries from one step to the next.

    step: 0 before the first step; parameters: exactly `model.state_dict()`; rest: buffers outside
    it, optimizer tensors and generators, by `kind/name`; settings: what is no tensor (param groups,
    schedule), as JSON would hold it.
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
        """The random generators, as they can be restored."""
        prefix = "generator/"
        named = {n.removeprefix(prefix): t for n, t in self.rest.items() if n.startswith(prefix)}
        return Generators.from_tensors(named)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by the names that `named_state` gives; a state_dict's under both kinds."""
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
        """Bring a training and the random generators to this state, in the training's own tensors.

        Settings of the optimizer and the schedule that are no plain numbers stay as they are. Without an
        optimizer, the model and the loss alone are brought to it.

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
                kind = "lacks it" if given is None else f"has {_geometry(given)}"
                raise ValueError(f"{name} is {_geometry(tensor)} here, and the state {kind}")
        with torch.no_grad():
            for name, tensor in live.items():
                copy_into(tensor, saved[name])
        if schedule is not None and "schedule" in self.settings:
            _restore_schedule(schedule, self.settings["schedule"])
        self.generators.restore(device)


def named_state(
    model: nn.Module, loss: Any, optimizer: torch.optim.Optimizer | None
) -> dict[str, Tensor]:
    """Return the live tensors that a training carries from one step to the next, by name.

    `parameter/0.weight`, `buffer/1.running_mean`, `optimizer/0.weight/exp_avg`, `group/0/lr` where a
    param group holds a tensor, and `loss/weight` of a loss that is a module. A gradient is state only
    where nothing zeroes it: of a parameter that the optimizer does not have.
    """
    found = {f"parameter/{name}": each for name, each in registered(model, "_parameters")}
    found |= {f"buffer/{name}": each for name, each in registered(model, "_buffers")}
    if isinstance(loss, nn.Module):
        own = (*registered(loss, "_parameters"), *registered(loss, "_buffers"))
        found |= {f"loss/{name}": tensor for name, tensor in own}
    if optimizer is None:
        return found
    names = parameter_names(model, optimizer)
    in_model: set[Tensor] = {parameter for _, parameter in registered(model, "_parameters")}
    found |= {f"parameter/{name}": p for p, name in names.items() if p not in in_model}
    for parameter, entries in entries_of(optimizer):
        place = names.get(parameter, "#")
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        found |= {f"optimizer/{place}/{key}": value for key, value in tensors.items()}
    for index, group in enumerate(optimizer.param_groups):
        found |= {f"group/{index}/{k}": v for k, v in group.items() if isinstance(v, Tensor)}
    for parameter, name in first_names(model).items():
        if parameter not in names and parameter.grad is not None:
            found[f"gradient/{name}"] = parameter.grad
    return found


def registered(
    module: nn.Module, kind: str, prefix: str = "", around: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters or buffers of a module and all within it, each under every name.

    As torch's `named_parameters` does, which a user may have overridden.
    """
    for name, tensor in vars(module)[kind].items():
        if tensor is not None:
            yield f"{prefix}{name}", tensor
    for name, inner in vars(module)["_modules"].items():
        if inner is not None and id(inner) not in around:
            yield from registered(inner, kind, f"{prefix}{name}.", (*around, id(module)))


def first_names(model: nn.Module) -> dict[Tensor, str]:
    """Return each parameter of a model with the first of its names."""
    found: dict[Tensor, str] = {}
    for name, parameter in registered(model, "_parameters"):
        found.setdefault(parameter, name)
    return found


def state_dict_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return what torch's `state_dict` does, in its order, without the hooks of the user's."""
    own = vars(module)
    left_out = own["_non_persistent_buffers_set"]
    found = {f"{prefix}{n}": t for n, t in own["_parameters"].items() if t is not None}
    found |= {
        f"{prefix}{name}": tensor
        for name, tensor in own["_buffers"].items()
        if tensor is not None and name not in left_out
    }
    for name, inner in own["_modules"].items():
        if inner is not None:
            found |= state_dict_of(inner, f"{prefix}{name}.")
    return found


def entries_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Yield what the optimizer keeps by parameter; some keep other things in the same place."""
    for parameter, entries in optimizer.state.items():
        if isinstance(parameter, Tensor) and isinstance(entries, Mapping):
            yield parameter, entries


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """Return the name of each parameter that the optimizer has; `#3` of one not in the model."""
    names = first_names(model)
    positions = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameter: names.get(parameter, f"#{i}") for i, parameter in enumerate(positions)}


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
    """Give the optimizer the settings and the entries that it had; tensors are filled in later."""
    names = parameter_names(model, optimizer)
    settings = state.settings["optimizer"]
    if type(optimizer).__qualname__ != settings["class"]:
        kinds = f"{type(optimizer).__qualname__}, and the state is of {settings['class']}"
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
        raise ValueError("the optimizer has other param groups")
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
    """A gradient is state where nothing zeroes it."""
    names = parameter_names(model, optimizer)
    for parameter, name in first_names(model).items():
        gradient = saved.get(f"gradient/{name}")
        if parameter in names:
            continue
        if gradient is None or parameter.grad is None:
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)


def _restore_schedule(schedule: LRScheduler, saved: Mapping[str, Any]) -> None:
    """Set the numbers of a schedule, and of those that it is made of."""
    inner = getattr(schedule, "_schedulers", ())
    for each, numbers in zip(inner, saved.get("_schedulers", ()), strict=False):
        _restore_schedule(each, numbers)
    _update_plain(vars(schedule), saved)


def _update_plain(target: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Set what is a number, a text or a list of these; the rest was written as a text only."""
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
    return type(value).__name__  # an object of the user's may count how often it is printed


def _device_generator_state(device: torch.device) -> Tensor | None:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return None
