"""Losses and their derivatives."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from everystep.ops.call import Axis, Call, Formula, Made, Piece, Sum, Terms, grid
from everystep.ops.elementwise import by_formula, each_alone, given_in
from everystep.ops.labels import SHARED, Tracked, broadcast, reduced
from everystep.ops.operator_record import LATER, LineRule, OperatorRecord, alike
from everystep.ops.row_rules import Result, RowsCall, filled, none_mixed, of_shape

__all__ = ["LOSSES"]

_MEAN = 1
_ERROR = "abs(self - target)"
#: One term of each loss. torch bounds the logarithms of binary cross entropy at -100, so that a wrong
#: prediction of exactly 0 or 1 costs a finite number; its derivative divides by at least 1e-12.
_TERMS = {
    "mse_loss": "(self - target) ^ 2",
    "smooth_l1_loss": f"0.5 * (self - target) ^ 2 / beta if {_ERROR} < beta else {_ERROR} - 0.5 * beta",
    "huber_loss": (
        f"0.5 * (self - target) ^ 2 if {_ERROR} <= delta else delta * ({_ERROR} - 0.5 * delta)"
    ),
    "soft_margin_loss": "log1p(exp(-target * self))",
    "binary_cross_entropy": ("(target - 1) * max(log1p(-self), -100) - target * max(log(self), -100)"),
    "binary_cross_entropy_with_logits": ("(1 - target) * self + log1p(exp(-abs(self))) + max(-self, 0)"),
}


def _loss(call: Call) -> Made:
    text = _TERMS[call.kind]
    if "pos_weight" in call:
        text = (
            "(1 - target) * self"
            " + (1 + (pos_weight - 1) * target) * (log1p(exp(-abs(self))) + max(-self, 0))"
        )
    if "weight" in call:
        text = f"weight * ({text})"
    axes = call.index if call.value("reduction") == 0 else grid(*map(range, call.shape("self")))
    given, settings = given_in(text, call, axes)
    count = float(given["self"].size) if call.value("reduction") == _MEAN else 1.0
    return Sum((Terms(text, given, settings),), count)


#: The derivative of one term by `self`.
_SLOPES = {
    "mse_loss_backward": "2 * (self - target)",
    "smooth_l1_loss_backward": (
        "(-1 if self - target <= -beta else 1 if self - target >= beta else (self - target) / beta)"
    ),
    "huber_loss_backward": "min(max(self - target, -delta), delta)",
    "soft_margin_loss_backward": "-target / (1 + exp(target * self))",
    "binary_cross_entropy_backward": "(self - target) / max((1 - self) * self, 1e-12)",
}


def _loss_backward(call: Call) -> Made:
    weight = "weight * " if "weight" in call else ""
    text = f"grad_output * {weight}{_SLOPES[call.kind]}"
    if call.value("reduction") == _MEAN:
        text += f" / {call.tensor('self').numel()}"
    return by_formula(call, text)


def _nll(call: Call) -> Made:
    """Return the rule of the negative log likelihood, of rows (N, C) or of images (N, C, H, W)."""
    targets = call.tensor("target").cpu().long().numpy()  # as indices, 8 bits would be a mask
    ignored = call.value("ignore_index")
    if call.value("reduction") == 0 and call.place == 0:
        # As arrays, from which an ignored target is taken out below.
        axes = tuple(np.asarray([place]) for place in call.index)
    else:
        axes = grid(*map(range, targets.shape))
    classes = targets[axes]
    # Of a single target, the loss is added up all the same.
    if call.place == 1 and call.value("reduction") == 0 and targets.ndim:
        return Formula("0", note="not used: the losses are not added up")
    # `total_weight`: how many targets count.
    if call.place == 1 and "weight" not in call:
        target = call.piece("target", *axes)
        return Formula("sum(target != ignored)", {"target": target}, {"ignored": ignored})
    kept = classes != ignored
    axes, classes = tuple(axis[kept] for axis in axes), classes[kept]
    given: dict[str, Piece] = {"target": call.piece("target", *axes)}
    if "weight" in call:
        given["weight"] = call.piece("weight", classes)
    if call.place == 1:
        return Sum((Terms("weight[target]", given),))
    places = (axes[0], classes, *axes[1:]) if call.tensor("self").dim() > 1 else (classes,)
    given = {"self": call.piece("self", *places)} | given
    text = "-weight[target] * self[target]" if "weight" in call else "-self[target]"
    divisor = 1.0
    if call.value("reduction") == _MEAN:
        total = call.tensor("weight").double()[classes].sum() if "weight" in call else len(classes)
        divisor = float(total)
    return Sum((Terms(text, given),), divisor)


def _nll_backward(call: Call) -> Made:
    has_rows = call.tensor("self").dim() > 1
    own = call.index[1 if has_rows else 0]
    where = (call.index[0], *call.index[2:]) if has_rows else ()
    gradient = call.tensor("grad_output")
    given = {
        "grad_output": call.piece("grad_output", *(where if gradient.dim() else ())),
        "target": call.piece("target", *(where if call.tensor("target").dim() else ())),
    }
    if own == call.value("ignore_index"):
        return Formula("0", given, note=f"class {own} is ignored")
    text = "-grad_output"
    if "weight" in call:
        given["weight"] = call.piece("weight", own)
        text += " * weight"
    if call.value("reduction") == _MEAN:
        given["total_weight"] = call.piece("total_weight")
        text += " / total_weight"
    return Formula(f"{text} if target == {own} else 0", given)


# Targets of multilabel_margin_loss for 3 classes: [2, 0, -1] names classes 2 and 0; what follows a -1
# does not count. Each named class is compared with each of the others, here with class 1.
def _margin(call: Call) -> Made:
    """Return the rule of losses that compare the numbers of the targets of a row with all others.

    `weight[target] * max(0, margin - self[target] + self[class])^p`; for several targets, without these.
    """
    rows, classes = _table(call)
    if call.place == 1:
        row, place = _place(call)
        named = call.piece("target", *_at(call, row, np.arange(len(_targets(call, row)))))
        return Formula("any(target == place)", {"target": named}, {"place": place})
    own = call.index[:1] if call.value("reduction") == 0 and rows > 1 else range(rows)
    found = [
        (row, chosen, other)
        for row in own
        for chosen in _targets(call, row)
        for other in range(classes)
        if other not in _targets(call, row)
    ]
    places, chosen, others = np.asarray(found, dtype=np.int64).reshape(-1, 3).T
    given = {
        "self": call.piece("self", *_at(call, places, others)),
        "chosen": call.piece("self", *_at(call, places, chosen)),
    }
    if call.kind != "multi_margin_loss":
        return Sum((Terms("max(0, 1 - chosen + self)", given),), float(_divisor(call)))
    text = "max(0, margin - chosen + self) ^ p"
    if "weight" in call:
        given["weight"] = call.piece("weight", chosen)
        text = f"weight * {text}"
    settings = {key: call.scalar(key) for key in ("margin", "p")}
    return Sum((Terms(text, given, settings),), float(_divisor(call)))


def _multi_margin_backward(call: Call) -> Made:
    row, own = _place(call)
    (target,) = _targets(call, row)
    # The target's own number is in the terms of all others, that of another class in its own alone.
    others = _others(call, row) if own == target else [own]
    given = {
        "grad_output": call.piece("grad_output", *_gradient_at(call, row)),
        "self": call.piece("self", *_at(call, row, np.asarray(others, dtype=np.int64))),
        "chosen": call.piece("self", *_at(call, row, target)),
    }
    text = "-grad_output" if own == target else "grad_output"
    if "weight" in call:
        given["weight"] = call.piece("weight", target)
        text += " * weight"
    short = "margin - chosen + self"
    slope = f"2 * sum(max(0, {short}))" if call.scalar("p") == 2 else f"sum({short} > 0)"
    settings = {"margin": call.scalar("margin"), "divisor": _divisor(call)}
    return Formula(f"{text} * {slope} / divisor", given, settings)


def _multilabel_margin_backward(call: Call) -> Made:
    row, own = _place(call)
    named = _targets(call, row)
    # A class may be named more than once, and then counts as often.
    listed = _others(call, row) * named.count(own) if own in named else named
    every = np.arange(_table(call)[1])
    given = {
        "grad_output": call.piece("grad_output", *_gradient_at(call, row)),
        "self": call.piece("self", *_at(call, row, own)),
        "others": call.piece("self", *_at(call, row, np.asarray(listed, dtype=np.int64))),
        "is_target": call.piece("is_target", *_at(call, row, every)),
    }
    text = "grad_output * sum(1 - others + self > 0) / divisor"
    if own in named:
        text = "-grad_output * sum(1 - self + others > 0) / divisor"
    which = f"others where is_target is {int(own not in named)}"
    return Formula(text, given, {"divisor": _divisor(call)}, note=which)


def _table(call: Call) -> tuple[int, int]:
    shape = call.shape("self")
    rows, classes = shape if len(shape) == 2 else (1, *shape)
    return rows, classes


def _targets(call: Call, row: int) -> list[int]:
    """Return the classes that are targets of a row; several end at the first below 0."""
    target = call.tensor("target").reshape(_table(call)[0], -1)[row].tolist()
    ends = [place for place, each in enumerate(target) if each < 0]
    return target[: ends[0]] if ends else target


def _others(call: Call, row: int) -> list[int]:
    return [c for c in range(_table(call)[1]) if c not in _targets(call, row)]


def _at(call: Call, row: Axis, place: Axis) -> tuple[Axis, ...]:
    """Return the indices of classes of rows in `self`, which may be one row."""
    return (row, place) if len(call.shape("self")) == 2 else (place,)


def _place(call: Call) -> tuple[int, int]:
    *row, place = call.index
    return (row[0] if row else 0), place


def _gradient_at(call: Call, row: int) -> tuple[int, ...]:
    return (row,) if call.tensor("grad_output").dim() else ()


def _divisor(call: Call) -> int:
    rows, classes = _table(call)
    return classes * (rows if call.value("reduction") == _MEAN else 1)


def _loss_rows(call: RowsCall) -> list[Result]:
    """Losses that are means or sums of a number for each element."""
    return [_mean_or_sum(call, none_mixed(broadcast([each.labels for each in call.tensors()])))]


def _mean_or_sum(call: RowsCall, labels: Tensor, divisor: Tensor | None = None) -> Result:
    """Return the mean, or the sum, of losses with labels; divisor: by default how many they are."""
    mode = _MEAN if call["reduction"] is None else call["reduction"]
    if mode == 0:
        return of_shape(labels.reshape(call.results[0].shape), call.results[0])
    # The same operator without its reduction: the loss of each element.
    each = call.again(reduction=0)[0].reshape(labels.shape)
    whole, count = Tracked(each, labels), each.numel() if divisor is None else divisor
    found = reduced(labels, [*range(each.dim())], is_sum=True)
    return Result(
        found, lambda row: whole.term(row).sum() / (count if mode == _MEAN else 1), mode == _MEAN
    )


def _classes_rows(call: RowsCall) -> list[Result]:
    """Losses with a number for each row of classes, and tensors kept for the derivative."""
    labels, axis = _of_classes(call)
    own = none_mixed(labels.squeeze(axis))
    if "nll" in call.kind:
        _, total = call.results
        return [_mean_or_sum(call, own, total), filled(SHARED, total)]  # as recorded
    others = [Result(labels.expand(result.shape)) for result in call.results[1:]]
    return [_mean_or_sum(call, own), *others]


def _slope_rows(call: RowsCall) -> list[Result]:
    labels, axis = _of_classes(call)
    gradient = call["grad_output"].labels
    parts = [labels, gradient.unsqueeze(axis) if gradient.dim() and labels.dim() > 1 else gradient]
    return [Result(broadcast(parts).expand(call.results[0].shape))]


def _of_classes(call: RowsCall) -> tuple[Tensor, int]:
    """Return the labels of rows of classes, (N, 1, ...) or (1), and the axis of the classes."""
    call.require_shared("weight", "total_weight")
    whole, target = call["self"].labels, call["target"].labels
    axis = 1 if whole.dim() > 1 else 0
    own = reduced(whole, [axis], keepdim=True)
    if target.shape == whole.shape:
        target = reduced(target, [axis], keepdim=True)
    return broadcast([own, target.reshape(own.shape)]), axis


def _squared_error_line(call: Call) -> str:
    error = "({self} - {target})²"
    return {0: error, 1: f"mean({error})", 2: f"sum({error})"}.get(call.value("reduction"), "")


def _squared_error_backward_line(call: Call) -> str:
    gradient = call.tensor("grad_output")
    factor = "" if gradient.numel() == 1 and gradient.item() == 1 else "{grad_output} * "
    count = f" / {call.tensor('self').numel():,}" if call.value("reduction") == _MEAN else ""
    return factor + "2 * ({self} - {target})" + count


def _nll_line(call: Call) -> str:
    """Return the line if all rows have the same weight."""
    if "weight" in call or call.tensor("self").dim() > 2:
        return ""
    if bool((call.tensor("target") == call.value("ignore_index")).any()):
        return ""
    mode = call.value("reduction")
    if call.kind == "nll_loss_forward":
        picked = "{self}[{target}]"
        return {0: f"-{picked}", 1: f"-mean({picked})", 2: f"-sum({picked})"}.get(mode, "")
    if mode == 0:
        return ""
    total = call.tensor("total_weight").item() if mode == _MEAN else 1
    divisor = f" / {total:,.17g}" if total != 1 else ""
    return "-{grad_output}" + divisor + " at {target} else 0"


_LINES: dict[str, LineRule] = {
    "mse_loss": _squared_error_line,
    "mse_loss_backward": _squared_error_backward_line,
}
LOSSES: dict[str, OperatorRecord] = {
    **{k: OperatorRecord(_loss, _loss_rows, _LINES.get(k, "")) for k in _TERMS},
    **{k: OperatorRecord(_loss_backward, each_alone, _LINES.get(k, "")) for k in _SLOPES},
    **alike("nll_loss_forward", _nll, _classes_rows, _nll_line),
    **alike("nll_loss2d_forward", _nll, _classes_rows),
    **alike("multi_margin_loss multilabel_margin_loss_forward", _margin, _classes_rows),
    **alike("nll_loss_backward", _nll_backward, _slope_rows, _nll_line, kept=LATER),
    **alike("nll_loss2d_backward", _nll_backward, _slope_rows, kept=LATER),
    **alike("multi_margin_loss_backward", _multi_margin_backward, _slope_rows, kept=LATER),
    **alike("multilabel_margin_loss_backward", _multilabel_margin_backward, _slope_rows, kept=LATER),
}
