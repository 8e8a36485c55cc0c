"""Effects: operations that code which is read must not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everystep.program.operator_mode import OperatorMode
from everystep.program.operators import draws_random_numbers, writes
from everystep.step.purity.attributes import NotProvenError
from everystep.step.purity.guards import Guards
from everystep.step.purity.reader import Reader
from everystep.step.recorder import StepRecorder

__all__ = ["ReadingRecorder", "RowReader"]


class ReadingRecorder(StepRecorder):  # type: ignore[no-untyped-call]
    """Forbids operations that change a tensor other than state, batch or tensors made in the step."""

    def _written(self, known: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> frozenset[int]:
        found = super()._written(known, args, keywords)
        if any(self.storages[number].kind == "constant" for number in found):
            raise NotProvenError("changes a tensor that does not belong to model, loss or optimizer")
        return found

    def _refuse(self, func: Any, error: Exception, args: tuple[Any, ...] = ()) -> None:
        super()._refuse(func, error, args)
        if writes(func):
            raise NotProvenError(self.refusals[-1].reason)


class RowReader:
    """Reads rows of a Dataset from its source, if that has no effect and draws no random number.

    guards: collects what was read.
    """

    def __init__(self, guards: Guards) -> None:
        self._reader = Reader(guards, _refuse_parameters)

    def row(self, dataset: Any, row: int) -> Any:
        """Return `dataset[row]`.

        Raises:
            NotProvenError: it does more than return a row.
        """
        with _NoEffects():
            return self._reader.item(dataset, row)


def _refuse_parameters(tensor: Tensor) -> bool:
    """Return False, as no tensor here is state; a trainable one changes at every step.

    Raises:
        NotProvenError: it is trainable.
    """
    if tensor.requires_grad:
        raise NotProvenError("reads a trainable tensor")
    return False


class _NoEffects(OperatorMode):  # type: ignore[no-untyped-call]
    """Forbids operations that write into a tensor or draw a random number."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if draws_random_numbers(func):
            raise NotProvenError("draws random numbers")
        if writes(func):
            raise NotProvenError("changes a tensor in place")
        if torch.Tag.data_dependent_output in func.tags:
            raise NotProvenError("reads a number from a tensor")
        return func(*args, **(kwargs or {}))
