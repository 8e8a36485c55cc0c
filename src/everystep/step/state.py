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

__all__ = ["Generators", "State", "generators_preserved"]


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

    def restore(self, device: torch.device) -> None:
        """Set all of them to what `capture` read."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_device is not None:
            module = torch.cuda if device.type == "cuda" else torch.mps
            module.set_rng_state(self.torch_device, *([device] if device.type == "cuda" else []))
        random.setstate(self.python)
        np.random.set_state(self.numpy)

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
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler | None,
        device: torch.device,
    ) -> State:
        """Copy the state after `step`; touches neither the training nor its generators."""
        parameters = {
            name: _copy(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)
        }
        outside = {
            f"buffer/{name}": _copy(buffer)
            for name, buffer in model.named_buffers(remove_duplicate=False)
            if name not in parameters
        }
        optimizer_tensors, optimizer_settings = _optimizer_parts(model, optimizer)
        generators = Generators.capture(device).tensors()
        settings: dict[str, Any] = {"step": step, "optimizer": optimizer_settings}
        if schedule is not None:
            settings["schedule"] = _plain(schedule.state_dict())
        return cls(
            step=step,
            parameters=parameters,
            rest=outside
            | optimizer_tensors
            | {f"generator/{name}": _copy(value) for name, value in generators.items()},
            settings=settings,
        )


def _optimizer_parts(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors by `optimizer/parameter/key`, and its other values."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    positions = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named = {p: names.get(p, f"#{index}") for index, p in enumerate(positions)}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            place = f"{named.get(parameter, '#')}/{key}"
            if isinstance(value, Tensor):
                tensors[f"optimizer/{place}"] = _copy(value)
            else:
                values[place] = _plain(value)
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        tensors |= {
            f"group/{index}/{key}": _copy(value)
            for key, value in group.items()
            if isinstance(value, Tensor)
        }
        settings = {
            key: _plain(value)
            for key, value in group.items()
            if key != "params" and not isinstance(value, Tensor)
        }
        groups.append(settings | {"params": [named[parameter] for parameter in group["params"]]})
    return tensors, {"class": type(optimizer).__qualname__, "groups": groups, "values": values}


def _copy(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return (
        detached.cpu()
        if detached.device.type != "cpu"
        else detached.clone(memory_format=torch.contiguous_format)
    )


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it; what it cannot hold as its text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return repr(value)


def _device_generator_state(device: torch.device) -> Tensor | None:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return None
