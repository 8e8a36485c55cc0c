"""What an answer of `why` says, computed again by hand from the numbers and the formula that it shows.

It uses nothing of everystep's rules: formulas are read as they are shown and evaluated as arithmetic in
double precision; those that are in words are written out here, by operator, after torch's documentation.
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
from torch.nn import functional

from everystep.replay.step import Step
from everystep.replay.why import Number, Why

__all__ = ["ALL", "by_hand", "complaints", "value_of"]

#: More terms than any sum has: every number is shown.
ALL = 10**9

_FLOAT = re.compile(r"(?<![\w.])\d+(\.\d*(e[-+]?\d+)?|e[-+]?\d+)(?![\w.])")
_NAME = re.compile(r"#(\d+)(?:\.(\d+))?(\[.*\])?")
_NAMED = re.compile(r"(parameters|buffers|tensors)\['(.+?)'\](\[.*\])?")
_BATCH = re.compile(r"batch\.(\w+)(\[.*\])?")


def value_of(step: Step, name: str) -> Any:
    """Return the number that a name means, read from the tensors of a step."""
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
    if value is None:
        return [*found, f"no way to compute by hand: {answer.formula}"]
    rounded = _rounded(value, answer.number)
    if answer.is_equal and not _same(rounded, answer.number.value):
        found.append(f"said to be equal, but by hand it is {rounded!r}, not {answer.number.value!r}")
    if not answer.is_equal and not _is_close(value, answer):
        found.append(f"by hand it is {rounded!r}, far from {answer.number.value!r}")
    return [f"{answer!r}: {each}" for each in found]


def _same(one: Any, other: Any) -> bool:
    if one != one and other != other:
        return True
    return one == other and math.copysign(1, one) == math.copysign(1, other)


def _is_close(value: float, answer: Why) -> bool:
    size = math.fsum(abs(term.value or 0) for group in answer.groups for term in group.terms)
    size = max(size / answer.divisor, abs(answer.number.value), 1e-3)
    return bool(abs(value - answer.number.value) <= 2e-5 * size)


def _rounded(value: float, number: Number) -> Any:
    return torch.tensor(value, dtype=torch.float64).to(getattr(torch, number.dtype)).item()


def by_hand(answer: Why) -> float | None:
    """Return what the formula of an answer gives for its numbers, in double precision."""
    with np.errstate(all="ignore"):
        if any(term.value is not None for group in answer.groups for term in group.terms):
            return _sum_by_hand(answer)
        if not answer.groups and answer.formula.startswith("the sum"):
            return 0.0
        given = {
            group.text: np.asarray([float(t.numbers[group.text].value) for t in _in_order(group.terms)])
            for group in answer.groups
        }
        for words, function in _IN_WORDS.items():
            if words in answer.formula:
                return float(function(answer, given))
        numbers = {key: v if len(v) > 1 or _is_row(answer, key) else v[0] for key, v in given.items()}
        try:
            return float(_evaluated(answer.formula, numbers, answer.number.dtype))
        except (SyntaxError, NameError, TypeError):
            return None


def _is_row(answer: Why, key: str) -> bool:
    return re.search(rf"\b{key}\[\d", answer.formula) is not None


def _in_order(terms: Any) -> list[Any]:
    """Return terms in the order of their numbers in the tensor."""
    return sorted(terms, key=lambda term: _index(next(iter(term.numbers.values()))))


def _index(number: Number) -> tuple[int, ...]:
    return number.spot.index


def _sum_by_hand(answer: Why) -> float:
    values = []
    for group in answer.groups:
        for term in group.terms:
            numbers = {key: float(number.value) for key, number in term.numbers.items()}
            values.append(float(_evaluated(group.text, numbers, answer.number.dtype)))
    if len(values) == 1:
        return values[0] / answer.divisor
    total = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    return total / answer.divisor


def _evaluated(text: str, numbers: dict[str, Any], dtype: str) -> Any:
    """Return the value of a formula as it is shown."""
    text, *new = text.split("; its state begins at 0")
    numbers = {"step": 0.0} | numbers if new else numbers
    text = re.sub(r"(\w+)\[[a-z]+\]", r"\1", text).replace("^", "**").split(" , ")[0]
    text = re.sub(r"\bis NaN|\bwhether ", "", text)
    if dtype in ("float32", "float16", "bfloat16"):  # as torch rounds the numbers of an operator
        text = _FLOAT.sub(lambda found: repr(float(np.float32(found[0]))), text)
    names = {"self": numbers.get("self"), **numbers}
    return eval(_compiled(text.strip()), {"__builtins__": {}}, _FUNCTIONS | names)


@cache
def _compiled(text: str) -> Any:
    return compile(text, "formula", "eval")


def _erf(x: float) -> float:
    return math.erf(x)


def _sigmoid(x: float) -> Any:
    return 1 / (1 + np.exp(-x))


_FUNCTIONS: dict[str, Any] = {
    **{name: getattr(np, name) for name in ("exp", "log", "log2", "log10", "log1p", "expm1", "sqrt")},
    **{name: getattr(np, name) for name in ("tanh", "sin", "cos", "floor", "ceil", "trunc", "sign")},
    "sum": np.sum,
    "relu": lambda x: x if x != x or x > 0 else 0.0,
    "sigmoid": _sigmoid,
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "softplus": lambda x: float(np.logaddexp(0, x)),
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "inf": math.inf,
    "nan": math.nan,
}

Given = dict[str, np.ndarray]


def _softmax(answer: Why, given: Given) -> float:
    row, own = given["self"], int(answer.formula.rpartition(" ")[2])
    weights = np.exp(row - row.max())
    if answer.formula.startswith("log"):
        return float(row[own] - row.max() - np.log(math.fsum(weights)))
    return float(weights[own] / math.fsum(weights))


def _inverse_deviation(answer: Why, given: Given) -> float:
    row = given["input"]
    assert answer.observed is not None
    eps = answer.observed.operation.given()["eps"]
    mean = math.fsum(row) / len(row)
    return float(1 / np.sqrt(math.fsum((row - mean) ** 2) / len(row) + eps))


def _running(answer: Why, given: Given) -> float:
    row = given["input"]
    assert answer.observed is not None
    momentum = float(np.float32(answer.observed.operation.given()["momentum"]))
    new = math.fsum(row) / len(row)
    name = "running_mean" if "running_mean" in given else "running_var"
    if name == "running_var":
        new = math.fsum((row - new) ** 2) / (len(row) - 1)
    return float((1 - momentum) * given[name][0] + momentum * new)


def _normalized_backward(answer: Why, given: Given) -> float:
    """The derivative of a normalization, after Ioffe and Szegedy (2015), with its own mean."""
    keys = [*given]
    gradient, mean, scale = given[keys[0]], given[keys[2]][0], given[keys[3]][0]
    normal = (given["input"] - mean) * scale
    weight = given.get("weight", np.ones(1))
    gradient = gradient * weight
    own = next(
        place
        for place, term in enumerate(_in_order(answer.groups[1].terms))
        if term.numbers["input"].spot.index[-_inner(answer) :] == _own_index(answer)[-_inner(answer) :]
    )
    mean_gradient, along = gradient.sum() / len(gradient), (gradient * normal).sum() / len(gradient)
    return float(scale * (gradient[own] - mean_gradient - normal[own] * along))


def _own_index(answer: Why) -> tuple[int, ...]:
    return tuple(ast.literal_eval(answer.number.name.partition("[")[2].join(["[", ""])))


def _inner(answer: Why) -> int:
    return len(_own_index(answer))


def _adam(answer: Why, given: Given) -> float:
    """Adam as torch's documentation has it: bias-corrected moments, decoupled decay in AdamW."""
    n = {key: value[0] for key, value in given.items()}
    assert answer.observed is not None
    operation, step = answer.observed.operation, answer.step
    if operation.operator.startswith("torch.optim."):
        assert step.places.optimizer is not None
        settings: dict[str, Any] = dict(step.places.optimizer.groups[0])
        settings |= {"beta1": settings["betas"][0], "beta2": settings["betas"][1]}
        settings["lr"] = step.hyperparameters["lr"]
        count = n.get("step", 0) + 1
    else:
        settings, count = dict(operation.given()), n["step"]
        settings["lr"] = n.get("lr", settings["lr"])
    is_decoupled = "adamw" in operation.operator.lower()
    decay, gradient, param = settings["weight_decay"], n["grad"], n["param"]
    if is_decoupled:
        param = param * (1 - settings["lr"] * decay)
    elif decay:
        gradient = gradient + decay * param
    beta1, beta2 = settings["beta1"], settings["beta2"]
    mean = beta1 * n.get("exp_avg", 0) + (1 - beta1) * gradient
    square = beta2 * n.get("exp_avg_sq", 0) + (1 - beta2) * gradient**2
    corrected = np.sqrt(square / (1 - beta2**count)) + settings["eps"]
    return float(param - settings["lr"] * mean / (1 - beta1**count) / corrected)


def _moment(answer: Why, given: Given) -> float:
    """A moment of Adam: the formula as it is shown, its numbers in double precision."""
    names = {key: value[0] for key, value in given.items()}
    assert answer.observed is not None
    operation = answer.observed.operation
    if operation.operator.startswith("torch.optim."):
        assert answer.step.places.optimizer is not None
        group = answer.step.places.optimizer.groups[0]
        betas, decay = group["betas"], group["weight_decay"]
    else:
        settings = operation.given()
        betas, decay = (settings["beta1"], settings["beta2"]), settings["weight_decay"]
    gradient = names["grad"] + (decay * names["param"] if "param" in answer.formula else 0)
    if "exp_avg_sq" in answer.formula:
        return float(betas[1] * names.get("exp_avg_sq", 0) + (1 - betas[1]) * gradient**2)
    return float(betas[0] * names.get("exp_avg", 0) + (1 - betas[0]) * gradient)


def _one(key: str) -> Callable[[Why, Given], float]:
    return lambda answer, given: float(given[key][0])


def _silu_slope(answer: Why, given: Given) -> float:
    x, gradient = given["self"][0], given["grad_output"][0]
    return float(gradient * _sigmoid(x) * (1 + x * (1 - _sigmoid(x))))


def _gelu_slope(answer: Why, given: Given) -> float:
    x, gradient = given["self"][0], given["grad_output"][0]
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float(gradient * (0.5 * (1 + _erf(x / math.sqrt(2))) + x * density))


def _kept_between(answer: Why, given: Given) -> float:
    assert answer.observed is not None
    settings = answer.observed.operation.given()
    low, high = settings.get("min"), settings.get("max")
    value = given["self"][0]
    value = value if low is None else max(value, low)
    return float(value if high is None else min(value, high))


def _attention(answer: Why, given: Given) -> float:
    """Attention of one query, after Vaswani et al. (2017), equation 1, with a mask that is added."""
    assert answer.observed is not None
    query = given["query"]
    scale = answer.observed.operation.given().get("scale") or 1 / math.sqrt(len(query))
    scores = given["key"].reshape(-1, len(query)) @ query * scale + given.get("attn_mask", 0.0)
    weights = np.exp(scores - scores.max())
    if "value" not in given:
        return float(scores.max() + np.log(math.fsum(weights)))
    return float(weights @ given["value"] / math.fsum(weights))


def _slope(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Why, Given], float]:
    """Return the derivative of a function of torch, by autograd, times the gradient of its result."""

    def of(answer: Why, given: Given) -> float:
        x = torch.tensor(given["self"][0], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(function(x), x)
        return float(given["grad_output"][0]) * float(slope)

    return of


#: Formulas that are in words, by a part of them.
_IN_WORDS: dict[str, Callable[[Why, Given], float]] = {
    "softmax(self), place": _softmax,
    "variance of input +": _inverse_deviation,
    "* running_": _running,
    "the derivative of the normalized": _normalized_backward,
    "as torch.optim.Adam": _adam,
    "* exp_avg": _moment,
    "the largest of self": lambda answer, given: float(given["self"].max()),
    "sqrt of the sum of self ^ 2": lambda a, given: math.sqrt(math.fsum(given["self"] ** 2)),
    "which it leaves as it is": lambda answer, given: float(next(iter(given.values()))[0]),
    "weight[indices]": _one("weight"),
    "self at indices": _one("self"),
    "softmax(query": _attention,
    "log of the sum of exp": _attention,
    "hardswish'": _slope(functional.hardswish),
    "mish'": _slope(functional.mish),
    "silu'": _silu_slope,
    "gelu'": _gelu_slope,
    "kept between": _kept_between,
    "which it fills in": lambda answer, given: float(answer.formula.partition(",")[0]),
    "0, of the padding": lambda answer, given: 0.0,
    "0, not used": lambda answer, given: 0.0,
}
