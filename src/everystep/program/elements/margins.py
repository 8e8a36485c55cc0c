"""Rules of losses that compare the numbers of classes with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.program.elements.call import Axis, Call, Formula, Made, Numbers, Sum, Terms

__all__ = ["MARGINS"]

_MEAN = 1


def _multi_margin(call: Call) -> Made:
    """Return the rule of `weight[target] * max(0, margin - self[target] + self[class])^p / classes`."""
    rows, classes, _ = _table(call)
    target = call.tensor("target").reshape(-1).tolist()
    own = call.index[:1] if call.value("reduction") == 0 and rows > 1 else range(rows)
    pairs = [
        (row, target[row], other) for row in own for other in range(classes) if other != target[row]
    ]
    row, chosen, other = np.asarray(pairs, dtype=np.int64).reshape(-1, 3).T
    given = {
        "self": call.piece("self", *_at(call, row, other)),
        "chosen": call.piece("self", *_at(call, row, chosen)),
    }
    margin, p = call.scalar("margin"), call.scalar("p")
    text = f"max( 0 , {margin:g} - chosen + self )" + (" ^ 2" if p == 2 else "")
    if "weight" in call:
        given["weight"] = call.piece("weight", chosen)
        text = f"weight * {text}"

    def of(self: Numbers, chosen: Numbers, weight: Numbers | float = 1) -> Numbers:
        return np.asarray(weight * np.maximum(0, margin - chosen + self) ** p)

    return Sum((Terms(text, given, of),), float(_divisor(call)))


def _multi_margin_backward(call: Call) -> Made:
    row, own = _place(call)
    _, classes, _ = _table(call)
    target = int(call.tensor("target").reshape(-1)[row])
    others = np.asarray(
        [c for c in range(classes) if c != target and own in (c, target)], dtype=np.int64
    )
    given = {
        "grad_output": call.piece("grad_output", *_gradient_at(call, row)),
        "self": call.piece("self", *_at(call, np.full(len(others), row), others)),
        "chosen": call.piece("self", *_at(call, row, target)),
    }
    if "weight" in call:
        given["weight"] = call.piece("weight", target)
    margin, p, divisor = call.scalar("margin"), call.scalar("p"), _divisor(call)

    def of(grad_output: Numbers, self: Numbers, chosen: Numbers, weight: Any = (1,)) -> float:
        short = margin - chosen[0] + self
        slope = np.where(short > 0, 2 * short if p == 2 else 1, 0).sum()
        return float((-1 if own == target else 1) * grad_output[0] * weight[0] * slope / divisor)

    factor = f"{p:g} * " if p != 1 else ""
    text = f"grad_output{' * weight' if 'weight' in call else ''} * {factor}short / {divisor:g}"
    return Formula(f"{text}, short = max( 0 , {margin:g} - chosen + self )", given, of)


def _multilabel_margin(call: Call) -> Made:
    """Return the rule of `max(0, 1 - self[target] + self[class])`, for each target and other class."""
    rows, classes, targets = _table(call)
    own = call.index[:1] if call.value("reduction") == 0 and rows > 1 else range(rows)
    if call.place == 1:
        row, place = _place(call)
        key = call.piece("target", *_at(call, np.full(classes, row), np.arange(classes)))
        return Formula(
            f"whether target names {place}", {"target": key}, lambda target: place in _named(target)
        )
    pairs = [
        (row, chosen, other)
        for row in own
        for chosen in _named(targets[row])
        for other in range(classes)
        if other not in _named(targets[row])
    ]
    places, chosen, other = np.asarray(pairs, dtype=np.int64).reshape(-1, 3).T
    given = {
        "self": call.piece("self", *_at(call, places, other)),
        "chosen": call.piece("self", *_at(call, places, chosen)),
    }

    def of(self: Numbers, chosen: Numbers) -> Numbers:
        return np.asarray(np.maximum(0, 1 - chosen + self))

    return Sum((Terms("max( 0 , 1 - chosen + self )", given, of),), float(_divisor(call)))


def _multilabel_margin_backward(call: Call) -> Made:
    row, own = _place(call)
    _, classes, targets = _table(call)
    named = _named(targets[row])
    # A class may be named more than once, and then counts as often.
    listed = [c for c in range(classes) if c not in named] * named.count(own) if own in named else named
    others = np.asarray(listed, dtype=np.int64)
    given = {
        "grad_output": call.piece("grad_output", *_gradient_at(call, row)),
        "self": call.piece("self", *_at(call, row, own)),
        "others": call.piece("self", *_at(call, np.full(len(others), row), others)),
        "is_target": call.piece("is_target", *_at(call, np.full(classes, row), np.arange(classes))),
    }
    divisor, sign = _divisor(call), -1 if own in named else 1

    def of(grad_output: Numbers, self: Numbers, others: Numbers, is_target: Numbers) -> float:
        count = np.count_nonzero(1 + sign * (self[0] - others) > 0)
        return float(sign * grad_output[0] * count / divisor)

    margin, which = ("1 - self + others", 0) if own in named else ("1 - others + self", 1)
    text = f"{'- ' if own in named else ''}grad_output * how many of {margin} are above 0 / {divisor}"
    return Formula(f"{text}, others where is_target is {which}", given, of)


def _table(call: Call) -> tuple[int, int, list[list[int]]]:
    """Return how many rows and classes there are, and the targets of each row."""
    shape = call.shape("self")
    rows, classes = shape if len(shape) == 2 else (1, *shape)
    return rows, classes, call.tensor("target").reshape(rows, -1).tolist()


def _at(call: Call, row: Axis, place: Axis) -> tuple[Axis, ...]:
    """Return the indices of classes of rows in `self`, which may be one row."""
    return (row, place) if len(call.shape("self")) == 2 else (place,)


def _place(call: Call) -> tuple[int, int]:
    """Return the row and the class of the wanted number."""
    *row, place = call.index
    return (row[0] if row else 0), place


def _gradient_at(call: Call, row: int) -> tuple[int, ...]:
    return (row,) if call.tensor("grad_output").dim() else ()


def _divisor(call: Call) -> int:
    rows, classes, _ = _table(call)
    return classes * (rows if call.value("reduction") == _MEAN else 1)


def _named(target: Any) -> list[int]:
    """Return the classes of a row of targets, which end at the first below 0."""
    classes = [int(each) for each in target]
    ends = [place for place, each in enumerate(classes) if each < 0]
    return classes[: ends[0]] if ends else classes


MARGINS: dict[str, Callable[[Call], Made]] = {
    "multi_margin_loss": _multi_margin,
    "multi_margin_loss_backward": _multi_margin_backward,
    "multilabel_margin_loss_forward": _multilabel_margin,
    "multilabel_margin_loss_backward": _multilabel_margin_backward,
}
