"""A parsed question about a step, and error messages that show the position."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everystep.errors import ExpressionError, Fault, did_you_mean
from everystep.expression.language import plain, truth

__all__ = ["Evaluate", "Expression", "Reference", "ValueOf", "column", "error_at"]


# e.g. in `norm(gradients['0.weight']) > 2 * previous.loss`: Reference("gradients", "0.weight", False)
# and Reference("loss", "", True).
class Reference(NamedTuple):
    """Something of a step that an expression names."""

    #: loss, step, batch, rows, parameters, buffers, gradients, activations, updates or measurements
    kind: str
    #: `0.weight`; `x` or `y` of the batch; `loss` or `gradient` of the rows; empty for loss and step
    name: str
    #: of the step before
    is_previous: bool
    #: of updates: empty (after - before), `before` or `after`
    part: str = ""

    @property
    def is_recorded(self) -> bool:
        """Whether recorded columns have it."""
        return self.kind in ("loss", "step", "measurements")

    def __str__(self) -> str:
        name = f"[{self.name!r}]" if self.name else ""
        if self.kind in ("batch", "rows"):
            name = f".{self.name}"
        return "previous." * self.is_previous + self.kind + name + (f".{self.part}" if self.part else "")


ValueOf = Callable[[Reference], Any]
Evaluate = Callable[[ValueOf], Any]


@dataclass(frozen=True)
class Expression:
    """A question about a step, as `parse` reads it.

    evaluate: returns its value on a step, a plain number or a tensor; use it at once, since a tensor may
    share its memory with a result of `value_of`. It raises ExpressionError if the values do not fit the
    expression.

    `value_of` returns the value of a reference: a plain number, or a tensor, which is never changed. It
    is called only for needed references (`step > 1 and loss > previous.loss` needs nothing previous at
    step 1), and its exceptions pass through.
    """

    text: str
    references: frozenset[Reference]
    evaluate: Evaluate = field(repr=False, compare=False)

    @property
    def is_recorded(self) -> bool:
        """Whether the recorded columns (loss, step, measurements) are enough to answer it."""
        return all(reference.is_recorded for reference in self.references)

    def number(self, value_of: ValueOf) -> float:
        """Return its value on a step as one number.

        Raises:
            ExpressionError: as `evaluate`, or the value is a tensor of several elements or of none.
        """
        return float(self._as(plain, value_of))

    def truth(self, value_of: ValueOf) -> bool:
        """Return whether it holds on a step. As in Python, every number except 0 is true, NaN too.

        Raises:
            ExpressionError: as `evaluate`, or the value is a tensor of several elements or of none.
        """
        return bool(self._as(truth, value_of))

    def check(self, known: Mapping[str, Collection[str]]) -> None:
        """Check that the names in the expression exist, by kind. Kinds not in `known` pass.

        Raises:
            ExpressionError: some do not exist; lists all of them in its faults.
        """
        faults = []
        for reference in sorted(self.references):
            names = known.get(reference.kind)
            if reference.name and names is not None and reference.name not in names:
                cure = did_you_mean(reference.name, list(names)) if names else "the run has none"
                faults.append(Fault(str(reference), f"unknown name; {cure}".removesuffix("; ")))
        if faults:
            raise ExpressionError(faults, where=excerpt(self.text)[0])

    def _as(self, convert: Callable[[Any], Any], value_of: ValueOf) -> Any:
        value = self.evaluate(value_of)
        try:
            return convert(value)
        except ValueError as error:
            raise error_at(self.text, str(error)) from None


def error_at(text: str, problem: str, start: int = 0, end: int = 0) -> ExpressionError:
    """Return an error that shows the text, and marks it from start to end."""
    shown, first = excerpt(text, start)
    marks = "^" * min(end - start, max(len(shown) - first, 1))
    return ExpressionError("\n  ".join([problem, shown, *([" " * first + marks] if marks else [])]))


def excerpt(text: str, start: int = 0) -> tuple[str, int]:
    """Return what fits on a line of the text around a place, and the column of that place in it."""
    # A character that moves the cursor would put the marks in the wrong place.
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    first = max(start - 60, 0) if len(text) > 100 else 0
    before, after = "..." * (first > 0), "..." * (len(text) > first + 100)
    return before + text[first : first + 100] + after, start - first + len(before)


def column(text: str, offset: int | None) -> int:
    """Return the character position of a byte offset from `ast`."""
    return len(text.encode()[:offset].decode(errors="ignore"))
