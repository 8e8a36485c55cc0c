"""Reading an expression: `ast` parses the text, and each node becomes a closure."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Collection
from functools import reduce
from inspect import signature
from typing import Any

from everystep.errors import ExpressionError, did_you_mean
from everystep.expression.language import (
    CONSTANTS,
    FUNCTIONS,
    OF_EACH,
    OPERATIONS,
    bounded,
    is_number,
    plain,
    truth,
)
from everystep.expression.question import Evaluate, Expression, Reference, ValueOf, column, error_at

__all__ = ["parse"]

_LONGEST = 10_000  # characters
_DEEPEST = 100  # levels of nesting
#: What torch raises for values that do not fit, and the functions of the language.
_FAILURES = (RuntimeError, IndexError, TypeError, ValueError, OverflowError)

#: The references that take no brackets.
_VALUES = {"loss", "step", "batch.x", "batch.y", "rows.loss", "rows.gradient"}
_NAMES = ("parameters", "buffers", "gradients", "activations", "updates", "measurements")
#: The references that take a name in brackets, with an example.
_MAPPINGS = {name: f"{name}['0.weight']" for name in _NAMES} | {
    "activations": "activations['0']",
    "measurements": "measurements['lr']",
}
#: Names that are not values alone, and what to write instead.
_INCOMPLETE = _MAPPINGS | {
    "batch": "batch.x or batch.y",
    "rows": "rows.loss or rows.gradient",
    "previous": "previous.loss",
}
#: What an expression cannot end with.
_UNFINISHED = re.compile(r"([-+*/%@<>=,.(\[]+|\b(and|or|not))\s*$")
#: A name without its quotes, such as a shell takes away.
_UNQUOTED = re.compile(r"([a-z]+)\[(\d+\.[a-z_][\w.]*)\]")
#: The names that mean something in any expression.
_LANGUAGE = frozenset({"loss", "step", *CONSTANTS, *_INCOMPLETE, *FUNCTIONS})
#: Why the language does not support what Python has.
_REFUSED: dict[type[ast.AST], str] = {
    ast.Lambda: "lambda is not supported; write the value itself",
    ast.NamedExpr: "expressions cannot assign; to compare, write ==",
    ast.JoinedStr: "f-strings are not supported; write the name itself, in quotes",
    ast.Invert: "~ is not supported; negate a condition with not",
    **dict.fromkeys(
        (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
        "comprehensions are not supported; sum(...) and similar functions cover all elements",
    ),
    **dict.fromkeys(
        (ast.Tuple, ast.List, ast.Set, ast.Dict),
        "an expression is a single value; use one expression per value",
    ),
    **dict.fromkeys(
        (ast.Is, ast.IsNot, ast.In, ast.NotIn),
        "is and in are not supported; to compare, write == or !=",
    ),
}


def parse(text: str, measurements: Collection[str] = ()) -> Expression:
    """Parse an expression.

    measurements: recorded names. They may be written bare (`lr` for `measurements['lr']`) if they are
    identifiers and mean nothing else here.

    Raises:
        ExpressionError: the expression is invalid.
    """
    # Line breaks, too: an expression may be written over several lines.
    text = re.sub(r"\s", " ", text).strip()
    if len(text) > _LONGEST:
        raise error_at(text, f"an expression has at most {_LONGEST:,} characters; split it")
    try:
        with warnings.catch_warnings(action="ignore"):  # about invalid escapes
            body = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise _syntax_error(text, error) from None
    except (RecursionError, MemoryError):
        raise error_at(text, "the expression is nested too deeply; split it") from None
    except ValueError as error:  # half a character
        raise error_at(text, f"the expression is invalid: {error}") from None
    # `ast` counts bytes, and a message shows characters.
    end = column(text, body.end_col_offset)
    # `ast` drops comments, and with them the rest of a condition.
    if "#" in text[end:]:
        raise error_at(text, "comments are not supported", text.index("#", end), len(text))
    # A measurement named `loss` must not hide the loss: it takes measurements['loss'].
    reader = _Compiler(text, frozenset(measurements) - _LANGUAGE)
    evaluate = reader.read(body)
    return Expression(text, frozenset(reader.references), evaluate)


# `norm(gradients['0.weight']) > 2` becomes nested functions, each of `value_of`:
#   compare( apply(norm, recall(Reference("gradients", "0.weight"))), constant(2) )
# Nothing of the text is executed as Python: only the nodes with a `visit_` method are known.
class _Compiler(ast.NodeVisitor):
    """Turns the nodes of an expression into closures, and notes what they refer to."""

    def __init__(self, text: str, bare: frozenset[str]) -> None:
        self.text = text
        self.bare = bare
        self.references: set[Reference] = set()
        self.depth = 0

    def read(self, node: ast.expr) -> Evaluate:
        # Python itself would overflow its stack, at a depth that depends on the caller.
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.error(node, "the expression is nested too deeply; split it")
        evaluate: Evaluate = self.visit(node)
        self.depth -= 1
        return evaluate

    def generic_visit(self, node: Any) -> Evaluate:
        raise self.error(node, _why_refused(node))

    def error(self, node: ast.expr, problem: str | Exception) -> ExpressionError:
        """Return the error at a node; of torch's messages, which can be long, the first line."""
        line = (str(problem).splitlines() or [type(problem).__name__])[0][:300]
        start, end = (column(self.text, offset) for offset in (node.col_offset, node.end_col_offset))
        return error_at(self.text, line, start, end)

    def attempt(self, node: ast.expr, function: Callable[..., Any], *values: Any) -> Any:
        try:
            return function(*values)
        except _FAILURES as error:
            raise self.error(node, error) from error

    def apply(self, node: ast.expr, function: Callable[..., Any], *operands: ast.expr) -> Evaluate:
        read = [self.read(operand) for operand in operands]
        return lambda value_of: self.attempt(node, function, *[operand(value_of) for operand in read])

    def operation(self, node: ast.expr, sign: ast.AST) -> Callable[..., Any]:
        if isinstance(sign, ast.Not):
            return lambda value: not truth(value)
        if type(sign) not in OPERATIONS:
            raise self.error(node, _why_refused(sign))
        return OPERATIONS[type(sign)]

    def visit_Constant(self, node: ast.Constant) -> Evaluate:
        if isinstance(node.value, str):
            raise self.error(node, "text is only supported as a name in brackets: gradients['0.weight']")
        if not is_number(node.value):
            raise self.error(
                node, "not a supported number; use real numbers, True, False, nan, inf or pi"
            )
        number = bounded(node.value)
        return lambda value_of: number

    def visit_Name(self, node: ast.Name | ast.Attribute) -> Evaluate:
        name, is_previous = _dotted(node)
        if name in CONSTANTS and not is_previous:
            return lambda value_of: CONSTANTS[name]
        if name in _VALUES:
            kind, _, own = name.partition(".")
            if kind == "rows" and is_previous:
                raise self.error(node, f"{name} is known of a step itself, not of the one before")
            return self.refer(kind, own, is_previous)
        if name in self.bare:
            return self.refer("measurements", name, is_previous)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Subscript):
            mapping, is_previous = _dotted(node.value.value)
            if mapping == "updates" and node.attr in ("before", "after"):
                return self.refer(mapping, self.key(node.value), is_previous, node.attr)
        raise self.error(node, _why_no_name(node, name, is_previous, self.bare))

    visit_Attribute = visit_Name  # noqa: N815  # as `ast` calls it

    def refer(self, kind: str, name: str, is_previous: bool, part: str = "") -> Evaluate:
        reference = Reference(kind, name, is_previous, part)
        self.references.add(reference)

        def recall(value_of: ValueOf) -> Any:
            value = value_of(reference)
            return value if is_number(value) else value.detach()  # autograd has no part in this

        return recall

    def visit_Subscript(self, node: ast.Subscript) -> Evaluate:
        mapping, is_previous = _dotted(node.value)
        if mapping in _MAPPINGS:
            return self.refer(mapping, self.key(node), is_previous)
        whole = self.read(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        index = tuple(self.index(part) for part in parts)
        return lambda value_of: self.attempt(node, _elements, whole(value_of), index)

    def key(self, node: ast.Subscript) -> str:
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            return node.slice.value
        example = _MAPPINGS[_dotted(node.value)[0]]
        raise self.error(node.slice, f"expected a name in quotes in these brackets: {example}")

    def index(self, node: ast.expr | None) -> int | slice | None:
        match node:
            case None:
                return None
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(self.index(lower), self.index(upper), self.index(step))
            case ast.Constant(value=int(value)) if value < 2**63 and not isinstance(value, bool):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))) if value < 2**63:
                return -value
        raise self.error(node, "index with integers and slices: [0], [-1, :3]")

    def visit_Call(self, node: ast.Call) -> Evaluate:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in FUNCTIONS:
            raise self.error(node.func, _why_no_function(node.func))
        for keyword in node.keywords:
            raise self.error(keyword.value, f"{name} takes no keyword arguments; pass only the value")
        function = FUNCTIONS[name]
        wanted = len(signature(function).parameters)
        if len(node.args) != wanted and not (name in ("min", "max") and node.args):
            these = f"{wanted} argument" + "s" * (wanted > 1)
            raise self.error(node, f"{name} takes {these}, not {len(node.args)}")
        if name in OF_EACH:
            return self.apply(node, function, *node.args)
        return self.apply(node, lambda *values: plain(function(*values)), *node.args)

    def visit_BinOp(self, node: ast.BinOp) -> Evaluate:
        # a + b + c + ... is nested as deep as it is long; here it is a loop.
        nodes = [node]
        while isinstance(nodes[-1].left, ast.BinOp):
            nodes.append(nodes[-1].left)
        nodes.reverse()
        first = self.read(nodes[0].left)
        rest = [(place, self.operation(place, place.op), self.read(place.right)) for place in nodes]

        def combined(value_of: ValueOf) -> Any:
            value = first(value_of)
            for place, function, operand in rest:
                value = self.attempt(place, function, value, operand(value_of))
            return value

        return combined

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Evaluate:
        return self.apply(node, self.operation(node, node.op), node.operand)

    def visit_Compare(self, node: ast.Compare) -> Evaluate:
        comparisons = [self.operation(node, op) for op in node.ops]

        def chain(*values: Any) -> Any:  # elementwise
            neighbours = zip(comparisons, values, values[1:], strict=False)
            results = (compare(a, b) for compare, a, b in neighbours)
            # `&` of tensors is for each element; Python's `and` would ask whether the whole is true.
            return reduce(lambda so_far, result: result & so_far, results)

        return self.apply(node, chain, node.left, *node.comparators)

    def visit_BoolOp(self, node: ast.BoolOp) -> Evaluate:
        operands = [(place, self.read(place)) for place in node.values]
        # What decides is returned without a look at the rest, which may not exist: previous.loss at step
        # 1.
        decides = isinstance(node.op, ast.Or)

        def connected(value_of: ValueOf) -> Any:
            for place, operand in operands:
                value = operand(value_of)
                if place is not node.values[-1] and self.attempt(place, truth, value) is decides:
                    break
            return value

        return connected

    def visit_IfExp(self, node: ast.IfExp) -> Evaluate:
        test = self.apply(node.test, truth, node.test)
        yes, no = self.read(node.body), self.read(node.orelse)
        return lambda value_of: (yes if test(value_of) else no)(value_of)


def _dotted(node: ast.expr) -> tuple[str, bool]:
    """Return a dotted name without its `previous.`, and whether it had one; empty if not a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return "", False
    is_previous = node.id == "previous" and bool(parts)
    return ".".join(parts if is_previous else [node.id, *parts]), is_previous


def _elements(value: Any, index: tuple[int | slice | None, ...]) -> Any:
    if is_number(value):
        raise ValueError("this is a single number and has no elements to index")
    return value[index]


def _syntax_error(text: str, error: SyntaxError) -> ExpressionError:
    start = max((error.offset or 1) - 1, 0)
    message = re.split("[.;] ", error.msg)[0]
    if not text:
        message = "the expression is empty; write, for example, loss > 1"
    elif text[start : start + 1] == "=" or "'=='" in error.msg:
        message = "expressions cannot assign; to compare, write =="
    elif text[start : start + 1] in ("&", "|", "!"):
        message = "combine conditions with and, or, not"
    elif (bare := _UNQUOTED.search(text)) is not None:
        message = f"a name needs quotes, which a shell takes away: \"{bare[1]}['{bare[2]}']\""
        return error_at(text, message, bare.start(), bare.end())
    elif message == "invalid syntax" and (last := _UNFINISHED.search(text)) is not None:
        return error_at(text, f"something is missing after {last[0].strip()}", last.start(), last.end())
    elif message == "invalid syntax":
        message = "the expression is invalid from here on"
    return error_at(text, message, start, start + 1)


def _why_refused(node: ast.AST) -> str:
    operators = "supported operators: + - * / // % ** @; combine conditions with and, or"
    other = f"{type(node).__name__} is not supported"
    return _REFUSED.get(type(node), operators if isinstance(node, ast.operator) else other)


def _why_no_name(node: ast.expr, name: str, is_previous: bool, bare: Collection[str]) -> str:
    """Explain why a name, without its `previous.`, is unknown. `bare` are measurements."""
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
    known = sorted((_LANGUAGE - {*CONSTANTS} if is_previous else _LANGUAGE) | {*bare})
    return f"unknown name {name}; " + (
        did_you_mean(name, known) or "write tensors as gradients['0.weight']"
    )


def _why_no_function(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute) and node.attr in FUNCTIONS:
        return f"values have no methods; write {node.attr}(...) around the value"
    name = node.id if isinstance(node, ast.Name) else "this"
    cure = did_you_mean(name, [*FUNCTIONS]) or "known functions: " + " ".join(FUNCTIONS)
    return f"{name} is not a function; {cure}"
