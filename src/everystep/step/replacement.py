"""Replacement: what gradients become between the backward pass, with clipping, and the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import ExperimentError, Fault

__all__ = ["Replacement", "UnderWay", "counted"]


class UnderWay(NamedTuple):
    """A step between its backward pass and its update: live tensors.

    step: its number, a float64 tensor of one element; loss: of one element; batch: `x` and `y`;
    parameters, buffers, gradients: by name.
    """

    step: Tensor
    loss: Tensor
    batch: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def counted(number: int, device: torch.device) -> Tensor:
    """Return the number of a step as an `UnderWay` has it."""
    return torch.full((), number, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Replacement:
    """What some gradients become before the update of each step.

    rules: by parameter, a function of the step that returns a tensor of the gradient's shape and dtype,
    or a plain number to fill it with. All read the gradients as backward and clipping left them.
    reads_step: whether a rule reads the number of the step.

    The operations of a rule may depend on shapes and dtypes, but not on values: programs repeat them.
    """

    rules: Mapping[str, Callable[[UnderWay], Any]]
    reads_step: bool

    @torch.no_grad()
    def apply(self, step: UnderWay) -> None:
        """Replace the gradients, in their own memory.

        Raises: as `gradients`.
        """
        for name, tensor in self.gradients(step).items():
            step.gradients[name].copy_(tensor)

    @torch.no_grad()
    def gradients(self, step: UnderWay) -> dict[str, Tensor]:
        """Return the new gradients by parameter.

        Raises:
            ExperimentError: a parameter has no gradient in this step, or a rule does not return one.
        """
        # A rule may return the gradient of another parameter itself, which is replaced, too.
        is_copied = len(self.rules) > 1
        return {
            name: _gradient(name, rule(step), step.gradients.get(name), is_copied)
            for name, rule in self.rules.items()
        }


def _gradient(name: str, value: Any, before: Tensor | None, is_copied: bool) -> Tensor:
    """Return what a rule gave as a tensor; before: the gradient that it replaces."""
    problem = _problem(value, before)
    if problem is not None:
        raise ExperimentError([Fault(f"replace gradients[{name!r}]", problem)])
    assert before is not None
    if not isinstance(value, Tensor):
        return torch.full_like(before, value)
    return value.to(before.dtype, copy=is_copied)


def _problem(value: Any, before: Tensor | None) -> str | None:
    """Return why a value cannot replace a gradient, with the cure, or None."""
    if before is None:
        return "this step has no such gradient: the loss does not depend on the parameter"
    if before.layout != torch.strided:
        return "the gradient is sparse; only dense gradients can be replaced"
    if not isinstance(value, Tensor):
        return None
    wanted, given = tuple(before.shape), tuple(value.shape)
    if given != wanted and not given:
        return (
            f"the expression is one number, but the gradient has shape {wanted}; combine it with the "
            "gradient, or write a constant such as 0 to fill the gradient with it"
        )
    if given != wanted:
        return (
            f"the expression has shape {given}, but the gradient has shape {wanted}; index it, or name "
            "another tensor"
        )
    if value.dtype != before.dtype and given:
        kinds = [str(each.dtype).removeprefix("torch.") for each in (value, before)]
        cure = "select by a condition with where(c, a, b)" if kinds[0] == "bool" else "use tensors of it"
        return f"the expression is {kinds[0]}, but the gradient is {kinds[1]}; {cure}"
    return None
