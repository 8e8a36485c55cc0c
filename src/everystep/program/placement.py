"""Placement: the same program on another device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from everystep.errors import ProgramError
from everystep.program.operators import draws_random_numbers
from everystep.program.program import Operation, Program

__all__ = ["Placement"]


class Placement:
    """Another device for the operations of a program. Tensors go where the program runs.

    Args:
        recorded: the device that the program was recorded on, as text.
        device: where it will run.
    """

    def __init__(self, recorded: str, device: str) -> None:
        self.name = device
        self._recorded = recorded

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the state, or an input, as it is."""
        return tensor

    def contents(self, program: Program, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the bytes of storages as they are."""
        return dict(contents)

    def program(self, program: Program) -> Program:
        """Return a program for the device.

        Raises:
            ProgramError: it draws random numbers, which are others there; names the operation.
        """
        for operation in program.operations:
            if draws_random_numbers(operation.resolved):
                raise ProgramError(
                    f"{operation.operator} draws other random numbers on {self.name}, so these would be "
                    "other steps"
                )
        placed = program.model_copy(
            update={
                "once": tuple(map(self._operation, program.once)),
                "operations": tuple(map(self._operation, program.operations)),
            }
        )
        return Program.from_json(placed.to_json())  # which checks it again

    def _operation(self, operation: Operation) -> Operation:
        arguments = tuple(map(self._argument, operation.arguments))
        keywords = {key: self._argument(value) for key, value in operation.keywords.items()}
        return operation.model_copy(update={"arguments": arguments, "keywords": keywords})

    def _argument(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._argument(each) for each in value]
        return {"device": self.name} if value == {"device": self._recorded} else value
