"""What x and y may be, for a whole data set and for one row; and the fix for anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Unfit", "called", "unfit"]


_TEXT = "map each text or class to a number"


class Unfit(NamedTuple):
    """Something that cannot be trained on. what: `a tuple of 2 tensors`; cure: what to pass instead."""

    what: str
    cure: str


def unfit(value: Any, name: str) -> Unfit | None:
    """Return what is wrong with x or y (`name`), of all rows or of one; None if it is valid."""
    if isinstance(value, Tensor):
        return _unfit_tensor(value, name)
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, str | bytes):
        return _unfit_array(value, name)
    if isinstance(value, bool | int | float | complex):
        return None
    return Unfit(called(value), _cure(value, name))


def called(value: Any) -> str:
    """Return what a value is, in words: `None`, `a list of 3`, `the class SGD`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return "text"
    kind = type(value).__name__
    text = f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"
    if isinstance(value, Mapping):
        names = ", ".join(repr(name) for name in list(value)[:4])
        return f"{text} of {names}" + ", ..." * (len(value) > 4)
    if isinstance(value, list | tuple):
        is_of_tensors = len(value) > 1 and all(isinstance(item, Tensor) for item in value)
        return f"{text} of {len(value)}" + " tensors" * is_of_tensors
    return text


def _unfit_tensor(value: Tensor, name: str) -> Unfit | None:
    if value.is_nested:
        cure = f"pad its rows to one length: torch.nested.to_padded_tensor({name}, 0.0)"
        return Unfit("a nested tensor", cure)
    if value.layout != torch.strided:
        return Unfit("a sparse tensor", f"pass {name}.to_dense()")
    if value.is_quantized:
        return Unfit("a quantized tensor", f"pass {name}.dequantize()")
    if value.requires_grad:
        return Unfit("a tensor that requires a gradient", f"pass {name}.detach()")
    if value.device.type == "meta":
        return Unfit("a tensor on the meta device", "it has no values; create it on a real device")
    return None


def _unfit_array(value: np.ndarray[Any, Any] | np.generic, name: str) -> Unfit | None:
    try:
        torch.from_numpy(np.empty(0, value.dtype))
    except TypeError:
        if value.dtype.kind in "SU":
            return Unfit("an array of text", _TEXT)
        cure = f"torch has no such dtype; pass {name}.astype('float32')"
        return Unfit(f"an array of {value.dtype}", cure)
    return None


def _cure(value: Any, name: str) -> str:
    is_mapping, is_list = isinstance(value, Mapping), isinstance(value, list | tuple)
    parts = [*value.values()] if is_mapping else [*value] if is_list else []
    if isinstance(value, str) or (parts and all(isinstance(part, str) for part in parts)):
        return _TEXT
    if parts and is_list and all(isinstance(part, bool | int | float) for part in parts):
        return f"pass torch.tensor({name})"
    if is_list or is_mapping:
        return (
            f"a step takes one tensor as {name}: join them (torch.cat, torch.stack), and split them "
            "in the model's forward or in the loss"
        )
    if type(value).__module__.partition(".")[0] == "PIL":
        return f"convert it to a tensor: torch.from_numpy(numpy.array({name}))"
    if hasattr(value, "to_numpy"):
        return f"pass {name}.to_numpy()"
    return "a step needs both x and y" if value is None else "convert it to a tensor of numbers"
