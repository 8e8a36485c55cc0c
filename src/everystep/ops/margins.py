"""Rules of losses that compare the numbers of classes with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.ops.call import Axis, Call, Formula, Made, Sum, Terms

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
    text = "max(0, margin - chosen + self) ^ p"
    if "weight" in call:
        given["weight"] = call.piece("weight", chosen)
        text = f"weight * {text}"
    settings = {key: call.scalar(key) for key in ("margin", "p")}
    return Sum((Terms(text, given, settings),), float(_divisor(call)))


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
    text = "-grad_output" if own == target else "grad_output"
    if "weight" in call:
        text += " * weight"
    short = "margin - chosen + self"
    slope = f"2 * sum(max(0, {short}))" if call.scalar("p") == 2 else f"sum({short} > 0)"
    settings = {"margin": call.scalar("margin"), "divisor": _divisor(call)}
    return Formula(f"{text} * {slope} / divisor", given, settings)


def _multilabel_margin(call: Call) -> Made:
    """Return the rule of `max(0, 1 - self[target] + self[class])`, for each target and other class."""
    rows, classes, targets = _table(call)
    own = call.index[:1] if call.value("reduction") == 0 and rows > 1 else range(rows)
    if call.place == 1:
        row, place = _place(call)
        count = len(_named(targets[row]))
        key = call.piece("target", *_at(call, np.full(count, row), np.arange(count)))
        return Formula("any(target == place)", {"target": key}, {"place": place})
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
    return Sum((Terms("max(0, 1 - chosen + self)", given),), float(_divisor(call)))


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
    text = "grad_output * sum(1 - others + self > 0) / divisor"
    if own in named:
        text = "-grad_output * sum(1 - self + others > 0) / divisor"
    which = f"others where is_target is {int(own not in named)}"
    return Formula(text, given, {"divisor": _divisor(call)}, note=which)


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
