"""How operators are written: what an operation computes, as mathematics or as a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from everystep.program.arguments import references
from everystep.program.observed import Observed
from everystep.program.operation import Operation
from everystep.program.operators import parameters
from everystep.views.lines import TIMES

__all__ = ["Call", "all_arguments", "kind_of", "right_side", "value_text"]

#: What the names of kernels have, and their mathematics does not.
_DECORATIONS = re.compile(r"^_|^_?native_|^_?cudnn_|_with_indices|_forward$|(?<=[a-z0-9])_$")
_ATTENTION = re.compile(r"scaled_dot_product_\w*attention(_for_cpu)?")


def kind_of(operation: Operation) -> str:
    """Return the operator's name without what only kernels have: `relu` of `aten.relu_.default`."""
    parts = operation.operator.split(".")
    name = parts[-1] if parts[0] == "torch" else operation.operator.split(".")[1]
    return _ATTENTION.sub("attention", _DECORATIONS.sub("", name))


def all_arguments(operation: Operation) -> dict[str, tuple[Any, bool]]:
    """Return the arguments of an operation by name, and whether each was passed or is the default.

    By position if the schema is unknown: an eager step may contain any operator.
    """
    try:
        known, given = parameters(operation.resolved), operation.given()
    except ValueError:
        places = {str(place): value for place, value in enumerate(operation.arguments)}
        return {key: (value, True) for key, value in (places | operation.keywords).items()}
    return {p.name: (given[p.name], True) if p.name in given else (p.default, False) for p in known}


def value_text(value: Any, name_of: Callable[[str], str] = str) -> str:
    """Return an encoded argument as text, with tensors as `name_of` calls them."""
    if isinstance(value, str):
        return name_of(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(value_text(item, name_of) for item in value)}]"
    if isinstance(value, dict):
        return ", ".join(map(str, value.values()))
    return f"{value:,}" if type(value) is int else str(value)


class Call:
    """An operation with what its arguments are called."""

    def __init__(self, seen: Observed, names: Mapping[str, str]) -> None:
        self.seen = seen
        self.kind = kind_of(seen.operation)
        self.names = names
        self.arguments = all_arguments(seen.operation)
        self.tensors = {
            key: names.get(value, value)
            for key, (value, _) in self.arguments.items()
            if isinstance(value, str)
        }

    def __getitem__(self, key: str) -> str:
        return value_text(self.arguments[key][0], lambda name: self.names.get(name, name))

    def value(self, key: str) -> Any:
        """Return an argument as it is encoded."""
        return self.arguments[key][0]

    def tensor(self, key: str) -> Tensor:
        """Return the tensor that an argument is."""
        return self.seen.inputs[self.arguments[key][0]]


def right_side(call: Call) -> str:
    """Return what an operation computes."""
    known = _WRITTEN.get(call.kind)
    try:
        text = known(call) if callable(known) else known
        return text.format_map(call) if text else _as_call(call)
    except (KeyError, ValueError):  # an operator of that name which takes something else
        return _as_call(call)


def _as_call(call: Call) -> str:
    """Return `name(arguments)`: tensors, and what is not the default, by name after what is left out.

    The settings of a backward operation are those of the operation that it is of.
    """
    defaults = _defaults(call.seen.operation)
    is_backward = "backward" in call.kind
    texts, is_named = [], False
    for key, (value, is_given) in call.arguments.items():
        tensors = list(references(value))
        if not tensors and (is_backward or not is_given or _is_usual(value, defaults.get(key))):
            is_named = not is_backward
            continue
        text = call[key] if len(tensors) <= 3 else f"{len(tensors)} tensors"
        is_named = (is_named or not tensors) and not key.isdigit()
        texts.append(f"{key}={text}" if is_named else text)
    return f"{call.kind}({', '.join(texts)})"


def _defaults(operation: Operation) -> dict[str, Any]:
    try:
        return {each.name: each.default for each in parameters(operation.resolved)}
    except ValueError:  # an eager step may contain any operator
        return {}


def _is_usual(value: Any, default: Any) -> bool:
    """Tell whether an argument changes nothing of what is computed."""
    if isinstance(value, dict):
        return not {"text", "float"} & value.keys() or value.get("text") == default
    if isinstance(value, list | tuple) and isinstance(default, int):
        return all(each == default for each in value)
    return value == default or (default is None and (value is False or value == []))


def _sum_of(left: str, right: str, factor: Any) -> str:
    """Return left + factor * right."""
    if factor == 1:
        return f"{left} + {right}"
    if isinstance(factor, int | float) and factor < 0:
        return f"{left} - {right}" if factor == -1 else f"{left} - {-factor} * {right}"
    return f"{left} + {value_text(factor)} * {right}"


def _added(call: Call) -> str:
    alpha = call.value("alpha") if "alpha" in call.arguments else 1
    return _sum_of("{self}", "{other}", alpha if call.kind == "add" else -alpha)


def _reduced(call: Call) -> str:
    axes = call.value("dim") if "dim" in call.arguments else None
    some = axes if isinstance(axes, list | tuple) else [axes]
    return f"{call.kind}({', '.join(['{self}', *(str(axis) for axis in some if axis is not None)])})"


def _squared_error(call: Call) -> str:
    error = "({self} - {target})²"
    return {0: error, 1: f"mean({error})", 2: f"sum({error})"}.get(call.value("reduction"), "")


def _squared_error_backward(call: Call) -> str:
    factor = "" if call["grad_output"] == "1" else "{grad_output} * "
    count = f" / {call.tensor('self').numel():,}" if call.value("reduction") == 1 else ""
    return factor + "2 * ({self} - {target})" + count


def _division(call: Call) -> str:
    quotient = "{self} / {other}"
    mode = call.value("rounding_mode") if "rounding_mode" in call.arguments else None
    return f"{call['rounding_mode']}({quotient})" if mode else quotient


def _is_plain_likelihood(call: Call) -> bool:
    """Tell whether a negative log likelihood is of rows that all count alike."""
    if call.value("weight") is not None or call.tensor("self").dim() > 2:
        return False
    return not bool((call.tensor("target") == call.value("ignore_index")).any())


def _negative_log_likelihood(call: Call) -> str:
    if not _is_plain_likelihood(call):
        return ""
    texts = {0: "-{self}[{target}]", 1: "-mean({self}[{target}])", 2: "-sum({self}[{target}])"}
    return texts.get(call.value("reduction"), "")


def _negative_log_likelihood_backward(call: Call) -> str:
    if not _is_plain_likelihood(call) or call.value("reduction") not in (1, 2):
        return ""
    total = call.tensor("total_weight").item() if call.value("reduction") == 1 else 1
    divisor = f" / {total:,.17g}" if total != 1 else ""
    return "-{grad_output}" + divisor + " at {target} else 0"


def _setting(call: Call, key: str, usual: Any) -> str:
    sizes = call.value(key)
    sizes = [sizes] if isinstance(sizes, int) else sizes
    if not sizes or all(size == usual for size in sizes) or sizes == usual:
        return ""
    return f", {key} {TIMES.join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))}"


#: The settings of a convolution that change nothing.
_OF_CONVOLUTIONS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}


def _convolution(call: Call) -> str:
    name = "conv_transpose" if call.value("transposed") else "conv"
    settings = "".join(_setting(call, key, usual) for key, usual in _OF_CONVOLUTIONS.items())
    bias = " + {bias}" if call.value("bias") is not None else ""
    return name + "({input}, {weight}" + settings + ")" + bias


def _pooled(call: Call) -> str:
    kernel = call.value("kernel_size")
    usual = {"stride": kernel, "padding": 0, "dilation": 1, "ceil_mode": False}
    settings = "".join(_setting(call, key, each) for key, each in usual.items())
    return "max_pool({self}, " + TIMES.join(map(str, kernel)) + settings + ")"


def _embedding_backward(call: Call) -> str:
    if call.value("padding_idx") >= 0 or call.value("scale_grad_by_freq"):
        return ""
    return "sum of {grad_output} at {indices}"


def _threshold_backward(call: Call) -> str:
    if bool(call.tensor("self").isnan().any()):  # it lets the gradient of NaN through
        return "0 if {self} <= {threshold} else {grad_output}"
    return "{grad_output} if {self} > {threshold} else 0"


def _normalised(call: Call) -> str:
    given = ["input", *(key for key in ("weight", "bias") if call.value(key) is not None)]
    return f"{call.kind}({', '.join(call[key] for key in given)})"


#: How operators are written, by kind, with their arguments by name; those not here, as calls.
_WRITTEN: dict[str, str | Callable[[Call], str]] = {
    "addmm": lambda call: "{mat1} · {mat2} + {self}" * (call.value("beta") == call.value("alpha") == 1),
    **dict.fromkeys(("mm", "bmm"), "{self} · {mat2}"),
    "mv": "{self} · {vec}",
    "dot": "{self} · {tensor}",
    **dict.fromkeys(("add", "sub"), _added),
    "mul": "{self} * {other}",
    "div": _division,
    "gt": "{self} > {other}",
    "lt": "{self} < {other}",
    "neg": "-{self}",
    "reciprocal": "1 / {self}",
    "pow": "{self}^{exponent}",
    **dict.fromkeys(("sum", "mean"), _reduced),
    "relu": "relu({self})",
    "gelu": lambda call: "gelu({self})" * (call["approximate"] == "none"),
    "softmax": "softmax({self}, {dim})",
    "log_softmax": "log_softmax({self}, {dim})",
    "mse_loss": _squared_error,
    "mse_loss_backward": _squared_error_backward,
    "nll_loss": _negative_log_likelihood,
    "nll_loss_backward": _negative_log_likelihood_backward,
    "threshold_backward": _threshold_backward,
    "tanh_backward": "{grad_output} * (1 - {output}²)",
    "sigmoid_backward": "{grad_output} * {output} * (1 - {output})",
    "gelu_backward": lambda call: "{grad_output} * gelu'({self})" * (call["approximate"] == "none"),
    "softmax_backward_data": "{output} * ({grad_output} - sum({grad_output} * {output}, {dim}))",
    "log_softmax_backward_data": "{grad_output} - exp({output}) * sum({grad_output}, {dim})",
    "convolution": _convolution,
    **dict.fromkeys(("batch_norm", "layer_norm", "group_norm"), _normalised),
    "dropout": "dropout({input}, p={p})",
    "bernoulli": "1 with probability {p}, else 0",
    "max_pool2d": _pooled,
    "embedding": "{weight}[{indices}]",
    "embedding_dense_backward": _embedding_backward,
    "local_scalar_dense": "read by Python: {self}",
    "nonzero": "where {self} is not 0",
    "masked_select": "{self}[{mask}]",
    "clone": "copy({self})",
    "copy": "copy({src})",
}
