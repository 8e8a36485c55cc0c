"""Rules of the optimizers' kernels, which update many tensors at once, each number by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.program.elements.call import Call, Formula, Made, NoRuleError, Piece, aligned

__all__ = ["adam", "fused", "unscaled"]

#: The lists of each kernel that it writes.
_LISTS = {
    "fused_adam": ("self", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    "fused_adamw": ("self", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    "fused_sgd": ("self", "grads", "momentum_buffer_list"),
    "fused_adagrad": ("self", "grads", "state_sums"),
}


def fused(call: Call, written: str) -> Made:
    """Return the rule of a fused optimizer for a number of one of the tensors that it writes.

    written: the name of that tensor.
    """
    lists = {
        key: call.names(key) for key in (*_LISTS[call.kind], "state_steps") if call.arguments.get(key)
    }
    own, place = next(
        ((key, names.index(written)) for key, names in lists.items() if written in names), ("", -1)
    )
    if place < 0:
        raise NoRuleError("it is not in its lists")
    given: dict[str, Piece] = {}
    for key, names in lists.items():
        if place < len(names):
            name = names[place]
            given[_SINGULAR.get(key, key)] = aligned(name, call.inputs[name].shape, call.index)
    if own == "grads" and "grad_scale" not in call:
        return Formula("grad, which it leaves as it is", {"grad": given["grad"]}, lambda grad: grad[0])
    numbers = _settings(call, given)
    text, function = _update(call.kind, own, numbers)
    is_scaled = "grad_scale" in call or "found_inf" in call  # which the formula does not have
    return Formula(text, given, None if is_scaled else function)


def unscaled(call: Call, written: str) -> Made:
    """Return the rule of the kernel by which a GradScaler divides gradients by its scale.

    written: the name of the tensor that it writes.
    """
    if written not in call.names("self"):
        known = aligned(written, call.inputs[written].shape, call.index)
        return Formula("1 if a gradient is not finite , else found_inf", {"found_inf": known})
    scale = call.piece("inv_scale", *[0] * call.tensor("inv_scale").dim())
    given = {"self": aligned(written, call.inputs[written].shape, call.index), "inv_scale": scale}
    return Formula("self * inv_scale", given, lambda self, inv_scale: self[0] * inv_scale[0])


#: The settings of Adam that its formula has.
_SETTINGS = ("lr", "beta1", "beta2", "eps", "weight_decay")
_SINGULAR = {
    "self": "param",
    "grads": "grad",
    "exp_avgs": "exp_avg",
    "exp_avg_sqs": "exp_avg_sq",
    "max_exp_avg_sqs": "max_exp_avg_sq",
    "momentum_buffer_list": "momentum_buffer",
    "state_sums": "state_sum",
    "state_steps": "step",
}


def _settings(call: Call, given: dict[str, Piece]) -> dict[str, Any]:
    """Return the numbers among the arguments; what is a tensor is given by it."""
    found = {}
    for key, value in call.arguments.items():
        if isinstance(value, str) and key in ("lr", "grad_scale", "found_inf"):
            given[key] = call.piece(key)
        elif isinstance(value, int | float) and not isinstance(value, str):
            found[key] = value
    return found


def _update(kind: str, own: str, s: dict[str, Any]) -> tuple[str, Callable[..., Any] | None]:
    """Return the formula of a tensor that a kernel writes, as torch documents the optimizer."""
    if kind in ("fused_adam", "fused_adamw"):
        return adam(kind == "fused_adamw", own, s)
    text = "updated by the kernel from these numbers"
    if kind != "fused_sgd" or s.get("momentum") or own != "self":
        return text, None

    def of(param: Any, grad: Any, lr: Any = None) -> Any:
        rate = s.get("lr") if lr is None else lr[0]
        gradient = -grad[0] if s.get("maximize") else grad[0]
        return param[0] - rate * (gradient + s.get("weight_decay", 0) * param[0])

    decay = f" + {s['weight_decay']} * param" if s.get("weight_decay") else ""
    rate = s.get("lr", "lr")
    return f"param - {rate} * ( {'- ' if s.get('maximize') else ''}grad{decay} )", of


def adam(is_decoupled: bool, own: str, s: dict[str, Any]) -> tuple[str, Callable[..., Any] | None]:
    """Return the formula of Adam, or of AdamW, for a tensor that it writes, as text and function.

    own: the list of that tensor; s: the settings. Source: the algorithm in torch's documentation of
    `torch.optim.Adam` and `AdamW`.
    """
    beta1, beta2 = s["beta1"], s["beta2"]
    decay = s.get("weight_decay", 0)
    plain = not s.get("amsgrad") and not s.get("maximize") and own in ("self", "exp_avgs", "exp_avg_sqs")

    def gradient(param: Any, grad: Any) -> Any:
        return grad[0] if is_decoupled or not decay else grad[0] + decay * param[0]

    def average(param: Any, grad: Any, exp_avg: Any) -> Any:
        return beta1 * exp_avg[0] + (1 - beta1) * gradient(param, grad)

    def square(param: Any, grad: Any, exp_avg_sq: Any) -> Any:
        return beta2 * exp_avg_sq[0] + (1 - beta2) * gradient(param, grad) ** 2

    def of(
        param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, step: Any, lr: Any = None, **others: Any
    ) -> Any:
        mean, second = average(param, grad, exp_avg), square(param, grad, exp_avg_sq)
        if own == "exp_avgs":
            return mean
        if own == "exp_avg_sqs":
            return second
        rate = s.get("lr") if lr is None else lr[0]
        before = param[0] * (1 - rate * decay) if is_decoupled else param[0]
        denominator = np.sqrt(second / (1 - beta2 ** step[0])) + s["eps"]
        return before - rate * mean / (1 - beta1 ** step[0]) / denominator

    used = f"( grad + {decay} * param )" if decay and not is_decoupled else "grad"
    settings = ", ".join(f"{key} {s[key]}" for key in _SETTINGS if key in s)
    texts = {
        "exp_avgs": f"{beta1} * exp_avg + {1 - beta1:g} * {used}",
        "exp_avg_sqs": f"{beta2} * exp_avg_sq + {1 - beta2:g} * {used} ^ 2",
        "self": "param - lr * mean / ( sqrt( square ) + eps ) , as torch.optim.Adam documents it: "
        + settings,
    }
    return texts.get(own, "updated by the kernel"), of if plain else None
