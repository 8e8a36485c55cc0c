"""Registered contents of modules and optimizers, independent of overrides and hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["entries_of", "registered", "state_dict_of"]


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
    """Yield the optimizer's state by parameter; some keep other values in the same dict."""
    for parameter, entries in optimizer.state.items():
        if isinstance(parameter, Tensor) and isinstance(entries, Mapping):
            yield parameter, entries
