"""A mode of torch's dispatcher, in which each operator is seen; those of everystep are made from it."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OperatorMode"]


class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Is entered without torch's compiler, which takes most of a second to import."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The compiler would be imported to be told to keep away.
        return False
