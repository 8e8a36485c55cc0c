"""What a reader may call, and which attributes it may read: known to have no effect but operations.

Everything is matched by identity: a user's function with the name of one of these does not count.
"""

from __future__ import annotations

import math
import operator
import re
import types
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

__all__ = [
    "ATTRIBUTES",
    "BINARY",
    "BUILTINS",
    "CHANGING",
    "COMPARE",
    "FROM_ARRAYS",
    "METHODS",
    "TENSOR_TYPES",
    "UNARY",
    "is_allowed_function",
    "is_allowed_method",
]

#: Exact types of tensors; a subclass may have methods of its own.
TENSOR_TYPES: frozenset[type] = frozenset({Tensor, nn.Parameter})

#: Operators of ATen that do more than compute: they give numbers to Python, or change a tensor's memory,
#: shape or history; and all in-place ones that change geometry.
_DENIED = re.compile(
    r"_.*|item|equal|allclose|is_nonzero|is_set_to|is_shared|is_pinned|pin_memory|record_stream|set_"
    r"|.*resize.*|requires_grad_|retain_grad|detach_|rename.*|refine_names|align_.*|.*sparse.*|swap\w*_"
    r"|(t|transpose|squeeze|unsqueeze|as_strided)_|sym_.*|empty_quantized|empty_permuted|backward|.*quantize.*"
    r"|set_data|data|output_nr|is_leaf|from_file|unique.*|nonzero\w*|argwhere|lobpcg"
)
#: Methods of tensors that the binding composes from other ATen operators.
_CASTS = (
    *("bfloat16", "bool", "byte", "char", "double", "float", "half", "int", "long", "short"),
    *("ndimension", "nelement", "cdouble", "cfloat", "split", "norm", "stft", "istft", "__len__"),
)
#: Functions that create tensors from plain values.
_FACTORIES = (
    *(
        "zeros",
        "ones",
        "full",
        "empty",
        "empty_like",
        "arange",
        "linspace",
        "logspace",
        "eye",
        "tensor",
        "rand",
        "randn",
    ),
    *("randint", "randperm", "tril_indices", "triu_indices", "zeros_like", "ones_like", "full_like"),
    *(
        "rand_like",
        "randn_like",
        "randint_like",
        "scalar_tensor",
        "as_tensor",
        "from_numpy",
        "hann_window",
    ),
    *("hamming_window", "blackman_window", "kaiser_window", "bartlett_window", "complex", "polar"),
)
#: Operations that torch's own parametrizations call.
_PRIVATE = ("_weight_norm",)
#: Functions that take arrays.
FROM_ARRAYS = (torch.from_numpy, torch.tensor, torch.as_tensor)
#: Functions that ask for a setting of the process, which are guards all the same, or whether a tensor is
#: of a kind of its own, which no tensor here is.
_SETTINGS = (
    torch.is_grad_enabled,
    torch.get_default_dtype,
    *(
        getattr(torch._C, name)
        for name in (
            *("_is_tracing", "_get_tracing_state", "_has_torch_function"),
            *("_has_torch_function_unary", "_has_torch_function_variadic", "_log_api_usage_once"),
        )
        if hasattr(torch._C, name)
    ),
)

#: Attributes that may be read, by exact type: numbers and geometry alone.
ATTRIBUTES: dict[type, frozenset[str]] = {
    torch.dtype: frozenset({"is_floating_point", "is_complex", "itemsize"}),
    torch.device: frozenset({"type", "index"}),
    slice: frozenset({"start", "stop", "step"}),
    np.ndarray: frozenset({"shape", "ndim", "size"}),
    complex: frozenset({"real", "imag"}),
} | {
    kind: frozenset(
        {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "itemsize", "nbytes"}
        | {"T", "mT", "H", "mH", "real", "imag", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_sparse"}
    )
    for kind in TENSOR_TYPES
}
_OF_STR = (
    "format startswith endswith lower upper split rsplit join strip lstrip rstrip replace partition"
)
#: Methods that may be called, by exact type; those that change what they belong to only on what the
#: step itself has made (`CHANGING`).
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_OF_STR.split())
    | {"partition", "rpartition", "isdigit", "title", "removeprefix", "removesuffix"},
    list: frozenset({"append", "extend", "insert", "pop", "reverse", "copy", "clear"}),
    dict: frozenset({"get", "items", "keys", "values", "pop", "setdefault", "update", "copy", "clear"}),
    torch.Size: frozenset({"numel"}),
    float: frozenset({"is_integer"}),
    int: frozenset({"bit_length"}),
}
CHANGING: frozenset[str] = frozenset(
    {"append", "extend", "insert", "pop", "reverse", "clear", "setdefault", "update"}
)

#: Builtins of plain values alone.
BUILTINS: frozenset[Any] = frozenset(
    {abs, round, divmod, pow, int, float, complex, str, slice, range, min, max, sorted}
    | {value for value in vars(math).values() if isinstance(value, types.BuiltinFunctionType)}
    | {operator.index}
)

BINARY: dict[str, Any] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mult": operator.mul,
    "Div": operator.truediv,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "Pow": operator.pow,
    "MatMult": operator.matmul,
    "BitAnd": operator.and_,
    "BitOr": operator.or_,
    "BitXor": operator.xor,
    "LShift": operator.lshift,
    "RShift": operator.rshift,
}
UNARY: dict[str, Any] = {"USub": operator.neg, "UAdd": operator.pos, "Invert": operator.invert}
COMPARE: dict[str, Any] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
}


def is_allowed_function(function: Any) -> bool:
    """Tell whether a function of torch may be called with tensors and plain values."""
    return id(function) in _functions()


def is_allowed_method(name: str) -> bool:
    """Tell whether a method of tensors may be called with tensors and plain values."""
    return name in _methods()


@cache
def _aten_names() -> frozenset[str]:
    schemas = torch._C._jit_get_all_schemas()
    return frozenset(s.name.removeprefix("aten::") for s in schemas if s.name.startswith("aten::"))


@cache
def _functions() -> dict[int, Any]:
    """Return the functions by their identity; holding them keeps it theirs."""
    found = [getattr(torch, name) for name in (*_FACTORIES, *_PRIVATE) if hasattr(torch, name)]
    found += _SETTINGS
    python = (torch.functional, torch.nn.functional)
    for place, functions in get_overridable_functions().items():
        if isinstance(place, types.ModuleType):
            found += [f for f in functions if _is_known(f, in_python=place in python)]
    return {id(function): function for function in found}


def _is_known(function: Any, *, in_python: bool) -> bool:
    name = function.__name__
    if isinstance(function, types.FunctionType):
        return in_python and not name.startswith("_") and not _DENIED.fullmatch(name)
    is_builtin = isinstance(function, types.BuiltinFunctionType)
    return is_builtin and name in _aten_names() and not _DENIED.fullmatch(name)


@cache
def _methods() -> frozenset[str]:
    known = {
        name
        for name, value in vars(torch._C.TensorBase).items()
        if isinstance(value, types.MethodDescriptorType)
        and name in _aten_names()
        and not _DENIED.fullmatch(name)
    }
    return frozenset(known | set(_CASTS))
