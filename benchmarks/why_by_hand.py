"""What an answer of `why` says, computed again by hand from the numbers and the formula that it shows.

It uses nothing of everystep's rules: formulas are read as they are shown, and evaluated in double
precision by Python, with functions of torch.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from everystep.answers.why import Number, Why
from everystep.replay.opened_step import Step

__all__ = ["ALL", "by_hand", "complaints", "evaluated", "value_of"]

#: More terms than any sum has: every number is shown.
ALL = 10**9

_FLOAT = re.compile(r"(?<![\w.])\d+(\.\d*(e[-+]?\d+)?|e[-+]?\d+)(?![\w.])")
_NAME = re.compile(r"#(\d+)(?:\.(\d+))?(\[.*\])?")
_NAMED = re.compile(r"(parameters|buffers|tensors)\['(.+?)'\](\[.*\])?")
_BATCH = re.compile(r"batch\.(\w+)(\[.*\])?")


def value_of(step: Step, name: str) -> Any:
    """Return the number that a name means, read from the tensors of a step."""
    if name.endswith((".real", ".imag")):
        whole = value_of(step, name[:-5])
        return None if whole is None else getattr(whole, name[-4:])
    if name.startswith("complex("):
        return None
    if found := _NAME.fullmatch(name):
        seen = step.operations[int(found[1])]
        if seen.operation.operator.startswith("torch.optim."):
            written = [*seen.results, *(n for n in step.end if n.startswith("optimizer/"))]
            tensor = step.end[written[int(found[2] or 1) - 1]]
        else:
            place = int(found[2] or 1) - 1
            names = [*seen.operation.results]
            names += [n for n in seen.operation.written() if n not in names]
            result = str(names[place])
            tensor = {**step.end, **seen.results}[result]
        return _picked(tensor, found[3])
    if found := _BATCH.fullmatch(name):
        return _picked(step.batch.tensors[found[1]], found[2])
    found = _NAMED.fullmatch(name)
    assert found is not None, name
    if found[1] != "tensors":
        return _picked(getattr(step, found[1])[found[2]], found[3])
    for tensors in (step.state, *(seen.inputs for seen in step.operations)):
        if found[2] in tensors:
            return _picked(tensors[found[2]], found[3])
    path = found[2].removeprefix("batch/")
    return _picked(step.batch.tensors[path], found[3]) if path in step.batch.tensors else None


def _picked(tensor: Any, index: str | None) -> Any:
    if tensor is None:
        return None
    return tensor[tuple(ast.literal_eval(index))].item() if index else tensor.item()


def complaints(answer: Why) -> list[str]:
    """Return what is wrong with an answer in which every number is shown (`terms=ALL`)."""
    found = []
    for number in (answer.number, *answer.numbers):
        read = value_of(answer.step, number.name)
        if read is not None and not _same(read, number.value):
            found.append(f"{number.name} is {read!r}, not {number.value!r}")
    if answer.origin != "operation" or answer.recomputed is None:
        return found
    value = by_hand(answer)
    rounded = [_rounded(each, answer.number) for each in (value, by_hand(answer, is_rounded=True))]
    if answer.is_equal and not any(_same(each, answer.number.value) for each in rounded):
        found.append(f"said to be equal, but by hand it is {rounded[0]!r}, not {answer.number.value!r}")
    if not answer.is_equal and not _is_close(value, answer):
        found.append(f"by hand it is {rounded[0]!r}, far from {answer.number.value!r}")
    return [f"{answer!r}: {each}" for each in found]


def _same(one: Any, other: Any) -> bool:
    if one != one and other != other:
        return True
    return one == other and math.copysign(1, one) == math.copysign(1, other)


def _is_close(value: float, answer: Why) -> bool:
    size = math.fsum(abs(term.value or 0) for group in answer.groups for term in group.terms)
    # The logarithm of a sum near 1 has the rounding of the sum, 6e-8 in single precision.
    least = 4e-3 if "log" in answer.formula else 1e-3
    size = max(size / answer.divisor, abs(answer.number.value), least)
    return bool(abs(value - answer.number.value) <= 2e-5 * size)


def _rounded(value: float, number: Number) -> Any:
    return torch.tensor(value, dtype=torch.float64).to(getattr(torch, number.dtype)).item()


def by_hand(answer: Why, *, is_rounded: bool = False) -> float:
    """Return what the formula of an answer gives for its numbers, in double precision.

    is_rounded: whether to round the numbers that stand in the formula to single precision, as torch does
    with the arguments of most operators.
    """
    text = answer.formula
    numbers: dict[str, Any] = {}
    if is_rounded:
        text = _single(text)
    is_sum = any(term.value is not None for group in answer.groups for term in group.terms)
    if is_sum or "the sum of 0 terms" in text:
        for place, group in enumerate(answer.groups):
            term = _single(group.text) if is_rounded else group.text
            text, numbers[f"sum{place}"] = _added(text, term, group, f"sum{place}")
    else:
        for group in answer.groups:
            values = [_number(term.numbers[group.text].value) for term in _in_order(group.terms)]
            numbers[group.text] = np.asarray(values).view(_Numbers)
    with np.errstate(all="ignore"):
        return float(np.asarray(evaluated(text, numbers)).item())


def _number(value: Any) -> np.float64:
    return np.float64(value)


def _single(text: str) -> str:
    return _FLOAT.sub(lambda found: repr(float(np.float32(found[0]))), text)


def _added(text: str, term: str, group: Any, name: str) -> tuple[str, float]:
    """Return a formula with the name of a sum in the place of its terms, and the sum."""
    with np.errstate(all="ignore"):
        values = [
            float(
                evaluated(
                    term, {key: _number(n.value) for key, n in each.numbers.items()} | each.weights
                )
            )
            for each in group.terms
        ]
    some = f"the sum of {group.count:,} terms " if group.count != 1 else ""
    written = next(each for each in (f"{some}({term})", f"{some}{term}") if each in text)
    total = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    return text.replace(written, name, 1), values[0] if len(values) == 1 else total


class _Numbers(np.ndarray):
    """Numbers, of which `a @ b` multiplies each row of `a` by `b`; a row is as long as `b`."""

    def __matmul__(self, other: Any) -> Any:
        return (np.asarray(self).reshape(-1, np.size(other)) * np.asarray(other)).sum(1).view(_Numbers)


def _in_order(terms: Any) -> list[Any]:
    """Return terms in the order of their numbers in the tensor."""
    return sorted(terms, key=lambda term: next(iter(term.numbers.values())).spot.index)


def evaluated(text: str, numbers: dict[str, Any]) -> Any:
    """Return the value of a formula as it is shown, read as Python after a few signs are replaced."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text).replace("^", "**").replace("·", "@")
    text = re.sub(r"\b([a-z]\w*)\[[a-z]\w*\]", r"\1", text)  # the number is the one that is named
    text = re.sub(r"\b([a-z]\w*)\(", r"f_\1(", text)  # a name may be that of a function, too
    whole, _, definitions = text.partition(" where ")
    known = {"inf": math.inf, "nan": math.nan, "pi": math.pi, **_FUNCTIONS, **numbers}
    for each in filter(None, re.split(r", (?=\w+ = )", definitions)):
        name, _, body = each.partition(" = ")
        known[name] = eval(_compiled(body), {"__builtins__": {}}, known)
    return eval(_compiled(whole), {"__builtins__": {}}, known)


@cache
def _compiled(text: str) -> Any:
    return compile(text, "formula", "eval")


def _of_torch(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Return a function of torch for arrays, in double precision."""

    def of(*given: Any) -> Any:
        tensors = (torch.as_tensor(np.asarray(each, dtype=np.float64)) for each in given)
        return function(*tensors).numpy().view(_Numbers)

    return of


def _max(*given: Any) -> Any:
    return np.max(given[0]) if len(given) == 1 else np.maximum(*given)


def _min(*given: Any) -> Any:
    return np.min(given[0]) if len(given) == 1 else np.minimum(*given)


_OF_TORCH: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(torch, name)
    for name in (
        *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "sin", "cos", "tan", "sinh"),
        *("cosh", "tanh", "asin", "acos", "atan", "atan2", "erf", "erfc", "floor", "ceil", "trunc"),
        *("round", "sign", "abs", "fmod", "remainder", "logaddexp", "isnan", "isinf", "sum", "mean"),
        *("prod", "any", "all", "argmax", "argmin", "floor_divide"),
    )
}
_FUNCTIONS: dict[str, Any] = {
    **{f"f_{name}": _of_torch(function) for name, function in _OF_TORCH.items()},
    "f_max": _max,
    "f_min": _min,
    "f_logsumexp": _of_torch(lambda x: x.reshape(-1).logsumexp(0)),
    "f_softmax": _of_torch(lambda x: x.reshape(-1).softmax(0)),
    "f_row_sums": lambda x, count: np.reshape(x, (-1, count)).sum(1),
    "f_bitwise_and": lambda a, b: int(np.max(a)) & int(np.max(b)),
    "f_bitwise_or": lambda a, b: int(np.max(a)) | int(np.max(b)),
}
