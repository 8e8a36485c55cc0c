"""The formulas of torch's optimizers, which update each number by itself: of their kernels and steps.

Source: the algorithms in torch's documentation of `torch.optim`, in the order of its implementations,
which add the weight decay after they change the sign of a gradient that is to be maximized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.ops.call import Call, Formula, Made, NoRuleError, Piece, Words, aligned
from everystep.ops.formula import names_in
from everystep.ops.labels import SHARED, Tracked
from everystep.ops.operator_record import Given, OperatorRecord, alike, are_dense
from everystep.ops.row_rules import Result, RowsCall, filled

__all__ = ["FUSED", "OPTIMIZERS", "UPDATES", "OptimizerFormulas", "update"]

Settings = Mapping[str, Any]


class OptimizerFormulas(NamedTuple):
    """What the step of an optimizer makes of a parameter and of its state.

    definitions: repeated parts, each after the parts that it uses; results: by the name of the written
    tensor: `param`, or a tensor of the state. All are in the language of formulas; `grad` and the state
    are those before the step.
    """

    definitions: dict[str, str]
    results: dict[str, str]

    def formula(self, key: str) -> str:
        """Return the formula of something that is written, with the definitions that it needs."""
        text = self.definitions.get(self.results[key], self.results[key])
        needed: list[str] = []
        self._need(text, needed)
        if not needed:
            return text
        return f"{text} where {', '.join(f'{name} = {self.definitions[name]}' for name in needed)}"

    def _need(self, text: str, needed: list[str]) -> None:
        for name in names_in(text):
            if name in self.definitions and name not in needed:
                self._need(self.definitions[name], needed)
                needed.append(name)


def update(optimizer: str, settings: Settings, *, t: str, is_first: bool = False) -> OptimizerFormulas:
    """Return the formulas of an optimizer by its name in `torch.optim`.

    settings: of its param group; missing ones are off. t: the count of steps, from 1; is_first: whether
    the state begins with this step.
    """
    is_decoupled = optimizer == "AdamW" or bool(settings.get("decoupled_weight_decay"))
    gradient = "grad / grad_scale" if "grad_scale" in settings else "grad"
    gradient = f"-{gradient}" if settings.get("maximize") else gradient
    parameter = "param"
    if settings.get("weight_decay") and is_decoupled:
        parameter = "param * (1 - lr * weight_decay)"
    elif settings.get("weight_decay"):
        gradient += " + weight_decay * param"
    is_plain = gradient == "grad"
    own, results = UPDATES[optimizer]("grad" if is_plain else "g", parameter, settings, is_first)
    return OptimizerFormulas(({} if is_plain else {"g": gradient}) | {"t": t} | own, results)


#: Definitions, and results.
_Formulas = tuple[dict[str, str], dict[str, str]]


def _moments(g: str) -> dict[str, str]:
    return {
        "m": f"beta1 * exp_avg + (1 - beta1) * {g}",
        "v": f"beta2 * exp_avg_sq + (1 - beta2) * {g} ^ 2",
    }


def _adam(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    definitions, results = _moments(g), {"exp_avg": "m", "exp_avg_sq": "v"}
    largest = "v"
    if s.get("amsgrad"):
        largest = "w"
        definitions["w"], results["max_exp_avg_sq"] = "max(max_exp_avg_sq, v)", "w"
    definitions["mean"] = "m / (1 - beta1 ^ t)"
    definitions["square"] = f"{largest} / (1 - beta2 ^ t)"
    return definitions, results | {"param": f"{p} - lr * mean / (sqrt(square) + eps)"}


def _sgd(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    if not s.get("momentum"):
        return {}, {"param": f"{p} - lr * {g}"}
    damped = f"(1 - dampening) * {g}" if s.get("dampening") else g
    definitions = {"b": g if is_first else f"momentum * momentum_buffer + {damped}"}
    direction = f"({g} + momentum * b)" if s.get("nesterov") else "b"
    return definitions, {"momentum_buffer": "b", "param": f"{p} - lr * {direction}"}


def _adadelta(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    definitions = {
        "v": f"rho * square_avg + (1 - rho) * {g} ^ 2",
        "d": f"sqrt(acc_delta + eps) / sqrt(v + eps) * {g}",
    }
    delta = "rho * acc_delta + (1 - rho) * d ^ 2"
    return definitions, {"square_avg": "v", "acc_delta": delta, "param": f"{p} - lr * d"}


def _adagrad(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    rate = "lr / (1 + (t - 1) * lr_decay)" if s.get("lr_decay") else "lr"
    results = {"sum": "v", "param": f"{p} - {rate} * {g} / (sqrt(v) + eps)"}
    return {"v": f"sum + {g} ^ 2"}, results


def _adamax(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    definitions = {
        "m": f"beta1 * exp_avg + (1 - beta1) * {g}",
        "u": f"max(beta2 * exp_inf, abs({g}) + eps)",
    }
    results = {"exp_avg": "m", "exp_inf": "u", "param": f"{p} - lr / (1 - beta1 ^ t) * m / u"}
    return definitions, results


def _nadam(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    definitions = {
        # 0.5 and 0.96 are constants of torch's implementation, not settings.
        "now": "beta1 * (1 - 0.5 * 0.96 ^ (t * momentum_decay))",
        "next": "beta1 * (1 - 0.5 * 0.96 ^ ((t + 1) * momentum_decay))",
        "q": "mu_product * now",
        **_moments(g),
        "square": "v / (1 - beta2 ^ t)",
    }
    step = f"(1 - now) / (1 - q) * {g} + next / (1 - q * next) * m"
    parameter = f"{p} - lr * ({step}) / (sqrt(square) + eps)"
    return definitions, {"mu_product": "q", "exp_avg": "m", "exp_avg_sq": "v", "param": parameter}


def _radam(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    definitions = {
        **_moments(g),
        "limit": "2 / (1 - beta2) - 1",
        "r": "limit - 2 * t * beta2 ^ t / (1 - beta2 ^ t)",
        "c": "sqrt((r - 4) * (r - 2) * limit / ((limit - 4) * (limit - 2) * r))",
    }
    # In the first steps the variance of the adaptive rate has no bound (Liu et al., 2019,
    # arXiv:1908.03265): the momentum alone is used.
    factor = "c * sqrt(1 - beta2 ^ t) / (sqrt(v) + eps) if r > 5 else 1"
    parameter = f"{p} - lr * m / (1 - beta1 ^ t) * ({factor})"
    return definitions, {"exp_avg": "m", "exp_avg_sq": "v", "param": parameter}


def _rmsprop(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    definitions = {"v": f"alpha * square_avg + (1 - alpha) * {g} ^ 2"}
    results, square = {"square_avg": "v"}, "v"
    if s.get("centered"):
        definitions["a"] = f"alpha * grad_avg + (1 - alpha) * {g}"
        results["grad_avg"], square = "a", "v - a ^ 2"
    step = f"{g} / (sqrt({square}) + eps)"
    if not s.get("momentum"):
        return definitions, results | {"param": f"{p} - lr * {step}"}
    definitions["b"] = f"momentum * momentum_buffer + {step}"
    return definitions, results | {"momentum_buffer": "b", "param": f"{p} - lr * b"}


def _rprop(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    definitions = {
        "f": f"etaplus if {g} * prev > 0 else etaminus if {g} * prev < 0 else 1",
        "size": "min(max(step_size * f, smallest), largest)",
        "d": f"0 if {g} * prev < 0 else {g}",
    }
    return definitions, {"step_size": "size", "prev": "d", "param": f"{p} - sign(d) * size"}


def _asgd(g: str, p: str, s: Settings, is_first: bool) -> _Formulas:
    results = {
        "param": "x",
        "ax": "ax + (x - ax) * mu",
        "eta": "lr / (1 + lambd * lr * t) ^ alpha",
        "mu": "1 / max(1, t - t0)",
    }
    return {"x": f"{p} * (1 - lambd * eta) - eta * {g}"}, results


#: The formulas of each optimizer, given those of the gradient and of the parameter after weight decay.
UPDATES: dict[str, Callable[[str, str, Settings, bool], _Formulas]] = {
    "ASGD": _asgd,
    "Adadelta": _adadelta,
    "Adagrad": _adagrad,
    "Adam": _adam,
    "AdamW": _adam,
    "Adamax": _adamax,
    "NAdam": _nadam,
    "RAdam": _radam,
    "RMSprop": _rmsprop,
    "Rprop": _rprop,
    "SGD": _sgd,
}
#: For each kernel, the lists that it writes, with the optimizer's names of their tensors.
_ADAM = {
    "self": "param",
    "grads": "grad",
    "exp_avgs": "exp_avg",
    "exp_avg_sqs": "exp_avg_sq",
    "max_exp_avg_sqs": "max_exp_avg_sq",
}
FUSED: dict[str, tuple[str, dict[str, str]]] = {
    "fused_adam": ("Adam", _ADAM),
    "fused_adamw": ("AdamW", _ADAM),
    "fused_sgd": (
        "SGD",
        {"self": "param", "grads": "grad", "momentum_buffer_list": "momentum_buffer"},
    ),
    "fused_adagrad": ("Adagrad", {"self": "param", "grads": "grad", "state_sums": "sum"}),
}


def _fused(call: Call) -> Made:
    written = call.written
    optimizer, keys = FUSED[call.kind]
    lists = {
        name: call.names(key)
        for key, name in {**keys, "state_steps": "step"}.items()
        if call.arguments.get(key)
    }
    own, place = next(
        ((key, names.index(written)) for key, names in lists.items() if written in names), ("", -1)
    )
    if place < 0:
        raise NoRuleError("it is not in its lists")
    tensors = {key: names[place] for key, names in lists.items() if place < len(names)}
    settings: dict[str, Any] = {}
    for key, value in call.arguments.items():
        if isinstance(value, str) and key in ("lr", "grad_scale", "found_inf"):
            tensors[key] = value
            settings[key] = None  # `update` asks only whether it is given
        elif isinstance(value, int | float):
            settings[key] = value
    if own in ("grad", "step"):
        text = "grad / grad_scale" if own == "grad" and "grad_scale" in tensors else own
    else:
        is_first = bool(settings.get("is_first_step"))
        text = update(optimizer, settings, t="step", is_first=is_first).formula(own)
    # e.g. the count of steps, which the kernel only reads.
    if text == own:
        return Formula(own, {own: _piece(call, written)}, note="which it leaves as it is")
    # A GradScaler found a gradient that is not finite: the kernel leaves everything as it is.
    if "found_inf" in tensors:
        text = f"{own} if found_inf == 1 else {text}"
    used = [name for name in names_in(text) if name in tensors]
    return Formula(text, {name: _piece(call, tensors[name]) for name in used}, settings)


def _unscaled(call: Call) -> Made:
    """Return the rule of the kernel by which a GradScaler divides gradients by its scale."""
    written = call.written
    if written not in call.names("self"):
        text = "1 if a gradient is not finite, else found_inf"
        return Words(text, {"found_inf": _piece(call, written)})
    given = {"self": _piece(call, written), "inv_scale": _piece(call, call.name("inv_scale"))}
    return Formula("self * inv_scale", given)


def _piece(call: Call, name: str) -> Piece:
    """Return the number of a tensor at the wanted place, or its only one."""
    shape = call.inputs[name].shape
    return Piece(name, (0,) * len(shape)) if shape.numel() == 1 else aligned(name, shape, call.index)


def _unscaled_rows(call: RowsCall) -> list[Result]:
    """Gradients, in place, and whether one of them is not finite."""
    call.require_shared("inv_scale")
    scale = call["inv_scale"].value

    def of(gradient: Tracked) -> Result:
        return Result(gradient.labels, lambda row: gradient.term(row) * scale, gradient.is_mean)

    return [*map(of, call["self"]), filled(SHARED, call["found_inf"].labels)]


def _fused_fits(given: Given) -> bool:
    """Each list has a tensor for each parameter: of its size, and without gaps."""
    whole = given["self"]
    for name, tensors in given.items():
        if name == "state_steps":
            fits = all(each.numel() == 1 and each.dtype == torch.float32 for each in tensors)
        elif isinstance(tensors, list):
            fits = all(
                each.numel() == own.numel() and each.dtype == own.dtype
                for each, own in zip(tensors, whole, strict=False)
            )
        else:
            fits = not isinstance(tensors, Tensor) or tensors.numel() == 1
            tensors = whole
        may_be_empty = {"max_exp_avg_sqs": "amsgrad", "momentum_buffer_list": "momentum"}
        is_left_out = not tensors and name in may_be_empty and not given[may_be_empty[name]]
        if not fits or not (is_left_out or len(tensors) == len(whole)):
            return False
    return are_dense(given)


#: The arguments of each kernel after the lists that it writes.
_SETTINGS = {
    **dict.fromkeys(
        ("fused_adam", "fused_adamw"),
        "List[Tensor] state_steps, float lr, float beta1, float beta2, float weight_decay, float eps, "
        "bool amsgrad, bool maximize",
    ),
    "fused_sgd": "float weight_decay, float momentum, float lr, float dampening, bool nesterov, "
    "bool maximize, bool is_first_step",
    "fused_adagrad": "List[Tensor] state_steps, float lr, float lr_decay, float weight_decay, "
    "float eps, bool maximize",
}


def _fused_arguments(kind: str) -> str:
    """Return the arguments of both overloads; in one of them, the learning rate is a tensor."""
    lists = "".join(f"List[Tensor] {key}, " for key in FUSED[kind][1])
    text = f"{lists}{_SETTINGS[kind]}, Optional[Tensor] grad_scale, Optional[Tensor] found_inf"
    return f"{text} | {text.replace('float lr,', 'Tensor lr,')}"


OPTIMIZERS: dict[str, OperatorRecord] = {
    **{
        f"_{kind}_": OperatorRecord(_fused, fits=_fused_fits, arguments=_fused_arguments(kind))
        for kind in FUSED
    },
    **alike("_amp_foreach_non_finite_check_and_unscale_", _unscaled, _unscaled_rows, by_values=True),
    **alike("_amp_update_scale_", by_values=True),
}
