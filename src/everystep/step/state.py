"""The state of a training: parameters, buffers, optimizer tensors and random generators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from everystep.step.generators import Generators
from everystep.step.own_state import PREFIX

__all__ = ["State", "copy_of"]


@dataclass(frozen=True)
class State:
    """A copy, on the CPU, of everything that a training carries from one step to the next.

    step: 0 before the first step; parameters: exactly `model.state_dict()`; rest: buffers outside it,
    optimizer tensors and generators, by `kind/name`; settings: everything that is not a tensor, in JSON
    form: in `names`, the tensors that a step can use, and in `held`, the rest of each part.
    """

    step: int
    parameters: dict[str, Tensor]
    rest: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def generators(self) -> Generators:
        """The random generators, ready to restore."""
        prefix = "generator/"
        named = {n.removeprefix(prefix): t for n, t in self.rest.items() if n.startswith(prefix)}
        return Generators.from_tensors(named)

    def optimizer(self, part: str) -> dict[str, Any]:
        """Return the settings of an optimizer: its class, its param groups, and its state."""
        held = self.settings.get("held", {}).get(part, {})
        return dict(held.get("optimizer", {}))

    def with_optimizer(self, part: str, groups: list[dict[str, Any]]) -> State:
        """Return the state with other param groups of an optimizer."""
        held = self.settings.get("held", {})
        changed = held.get(part, {}) | {"optimizer": self.optimizer(part) | {"groups": groups}}
        return replace(self, settings=self.settings | {"held": held | {part: changed}})

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by the names of `Parts.state`; those of a state_dict under both kinds."""
        kinds = ("parameter", "buffer")
        found = {f"{kind}/{name}": t for name, t in self.parameters.items() for kind in kinds}
        others = ("generator/", PREFIX)
        return found | {name: t for name, t in self.rest.items() if not name.startswith(others)}


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, row after row."""
    detached = tensor.detach()
    if detached.is_cpu:
        return detached.clone(memory_format=torch.contiguous_format)
    return detached.cpu().contiguous()
