"""The operations of a step in the terminal: lines of a table that fits, and one operation in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text
from torch import Tensor

from everystep.program.observed import Observed
from everystep.replay.step import Step
from everystep.views.lines import Page, number_cells, number_headings, statistics_text
from everystep.views.mathematics import Line, all_arguments, value_text
from everystep.views.tables import Cell, table_lines, table_width, without

__all__ = ["operation_lines", "write_operation"]

#: The numbers of tensors with at most so many elements are shown unasked.
FEW_VALUES = 64

_INDENT = 2


def operation_lines(operations: Sequence[Observed], lines: Sequence[Line], width: int) -> list[Text]:
    """Return a line for the headings, and one for each operation; aligned through the whole page.

    lines: the operations as mathematics; width: of the page; columns that do not fit are left out.
    """
    rows: list[list[Cell]] = [_headings()]
    for place, (seen, line) in enumerate(zip(operations, lines, strict=True)):
        shown = seen.operation.phase != "update"
        rows.append(
            [
                (f"#{place}", "dim", False),
                (_path(seen.operation.module) if shown else "", "cyan", False),
                (line.short if shown else "", "", False),
                *number_cells(next(iter(seen.made.values()), None) if shown else None),
                (seen.operation.operator if shown else "", "dim", False),
            ]
        )
    return table_lines(_fitting(rows, width))


def _headings() -> list[Cell]:
    names = [(name, "dim", False) for name in ("", "module", "formula")]
    return [*names, *number_headings(), ("operator", "dim", False)]


def _fitting(rows: list[list[Cell]], width: int) -> list[list[Cell]]:
    """Leave out columns, and the ends of long formulas, so that the rows fit."""
    for unneeded in (("operator",), ("min", "max"), ("std",)):
        if table_width(_with_formulas_cut(rows, width, 34)) > width:
            rows = without(rows, unneeded)
    return _with_formulas_cut(rows, width, 16)


def _with_formulas_cut(rows: list[list[Cell]], width: int, least: int) -> list[list[Cell]]:
    place = [cell[0] for cell in rows[0]].index("formula")
    longest = max(len(row[place][0]) for row in rows)
    length = max(longest - max(table_width(rows) - width, 0), least)
    return [[*r[:place], (_cut(r[place][0], length), *r[place][1:]), *r[place + 1 :]] for r in rows]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip("….") + "…"


def _path(module: str | None, longest: int = 18) -> str:
    if module is None or len(module) <= longest:
        return module or ""
    return "…" + module[-longest + 1 :]


def write_operation(page: Page, step: Step, place: int, line: Line, about: Mapping[str, str]) -> None:
    """Write an operation, below the heading.

    place: its number in the step; line: it as mathematics; about: what to say of a tensor, by its id.
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
            said = about.get(f"operations/{place}/{label}/{name}")
            _tensor(page, names.get(name, name), name, tensor, said, is_unset)


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
