"""The live tensors of a training by name, independent of what a user overrides or hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "entries_of",
    "first_names",
    "named_state",
    "parameter_names",
    "registered",
    "state_dict_of",
]


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
