"""Rules of operators whose result at a place depends on their inputs at that place alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everystep.ops.call import Call, Formula, Made, NoRuleError, Piece
from everystep.ops.formula import names_in

__all__ = ["BY_ARGUMENTS", "ELEMENTWISE", "elementwise", "foreach"]


def elementwise(call: Call, text: str, **places: Piece) -> Made:
    """Return a formula of arguments at the wanted place, each under its own name.

    places: numbers of other places, by their name in the formula.
    """
    if call.place:
        raise NoRuleError("of another result than the first")
    given: dict[str, Piece] = {}
    settings: dict[str, Any] = {}
    for name in names_in(text):
        if name in places:
            given[name] = places[name]
        elif isinstance(call.arguments[name], str):
            given[name] = call.aligned(name)
        else:
            settings[name] = call.scalar(name)
    return Formula(text, given, settings)


ELEMENTWISE: dict[str, str] = {
    "add": "self + alpha * other",
    "sub": "self - alpha * other",
    "rsub": "other - alpha * self",
    "mul": "self * other",
    "maximum": "max(self, other)",
    "minimum": "min(self, other)",
    "pow": "self ^ exponent",
    "eq": "self == other",
    "ne": "self != other",
    "lt": "self < other",
    "le": "self <= other",
    "gt": "self > other",
    "ge": "self >= other",
    "logical_and": "self and other",
    "logical_or": "self or other",
    "logical_xor": "(self != 0) != (other != 0)",
    "logical_not": "not self",
    "floor_divide": "floor(self / other)",
    "where": "self if condition else other",
    "masked_fill": "value if mask else self",
    "addcmul": "self + value * tensor1 * tensor2",
    "addcdiv": "self + value * tensor1 / tensor2",
    "lerp": "self + weight * (end - self)",
    "neg": "-self",
    "reciprocal": "1 / self",
    "rsqrt": "1 / sqrt(self)",
    "frac": "self - trunc(self)",
    "sgn": "sign(self)",
    "copy": "src",
    **dict.fromkeys(("clone", "to_copy", "lift_fresh"), "self"),
    "xlogy": "0 if self == 0 and not isnan(other) else self * log(other)",
    "native_dropout_backward": "grad_output * mask * scale",
    **{
        name: f"{name}(self, other)"
        for name in ("atan2", "bitwise_and", "bitwise_or", "fmod", "logaddexp", "remainder")
    },
    **{
        name: f"{name}(self)"
        for name in (
            *(
                "abs",
                "exp",
                "exp2",
                "expm1",
                "log",
                "log1p",
                "log2",
                "log10",
                "sqrt",
                "sin",
                "cos",
                "tan",
            ),
            *("sinh", "cosh", "tanh", "asin", "acos", "atan", "erf", "erfc", "floor", "ceil", "trunc"),
            *("sign", "isnan", "isinf"),
        )
    },
}


def _clamp(call: Call) -> Made:
    """Return the rule of `clamp` and its variants, with what there is of both bounds."""
    text, places, settings = "self", {"self": call.aligned("self")}, {}
    for key, name, kept in (("min", "low", "max"), ("max", "high", "min")):
        if key not in call:
            continue
        text = f"{kept}({text}, {name})"
        if isinstance(call.arguments[key], str):
            places[name] = call.aligned(key)
        else:
            settings[name] = call.scalar(key)
    return Formula(text, places, settings)


def _division(call: Call) -> Made:
    mode = call.value("rounding_mode") if "rounding_mode" in call else None
    return elementwise(call, "self / other" if mode is None else f"{mode}(self / other)")


def _round(call: Call) -> Made:
    if not call.arguments.get("decimals"):
        return elementwise(call, "round(self)")
    return elementwise(call, "round(self * 10 ^ decimals) / 10 ^ decimals")


def _outer(call: Call) -> Made:
    """Return the rule of `addr`, which adds an outer product, and reads `self` only where it counts."""
    row, column = call.index
    vectors = {"vec1": call.piece("vec1", row), "vec2": call.piece("vec2", column)}
    return elementwise(
        call, ("beta * self + " * bool(call.scalar("beta"))) + "alpha * vec1 * vec2", **vectors
    )


#: Rules of which the formula depends on arguments, or the numbers on more than the place.
BY_ARGUMENTS: dict[str, Callable[[Call], Made]] = {
    "addr": _outer,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    "div": _division,
    "round": _round,
}

#: How the arguments of `_foreach_` operators are called by the operator that runs on each tensor.
_EACH = {
    "add": {"scalar": "other", "scalars": "other", "other": "other"},
    "addcdiv": {"scalars": "value"},
    "lerp": {"tensors1": "end", "weights": "weight"},
    "clamp_min": {"scalar": "min", "scalars": "min", "other": "min"},
    "clamp_max": {"scalar": "max", "scalars": "max", "other": "max"},
    "pow": {"exponent": "exponent"},
    "copy": {"self": "self", "src": "src"},
}
_LIKE_ADD = {"sub", "mul", "div", "maximum", "minimum"}


def foreach(call: Call) -> Call:
    """Return the call on one tensor that a `_foreach_` operator makes of the wanted result's list."""
    kind = call.kind.removeprefix("foreach_")
    known = "add" if kind in _LIKE_ADD else "addcdiv" if kind == "addcmul" else kind
    renamed = _EACH.get(known, {})
    arguments: dict[str, Any] = {}
    for key, value in call.arguments.items():
        each = value[call.place] if isinstance(value, list | tuple) else value
        arguments[renamed.get(key, key)] = each
    if kind in ("add", "sub"):
        arguments.setdefault("alpha", 1)
    if kind in ("addcmul", "addcdiv") and isinstance(arguments.get("value"), str):
        raise NoRuleError("the factors are in a tensor")
    return call.standing_for(kind, arguments)
