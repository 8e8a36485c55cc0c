"""Comparison: a step that Python just ran, run by its program on a copy of the state before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.bound import BoundProgram
from everystep.program.calls import without_autograd
from everystep.program.interpreter import Interpreter
from everystep.program.memory import copy_into, tensor_on
from everystep.step.build import BuiltPath
from everystep.step.parts import Parts
from everystep.step.state import same_bits

__all__ = ["Comparison", "PartsCopy"]

Number = int | float
#: Bytes up to which a copy of the state and of the program's memory is kept for the next comparison.
SMALL_BYTES = 16_000_000


class PartsCopy(NamedTuple):
    """The parts before a step: copies of their tensors by name, and torch's generator."""

    tensors: dict[str, Tensor]
    generator: Tensor

    @classmethod
    def of(cls, parts: Parts) -> PartsCopy:
        """Copy the current state of the parts."""
        copies = {name: tensor.detach().clone() for name, tensor in parts.state().items()}
        return cls(copies, torch.get_rng_state())


class Comparison:
    """Compares steps of Python with a program.

    Args:
        parts: of the training.
        built: the program.
        interpreter: the same, for the interpreter.
        bind: binds it to a state.
        inputs: returns the bytes of inputs that are not in the batch, by `input/storage`.
        read: the places, among the numbers of the program, of those that Python reads.
        draws: whether it draws random numbers.
    """

    def __init__(
        self,
        parts: Parts,
        built: BuiltPath,
        interpreter: Interpreter,
        bind: Callable[[Mapping[str, Tensor]], BoundProgram],
        inputs: Callable[[], dict[str, Tensor]],
        read: Mapping[int, int],
        *,
        draws: bool,
    ) -> None:
        self._parts = parts
        self._built = built
        self._interpreter = interpreter
        self._bind = bind
        self._inputs = inputs
        self._read = read
        self._draws = draws
        self._copy: tuple[BoundProgram, dict[str, Tensor]] | None = None

    def difference(
        self,
        before: PartsCopy,
        batch: Mapping[str, Tensor],
        numbers: Sequence[Number],
        logged: Mapping[str, Any],
    ) -> str | None:
        """Run a step that Python just ran, on a copy; describe the difference, or return None.

        Args:
            before: the parts before the step.
            batch: copies of its tensors.
            numbers: of the step.
            logged: by the step in Python.
        """
        interpreter = self._interpreter
        live, copies = self._bound_to_copies(before.tensors)
        inputs = self._inputs() | {f"batch/{name}": tensor for name, tensor in batch.items()}
        laid = interpreter.lay_inputs(inputs)
        given = {
            name: tensor_on(laid[spec.storage].untyped_storage(), spec)
            for name, spec in interpreter.inputs.items()
            if name in batch
        }
        after = torch.get_rng_state()
        torch.set_rng_state(before.generator)
        try:
            with without_autograd():
                live.load(given)
                found = live.take(self._built.numbers(numbers))
            is_drawn_alike = not self._draws or torch.equal(torch.get_rng_state(), after)
        finally:
            torch.set_rng_state(after)
        state = self._parts.state()
        now = {name: copies[name] for name in interpreter.state if name in state} | live.ends
        other = (n for n, tensor in now.items() if n not in state or not same_bits(state[n], tensor))
        name = next(other, None)
        if name is not None:
            return f"the program computes different values of {name.partition('/')[2]} than Python"
        for place, index in self._read.items():
            if repr(live.numbers[index]) != repr(numbers[place]):
                return "the program reads another number than Python"
        for name, tensor in found.items():
            value = logged.get(name)
            if isinstance(value, Tensor) and not same_bits(
                value.detach().reshape(()), tensor.reshape(())
            ):
                return f"the program computes another {name} than Python"
        return None if is_drawn_alike else "the program draws different random numbers than Python"

    def _bound_to_copies(self, state: Mapping[str, Tensor]) -> tuple[BoundProgram, dict[str, Tensor]]:
        """Return the program on a copy of a state, and the copy; a small one serves again."""
        if self._copy is not None:
            with torch.no_grad():
                for name, copy in self._copy[1].items():
                    copy_into(copy, state[name])
            return self._copy
        copies = {name: state[name] for name in self._interpreter.state}
        self._interpreter.lay_state(copies)
        live = self._bind(copies)
        size = sum(tensor.nbytes for tensor in copies.values()) + live.temporary_bytes
        if size <= SMALL_BYTES:
            self._copy = live, copies
        return live, copies
