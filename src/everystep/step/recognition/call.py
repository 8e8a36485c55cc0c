"""Calls of torch functions in a form in which two steps can be compared.

Equal calls, on corresponding tensors, run the same operations: the other inputs of torch functions (grad
mode, autocast, ...) are compared as well, and what cannot be compared is strange.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everystep.device import kinds

__all__ = [
    "FREE",
    "PLAIN_TENSORS",
    "Reference",
    "StrangeError",
    "are_methods_torchs_own",
    "is_free",
    "is_readable",
    "kind_of",
    "mode_of",
    "moves",
    "reads",
    "scalars",
    "signature_of",
    "tensors_in",
]

PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
#: They pass their numbers on to one operator, so that another number is the same operation. Where
#: autograd takes part, the backward pass has the number too, or does other things with another.
FREE = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "pow", "lerp", "lerp_", "fill_"),
    *("addcmul", "addcmul_", "addcdiv", "addcdiv_", "true_divide", "__add__", "__radd__", "__iadd__"),
    *("__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__"),
    *("__itruediv__", "__pow__", "rsub"),
}
_AS_THEY_ARE = {
    *(int, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format),
}
#: What torch's functions return besides tensors, and Python can only read.
_READABLE = {*_AS_THEY_ARE, bool, float, complex, torch.Size, list, dict}
_SEQUENCES = (list, tuple)
#: They return one number of their tensor to Python.
_READS = {"item", "__bool__", "__int__", "__float__", "__complex__", "__index__", "is_nonzero", "tolist"}
#: They take numbers from a tensor in C++, where no operator shows it, and act on them.
_READ_OUT_OF_SIGHT = {"tensor_split", "ctc_loss", "_pack_padded_sequence", "_pad_packed_sequence"}
#: Their backward pass is another one where a mode of torch's dispatcher is in force, as in a full watch.
_OTHER_WHEN_WATCHED = {
    *("prod", "cumprod", "cumprod_", "det", "slogdet", "logdet", "linalg_det", "linalg_slogdet"),
    *("median", "nanmedian", "linalg_householder_product", "ormqr"),
}
#: So is theirs, where they are given nothing but a tensor.
_OTHER_WHEN_WATCHED_ALONE = {"max", "min"}
#: The place of the argument that is a tensor where they take a packed sequence, with its lengths.
_PACKED = {"lstm": 1, "gru": 2, "rnn_tanh": 2, "rnn_relu": 2}
#: They return a text to Python; no step depends on it.
_TEXTS = {"__repr__", "__str__", "__format__"}
#: They move a tensor to other memory, or to another offset in it.
_MOVES = {
    *("set_", "resize_", "resize_as_", "swap_tensors", "t_", "transpose_", "squeeze_", "unsqueeze_"),
    *("as_strided_", "swapaxes_", "swapdims_"),
}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_transforms = torch._C._are_functorch_transforms_active
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_has_autocast = torch._C._is_any_autocast_enabled
_ASKED = (
    *(torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.get_default_dtype),
    *(torch._C._len_torch_function_stack, torch._C._get_flash_sdp_enabled),
    *(torch._C._get_mem_efficient_sdp_enabled, torch._C._get_math_sdp_enabled),
    *(torch._C._get_cudnn_sdp_enabled, torch._C._get_mkldnn_enabled, torch._C._get_cudnn_enabled),
    *(torch._C._get_deterministic_algorithms, torch.is_anomaly_enabled),
)
_FLOAT = object()
_TRUE, _FALSE = object(), object()


_TORCH = str(Path(torch.__file__).parent)
#: The methods of Tensor that were checked last, and are torch's.
_known_methods: dict[str, Any] = {}


def are_methods_torchs_own() -> bool:
    """Tell whether the methods of Tensor are torch's: under a mode, torch calls replaced ones twice."""
    now = vars(Tensor)
    if len(now) == len(_known_methods) and all(
        map(is_, map(now.get, _known_methods), _known_methods.values())
    ):
        return True
    if not all(_is_torchs(name, value) for name, value in now.items()):
        return False
    _known_methods.clear()
    _known_methods.update(now)
    return True


def _is_torchs(name: str, value: Any) -> bool:
    if type(value) is types.FunctionType:
        return value.__code__.co_filename.startswith(_TORCH)
    inherited = vars(torch._C.TensorBase).get(name, value)
    return inherited is value or not callable(value)


class StrangeError(Exception):
    """A call that cannot be compared with another; the message gives the reason."""


class Reference:
    """Stands for a tensor of a step, by the order in which the step first used it."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def signature_of(
    func: Any,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    place: Any,
    refer: Callable[[Tensor], Any],
    nodes: int,
    modes: int,
) -> Any:
    """Return a call of a torch function in comparable and hashable form.

    Args:
        place: of the call in the modules.
        refer: returns the reference of a tensor.
        nodes: the number of nodes that autograd has made in the step so far.
        modes: the number of everystep's own dispatch modes.

    Raises:
        StrangeError: it cannot be compared.
    """
    if _reads_out_of_sight(func, args):
        raise StrangeError("a function reads numbers from a tensor out of sight")
    if _is_other_when_watched(func, args, keywords):
        raise StrangeError("a function behaves differently while everystep watches")
    mode = mode_of(modes)  # first: tensors within a transform of torch.func have no memory
    free = is_free(func, args, keywords)
    positional = [_encoded(value, refer, free) for value in args]
    if not keywords:
        return (func, place, nodes, mode, *positional)
    named = [(key, _encoded(value, refer, free)) for key, value in keywords.items()]
    return (func, place, nodes, mode, *positional, *named)


def mode_of(modes: int) -> tuple[Any, ...]:
    """Return what torch functions read from the thread and the process, besides their arguments.

    Raises:
        StrangeError: something is active that cannot be compared.
    """
    if _dispatch_modes() != modes or _has_transforms():
        raise StrangeError("another mode, or a torch.func transform, is active")
    if _saved_tensor_hooks(False) is not None:
        raise StrangeError("hooks on saved tensors are active (a checkpoint)")
    autocast: Any = _has_autocast()
    if autocast:
        enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        autocast = tuple([(enabled(kind), dtype(kind)) for kind in kinds()])
    return (autocast, *[ask() for ask in _ASKED])


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


def kind_of(func: Any) -> str:
    """Return what a function is to a step: `look`, `text` (of a tensor) or `call`.

    A look computes nothing: Python reads at most the properties of a tensor, or gets its gradient, which
    is identified by its owner where it is used.
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        asked = getattr(func.__self__, "__name__", "")
        return "look" if asked in _LOOKS or asked == "grad" else "call"
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return "look" if str(func).startswith("profiler.") else "call"
    return "look" if name in _LOOKS else "text" if name in _TEXTS else "call"


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


def moves(func: Any) -> bool:
    """Tell whether a function moves a tensor to other memory, or to another offset in it."""
    name = getattr(func, "__name__", "")
    return name in _MOVES or (name == "__set__" and func.__self__.__name__ == "data")


def is_readable(value: Any) -> bool:
    """Tell whether Python can do nothing with a result but read it."""
    return type(value) in _READABLE or type(value).__module__ == "numpy"


def is_free(func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Tell whether the float arguments of a function belong to exactly one operation."""
    if getattr(func, "__name__", "") not in FREE:
        return False
    return not _is_differentiated(args, keywords)


def _is_differentiated(args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in([args, keywords]))


def _is_other_when_watched(func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    is_alone = name in _OTHER_WHEN_WATCHED_ALONE and len(args) == 1 and not keywords
    return (is_alone or name in _OTHER_WHEN_WATCHED) and _is_differentiated(args, keywords)


def _reads_out_of_sight(func: Any, args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "")
    if name in _READ_OUT_OF_SIGHT:
        return True
    place = _PACKED.get(name)
    return place is not None and place < len(args) and isinstance(args[place], Tensor)


def reads(func: Any) -> bool:
    """Tell whether a function only returns one number of its tensor to Python."""
    return func.__name__ in _READS


def scalars(args: tuple[Any, ...], keywords: dict[str, Any]) -> list[int | float]:
    """Return the number arguments of a function, in order."""
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
