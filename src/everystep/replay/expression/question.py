"""A parsed question about a step; what is refused; and error messages that show the position."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everystep.errors import ExpressionError, Fault, did_you_mean
from everystep.replay.expression.language import CONSTANTS, FUNCTIONS, plain, truth

__all__ = [
    "LANGUAGE",
    "MAPPINGS",
    "Evaluate",
    "Expression",
    "Reference",
    "ValueOf",
    "column",
    "error_at",
    "excerpt",
    "syntax_error",
    "why_no_function",
    "why_no_name",
    "why_refused",
]


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

    def __str__(self) -> str:
        name = (
            f".{self.name}"
            if self.kind in ("batch", "rows")
            else f"[{self.name!r}]"
            if self.name
            else ""
        )
        return "previous." * self.is_previous + self.kind + name + (f".{self.part}" if self.part else "")


ValueOf = Callable[[Reference], Any]
Evaluate = Callable[[ValueOf], Any]


@dataclass(frozen=True)
class Expression:
    """A question about a step, as `parse` reads it.

    `value_of` returns the value of a reference: a plain number, or a tensor, which is never changed. It
    is called only for what is needed (`step > 1 and loss > previous.loss` needs nothing previous at step
    1), and its exceptions pass through.
    """

    text: str
    references: frozenset[Reference]
    _evaluate: Evaluate = field(repr=False, compare=False)

    @property
    def is_recorded(self) -> bool:
        """Whether the recorded columns (loss, step, measurements) are enough to answer it."""
        return all(reference.kind in ("loss", "step", "measurements") for reference in self.references)

    def evaluate(self, value_of: ValueOf) -> Any:
        """Return its value on a step: a plain number, or a tensor.

        Use it at once: a tensor may share its memory with what `value_of` gave.

        Raises:
            ExpressionError: the values do not fit what is done with them.
        """
        return self._evaluate(value_of)

    def number(self, value_of: ValueOf) -> float:
        """Return its value on a step as one number.

        Raises:
            ExpressionError: as `evaluate`, or the value is a tensor of several elements or of none.
        """
        return float(self._as(plain, value_of))

    def truth(self, value_of: ValueOf) -> bool:
        """Tell whether it holds on a step. As in Python, every number but 0 does, NaN too.

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
        value = self._evaluate(value_of)
        try:
            return convert(value)
        except ValueError as error:
            raise error_at(self.text, str(error)) from None


_NAMES = ("parameters", "buffers", "gradients", "activations", "updates", "measurements")
#: What is followed by a name in brackets, and how.
MAPPINGS = {name: f"{name}['0.weight']" for name in _NAMES} | {
    "activations": "activations['0']",
    "measurements": "measurements['lr']",
}
#: Names that are not values by themselves, and what to write in their place.
_INCOMPLETE = MAPPINGS | {
    "batch": "batch.x or batch.y",
    "rows": "rows.loss or rows.gradient",
    "previous": "previous.loss",
}
#: What an expression cannot end with.
_UNFINISHED = re.compile(r"([-+*/%@<>=,.(\[]+|\b(and|or|not))\s*$")
#: The names that mean something in any expression.
LANGUAGE = frozenset({"loss", "step", *CONSTANTS, *_INCOMPLETE, *FUNCTIONS})


def error_at(text: str, problem: str, start: int = 0, end: int = 0) -> ExpressionError:
    """Return an error that shows the text, and marks it from start to end."""
    shown, first = excerpt(text, start)
    marks = "^" * min(end - start, max(len(shown) - first, 1))
    return ExpressionError("\n  ".join([problem, shown, *([" " * first + marks] if marks else [])]))


def syntax_error(text: str, error: SyntaxError) -> ExpressionError:
    """Return the error for what `ast` cannot read."""
    start = max((error.offset or 1) - 1, 0)
    message = re.split("[.;] ", error.msg)[0]
    if not text:
        message = "the expression is empty; write, for example, loss > 1"
    elif text[start : start + 1] == "=" or "'=='" in error.msg:
        message = "expressions cannot assign; to compare, write =="
    elif text[start : start + 1] in ("&", "|", "!"):
        message = "combine conditions with and, or, not"
    elif message == "invalid syntax" and (last := _UNFINISHED.search(text)) is not None:
        return error_at(text, f"something is missing after {last[0].strip()}", last.start(), last.end())
    elif message == "invalid syntax":
        message = "the expression is invalid from here on"
    return error_at(text, message, start, start + 1)


def why_refused(node: ast.AST) -> str:
    """Explain why the language does not support a Python construct."""
    match node:
        case ast.Lambda():
            return "lambda is not supported; write the value itself"
        case ast.NamedExpr():
            return "expressions cannot assign; to compare, write =="
        case ast.JoinedStr():
            return "f-strings are not supported; write the name itself, in quotes"
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            return "comprehensions are not supported; sum(...) and similar functions cover all elements"
        case ast.Tuple() | ast.List() | ast.Set() | ast.Dict():
            return "an expression is a single value; use one expression per value"
        case ast.Invert():
            return "~ is not supported; negate a condition with not"
        case ast.Is() | ast.IsNot() | ast.In() | ast.NotIn():
            return "is and in are not supported; to compare, write == or !="
        case ast.operator():
            return "supported operators: + - * / // % ** @; combine conditions with and, or"
    return f"{type(node).__name__} is not supported"


def why_no_name(node: ast.expr, name: str, is_previous: bool, bare: Collection[str]) -> str:
    """Explain why a name, without its `previous.`, means nothing. `bare` are measurements."""
    if name in _INCOMPLETE:
        return f"{name} alone is not a value; write {_INCOMPLETE[name]}"
    if is_previous and name.split(".")[0] == "previous":
        return "previous.previous is not supported: an expression sees a step and the one before it"
    if name in FUNCTIONS:
        return f"{name} is a function; write {name}(...)"
    if isinstance(node, ast.Attribute) and (not name or "." in name):
        if node.attr in FUNCTIONS:
            return f".{node.attr} is not supported; write {node.attr}(...) around the value"
        return (
            f"unknown attribute .{node.attr}; known are batch.x, batch.y, rows.loss, rows.gradient, "
            "updates[...].before and .after"
        )
    known = sorted((LANGUAGE - {*CONSTANTS} if is_previous else LANGUAGE) | {*bare})
    return f"unknown name {name}; " + (
        did_you_mean(name, known) or "write tensors as gradients['0.weight']"
    )


def why_no_function(node: ast.expr) -> str:
    """Explain why this cannot be called."""
    if isinstance(node, ast.Attribute) and node.attr in FUNCTIONS:
        return f"values have no methods; write {node.attr}(...) around the value"
    name = node.id if isinstance(node, ast.Name) else "this"
    cure = did_you_mean(name, [*FUNCTIONS]) or "known functions: " + " ".join(FUNCTIONS)
    return f"{name} is not a function; {cure}"


def excerpt(text: str, start: int = 0) -> tuple[str, int]:
    """Return what fits on a line of the text around a place, and the column of that place in it."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    first = max(start - 60, 0) if len(text) > 100 else 0
    before, after = "..." * (first > 0), "..." * (len(text) > first + 100)
    return before + text[first : first + 100] + after, start - first + len(before)


def column(text: str, offset: int | None) -> int:
    """Return the character position of a byte offset from `ast`."""
    return len(text.encode()[:offset].decode(errors="ignore"))
