"""An operation as a line of mathematics.

`#3` is the result of operation 3, `∂#3` the gradient of the loss with respect to it, `·` the matrix
product, `*` the product of numbers. A view is written as its base: transposed `#3ᵀ`, or `permute(#3)`,
or `part(#3)`; reshaped or broadcast, it is `#3` itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from everystep.ops import RECORDS
from everystep.ops.arguments import references
from everystep.ops.call import Call, NoRuleError
from everystep.ops.operator_record import OperatorRecord
from everystep.ops.operators import parameters
from everystep.program.observed import Observed
from everystep.program.operation import Operation

__all__ = ["Line", "all_arguments", "argument_texts", "kind_of", "mathematics"]

# Operations of a step, as the program has them, and their lines; "~1" marks the first view of a tensor:
#   addmm(parameter/0.bias, x, parameter/0.weight~1)   #0 = x · 0.weightᵀ + 0.bias
#   relu(addmm)                                        #1 = relu(#0)
#   threshold_backward(mm, relu, 0)                    ∂#0 = ∂#1 if #1 > 0 else 0
#   mm(threshold_backward~1, x)                        0.weight.grad = ∂#0ᵀ · x
# A result is called ∂#1 only where it is certainly the whole gradient of #1.
_VIEW = re.compile(r"~\d+$")
_NUMBERED = re.compile(r"#\d+(\.\d+)?")
#: Parts of kernel names that are omitted in mathematics.
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
    reader = _Naming(operations)
    return [reader.line(number, seen) for number, seen in enumerate(operations)]


class _Made(NamedTuple):
    """A result of the forward pass: its operator, the tensors it was made from, and its size."""

    kind: str
    tensors: dict[str, str]
    size: int


class _Naming:
    """The names of the tensors of a step at its current operation."""

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
        operation = seen.operation
        names = {name: self._name(name, tensor) for name, tensor in seen.inputs.items()}
        # Whole, or a part of it: before an operation in place gives its memory another name.
        used = [self._called.get(_base(name), name) for name in operation.reads()]
        call = NamedCall(seen, names)
        results = [name for name in operation.results if name] or list(seen.results)
        called = {}
        for place, name in enumerate(results):
            own = f"#{number}.{place + 1}" if place else f"#{number}"
            called[name] = _lasting_name(_base(name)) or own
        if operation.phase == "backward" and operation.results and operation.results[0]:
            source = self._differentiated(call, seen.results[results[0]].numel())
            if source and called[results[0]] == f"#{number}":
                called[results[0]] = f"∂{source}"
        # backward() begins with it: the derivative of the loss by itself.
        if call.kind == "ones_like" and call.tensors.get("self") == "loss":
            self._called[_base(results[0])] = "1"
            return Line("∂loss", "1", names, {results[0]: "∂loss"})
        self._called.update({_base(name): text for name, text in called.items()})
        if operation.phase in ("forward", "loss", "other"):
            # How often the forward pass used each: the gradient of what it used twice is a sum of two.
            self._uses.update(used)
        if operation.phase in ("forward", "loss"):
            for name in results[:1]:
                size = seen.results[name].numel()
                self._made[called[name]] = _Made(call.kind, call.tensors, size)
        left = [*dict.fromkeys(text for text in called.values() if not _NUMBERED.fullmatch(text))]
        # A foreach operator writes a tensor for each parameter.
        if len(left) > 3:
            left[1:] = [f"... ({len(left)} tensors)"]
        return Line(", ".join(left), right_side(call), names, called)

    def _name(self, name: str, tensor: Tensor) -> str:
        base = _base(name)
        called = self._called.get(base) or _lasting_name(base) or base
        return called if name == base else _as_view(called, tensor, self._shapes.get(base))

    def _differentiated(self, call: NamedCall, size: int) -> str | None:
        """Return the tensor of which a backward operation returns the whole gradient, if certain."""
        gradient = next(iter(call.tensors.values()), "")
        made = self._made.get("loss" if gradient == "1" else gradient.removeprefix("∂"))
        if made is None or not gradient.startswith(("1", "∂")):
            return None
        source = _source(made, call)
        # Used more than once, it has a gradient that is a sum of several.
        if source not in self._made or self._uses[source] != 1 or self._made[source].size != size:
            return None
        return source


def _source(made: _Made, call: NamedCall) -> str:
    """Return the input of `made` for which the operation may return the gradient; "" if unknown."""
    first = next(iter(made.tensors.values()), "")
    if call.kind == "mm" and made.kind in ("addmm", "mm"):
        right, factor = made.tensors["mat2"], call.tensors.get("mat2", "")
        # The gradient of `mat1` is the gradient times mat2 transposed, that of `mat2` the reverse.
        is_its_transpose = right == f"{factor}ᵀ" or factor == f"{right}ᵀ"
        return made.tensors.get("mat1", first) if is_its_transpose else ""
    if call.kind == "mul" and made.kind == "mul" and len(made.tensors) == 2:
        # The derivative by one factor is the gradient times the other.
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
    return base if base in ("x", "y", "loss") else None


def _as_view(called: str, tensor: Tensor, base: tuple[int, ...] | None) -> str:
    shape, stride = tuple(tensor.shape), tensor.stride()
    # Strides alone show a transposed matrix, whatever it is a view of; with a size of 1 they do not.
    if len(shape) == 2 and 1 not in shape and stride[0] == 1 and stride[1] >= shape[0]:
        return f"{called}ᵀ"
    if len(shape) == 2 and base == shape[::-1] and base != shape:
        return f"{called}ᵀ"
    # Of a tensor from outside, only its view may be known: then its memory tells the size.
    whole = math.prod(base) if base else tensor.untyped_storage().nbytes() // tensor.itemsize
    if tensor.numel() < whole:
        # A stride of 0 repeats numbers, as an expanded tensor does: it is whole.
        return f"part({called})" if 0 not in stride else called
    if tensor.numel() == whole and not tensor.is_contiguous():
        return f"permute({called})"
    return called


def kind_of(operation: Operation) -> str:
    """Return the operator's name without what only kernels have: `relu` of `aten.relu_.default`."""
    return _ATTENTION.sub("attention", _DECORATIONS.sub("", operation.name))


def all_arguments(operation: Operation) -> dict[str, tuple[Any, bool]]:
    """Return the arguments of an operation by name, and whether each was passed or is the default."""
    known, given = parameters(operation.resolved), operation.given()
    return {p.name: (given[p.name], True) if p.name in given else (p.default, False) for p in known}


def argument_texts(operation: Operation, called: Mapping[str, str]) -> list[tuple[str, str, bool]]:
    """Return name and text of each argument of an operation, and whether it is the default.

    called: the names of its input tensors.
    """
    return [
        (key, _argument_text(value, called), not is_given)
        for key, (value, is_given) in all_arguments(operation).items()
    ]


def _argument_text(value: Any, called: Mapping[str, str]) -> str:
    if isinstance(value, str):
        return called.get(value, value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument_text(item, called) for item in value)}]"
    if isinstance(value, dict):
        return ", ".join(map(str, value.values()))
    return f"{value:,}" if type(value) is int else str(value)


class NamedCall:
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
        return _argument_text(self.arguments[key][0], self.names)


def right_side(call: NamedCall) -> str:
    """Return what an operation computes."""
    operation, inputs, results = call.seen.operation, call.seen.inputs, call.seen.results
    own = Call(operation, inputs, results, [None], 0, ())
    line = RECORDS.get(own.kind, OperatorRecord()).line
    try:
        text = line(own) if callable(line) else line
        return text.format_map(call) if text else _as_call(call)
    except (KeyError, NoRuleError):  # an operator of that name with other arguments
        return _as_call(call)


def _as_call(call: NamedCall) -> str:
    """Return `name(arguments)`: tensors and non-default arguments, by name after an omitted one.

    A backward operation has the settings of its forward operation, and these are left out.
    """
    defaults = {each.name: each.default for each in parameters(call.seen.operation.resolved)}
    is_backward = "backward" in call.kind
    texts, is_named = [], False
    for key, (value, is_given) in call.arguments.items():
        tensors = list(references(value))
        if not tensors and (is_backward or not is_given or _is_usual(value, defaults.get(key))):
            # As in Python, arguments after an omitted one need their names.
            is_named = not is_backward
            continue
        text = call[key] if len(tensors) <= 3 else f"{len(tensors)} tensors"
        is_named |= not tensors
        texts.append(f"{key}={text}" if is_named else text)
    return f"{call.kind}({', '.join(texts)})"


def _is_usual(value: Any, default: Any) -> bool:
    """Return whether an argument does not affect the result."""
    if isinstance(value, dict):
        return "float" not in value and value.get("text", default) == default
    if isinstance(value, list | tuple) and isinstance(default, int):
        return all(each == default for each in value)
    return value == default or (default is None and (value is False or value == []))
