"""Observed: an operation that just ran, with the tensors that it read and wrote.

Some of these have no numbers: memory of a kernel, or memory that the operation overwrites. The bytes of
such memory may be of anything that was computed before. They differ between two replays of the same
step, so nothing compares them, looks for NaN in them, or shows them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from everystep.ops import record_of
from everystep.ops.arguments import references
from everystep.ops.operators import ALLOCATING
from everystep.program.operation import CodeLine, Operation

__all__ = ["FILLING", "OVERWRITING", "Observed", "unread_inputs", "unset_results", "uses_only_shape"]

#: What backward passes call a kernel's own memory, where it writes only parts: workspaces, reserves, the
#: state of a generator that only dropout sets, and log-sum-exps that are padded to 32 rows.
_MEMORY_ARGUMENTS = {
    *("workspace", "reserve", "reserveSpace", "weight_buf"),
    *("logsumexp", "philox_seed", "philox_offset"),
}

#: Operators that write to all of their first argument without reading it.
OVERWRITING = {
    *("bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_"),
    *("normal_", "random_", "uniform_", "zero_"),
}
#: Those, and others that write to some places of it, which may be the first to write to new memory.
FILLING = OVERWRITING | {
    *("_foreach_copy_", "_foreach_zero_", "_index_put_impl_", "fill_diagonal_", "index_copy_"),
    *("index_fill_", "index_put_", "masked_fill_", "masked_scatter_", "put_", "scatter_"),
}
#: They use only the shape of their first argument, as `ones_like` and `new_zeros` do.
_ONLY_SHAPES = {"bernoulli.p", "nll_loss_backward.default", "nll_loss2d_backward.default"}


def unset_results(operation: Operation) -> frozenset[str]:
    """Return the names of results without numbers, and of what it could have written and did not."""
    first = 0 if operation.name in ALLOCATING else record_of(operation.name).memory_from
    found = frozenset() if first is None else frozenset(filter(None, operation.results[first:]))
    if operation.name.startswith("rrelu_with_noise") and "backward" not in operation.name:
        given = operation.given()
        if not given.get("training"):
            found |= {*references(given["noise"])}
    return found


def uses_only_shape(operator: str) -> bool:
    """Return whether an operator, `aten.ones_like.default`, reads no numbers of its first argument."""
    name = operator.partition(".")[2]
    return "_like." in name or name.startswith("new_") or name in _ONLY_SHAPES


def unread_inputs(operation: Operation) -> frozenset[str]:
    """Return the names of inputs that an operation reads no numbers of."""
    given = operation.given()
    is_unread = uses_only_shape(operation.operator) or operation.name in OVERWRITING
    unread = _MEMORY_ARGUMENTS | ({"self"} if is_unread else set())
    # A tensor that is given twice is read if either argument is.
    sides: tuple[set[str], set[str]] = (set(), set())
    for argument, value in given.items():
        sides[argument in unread].update(references(value))
    return frozenset(sides[True] - sides[False])


class Observed(NamedTuple):
    """An operation that just ran: its inputs before it ran, and its results, by name.

    written: inputs that it also wrote into, such as running statistics, after it ran; line: of the code
    that called it, None if it is unknown.

    The tensors are copies and do not change. A tensor that several operations use is copied once.
    """

    operation: Operation
    inputs: dict[str, Tensor]
    results: dict[str, Tensor]
    written: dict[str, Tensor] = {}  # noqa: RUF012  # a default that nothing changes
    line: CodeLine | None = None

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
