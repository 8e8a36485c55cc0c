"""The random generators that a step can draw from: read and restore them."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.device import generator_of, set_generator_of
from everystep.errors import RunError, UsageError

__all__ = ["Generators", "different", "generator_states", "generators_preserved"]


@dataclass(frozen=True)
class Generators:
    """The random generators that a step can draw from: torch's, Python's and NumPy's global ones."""

    torch_cpu: Tensor
    torch_device: Tensor | None
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    @classmethod
    def capture(cls, device: torch.device) -> Generators:
        """Read all of them, without drawing."""
        return cls(
            torch_cpu=torch.get_rng_state(),
            torch_device=generator_of(device),
            python=random.getstate(),
            numpy=np.random.get_state(),  # type: ignore[arg-type]
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Generators:
        """Return the argument of `tensors`.

        Raises:
            RunError: `tensors` does not return such tensors.
        """
        with _as_recorded():
            # Python keeps the second of two normal numbers that it draws together; empty if it has none.
            gauss = [float(each) for each in tensors["python.gauss"].tolist()]
            position, has_gauss = tensors["numpy.position"].tolist()
            keys = tensors["numpy"].numpy().astype(np.uint32)
            if not 0 <= position <= len(keys):  # NumPy would read past their end
                raise ValueError
            words = tuple(tensors["python"].tolist())
            return cls(
                torch_cpu=tensors["torch"].cpu(),
                torch_device=tensors.get("device"),
                python=(random.Random.VERSION, words, gauss[0] if gauss else None),
                numpy=("MT19937", keys, position, has_gauss, tensors["numpy.gauss"].item()),
            )

    def restore(self, device: torch.device) -> None:
        """Set all of them to this state; torch's generator of another kind of device stays unchanged.

        Raises:
            RunError: they cannot be in this state.
        """
        with _as_recorded():
            torch.set_rng_state(self.torch_cpu)
            if self.torch_device is not None and device.type != "cpu":
                set_generator_of(device, self.torch_device)
            random.setstate(self.python)
            np.random.set_state(self.numpy)

    def tensors(self) -> dict[str, Tensor]:
        """Return the states as tensors, by name.

        Raises:
            UsageError: NumPy's is of another kind than its default.
        """
        _, words, gauss = self.python
        if isinstance(self.numpy, dict):
            name = self.numpy["bit_generator"]
            raise UsageError(
                f"NumPy's global generator is {name} (np.random.set_bit_generator), and a run holds the "
                "state of MT19937, its default; use a generator of your own, np.random.Generator"
            )
        _, keys, position, has_gauss, cached = self.numpy
        found = {
            "torch": self.torch_cpu,
            "python": torch.tensor(words, dtype=torch.int64),
            "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor(keys.astype(np.int64)),
            "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
            "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        }
        return found if self.torch_device is None else found | {"device": self.torch_device}


@contextmanager
def _as_recorded() -> Iterator[None]:
    """Report errors of torch, Python and NumPy about an invalid state."""
    try:
        yield
    except (LookupError, RuntimeError, TypeError, ValueError, OverflowError):
        raise RunError(
            "the state of the random generators is not one that everystep wrote: the run was changed"
        ) from None


@contextmanager
def generators_preserved(device: torch.device) -> Iterator[None]:
    """Restore the generators after the block."""
    before = Generators.capture(device)
    try:
        yield
    finally:
        before.restore(device)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all of them, by name, in microseconds; they must not be changed.

    Python's and NumPy's are read again only if their words have changed: this may miss a `set_state`
    that changes nothing but the second of two normal numbers.
    """
    found = {
        "torch": torch.default_generator.get_state(),
        "python": _python_state(),
        "numpy": _numpy_state(),
    }
    state = generator_of(device)
    return found if state is None else found | {"device": state}


def different(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Return the names of generators with another state in the other."""
    return {name for name, state in one.items() if not _is_same(state, other[name])}


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor):  # an operation of torch takes four times as long
        return bool(one.numpy().tobytes() == other.numpy().tobytes())
    if isinstance(one, tuple) and isinstance(one[1], np.ndarray):  # NumPy's
        return np.array_equal(one[1], other[1]) and one[2:] == other[2:]
    return bool(one == other)


def _python_state() -> Any:
    if not _PYTHON_PLACE:
        return random.getstate()
    return _read_again(_PYTHON_PLACE, random.getstate, lambda state: state[2] is not None)


def _numpy_state() -> Any:
    # The user may have set another bit generator, with other words (`np.random.set_bit_generator`).
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return np.random.get_state()
    return _read_again(generator.ctypes.state_address, np.random.get_state, lambda state: state[3])


#: Of a generator, by the place of its words: what shows them, how they were, and the state read then.
_known: dict[int, tuple[Any, bytes, Any]] = {}


def _read_again(place: int, read: Callable[[], Any], has_second: Callable[[Any], bool]) -> Any:
    """Return the state of a generator, as a tuple that must not be changed."""
    # Python makes a number of each of its 624 words, and NumPy copies them one by one, so it is read
    # only if they have changed, or if it keeps the second of two normal numbers, which is not in them.
    if (known := _known.get(place)) is None:
        known = (ctypes.c_char * _STATE_BYTES).from_address(place), b"", None
    words, then, state = known
    now = words.raw
    if now != then or has_second(state):
        state = read()
        _known[place] = words, now, state
    return state


#: 624 words and the position of the next: in NumPy's `mt19937_state` after them, in Python's before.
_STATE_BYTES = 624 * 4 + 4


def _python_place() -> int:
    """Return where the words of Python's generator lie, 0 if not where CPython has them."""
    generator = random.getstate.__self__  # type: ignore[attr-defined]
    head = object.__basicsize__
    if sys.implementation.name != "cpython" or generator.__sizeof__() < head + _STATE_BYTES:
        return 0
    # The struct of `random.Random`: the head of an object, the position, then the words.
    place = id(generator) + head
    position, *words = np.frombuffer(ctypes.string_at(place, _STATE_BYTES), dtype=np.uint32).tolist()
    return place if (*words, position) == random.getstate()[1] else 0


_PYTHON_PLACE = _python_place()
