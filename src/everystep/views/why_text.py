"""Where a number comes from, as text and as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from rich.text import Text

from everystep.answers.why import Group, Number, Spot, Term, Why
from everystep.errors import UsageError
from everystep.recording.facts import Facts
from everystep.recording.texts import shortest
from everystep.replay.opened_step import Step
from everystep.views.formatting import about_numbers, several
from everystep.views.formatting import number as four_digits
from everystep.views.mathematics import Line, mathematics
from everystep.views.step_data import tensor_of
from everystep.views.terminal import Cell, Column, Page, keyed

__all__ = ["derived", "spot_of", "why_text"]

_INDEX = re.compile(r"\d{1,18}(,\d{1,18})*", re.ASCII)

_INDENT = 2
#: Lines that are shown at each end of the path of a NaN.
_ENDS = 5


def why_text(found: Why, *, name: str = "", width: int = 100) -> Text:
    """Return where a number comes from as text, to print with `soft_wrap=True`.

    name: of the run.
    """
    page = Page(width)
    _Writer(page, found).write(name)
    return page.text


# For run.why(3, "gradients['0.weight'][2, 1]", terms=1), it writes
#   gradients['0.weight'][2, 1]  0.0660336  #10[2, 1]         what was asked, the number, its own name
#     #10  0.weight.grad = ∂#0ᵀ · x  (backward of 0)          `_made`
#     from the sum of 8 terms self * mat2
#              term  self                   mat2              `_columns`, then `_rows`
#        0.09333699  #9[3, 2]  0.090104215  batch.x[3, 1]  1.0358782  row 3
#       -0.02730335  7 more
#     ≈ 0.066033594  off by 7.451e-09                         `_check_text`
class _Writer:
    def __init__(self, page: Page, found: Why) -> None:
        self.page = page
        self.found = found
        self.step = found.number.step
        self.lines: dict[tuple[int | None, int], list[Line]] = {}

    def write(self, name: str) -> None:
        step = self.found.step
        exact = "bit-identical" if step.is_exact else f"differs from step {step.diverged_at} on"
        where = f"{name}, step {step.number:,}" if name else f"step {step.number:,}"
        self.page.line((where, "bold"), (f"  replayed, {exact}", "dim"))
        # The way of a NaN has lines of its own; other followed numbers are blocks like the first.
        blocks = [self.found, *(_below(self.found) if self.found.began is None else ())]
        for each in blocks:
            self._block(each)
        if self.found.began is not None:
            self._way(self.found.causes)
        if any(number.row is not None for each in blocks for number in each.numbers):
            batch = self.found.step.batch
            self.page.blank()
            self.page.line((about_numbers("" if batch.rows is None else batch.source), "dim"))

    def _way(self, way: tuple[Why, ...]) -> None:
        """Write the way of a NaN or infinity, and its origin."""
        *through, last = way
        if through:
            self.page.blank()
            self.page.line(("through", "dim"))
            # Those that the answer itself has left out are in the middle, too.
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
        value = exact_text(each.number)
        parts = [
            (self._where(each.number), "dim"),
            (f"{each.number.name}  ", ""),
            (f"{value}  ", "bold red"),
        ]
        line = each.observed and each.observed.line
        place = (f"  {line.place}" if line else "", "green")
        self.page.line(*parts, (self._made(each), "dim"), place, indent=_INDENT)

    def _where(self, number: Number) -> str:
        """Return the step and the rank of a number, if they are not those of the question."""
        rank = "" if number.rank is None else f"rank {number.rank}  "
        return rank + (f"step {number.step:,}  " if number.step != self.step else "")

    def _block(self, each: Why) -> None:
        number = each.number
        name = each.asked or number.name
        # #7[17,3] and #7[17, 3] are one name.
        is_same = name.replace(" ", "") == number.name.replace(" ", "")
        also = ("" if is_same else f"  {number.name}") + f"  {self._where(number)}"
        self.page.blank()
        self.page.line((name, "bold"), (f"  {exact_text(number)}", ""), (also, "dim"))
        if each.origin == "operation" or each.operation is not None:
            self.page.line((self._made(each), ""), indent=_INDENT)
            if each.observed is not None and each.observed.line is not None:
                self.page.line((str(each.observed.line), "green"), indent=_INDENT)
        if each.formula:
            self.page.line(("from ", "dim"), (each.formula, ""), indent=_INDENT)
        if each.note:
            self.page.line((each.note, "dim"), indent=_INDENT)
        if each.groups:
            self.page.table(_columns(each), list(_rows(each)), indent=2 * _INDENT)
        if each.unknown:
            known = ", ".join(each.unknown)
            text = f"which numbers it used is unknown; its inputs were all of: {known}"
            self.page.wrapped(text, "dim", indent=_INDENT)
        if each.formula and each.groups and each.origin == "operation":
            self.page.line(*_check_text(each), indent=_INDENT)
        if rows := _rows_text(each):
            self.page.wrapped(rows, "", indent=_INDENT)

    def _made(self, each: Why) -> str:
        if each.operation is None:
            return each.note or each.origin
        # The mathematics of a step is of all its operations: made once for the numbers of one step.
        place = each.number.rank, each.number.step
        if place not in self.lines:
            self.lines[place] = mathematics(each.step.operations)
        return _made_text(each, self.lines[place])


def _made_text(found: Why, lines: list[Line] | None = None) -> str:
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


def _columns(each: Why) -> list[Column[Mapping[str, Cell]]]:
    """Return the columns of the numbers of an answer: a term, its numbers, where they are from."""
    # Groups have different arguments; the titles are those of the one with the most terms.
    most = max(len(_numbers(term)) for group in each.groups for term in group.terms or (Term({}),))
    main = max(each.groups, key=lambda group: group.count)
    names = [*main.terms[0].numbers, *main.terms[0].weights] if _is_sum(each) and main.terms else []
    titles = [*names, *[""] * most][:most]
    pairs = (
        (keyed(f"name {i}", title), keyed(f"text {i}", "", is_number=True))
        for i, title in enumerate(titles)
    )
    first = keyed("term", "term" if _is_sum(each) else "", is_number=_is_sum(each))
    return [first, *chain.from_iterable(pairs), keyed("row", "", style="dim")]


def _is_sum(each: Why) -> bool:
    return any(
        group.rest is not None or any(term.value is not None for term in group.terms)
        for group in each.groups
    )


def _rows(each: Why) -> Iterator[dict[str, Cell]]:
    """Yield a row for each term, and for those that are left out together."""
    for group in each.groups:
        for term in group.terms:
            rows = (number.row for number in term.numbers.values() if number.row is not None)
            row: dict[str, Cell] = {
                "term": (group.text, "dim") if term.value is None else _digits_text(term.value),
                "row": ", ".join(dict.fromkeys(f"row {row:,}" for row in rows)),
            }
            for place, (name, text) in enumerate(_numbers(term)):
                row |= {f"name {place}": name, f"text {place}": text}
            yield row
        if group.count > len(group.terms):
            of = "" if _is_sum(each) else f" of {group.text}"
            more = f"{group.count - len(group.terms):,} more{of}"
            yield {"term": _optional(group.rest) or "", "name 0": (more, "dim")}


def _numbers(term: Term) -> list[tuple[str, str]]:
    """Return the names and the texts of the numbers of a term; its weights have no names."""
    numbers = [(number.name, exact_text(number)) for number in term.numbers.values()]
    return [*numbers, *(("", shortest(weight)) for weight in term.weights.values())]


def _check_text(each: Why) -> list[tuple[str, str]]:
    """Return whether the numbers shown give the number."""
    if each.recomputed is None:
        return [("the formula is not computed here", "dim")]
    if each.is_equal:
        return [("= ", "bold"), (exact_text(each.number), ""), ("  the same bits", "dim")]
    text = _text_of(each.recomputed, each.number.dtype)
    # Whole numbers and truths are right or wrong: a distance has no meaning.
    if isinstance(each.number.value, bool | int) or each.recomputed != each.recomputed:
        return [("\N{NOT EQUAL TO} ", "bold"), (text, "")]
    off = each.number.value - each.recomputed
    off = four_digits(abs(off) if isinstance(off, complex) else off)
    return [("\N{ALMOST EQUAL TO} ", "bold"), (text, ""), (f"  off by {off}", "dim")]


def _rows_text(each: Why) -> str:
    """Return the rows of the batch behind a NaN or infinity."""
    if each.rows is None or each.origin == "batch":
        return ""
    if not each.rows:
        return "it depends on no row of the batch"
    if len(each.rows) == each.step.batch.count and len(each.rows) > 1:
        return f"it depends on all {len(each.rows):,} rows of the batch"
    return f"{several('row', each.rows, 10)} of {each.step.batch.whole}"


def exact_text(number: Number) -> str:
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


def _digits_text(value: Any) -> str:
    """Return a term of a sum: it is of double precision, and shown in eight digits."""
    return f"{value:.8g}" if isinstance(value, float | complex) else str(value)


def derived(part: Number | Term | Group | Why) -> dict[str, Any]:
    """Return what an answer, or a part of it, is shown with besides its fields."""
    if isinstance(part, Term):
        return {"text": _optional(part.value)}
    if isinstance(part, Group):
        return {"rest_text": _optional(part.rest)}
    if isinstance(part, Number):
        # Linked where the page can ask again: nothing is behind a number of the batch.
        is_linked = part.is_made or part.name.startswith(("parameters", "buffers", "tensors"))
        is_linked &= part.rank is None and not part.name.endswith(".bits")
        return {"text": exact_text(part), "is_linked": is_linked}
    is_checked = part.formula and part.groups
    return {
        "made": None if part.operation is None else _made_text(part),
        "observed": part.observed,
        "phase": None if part.operation is None else part.step.phases[part.operation],
        "check": "".join(text for text, _ in _check_text(part)) if is_checked else "",
        "rows_text": _rows_text(part),
        "has_begun": part.began is not None,
    }


def _optional(value: Any) -> str | None:
    return None if value is None else _digits_text(value)


def spot_of(step: Step, facts: Facts, id: str, index: str) -> str | Spot:
    """Return where a number of a tensor is, for `why`.

    facts: of the run; id: of the tensor, as `Step.data` names it; index: of the number in it: `3,5`.

    Raises:
        UsageError: there is no such number, or it is unknown.
    """
    shape = tuple(tensor_of(step, id, facts).shape)
    if index and not _INDEX.fullmatch(index):
        raise UsageError(f"index is {index!r:.80}; write 3,5")
    place = tuple(map(int, index.split(","))) if index else ()
    at = str([*place]) if place else ""
    kind, _, name = id.partition("/")
    # Ids are nearly expressions; the names of other tensors of the batch are those of the program.
    if id in ("batch.x", "batch.y"):
        return f"{id}{at}"
    if kind in ("parameters", "buffers", "gradients", "activations"):
        return f"{kind}[{name!r}]{at}"
    if kind == "updates":
        parameter, _, part = name.rpartition("/")
        return f"updates[{parameter!r}]{'' if part == 'change' else f'.{part}'}{at}"
    if kind == "batch":
        return f"tensors[{f'batch/{name}'!r}]{at}"
    if kind == "operations":
        number, role, tensor = name.split("/", 2)
        if len(place) != len(shape) or any(i >= n for i, n in zip(place, shape, strict=True)):
            raise UsageError(f"{id!r:.200} has shape {shape}, and no number at {place}")
        return Spot(tensor, place, int(number) + (role == "results"))
    raise UsageError(f"no operation of step {step.number} makes the numbers of {id!r:.200}")
