"""Calls of torch's functions, as something that two steps can be compared by.

Equal calls, on tensors that stand for each other, are the same operations: what else torch's functions
read (grad mode, autocast, ...) is compared as well, and what cannot be compared is strange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FREE",
    "PLAIN_TENSORS",
    "Reference",
    "StrangeError",
    "is_ignored",
    "is_readable",
    "is_text",
    "scalars",
    "signature_of",
    "tensors_in",
]

PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
#: They hand their numbers through to one operator, so that another number is the same operation.
FREE = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "pow", "lerp", "lerp_", "fill_"),
    *("addcmul", "addcmul_", "addcdiv", "addcdiv_", "true_divide", "__add__", "__radd__", "__iadd__"),
    *("__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__"),
    *("__itruediv__", "__pow__", "rsub"),
}
_AS_THEY_ARE = {
    *(int, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format),
}
#: What torch's functions give besides tensors, and Python can do nothing with but read.
_READABLE = {*_AS_THEY_ARE, bool, float, complex, torch.Size, list, dict}
_SEQUENCES = (list, tuple)
#: They give Python a text, of which no step depends.
_TEXTS = {"__repr__", "__str__", "__format__"}
_FLOAT = object()
_TRUE, _FALSE = object(), object()


class StrangeError(Exception):
    """A call that cannot be compared with another; the message says why."""


class Reference:
    """Stands for a tensor of a step, by the order in which it was met."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def signature_of(
    func: Any,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    place: Any,
    refer: Callable[[Tensor], Any],
    modes: int,
) -> Any:
    """Return a call of one of torch's functions as something that can be compared and hashed.

    Args:
        place: of the call in the modules.
        refer: returns what stands for a tensor.
        modes: how many modes of torch's dispatcher are everystep's own.

    Raises:
        StrangeError: it cannot be compared.
    """
    free = getattr(func, "__name__", "") in FREE
    positional = [_encoded(value, refer, free) for value in args]
    if not keywords:
        return (func, place, _mode(modes), *positional)
    named = [(key, _encoded(value, refer, free)) for key, value in keywords.items()]
    return (func, place, _mode(modes), *positional, *named)


def _mode(modes: int) -> tuple[Any, ...]:
    """Return what torch's functions read of the thread and the process, besides their arguments.

    Raises:
        StrangeError: something takes part that cannot be compared.
    """
    c = torch._C
    if c._len_torch_dispatch_stack() != modes or c._are_functorch_transforms_active():
        raise StrangeError("another mode, or a transform of torch.func, is in force")
    if c._autograd._top_saved_tensors_default_hooks(False) is not None:
        raise StrangeError("hooks on saved tensors are in force (a checkpoint)")
    autocast: Any = c._is_any_autocast_enabled()
    if autocast:
        kinds = ("cpu", "cuda", "mps")
        autocast = tuple((c.is_autocast_enabled(k), c.get_autocast_dtype(k)) for k in kinds)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast,
        torch.get_default_dtype(),
        c._len_torch_function_stack(),
        c._get_flash_sdp_enabled(),
        c._get_mem_efficient_sdp_enabled(),
        c._get_math_sdp_enabled(),
        c._get_mkldnn_enabled(),
        c._get_cudnn_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _encoded(value: Any, refer: Callable[[Tensor], Any], free: bool = False) -> Any:
    """Return an argument as something that can be compared. free: whether floats are the step's."""
    kind = type(value)
    if kind in PLAIN_TENSORS:
        return refer(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is float:
        return _FLOAT if free else ("float", value.hex())
    if kind is bool:
        return _TRUE if value else _FALSE
    if kind is list or kind is tuple or kind is torch.Size:
        return (kind, *[_encoded(item, refer, free) for item in value])
    if kind is slice:
        return (slice, *[_encoded(v, refer) for v in (value.start, value.stop, value.step)])
    if kind is dict:
        return (dict, *[(_encoded(k, refer), _encoded(v, refer, free)) for k, v in value.items()])
    raise StrangeError(f"takes a {kind.__name__}")


def is_ignored(func: Any) -> bool:
    """Tell whether a function computes nothing, and Python reads at most what a tensor is like."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") in _LOOKS
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(func).startswith("profiler.")
    return getattr(func, "__name__", "") in _LOOKS


_LOOKS = {
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda", "is_sparse"),
    *("is_cpu", "is_mps", "is_meta", "is_quantized", "is_nested", "is_mkldnn", "is_xla", "is_xpu"),
    *("is_sparse_csr", "is_ipu", "is_vulkan", "is_mtia", "is_hpu", "is_maia", "itemsize", "nbytes"),
    *("names", "_version", "output_nr", "name"),
    *("dim", "size", "stride", "storage_offset", "numel", "nelement", "is_floating_point"),
    *("is_complex", "is_contiguous", "element_size", "get_device", "__len__", "is_same_size"),
    *("is_conj", "is_neg", "is_inference", "is_signed", "data_ptr", "dim_order", "__hash__"),
    *("_is_zerotensor", "has_names", "ndimension"),
}


def is_text(func: Any) -> bool:
    """Tell whether a function only makes a text of a tensor."""
    return getattr(func, "__name__", "") in _TEXTS


def is_readable(value: Any) -> bool:
    """Tell whether Python can do nothing with a result but read it."""
    return type(value) in _READABLE or type(value).__module__ == "numpy"


def scalars(args: tuple[Any, ...], keywords: dict[str, Any]) -> list[int | float]:
    """Return the numbers that a function was given, in order."""
    return [value for value in (*args, *keywords.values()) if type(value) in (int, float)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a result or of arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _SEQUENCES):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in([*value.values()])
