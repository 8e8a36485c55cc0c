"""An operation as a line of mathematics.

`#3` is the result of operation 3, `∂#3` the gradient of the loss with respect to it, `·` the matrix
product, `*` the product of numbers. A view is written as what it is a view of: transposed `#3ᵀ`, or
`permute(#3)`, or `part(#3)`; reshaped or broadcast, it is `#3` itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from everystep.program.arguments import references
from everystep.program.execute import Observed
from everystep.program.operation import Operation
from everystep.program.operators import parameters
from everystep.views.lines import TIMES

__all__ = ["Line", "all_arguments", "kind_of", "mathematics", "value_text"]

_VIEW = re.compile(r"~\d+$")
_NUMBERED = re.compile(r"#\d+(\.\d+)?")
#: What the names of kernels have, and their mathematics does not.
_DECORATIONS = re.compile(r"^_|^_?native_|^_?cudnn_|_with_indices|_forward$|(?<=[a-z0-9])_$")
_ATTENTION = re.compile(r"scaled_dot_product_\w*attention(_for_cpu)?")


class Line(NamedTuple):
    """An operation as mathematics.

    left: its result, empty if that is named by the operation's number only; right: what it computes;
    given, made: the names of its input and result tensors.
    """

    left: str
    right: str
    given: dict[str, str]
    made: dict[str, str]

    def __str__(self) -> str:
        return f"{self.left} = {self.right}" if self.left else self.right

    @property
    def short(self) -> str:
        """The line with only the first of its results."""
        first, _, others = self.left.partition(", ")
        return f"{first}, ... = {self.right}" if others else str(self)


def mathematics(operations: Sequence[Observed]) -> list[Line]:
    """Return a line for each operation of a step, in order."""
    reader = _Reader(operations)
    return [reader.line(number, seen) for number, seen in enumerate(operations)]


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


class _Call:
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
        return self.arguments[key][0]

    def tensor(self, key: str) -> Tensor:
        return self.seen.inputs[self.arguments[key][0]]


class _Made(NamedTuple):
    """What an operation of the forward pass has made, and of what."""

    kind: str
    tensors: dict[str, str]
    size: int


class _Reader:
    """Goes through a step, and knows what each tensor is called at the operation it has come to."""

    def __init__(self, operations: Sequence[Observed]) -> None:
        self._shapes = {
            name: tuple(tensor.shape)
            for seen in operations
            for name, tensor in (*seen.inputs.items(), *seen.results.items())
            if not _VIEW.search(name)
        }
        self._called: dict[str, str] = {}
        self._made: dict[str, _Made] = {}
        self._uses: Counter[str] = Counter()

    def line(self, number: int, seen: Observed) -> Line:
        """Return the next operation as mathematics."""
        operation = seen.operation
        names = {name: self._name(name, tensor) for name, tensor in seen.inputs.items()}
        call = _Call(seen, names)
        results = [name for name in operation.results if name] or list(seen.results)
        called = {}
        for place, name in enumerate(results):
            own = f"#{number}.{place + 1}" if place else f"#{number}"
            called[name] = _lasting_name(_base(name)) or own
        if operation.phase == "backward" and operation.results[:1] == tuple(results[:1]) != ():
            source = self._differentiated(call, seen.results[results[0]].numel())
            if source and called[results[0]] == f"#{number}":
                called[results[0]] = f"∂{source}"
        if call.kind == "ones_like" and call.tensors.get("self") == "loss":
            self._called[_base(results[0])] = "1"
            return Line("∂loss", "1", names, {results[0]: "∂loss"})
        self._called.update({_base(name): text for name, text in called.items()})
        if operation.phase in ("forward", "loss"):
            self._uses.update(text.removesuffix("ᵀ") for text in call.tensors.values())
            for name in results[:1]:
                size = seen.results[name].numel()
                self._made[called[name]] = _Made(call.kind, call.tensors, size)
        left = [*dict.fromkeys(text for text in called.values() if not _NUMBERED.fullmatch(text))]
        if len(left) > 3:
            left[1:] = [f"... ({len(left)} tensors)"]
        return Line(", ".join(left), _right(call), names, called)

    def _name(self, name: str, tensor: Tensor) -> str:
        base = _base(name)
        called = self._called.get(base) or _lasting_name(base)
        if called is None:
            is_one = base.startswith("ones_like") and tensor.numel() == 1 and tensor.item() == 1
            called = "1" if is_one else base
        return called if name == base else _as_view(called, tensor, self._shapes.get(base))

    def _differentiated(self, call: _Call, size: int) -> str | None:
        """Return what a backward operation gives the whole gradient of, where that is sure."""
        gradient = next(iter(call.tensors.values()), "")
        made = self._made.get("loss" if gradient == "1" else gradient.removeprefix("∂"))
        if made is None or not gradient.startswith(("1", "∂")):
            return None
        source = _source(made, call)
        if source not in self._made or self._uses[source] != 1 or self._made[source].size != size:
            return None
        return source


def _source(made: _Made, call: _Call) -> str:
    """Return what `made` was made of that the operation may give the gradient of; "" if unknown."""
    first = next(iter(made.tensors.values()), "")
    if call.kind == "mm" and made.kind in ("addmm", "mm"):
        right, factor = made.tensors["mat2"], call.tensors.get("mat2", "")
        is_its_transpose = right == f"{factor}ᵀ" or factor == f"{right}ᵀ"
        return made.tensors.get("mat1", first) if is_its_transpose else ""
    if call.kind == "mul" and made.kind == "mul" and len(made.tensors) == 2:
        others = [text for text in made.tensors.values() if text != call.tensors.get("other")]
        return others[0] if len(others) == 1 else ""
    of_kind = {f"{made.kind}_backward", f"{made.kind}_backward_data"}
    if made.kind == "relu":
        of_kind.add("threshold_backward")
    return first if call.kind in of_kind else ""


def _base(name: str) -> str:
    return _VIEW.sub("", name)


def _lasting_name(base: str) -> str | None:
    """Return the name of a tensor that outlives the operation, or is an input of the step."""
    kind, _, rest = base.partition("/")
    if kind in ("parameter", "buffer") and rest:
        return rest
    if kind == "gradient" and rest:
        return f"{rest}.grad"
    if kind == "optimizer" and rest:
        return rest.replace("/", ".")
    if kind == "hyperparameter" and rest:
        group, setting, _ = f"{rest}//".split("/", 2)
        return setting if group == "0" else f"{setting}[{group}]"
    return base if base in ("x", "y", "loss") else None


def _as_view(called: str, tensor: Tensor, base: tuple[int, ...] | None) -> str:
    shape, stride = tuple(tensor.shape), tensor.stride()
    if len(shape) == 2 and 1 not in shape and stride[0] == 1 and stride[1] >= shape[0]:
        return f"{called}ᵀ"
    if len(shape) == 2 and base == shape[::-1] and base != shape:
        return f"{called}ᵀ"
    whole = math.prod(base) if base else tensor.untyped_storage().nbytes() // tensor.itemsize
    if tensor.numel() < whole:
        return f"part({called})" if 0 not in stride else called
    if tensor.numel() == whole and not tensor.is_contiguous():
        return f"permute({called})"
    return called


def _right(call: _Call) -> str:
    written = _WRITTEN.get(call.kind)
    try:
        text = written(call) if written else None
    except (KeyError, ValueError):  # an operator of that name which takes something else
        text = None
    return text or _as_call(call)


def _as_call(call: _Call) -> str:
    """Return `name(arguments)`: tensors, and what is not the default."""
    texts = []
    for key, (value, is_given) in call.arguments.items():
        tensors = list(references(value))
        if tensors and not isinstance(value, str):
            texts.append(call[key] if len(tensors) <= 3 else f"{len(tensors)} tensors")
        elif tensors:
            texts.append(call[key])
        elif is_given and not _is_nothing(value) and "backward" not in call.kind:
            texts.append(call[key] if key.isdigit() else f"{key}={call[key]}")
    return f"{call.kind}({', '.join(texts)})"


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or value == [] or isinstance(value, dict)


def _sum_of(left: str, right: str, factor: Any) -> str:
    """Return left + factor * right."""
    if factor == 1:
        return f"{left} + {right}"
    if isinstance(factor, int | float) and factor < 0:
        return f"{left} - {right}" if factor == -1 else f"{left} - {-factor} * {right}"
    return f"{left} + {value_text(factor)} * {right}"


def _added(call: _Call) -> str:
    return _sum_of(call["self"], call["other"], call.value("alpha") if "alpha" in call.arguments else 1)


def _subtracted(call: _Call) -> str:
    alpha = call.value("alpha") if "alpha" in call.arguments else 1
    return _sum_of(call["self"], call["other"], -alpha)


def _reduced(name: str) -> Callable[[_Call], str]:
    def written(call: _Call) -> str:
        axes = call.value("dim") if "dim" in call.arguments else None
        if not axes and axes != 0:
            return f"{name}({call['self']})"
        some = axes if isinstance(axes, list | tuple) else [axes]
        return f"{name}({call['self']}, {', '.join(map(str, some))})"

    return written


def _matrix_product(call: _Call) -> str:
    product = f"{call['mat1']} · {call['mat2']}"
    if call.value("beta") != 1 or call.value("alpha") != 1:
        return ""
    return f"{product} + {call['self']}"


def _squared_error(call: _Call) -> str:
    error = f"({call['self']} - {call['target']})²"
    return {0: error, 1: f"mean({error})", 2: f"sum({error})"}.get(call.value("reduction"), "")


def _squared_error_backward(call: _Call) -> str:
    factor = "" if call["grad_output"] == "1" else f"{call['grad_output']} * "
    count = f" / {call.tensor('self').numel():,}" if call.value("reduction") == 1 else ""
    return f"{factor}2 * ({call['self']} - {call['target']}){count}"


def _negative_log_likelihood(call: _Call) -> str:
    if call.value("weight") is not None or call.tensor("self").dim() > 2:
        return ""
    chosen = f"{call['self']}[{call['target']}]"
    return {0: f"-{chosen}", 1: f"-mean({chosen})", 2: f"-sum({chosen})"}.get(
        call.value("reduction"), ""
    )


def _negative_log_likelihood_backward(call: _Call) -> str:
    if call.value("weight") is not None or call.value("reduction") not in (1, 2):
        return ""
    total = call.tensor("total_weight").item() if call.value("reduction") == 1 else 1
    factor = f"-{call['grad_output']}" + (f" / {total:,g}" if total != 1 else "")
    return f"{factor} at {call['target']} else 0"


def _softmax_backward(call: _Call) -> str:
    gradient, output = call["grad_output"], call["output"]
    return f"{output} * ({gradient} - sum({gradient} * {output}, {call['dim']}))"


def _log_softmax_backward(call: _Call) -> str:
    gradient = call["grad_output"]
    return f"{gradient} - exp({call['output']}) * sum({gradient}, {call['dim']})"


def _convolution(call: _Call) -> str:
    def setting(key: str, usual: int) -> str:
        sizes = call.value(key)
        if all(size == usual for size in sizes):
            return ""
        return f", {key} {TIMES.join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))}"

    name = "conv_transpose" if call.value("transposed") else "conv"
    settings = setting("stride", 1) + setting("padding", 0) + setting("dilation", 1)
    bias = f" + {call['bias']}" if call.value("bias") is not None else ""
    groups = f", groups {call['groups']}" if call.value("groups") != 1 else ""
    return f"{name}({call['input']}, {call['weight']}{settings}{groups}){bias}"


def _pooled(call: _Call) -> str:
    return f"max_pool({call['self']}, {TIMES.join(map(str, call.value('kernel_size')))})"


def _threshold_backward(call: _Call) -> str:
    return f"{call['grad_output']} if {call['self']} > {call['threshold']} else 0"


def _normalised(call: _Call) -> str:
    parts = [call["input"], *(call[key] for key in ("weight", "bias") if call.value(key) is not None)]
    return f"{call.kind}({', '.join(parts)})"


#: How operators are written, by kind; those that are not here, as calls.
_WRITTEN: dict[str, Callable[[_Call], str]] = {
    "addmm": _matrix_product,
    "mm": lambda call: f"{call['self']} · {call['mat2']}",
    "bmm": lambda call: f"{call['self']} · {call['mat2']}",
    "mv": lambda call: f"{call['self']} · {call['vec']}",
    "dot": lambda call: f"{call['self']} · {call['tensor']}",
    "add": _added,
    "sub": _subtracted,
    "mul": lambda call: f"{call['self']} * {call['other']}",
    "div": lambda call: f"{call['self']} / {call['other']}",
    "gt": lambda call: f"{call['self']} > {call['other']}",
    "lt": lambda call: f"{call['self']} < {call['other']}",
    "neg": lambda call: f"-{call['self']}",
    "reciprocal": lambda call: f"1 / {call['self']}",
    "pow": lambda call: f"{call['self']}^{call['exponent']}",
    "sum": _reduced("sum"),
    "mean": _reduced("mean"),
    "relu": lambda call: f"relu({call['self']})",
    "gelu": lambda call: f"gelu({call['self']})",
    "softmax": lambda call: f"softmax({call['self']}, {call['dim']})",
    "log_softmax": lambda call: f"log_softmax({call['self']}, {call['dim']})",
    "mse_loss": _squared_error,
    "mse_loss_backward": _squared_error_backward,
    "nll_loss": _negative_log_likelihood,
    "nll_loss_backward": _negative_log_likelihood_backward,
    "threshold_backward": _threshold_backward,
    "tanh_backward": lambda call: f"{call['grad_output']} * (1 - {call['output']}²)",
    "sigmoid_backward": lambda c: f"{c['grad_output']} * {c['output']} * (1 - {c['output']})",
    "gelu_backward": lambda call: f"{call['grad_output']} * gelu'({call['self']})",
    "softmax_backward_data": _softmax_backward,
    "log_softmax_backward_data": _log_softmax_backward,
    "convolution": _convolution,
    "batch_norm": _normalised,
    "layer_norm": _normalised,
    "group_norm": _normalised,
    "dropout": lambda call: f"dropout({call['input']}, p={call['p']})",
    "bernoulli": lambda call: f"1 with probability {call['p']}, else 0",
    "max_pool2d": _pooled,
    "embedding": lambda call: f"{call['weight']}[{call['indices']}]",
    "embedding_dense_backward": lambda c: f"sum of {c['grad_output']} at {c['indices']}",
    "local_scalar_dense": lambda call: f"read by Python: {call['self']}",
    "nonzero": lambda call: f"where {call['self']} is not 0",
    "masked_select": lambda call: f"{call['self']}[{call['mask']}]",
    "clone": lambda call: f"copy({call['self']})",
}
