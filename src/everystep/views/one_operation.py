"""One operation of a step in full: its formula, arguments, inputs and results."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from everystep.replay.step import Step
from everystep.views.lines import Page, statistics_text
from everystep.views.mathematics import Line, all_arguments, value_text

__all__ = ["write_operation"]

#: The numbers of tensors with at most so many elements are shown unasked.
FEW_VALUES = 64

_INDENT = 2


def write_operation(page: Page, step: Step, place: int, line: Line, about: Mapping[str, str]) -> None:
    """Write an operation, below the heading.

    place: its number in the step; line: it as mathematics; about: what to say of a tensor, by its name.
    """
    seen = step.operations[place]
    page.labelled("formula", f"{line.left or f'#{place}'} = {line.right}")
    page.labelled("operator", seen.operation.operator)
    page.labelled("phase", seen.operation.phase)
    if seen.operation.module is not None:
        page.labelled("module", seen.operation.module)
    if arguments := all_arguments(seen.operation):
        page.heading("arguments")
        width = max(map(len, arguments))
        for key, (value, is_given) in arguments.items():
            text = value_text(value, lambda name: line.given.get(name, name))
            unsaid = [] if is_given else [("  default", "dim")]
            page.line((f"{key:<{width}}  ", "dim"), (text, ""), *unsaid, indent=_INDENT)
    for label, tensors, names in (
        ("inputs", seen.inputs, line.given),
        ("results", seen.results, line.made),
    ):
        page.heading(label)
        for name, tensor in tensors.items():
            is_unset = (place, label, name) in step.unset
            _tensor(page, names.get(name, name), name, tensor, about.get(name), is_unset)


def _tensor(
    page: Page, called: str, name: str, tensor: Tensor, about: str | None, is_unset: bool
) -> None:
    own = f"{name}, " if name != called else ""
    strides = f"  {own}strides ({', '.join(map(str, tensor.stride()))})"
    page.line((called, "bold"), (strides, "dim"), indent=_INDENT)
    page.line(*statistics_text(tensor, is_unset=is_unset), indent=2 * _INDENT)
    if about is not None:
        page.wrapped(about, "dim", indent=2 * _INDENT)
    if (page.values or tensor.numel() <= FEW_VALUES) and not is_unset:
        page.numbers(tensor, indent=2 * _INDENT)
