"""The state of optimizers and modules, as named tensors and plain data, to write and to restore.

torch's optimizers keep tensors by parameter, and settings by param group. Others keep lists of tensors,
counters, generators or another optimizer in their attributes (see `kept_values`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "entries_of",
    "keeps_own_state",
    "optimizer_settings",
    "registered",
    "restore_optimizer",
    "state_dict_of",
]

#: Of a number of NumPy's that a setting is: its dtype, next to its `value`.
_NUMPY = "numpy"


def registered(module: nn.Module, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the `_parameters` or `_buffers` of a module and all within it, each under every name.

    As torch's `named_parameters` does, which a user may have overridden.
    """
    for path, inner in module.named_modules(remove_duplicate=False):
        for name, tensor in vars(inner)[kind].items():
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def state_dict_of(module: nn.Module) -> dict[str, Tensor]:
    """Return what torch's `state_dict` does, in its order, without the hooks of the user's."""
    found: dict[str, Tensor] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        own = vars(inner)
        for name, tensor in (*own["_parameters"].items(), *own["_buffers"].items()):
            if tensor is not None and name not in own["_non_persistent_buffers_set"]:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def entries_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Yield what the optimizer keeps by parameter; some keep other things in the same place."""
    for parameter, entries in optimizer.state.items():
        if isinstance(parameter, Tensor) and isinstance(entries, Mapping):
            yield parameter, entries


def keeps_own_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer may keep more than torch's own do."""
    return not type(optimizer).__module__.startswith(("torch.optim", "everystep."))


def optimizer_settings(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return the state of an optimizer other than tensors. names: of its parameters."""
    values = {
        f"{names.get(parameter, '#')}/{key}": _plain(value)
        for parameter, entries in entries_of(optimizer)
        for key, value in entries.items()
        if not isinstance(value, Tensor)
    }
    groups = [
        {k: _plain(v) for k, v in group.items() if k != "params" and not isinstance(v, Tensor)}
        | {"params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__qualname__, "groups": groups, "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    settings: Mapping[str, Any],
    saved: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """Restore the settings and the entries of an optimizer; tensors that it has are filled in later.

    Args:
        optimizer: of the same class as the written one.
        names: of its parameters.
        settings: as `optimizer_settings` returned them.
        saved: tensors by name.
        prefix: of the names of its tensors.

    Raises:
        ValueError: it is the state of another optimizer.
    """
    if [len(g["params"]) for g in settings["groups"]] != [
        len(g["params"]) for g in optimizer.param_groups
    ]:
        raise ValueError("the optimizer has different param groups")
    for group, known in zip(optimizer.param_groups, settings["groups"], strict=True):
        _update_plain(group, {key: value for key, value in known.items() if key != "params"})
    tensors = {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
    kept: dict[str, dict[str, Any]] = {}
    for place, each in (*settings["values"].items(), *tensors.items()):
        name, _, key = place.rpartition("/")
        kept.setdefault(name, {})[key] = each
    for parameter, name in names.items():
        if name not in kept:  # the optimizer had not stepped with it yet: it begins as a new one
            optimizer.state.pop(parameter, None)
            continue
        entries = optimizer.state[parameter]
        for key in entries.keys() - kept[name].keys():
            del entries[key]
        for key, each in kept[name].items():
            there = entries.get(key)
            if not isinstance(each, Tensor):
                entries[key] = each
            # A tensor that fits stays, and its numbers are filled in later.
            elif not isinstance(there, Tensor) or there.shape != each.shape:
                entries[key] = _made(optimizer, parameter, each)


def _made(optimizer: torch.optim.Optimizer, parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a new tensor of an optimizer, on the device where torch would have it."""
    if tensor.shape == parameter.shape:  # kernels go through both in the same order
        like = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
        return like.copy_(tensor)
    # A count of steps stays on the CPU, where torch's optimizers look for it.
    on_cpu = tensor.ndim == 0 and not any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    return tensor.clone() if on_cpu else tensor.to(parameter.device, copy=True)


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it; the class of other values."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return {_NUMPY: value.dtype.str, "value": value.item()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return type(value).__name__  # a user's object may count how often it is printed


def _update_plain(target: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Set numbers, strings and lists of these; everything else was written only as text."""
    for key, value in saved.items():
        there = target.get(key)
        if isinstance(value, Mapping) and _NUMPY in value:
            target[key] = np.dtype(value[_NUMPY]).type(value["value"])
            continue
        # A tensor is filled in by its name, and of a function only the class was written.
        if isinstance(there, Mapping | Tensor) or callable(there):
            continue
        if isinstance(value, list):
            # JSON has no tuples, such as betas, so the one that is there shows the type.
            items = [*value, *there] if isinstance(there, list | tuple) else value
            if all(isinstance(item, bool | int | float | None) for item in items):
                target[key] = tuple(value) if isinstance(there, tuple) else value
        # A text may be the class of an object, which JSON cannot hold.
        elif not isinstance(value, Mapping) and not (isinstance(value, str) and there != value):
            target[key] = value
