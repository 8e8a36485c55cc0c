"""Hooks: count those in this process, and find those on autograd nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["handles", "has_hooks_on_node"]


def handles() -> int:
    """Return the number of hooks registered on tensors, nodes and modules in this process."""
    return RemovableHandle.next_id


def has_hooks_on_node(tensor: Tensor) -> bool:
    """Return whether Python runs when autograd accumulates a parameter's gradient.

    This node lives while other code keeps a graph with it. Registering a hook shows which others exist.
    """
    if not tensor.requires_grad or not tensor.is_leaf or tensor.is_inference():
        return False
    with torch.inference_mode(False), torch.enable_grad():  # else a view has no node
        node: Any = tensor.view_as(tensor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    ours = [node.register_hook(_nothing), node.register_prehook(_nothing)]
    has_others = any(len(handle.hooks_dict_ref()) > 1 for handle in ours)
    for handle in ours:
        handle.remove()
    return has_others


def _nothing(*_: Any) -> None:
    return None
