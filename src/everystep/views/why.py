"""Where a number comes from, as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from everystep.replay.why import Group, Number, Term, Why
from everystep.views.batch import about_numbers
from everystep.views.lines import Cell, Page, table_lines
from everystep.views.mathematics import Line, mathematics
from everystep.views.terminal import number as four_digits
from everystep.views.terminal import shortest

__all__ = [
    "check_text",
    "digits_text",
    "made_text",
    "rows_text",
    "value_text",
    "why_data",
    "why_page",
    "why_text",
]

_INDENT = 2
#: Lines of the way of a NaN that are shown at each end.
_ENDS = 5


def why_text(found: Why, *, has_title: bool = True) -> str:
    """Return where a number comes from, in lines.

    has_title: whether the first names the step.
    """
    text = why_page(found).plain
    return text if has_title else text.partition("\n")[2].rstrip()


def why_page(found: Why, *, name: str = "", width: int = 100) -> Text:
    """Return where a number comes from as text, to print with `soft_wrap=True`.

    name: of the run.
    """
    page = Page(width, values=False)
    _Writer(page, found).write(name)
    return page.text


class _Writer:
    """Writes an answer and its causes."""

    def __init__(self, page: Page, found: Why) -> None:
        self.page = page
        self.found = found
        self.step = found.number.step
        self.lines: dict[int, list[Line]] = {}

    def write(self, name: str) -> None:
        """Write everything."""
        step = self.found.step
        exact = "bit-identical" if step.is_exact else f"differs from step {step.diverged_at} on"
        where = f"{name}, step {step.number:,}" if name else f"step {step.number:,}"
        self.page.line((where, "bold"), (f"  replayed, {exact}", "dim"))
        blocks = [self.found]
        self._block(self.found)
        if self.found.began is not None:
            self._way(self.found.causes)
        else:
            blocks += _below(self.found)
            for each in blocks[1:]:
                self._block(each)
        if any(number.row is not None for each in blocks for number in each.numbers):
            batch = self.found.step.batch
            self.page.blank()
            self.page.line((about_numbers("" if batch.rows is None else batch.source), "dim"))

    def _way(self, way: tuple[Why, ...]) -> None:
        """Write what a NaN or infinity came through, and where it began."""
        *through, last = way
        if through:
            self.page.blank()
            self.page.line(("through", "dim"))
            left_out = len(through) - 2 * _ENDS + self.found.left_out
            for place, each in enumerate(through):
                if left_out > 0 and place == _ENDS:
                    self.page.line((f"{left_out:,} more", "dim"), indent=_INDENT)
                if left_out <= 0 or not _ENDS <= place < len(through) - _ENDS:
                    self._through(each)
        self.page.blank()
        self.page.line(("began here", "dim"))
        self._block(last)

    def _through(self, each: Why) -> None:
        value = value_text(each.number)
        step = "" if each.number.step == self.step else f"step {each.number.step:,}  "
        parts = [(step, "dim"), (f"{each.number.name}  ", ""), (f"{value}  ", "bold red")]
        self.page.line(*parts, (self._made(each), "dim"), indent=_INDENT)

    def _block(self, each: Why) -> None:
        number = each.number
        step = f"  step {number.step:,}" if number.step != self.step else ""
        self.page.blank()
        name = each.asked or number.name
        is_same = name.replace(" ", "") == number.name.replace(" ", "")
        also = "" if is_same else f"  {number.name}"
        self.page.line((name, "bold"), (f"  {value_text(number)}", ""), (also, "dim"), (step, "dim"))
        if each.origin == "operation" or each.operation is not None:
            self.page.line((self._made(each), ""), indent=_INDENT)
        if each.formula:
            self.page.line(("from ", "dim"), (each.formula, ""), indent=_INDENT)
        if each.note:
            self.page.line((each.note, "dim"), indent=_INDENT)
        if each.groups:
            headings, *lines = table_lines(_rows(each))
            for line in [headings] * bool(headings.plain.strip()) + lines:
                self.page.text.append(" " * 2 * _INDENT).append(line).append("\n")
        if each.unknown:
            known = ", ".join(each.unknown)
            text = f"which numbers it used is not known; it was given all of: {known}"
            self.page.wrapped(text, "dim", indent=_INDENT)
        if each.formula and each.groups and each.origin == "operation":
            self.page.line(*check_text(each), indent=_INDENT)
        if rows := rows_text(each):
            self.page.wrapped(rows, "", indent=_INDENT)

    def _made(self, each: Why) -> str:
        if each.operation is None:
            return each.note or each.origin
        if each.number.step not in self.lines:
            self.lines[each.number.step] = mathematics(each.step.operations)
        return made_text(each, self.lines[each.number.step])


def made_text(found: Why, lines: list[Line] | None = None) -> str:
    """Return the operation that made a number, as mathematics.

    lines: the mathematics of its step, if it is there already.
    """
    assert found.operation is not None and found.observed is not None
    line = (lines or mathematics(found.step.operations))[found.operation]
    operation = found.observed.operation
    left = f"#{found.operation}  {line.left}" if line.left else f"#{found.operation}"
    of = f" of {operation.module}" if operation.module else ""
    return f"{left} = {line.right}  ({found.step.phases[found.operation]}{of})"


def _below(found: Why) -> Iterator[Why]:
    for each in found.causes:
        yield each
        yield from _below(each)


def _rows(each: Why) -> list[list[Cell]]:
    """Return the numbers of an answer as rows of a table: a term, its numbers, where they are from."""
    most = max(len(_names(term)) for group in each.groups for term in group.terms or (Term({}),))
    is_sum = any(group.rest is not None or _hasvalue_text(group) for group in each.groups)
    heading: list[Cell] = [("term" if is_sum else "", "dim", is_sum)]
    for place in range(most):
        main = max(each.groups, key=lambda group: group.count)
        names = _names(main.terms[0]) if is_sum and main.terms else []
        title = names[place] if place < len(names) else " "
        heading += [(title, "dim", False), (" ", "dim", True)]
    rows: list[list[Cell]] = [[*heading, (" ", "dim", False)]]
    for group in each.groups:
        for term in group.terms:
            rows.append(_row(group, term, most))
        if group.count > len(group.terms):
            left = group.count - len(group.terms)
            rest = digits_text(group.rest) if group.rest is not None else ""
            more = f"{left:,} more" + (f" of {group.text}" if not is_sum else "")
            rows.append([(rest, "", True), (more, "dim", False), *[("", "", False)] * (2 * most)])
    return rows


def _hasvalue_text(group: Group) -> bool:
    return any(term.value is not None for term in group.terms)


def _names(term: Term) -> list[str]:
    return [*term.numbers, *term.weights]


def _row(group: Group, term: Term, most: int) -> list[Cell]:
    first = (group.text, "dim", False) if term.value is None else (digits_text(term.value), "", True)
    cells: list[Cell] = [first]
    where = []
    for number in term.numbers.values():
        cells += [(number.name, "", False), (value_text(number), "", True)]
        if number.row is not None:
            where.append(f"row {number.row:,}")
    for weight in term.weights.values():
        cells += [("", "", False), (shortest(weight), "", True)]
    cells += [("", "", False)] * (2 * (most - len(_names(term))))
    return [*cells, (", ".join(dict.fromkeys(where)), "dim", False)]


def check_text(each: Why) -> list[tuple[str, str]]:
    """Return whether the numbers shown give the number."""
    if each.recomputed is None:
        return [("the formula is not computed here", "dim")]
    if each.is_equal:
        return [("= ", "bold"), (value_text(each.number), ""), ("  the same bits", "dim")]
    text = _text_of(each.recomputed, each.number.dtype)
    if isinstance(each.number.value, bool | int) or each.recomputed != each.recomputed:
        return [("\N{NOT EQUAL TO} ", "bold"), (text, "")]
    off = each.number.value - each.recomputed
    off = four_digits(abs(off) if isinstance(off, complex) else off)
    return [("\N{ALMOST EQUAL TO} ", "bold"), (text, ""), (f"  off by {off}", "dim")]


def rows_text(each: Why) -> str:
    """Return the rows of the batch behind a NaN or infinity."""
    if each.rows is None or each.origin == "batch":
        return ""
    if not each.rows:
        return "no row of the batch is behind it"
    if len(each.rows) == each.step_rows and len(each.rows) > 1:
        return f"all {len(each.rows):,} rows of the batch are behind it"
    shown = ", ".join(map(str, each.rows[:10]))
    more = f" and {len(each.rows) - 10:,} more" if len(each.rows) > 10 else ""
    return f"row{'s' * (len(each.rows) > 1)} {shown}{more} of {each.step.batch.whole}"


def value_text(number: Number) -> str:
    """Return a number in the fewest digits that give it back."""
    return _text_of(number.value, number.dtype)


def _text_of(value: Any, dtype: str) -> str:
    if isinstance(value, complex):
        half = "float64" if dtype == "complex128" else "float32"
        real, imaginary = _text_of(value.real, half), _text_of(value.imag, half)
        return f"{real}{'' if imaginary.startswith('-') else '+'}{imaginary}j"
    if not isinstance(value, float):
        return str(value)
    return shortest(value) if dtype != "float64" else repr(value)


def digits_text(value: Any) -> str:
    """Return a term of a sum: it is of double precision, and shown in eight digits."""
    return f"{value:.8g}" if isinstance(value, float | complex) else str(value)


def why_data(found: Why) -> dict[str, Any]:
    """Return the same as plain data, with every number in full precision."""
    seen = found.observed
    return {
        **_number(found.number),
        "origin": found.origin,
        "operation": found.operation,
        "operator": seen and seen.operation.operator,
        "phase": None if found.operation is None else found.step.phases[found.operation],
        "module": seen and seen.operation.module,
        "formula": found.formula,
        "divisor": found.divisor,
        "groups": [
            {
                "text": group.text,
                "count": group.count,
                "rest": _plain(group.rest),
                "terms": [
                    {
                        "value": _plain(term.value),
                        "numbers": {key: _number(each) for key, each in term.numbers.items()},
                        "weights": term.weights,
                    }
                    for term in group.terms
                ],
            }
            for group in found.groups
        ],
        "recomputed": _plain(found.recomputed),
        "is_equal": found.is_equal,
        "unknown": list(found.unknown),
        "note": found.note,
        "left_out": found.left_out,
        "rows": None if found.rows is None else list(found.rows),
        "causes": [why_data(each) for each in found.causes],
    }


def _number(number: Number) -> dict[str, Any]:
    return {
        "step": number.step,
        "name": number.name,
        "value": _plain(number.value),
        "dtype": number.dtype,
        "row": number.row,
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, complex) else value
