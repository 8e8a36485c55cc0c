"""Arguments of operators in JSON.

A string is the name of a tensor; numbers, booleans, null and lists are themselves; everything else is an
object with one key that names its kind: `{"dtype": "float32"}`, `{"float": "inf"}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from everystep.device import kinds
from everystep.ops.operators import NotAllowedError

__all__ = ["DTYPES", "decode", "encode", "json_floats", "references"]

#: Those that a program's tensors may have, by name.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.complex128, torch.complex64, torch.complex32),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}
# e.g. {"memory_format": "preserve_format"}
_ENUMERATIONS: dict[str, dict[str, Any]] = {
    "dtype": DTYPES,
    "layout": {"strided": torch.strided},
    "memory_format": {
        name: getattr(torch, name)
        for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    },
    "float": {"nan": math.nan, "inf": math.inf, "-inf": -math.inf},
}
_DEVICE = re.compile(r"([a-z]+)(:[0-9]{1,3})?")


def encode(value: Any, name_of: Callable[[torch.Tensor], str]) -> Any:
    """Return an argument as JSON holds it.

    Raises:
        NotAllowedError: it is of a kind that a program does not hold.
    """
    if isinstance(value, torch.Tensor):
        return name_of(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list | tuple):
        return [encode(item, name_of) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, values in _ENUMERATIONS.items():
        for name, known in values.items():
            if value is known:
                return {key: name}
    raise NotAllowedError(f"takes a {type(value).__name__}, which a program cannot hold")


def decode(value: Any, tensor_of: Callable[[str], Any]) -> Any:
    """Return the argument that `encode` encoded.

    Raises:
        ValueError: `encode` does not write this.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return tensor_of(value)
    if isinstance(value, list | tuple):
        return [decode(item, tensor_of) for item in value]
    # Exactly one key: an object with more is not what `encode` writes.
    match [*value.items()] if isinstance(value, dict) else value:
        case [("text", str(text))]:
            return text
        case [("device", str(name))] if (found := _DEVICE.fullmatch(name)) and found[1] in kinds():
            return torch.device(name)
        case [(key, str(name))] if name in _ENUMERATIONS.get(key, ()):
            return _ENUMERATIONS[key][name]
    raise ValueError(f"{value!r:.80} is not an argument")


def references(value: Any) -> list[str]:
    """Return the names of tensors in an argument as `encode` writes it."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list | tuple):
        return []
    return [name for item in value for name in references(item)]


def json_floats(value: Any) -> Any:
    """Return JSON data with floats that JSON has no numbers for as `encode` writes them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, dict):
        return {key: json_floats(item) for key, item in value.items()}
    return [*map(json_floats, value)] if isinstance(value, list | tuple) else value
