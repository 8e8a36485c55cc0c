"""Calls: an operation as a function without arguments that writes into existing memory.

There are three ways, tried in order: the operator writes in place anyway; it has an overload that writes
into given tensors (`out=`); or its results are copied into place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.ops.operators import OperatorMode, flattened, out_variant
from everystep.program.memory import copy_into, repeats

__all__ = ["ASK_FOR_GRADIENTS", "Call", "prebuilt_calls"]

Call = Callable[[], Any]

#: Operators without kernels that write into given tensors, and the ATen operators that they call.
_SAME_AS: dict[str, Callable[[list[Any], Tensor], Call]] = {
    # ATen's relu is clamp_min(x, 0).
    "aten.relu.default": lambda arguments, result: partial(torch.clamp_min, arguments[0], 0, out=result),
    "aten.clone.default": lambda arguments, result: partial(result.copy_, arguments[0]),
    "aten._to_copy.default": lambda arguments, result: partial(result.copy_, arguments[0]),
    "aten.ones_like.default": lambda arguments, result: partial(result.fill_, 1),
    "aten.zeros_like.default": lambda arguments, result: result.zero_,
    "aten.zeros.default": lambda arguments, result: result.zero_,
    "aten.new_zeros.default": lambda arguments, result: result.zero_,
}

#: Parts of the names of linear algebra: its `out=` may not be a part of a shared storage.
_OF_MATRICES = ("linalg_", "cholesky", "triangular", "geqrf", "orgqr", "ormqr", "lu_")

#: Losses that ATen computes element by element, and then takes the mean or the sum of.
_ELEMENTWISE_LOSSES = {
    "aten.binary_cross_entropy.default",
    "aten.huber_loss.default",
    "aten.mse_loss.default",
    "aten.smooth_l1_loss.default",
    "aten.soft_margin_loss.default",
}
#: Kernels that check whether gradients are wanted, although they are called below autograd.
ASK_FOR_GRADIENTS = {"aten.mkldnn_rnn_layer.default"}


def prebuilt_calls(
    operator: Any,
    arguments: list[Any],
    keywords: dict[str, Any],
    results: Sequence[Tensor | None],
    *,
    is_late: bool = False,
) -> list[Call]:
    """Return functions that, called in order, apply the operator and write its results into `results`.

    Make and call them inside `without_autograd`.

    is_late: the arguments are read at each call: others of the same types may be put in their place.
    """
    if is_late:
        function, given = _into_results(operator, arguments, keywords, results)
        return [lambda: function(*arguments, **given)]
    arguments = _numbers_in_tensors(operator, arguments, results)
    if len(results) == 1 and results[0] is not None and not keywords:
        if str(operator) in _SAME_AS:
            return [_SAME_AS[str(operator)](arguments, results[0])]
        if str(operator) in _ELEMENTWISE_LOSSES:
            return _loss_calls(operator, arguments, results[0])
    function, given = _into_results(operator, arguments, keywords, results)
    return [partial(function, *arguments, **given)]


def _numbers_in_tensors(
    operator: Any, arguments: list[Any], results: Sequence[Tensor | None]
) -> list[Any]:
    """Return arguments with tensors for numbers that replace one: torch would make one at each call.

    All others have the same dtype, so the number is rounded as torch does. Numbers of fewer bits are
    computed with in more, which a number is, but not a tensor.
    """
    tensors = [each for each in flattened([*arguments, *results]) if isinstance(each, Tensor)]
    kinds = {(each.dtype, each.device.type) for each in tensors}
    if kinds not in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")}):
        return arguments
    return [
        torch.tensor(value, dtype=tensors[0].dtype)
        if type(value) in (int, float) and str(parameter.type) == "Tensor"
        else value
        for value, parameter in zip(arguments, operator._schema.arguments, strict=False)
    ]


def _into_results(
    operator: Any, arguments: list[Any], keywords: dict[str, Any], results: Sequence[Tensor | None]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what computes the results into their place, and the keywords that it needs."""
    if all(r.alias_info and r.alias_info.is_write for r in operator._schema.returns):
        return _quickest(operator, arguments, keywords), keywords
    variant = out_variant(operator)
    # Kernels refuse to write into a tensor with several elements in one place.
    can_be_given = all(r is not None and not repeats(r) for r in results)
    can_be_given &= str(operator) not in _ELEMENTWISE_LOSSES  # these resize the tensor that they get
    # Linear algebra asks whether tensors are on one storage, and takes that for the same memory.
    can_be_given &= not any(part in str(operator) for part in _OF_MATRICES)
    if str(operator) == "aten.native_batch_norm.default":
        # torch 2.13 leaves the saved statistics unwritten where the input is strided.
        can_be_given &= arguments[0].is_contiguous()
    if variant is not None and can_be_given and str(operator) not in ASK_FOR_GRADIENTS:
        overload, names = variant
        if [str(r.type) for r in operator._schema.returns] == ["List[Tensor]"]:
            given: dict[str, Any] = {names[0]: list(results)}
        else:
            given = dict(zip(names, results, strict=True))
        keywords |= given
        return _quickest(overload, arguments, keywords), keywords
    return _copying(operator, results), keywords


def _loss_calls(operator: Any, arguments: list[Any], result: Tensor) -> list[Call]:
    """Return a loss as ATen computes it: per element, then their mean or sum.

    In one call, ATen would resize the result tensor twice.
    """
    parameters = operator._schema.arguments
    # All arguments, since `reduction` is put among them: 0 for each element, 1 for their mean, 2 for the
    # sum.
    given = [*arguments, *(p.default_value for p in parameters[len(arguments) :])]
    place = [p.name for p in parameters].index("reduction")
    reduction, given[place] = given[place], 0
    function = getattr(torch._C._nn, operator.overloadpacket.__name__)
    if reduction == 0:
        return [partial(function, *given, out=result)]
    # torch's own function imports sympy, which takes half a second.
    shape = np.broadcast_shapes(tuple(given[0].shape), tuple(given[1].shape))
    elements = torch.empty(shape, dtype=result.dtype, device=result.device)
    reduce = torch.mean if reduction == 1 else torch.sum
    return [partial(function, *given, out=elements), partial(reduce, elements, [], out=result)]


def _copying(operator: Any, results: Sequence[Tensor | None]) -> Callable[..., None]:
    targets = [(index, target) for index, target in enumerate(results) if target is not None]
    compute = operator._op
    if str(operator) in ASK_FOR_GRADIENTS:
        compute = torch.enable_grad()(compute)

    def call(*arguments: Any, **keywords: Any) -> None:
        flat = flattened(compute(*arguments, **keywords))
        for index, target in targets:
            copy_into(target, flat[index])

    return call


def _quickest(operator: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Callable[..., Any]:
    """Return the fastest callable for an operator with such arguments.

    torch's own Python binding, if one calls exactly this operator, is about a microsecond faster than
    the call through `torch.ops`. Which overload a binding calls depends on the kinds of its arguments.
    """
    kinds = str(operator), _kinds_of(arguments), *((k, _kinds_of(v)) for k, v in keywords.items())
    if kinds not in _chosen:
        bindings = (f for f in _bindings(operator) if _calls_only(f, operator, arguments, keywords))
        _chosen[kinds] = next(bindings, operator._op)
    return _chosen[kinds]


#: By operator and kinds of arguments: what `_quickest` found, for all programs of the process.
_chosen: dict[Any, Callable[..., Any]] = {}


def _kinds_of(value: Any) -> Any:
    """Return the kinds by which torch's bindings distinguish arguments."""
    if isinstance(value, list | tuple):
        return tuple(map(_kinds_of, value))
    if isinstance(value, Tensor):  # one without dimensions may replace a number
        return Tensor, None if value.ndim else (value.dtype, value.requires_grad)
    return type(value)


def _bindings(operator: Any) -> list[Callable[..., Any]]:
    name = operator.overloadpacket.__name__
    places = (torch, torch.Tensor, torch._C._nn)
    found = (getattr(place, name, None) for place in places)
    # A function of torch that is written in Python is slower than the operator, and may do more.
    return [function for function in found if callable(function) and not hasattr(function, "__code__")]


def _calls_only(
    function: Callable[..., Any], operator: Any, arguments: Sequence[Any], keywords: dict[str, Any]
) -> bool:
    """Return whether the function only calls the operator with these arguments."""
    probe = _Probe(operator)
    try:
        with probe:
            function(*arguments, **keywords)
    # A binding that refuses these arguments, or calls another operator, is not the one.
    except Exception:
        return False
    return probe.calls == [_identities(_named(operator, arguments, keywords))]


def _named(operator: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    parameters = operator._schema.arguments
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
    return defaults | dict(zip((p.name for p in parameters), arguments, strict=False)) | keywords


def _identities(value: Any) -> Any:
    """Return what makes an argument the same as another one: of a tensor, that it is this object."""
    if isinstance(value, dict):
        return {key: _identities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_identities, value)]
    return ("a tensor", id(value)) if isinstance(value, Tensor) else value


class _Probe(OperatorMode):  # type: ignore[no-untyped-call]
    """Sees which operator is called, and runs nothing."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self._operator = operator
        self.calls: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not self._operator:
            raise NotImplementedError("another operator")
        given = _named(func, args, kwargs or {})
        self.calls.append(_identities(given))
        # An operator that writes returns the tensor that it wrote into.
        writing = (p for p in func._schema.arguments if p.alias_info and p.alias_info.is_write)
        written = [given[p.name] for p in writing]
        count = len(func._schema.returns)
        return None if count == 0 else written[0] if count == 1 else tuple(written[:count])
