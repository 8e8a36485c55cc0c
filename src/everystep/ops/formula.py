"""The language of formulas: the text that a person reads is the text that is computed.

A rule writes one text, such as `self + alpha * other`. Names are numbers of tensors, lists of them, or
settings of the operator; `written` puts the settings in for the reader, `value` computes the same text
in double precision. So the formula that is shown is the one that is computed.

`^` is a power. `a if c else b`, comparisons, `and`, `or` and `not` are those of Python, for each number.
`a · b` is the sum of the products; if `a` has more numbers than `b`, of each row of `a`, a row having as
many numbers as `b`. `a[b]` is the number of `a` at the place that `b` names: only that number is passed.
`TEXT where x = ..., y = ...` names repeated parts, each after the parts that it uses.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache, reduce
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = ["BINARY", "UNARY", "names_in", "number_text", "parsed", "total", "value", "written"]

# Not the names of functions, which a "(" follows, and not the e of 1e-05.
_NAME = re.compile(r"(?<![\w.])[a-z]\w*(?!\w|\()")
_WORDS = {"if", "else", "and", "or", "not", "where", "pi", "inf", "nan"}
#: A factor, a divisor or an exponent of 1, which is omitted for the reader.
_ONE = re.compile(
    r"(?<![/^] )(?<![\w.])1(?:\.0)? \* "
    r"| (?:[*/]|\^) 1(?:\.0)?(?=$|[),]| [-+*/<>=)]| if| else| where| and| or)"
)
_DEFINITION = re.compile(r", (?=\w+ = )")


def names_in(text: str) -> list[str]:
    """Return the names of numbers in a formula, in order, functions and definitions not among them."""
    defined = re.findall(r"(?:where|,) (\w+) = ", text)
    return [name for name in dict.fromkeys(_NAME.findall(text)) if name not in {*_WORDS, *defined}]


def written(text: str, settings: Mapping[str, Any], given: Collection[str]) -> str:
    """Return a formula for display, with its settings as numbers, unless they differ by term.

    given: the names of the numbers of tensors, which stay names.
    """
    names = {*names_in(text)}.difference(given)

    def put(found: re.Match[str]) -> str:
        setting = settings[found[0]] if found[0] in names else None
        if setting is None or isinstance(setting, np.ndarray):
            return found[0]
        shown = number_text(setting)
        # -2 ^ 2 would be read as -(2 ^ 2).
        is_base = shown.startswith("-") and text[found.end() :].startswith(" ^")
        return f"({shown})" if is_base else shown

    # A negative setting: `self + -0.1 * other` is written `self - 0.1 * other`.
    return re.sub(r"(?<=[\w)\]]) \+ -(?=\w)", " - ", _ONE.sub("", _NAME.sub(put, text)))


def number_text(number: Any) -> str:
    """Return a number in the fewest digits that restore it; as float32, if it is one."""
    if isinstance(number, int) or not math.isfinite(number):
        return str(number)
    with np.errstate(over="ignore"):
        single = np.float32(number)
    shown = str(single) if float(single) == number else repr(float(number))
    return shown.removesuffix(".0")


def value(text: str, numbers: Mapping[str, Any]) -> Any:
    """Return the result of a formula, in double precision: a number, or an array with one for each term.

    numbers: arrays, or single numbers, by name.
    """
    known = dict(numbers)
    *definitions, whole = _parsed(text)
    with np.errstate(all="ignore"):
        for name, tree in definitions:
            known[name] = _of(tree, known)
        return _of(whole[1], known)


@cache
def _parsed(text: str) -> list[tuple[str, ast.expr]]:
    whole, _, rest = text.partition(" where ")
    pairs = [each.split(" = ", 1) for each in _DEFINITION.split(rest)] if rest else []
    texts = [*((name, body) for name, body in pairs), ("", whole)]
    return [(name, parsed(body)) for name, body in texts]


def parsed(text: str) -> ast.expr:
    """Return the tree of a formula without definitions."""
    # Python's ^ binds more loosely than +, and its @ as its *.
    return ast.parse(text.replace("^", "**").replace("·", "@"), mode="eval").body


def total(values: Any) -> Any:
    """Return the exact sum, rounded once to double precision."""
    values = np.asarray(values)
    if np.iscomplexobj(values) or not np.isfinite(values).all():  # which fsum refuses
        return np.sum(values)
    return math.fsum(values.ravel())


def _of(tree: ast.expr, known: Mapping[str, Any]) -> Any:
    match tree:
        case ast.Constant():
            return tree.value
        case ast.Name():
            return known[tree.id] if tree.id in known else _CONSTANTS[tree.id]
        # `weight[indices]`: only the number at that place was passed.
        case ast.Subscript():
            return _of(tree.value, known)
        case ast.Call(func=ast.Name(id=name)):
            return _FUNCTIONS[name](*(_of(each, known) for each in tree.args))
        case ast.UnaryOp():
            operand = _of(tree.operand, known)
            return np.equal(operand, 0) if isinstance(tree.op, ast.Not) else np.negative(operand)
        case ast.BinOp():
            return _OPERATORS[type(tree.op)](_of(tree.left, known), _of(tree.right, known))
        case ast.Compare():
            sides = [_of(each, known) for each in (tree.left, *tree.comparators)]
            found = [
                _COMPARISONS[type(each)](*pair)
                for each, pair in zip(tree.ops, pairwise(sides), strict=True)
            ]
            return reduce(np.logical_and, found)
        case ast.BoolOp():
            joined = np.logical_and if isinstance(tree.op, ast.And) else np.logical_or
            return reduce(joined, (_of(each, known) for each in tree.values))
        # Both sides are computed for all numbers; what the other side gives, such as 0 / 0, is not used.
        case ast.IfExp():
            return np.where(*(_of(each, known) for each in (tree.test, tree.body, tree.orelse)))
    raise AssertionError(ast.dump(tree))


def _times(a: Any, b: Any) -> Any:
    # The keys of attention, one after the other, times one query: a product for each key.
    rows = np.reshape(a, (-1, np.size(b))) @ np.reshape(b, -1)
    return rows[0] if len(rows) == 1 else rows


def _extreme(one: Callable[[Any], Any], two: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    # `max(row)` is of a list, `max(self, 0)` of pairs; np.max takes a second argument for an axis.
    return lambda *given: one(*given) if len(given) == 1 else two(*given)


def _logsumexp(x: Any) -> Any:
    highest = np.max(x, initial=-np.inf)  # which it is of no numbers
    # The difference of two infinities would be NaN.
    return highest + np.log(total(np.exp(x - highest))) if np.isfinite(highest) else highest


_erf, _erfc = (np.vectorize(of, otypes=[float]) for of in (math.erf, math.erfc))
_CONSTANTS = {"pi": math.pi, "inf": math.inf, "nan": math.nan}
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: lambda a, b: np.power(np.asarray(a) * 1.0, b),  # NumPy refuses 2 ^ -1 of whole numbers
    ast.MatMult: _times,
}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
#: Functions of one number and of two, by the names of torch's operators.
UNARY: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(np, name) for name in ("exp", "exp2", "expm1", "log", "log1p", "log2", "log10")},
    **{name: getattr(np, name) for name in ("sqrt", "sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{name: getattr(np, name) for name in ("floor", "ceil", "trunc", "abs", "isnan", "isinf")},
    "sign": lambda x: np.nan_to_num(np.sign(x)),  # torch's sign of NaN is 0
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "erf": _erf,
    "erfc": _erfc,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(np, name) for name in ("floor_divide", "fmod", "logaddexp", "remainder")},
    "atan2": np.arctan2,
    "bitwise_and": lambda a, b: np.bitwise_and(np.asarray(a, np.int64), np.asarray(b, np.int64)),
    "bitwise_or": lambda a, b: np.bitwise_or(np.asarray(a, np.int64), np.asarray(b, np.int64)),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **UNARY,
    **BINARY,
    **{name: getattr(np, name) for name in ("round", "prod", "any", "all", "argmax", "argmin")},
    "max": _extreme(np.max, np.maximum),
    "min": _extreme(np.min, np.minimum),
    "sum": total,
    "mean": lambda x: np.divide(total(x), np.size(x)),
    "logsumexp": _logsumexp,
    "softmax": lambda x: np.exp(x - _logsumexp(x)),
    "row_sums": lambda x, count: np.reshape(x, (-1, int(count))).sum(1),
}
