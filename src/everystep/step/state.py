"""The state of a training: all parts and random generators; and how two states differ, bit for bit."""

from __future__ import annotations

import ctypes
import math
import os
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everystep.step.generators import Generators

__all__ = [
    "OWN",
    "READABLE",
    "Size",
    "State",
    "StateDifference",
    "as_integers",
    "comparable",
    "copy_of",
    "distance",
    "same_bits",
    "size_of_difference",
    "state_differences",
]

#: Prefix of the names of tensors in the values of objects, which only `kept_values` knows.
OWN = "own/"


@dataclass(frozen=True)
class State:
    """A copy, on the CPU, of everything that a training carries from one step to the next.

    step: 0 before the first step; parameters: exactly `model.state_dict()`; rest: buffers outside it,
    optimizer tensors and generators, by `kind/name`; settings: everything that is not a tensor, in JSON
    form: in `names`, the tensors that a step can use, and in `held`, the rest of each part.
    """

    step: int
    parameters: dict[str, Tensor]
    rest: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def size(self) -> int:
        """The memory of its tensors, in bytes."""
        return sum(tensor.nbytes for each in (self.parameters, self.rest) for tensor in each.values())

    @property
    def generators(self) -> Generators:
        """The random generators, ready to restore."""
        prefix = "generator/"
        named = {n.removeprefix(prefix): t for n, t in self.rest.items() if n.startswith(prefix)}
        return Generators.from_tensors(named)

    def optimizer(self, part: str) -> dict[str, Any]:
        """Return the settings of an optimizer: its class, its param groups, and its state."""
        held = self.settings.get("held", {}).get(part, {})
        return dict(held.get("optimizer", {}))

    def with_optimizer(self, part: str, groups: list[dict[str, Any]]) -> State:
        """Return the state with other param groups of an optimizer, without its other attributes."""
        held = self.settings.get("held", {})
        changed = {"optimizer": self.optimizer(part) | {"groups": groups}}
        return replace(self, settings=self.settings | {"held": held | {part: changed}})

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by the names of `Parts.state`; those of a state_dict under both kinds."""
        kinds = ("parameter", "buffer")
        found = {f"{kind}/{name}": t for name, t in self.parameters.items() for kind in kinds}
        others = ("generator/", OWN)
        return found | {name: t for name, t in self.rest.items() if not name.startswith(others)}


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, row after row."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


_OF_MODEL = re.compile(r"^(parameter|buffer)/")
#: Units in the last place that a person can still picture; beyond them, a size is given as a number.
READABLE = 9_999


class Size(NamedTuple):
    """How far two tensors are apart, at most.

    units: in units in the last place, None if undefined; absolute, relative: as a number, and divided by
    the largest magnitude in either tensor, None while the units are few, or if a number that differs, or
    how far it is apart, is not finite.
    """

    units: int | None = None
    absolute: float | None = None
    relative: float | None = None

    def __str__(self) -> str:
        if self.absolute is None:
            if not self.units or self.units > READABLE:
                return ""
            return f"by at most {self.units:,} unit{'s' * (self.units != 1)} in the last place"
        part = "" if self.relative is None else f" ({self.relative:.2g} of the largest)"
        return f"by at most {self.absolute:.4g}{part}"


class StateDifference(NamedTuple):
    """A tensor of a snapshot that differs in the replay.

    elements: the number of differing elements; largest, absolute, relative: how far they are apart, as
    in `Size`.
    """

    state: int
    tensor: str
    elements: int
    largest: int | None
    absolute: float | None = None
    relative: float | None = None

    @property
    def size(self) -> Size:
        """How far they are apart."""
        return Size(self.largest, self.absolute, self.relative)


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors are bit-identical; NaN equals NaN, -0.0 differs from 0.0.

    They may be on different devices.
    """
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if all(map(_is_in_one_piece, (one, two))):
        return not _compare(one.data_ptr(), two.data_ptr(), one.nbytes)
    # As integers: `torch.equal` finds NaN unequal to itself, and -0.0 equal to 0.0.
    return torch.equal(as_integers(one), as_integers(two.to(one.device)))


def _is_in_one_piece(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor are consecutive bytes in the memory of the CPU."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    is_as_stored = is_plain and not (tensor.is_neg() or tensor.is_conj())
    return is_as_stored and tensor.is_cpu and tensor.is_contiguous()


# An operation of torch on the smallest tensors takes ten times as long.
_compare = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_compare.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


def as_integers(tensor: Tensor) -> Tensor:
    """Return the bits of floats as integers of their size; others unchanged."""
    # Of a conjugated or negated tensor, the memory has other signs than the numbers.
    whole = tensor.detach().resolve_conj().resolve_neg()
    if whole.is_complex():
        whole = torch.view_as_real(whole)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    is_float = whole.is_floating_point()
    return whole.view(integers[whole.element_size()]) if is_float else whole


def distance(one: Tensor, two: Tensor) -> int | None:
    """Return the maximum distance between two tensors' elements in units in the last place.

    None if that has no meaning: for integers, empty tensors and NaNs.
    """
    if not (one.is_floating_point() and one.numel()) or bool((one.isnan() | two.isnan()).any()):
        return None
    return _furthest(_in_order(one), _in_order(two))


def _furthest(one: Tensor, two: Tensor) -> int:
    """Return the largest difference between the elements of two tensors of int64 on the CPU."""
    # Numbers of different signs are up to 2**64 apart, which only unsigned integers hold.
    high, low = (pick(one, two).numpy().view(np.uint64) for pick in (torch.maximum, torch.minimum))
    return int((high - low).max())


def _in_order(tensor: Tensor) -> Tensor:
    """Return the places of floats among all of their dtype, in order, in one dimension on the CPU.

    Those of 0.0 and -0.0 are 0.
    """
    bits = as_integers(tensor).flatten().cpu().long()
    if torch.finfo(tensor.dtype).min >= 0:  # float8_e8m0fnu has no sign
        return bits
    sign = 1 << (8 * tensor.element_size() - 1)
    magnitudes = bits & (sign - 1)
    # A float is its sign and a magnitude that grows with its bits, so neighbours are 1 apart.
    return torch.where(bits & sign != 0, -magnitudes, magnitudes)


def size_of_difference(one: Tensor, two: Tensor) -> Size:
    """Return how far two tensors of the same shape and dtype are apart, at most."""
    units = distance(one, two)
    if (units is not None and units <= READABLE) or one.dtype == torch.bool or not one.numel():
        return Size(units)
    if one.is_floating_point() or one.is_complex():
        differs = as_integers(one) != as_integers(two)
        differs = differs.any(-1) if one.is_complex() else differs
        wide = torch.complex128 if one.is_complex() else torch.float64
        # Converted first: not every torch picks elements of the smallest floats.
        a, b = (tensor.detach().to(wide)[differs] for tensor in (one, two))
        if not bool((torch.isfinite(a) & torch.isfinite(b)).all()):
            return Size(units)
        absolute = float((a - b).abs().max())
        if not math.isfinite(absolute):
            return Size(units)
    else:  # float64 has not all whole numbers
        absolute = float(_furthest(one.detach().cpu().long(), two.detach().cpu().long()))
    largest = max(_largest(tensor.detach()) for tensor in (one, two))
    return Size(units, absolute, absolute / largest if largest else None)


def comparable(tensor: Tensor) -> Tensor:
    """Return floats of 8 bits as float32, which holds them all: torch hardly compares those."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude of the finite numbers."""
    tensor = comparable(tensor)
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def state_differences(
    recorded: State, replayed: State, *, only_model: bool = False, only_seen: bool = False
) -> list[StateDifference]:
    """Return the tensors of two states that differ, except Python's and NumPy's generators.

    only_model: compare only the state_dict of the model; only_seen: only what operations of steps can
    change, which excludes random generators.
    """
    found = []
    both = [_compared(state, only_seen=only_seen) for state in (recorded, replayed)]
    names = both[0].keys() | both[1].keys()
    if only_model:
        names = {f"parameters/{name}" for name in recorded.parameters | replayed.parameters}
    for name in sorted(names):
        # A pending gradient is in a snapshot only where the next step uses it.
        if name.startswith("gradient/") and not (name in both[0] and name in both[1]):
            continue
        one, two = (tensors.get(name) for tensors in both)
        if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
            found.append(StateDifference(recorded.step, name, 0, None))
        elif not same_bits(one, two):
            elements = int((as_integers(one) != as_integers(two)).sum())
            # The bytes of a generator's state are not numbers.
            size = Size() if name.startswith("generator/") else size_of_difference(one, two)
            found.append(StateDifference(recorded.step, name, elements, *size))
    return found


def _compared(state: State, *, only_seen: bool) -> dict[str, Tensor]:
    """Return the tensors of a state that are compared, by name."""
    # Draws of Python between steps are not repeated; steps get the recorded generators.
    left_out = (OWN, *(["generator/"] if only_seen else ["generator/python", "generator/numpy"]))
    own = {n: tensor for n, tensor in state.rest.items() if not n.startswith(left_out)}
    # The tensors of a state_dict may change meanwhile, as layers are added and removed.
    found = own | {f"parameter/{name}": tensor for name, tensor in state.parameters.items()}
    return {_OF_MODEL.sub("parameters/", name): tensor for name, tensor in found.items()}
