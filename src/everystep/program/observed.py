"""Observed: an operation that just ran, with the tensors that it read and wrote."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from everystep.program.operation import Operation
from everystep.program.unset import unread_inputs, unset_results

__all__ = ["Observed"]


class Observed(NamedTuple):
    """An operation that just ran: its inputs before it ran, and its results, by name.

    written: inputs that it also wrote into, such as running statistics, after it ran.

    The tensors are copies and do not change. A tensor that several operations use is copied once.
    """

    operation: Operation
    inputs: dict[str, Tensor]
    results: dict[str, Tensor]
    written: dict[str, Tensor] = {}  # noqa: RUF012  # a default that nothing changes

    @property
    def read(self) -> dict[str, Tensor]:
        """The inputs with numbers that it reads."""
        unread = unread_inputs(self.operation)
        return {name: tensor for name, tensor in self.inputs.items() if name not in unread}

    @property
    def made(self) -> dict[str, Tensor]:
        """The results that have numbers, and other tensors that it wrote into."""
        unset = unset_results(self.operation)
        both = (*self.results.items(), *self.written.items())
        return {name: tensor for name, tensor in both if name not in unset}

    def __repr__(self) -> str:
        given, made = (
            ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
            for named in (self.inputs, self.results)
        )
        module = f" of {self.operation.module}" if self.operation.module else ""
        return f"<{self.operation.operator}, {self.operation.phase}{module}: {given} -> {made}>"
