"""Stored inputs: what watched steps were given, read from a run for many steps at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from everystep.errors import RunError
from everystep.program.arguments import DTYPES
from everystep.recording.contents import Given, Inputs, inputs_of
from everystep.recording.database import Repeat
from everystep.recording.run import RecordedRun
from everystep.replay.step import reading

__all__ = ["StoredInputs", "pieces_of"]

#: Bytes of contents that stay in memory, because later steps may need them again.
KEPT_BYTES = 64_000_000
#: Bytes of contents that are read ahead at once.
AHEAD_BYTES = 16_000_000
#: Steps with their inputs decoded.
KEPT_STEPS = 512


class StoredInputs:
    """The inputs of steps that a run holds by content.

    Steps share contents: the rows of a batch return in each epoch. These are read once, as far as
    `KEPT_BYTES` go.
    """

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self._given: dict[bytes | None, Inputs] = {}
        #: The bytes of an input, or of a row of one, by their digest.
        self._pieces: dict[bytes, Tensor] = {}
        self._bytes = 0

    def given(self, row: Repeat) -> Inputs:
        """Return the inputs of a step without their contents.

        Raises:
            NotReplayedError: they cannot be read.
        """
        if row.inputs not in self._given:
            if len(self._given) >= KEPT_STEPS:
                self._given.clear()
            with reading():
                self._given[row.inputs] = inputs_of(row.inputs, self._what(row))
        return self._given[row.inputs]

    def read_ahead(self, rows: Iterable[Repeat]) -> None:
        """Read contents that the next steps need. What cannot be read is reported by the step itself."""
        wanted: dict[bytes, Given] = {}
        size = 0
        with suppress(RunError):
            for row in rows:
                for given in self.given(row).given.values():
                    for digest, piece in pieces_of(given).items():
                        if digest not in self._pieces and digest not in wanted:
                            wanted[digest] = piece
                            size += _bytes_of(piece)
                if size > AHEAD_BYTES:
                    break
            if size:
                self._read(wanted, size)

    def _read(self, wanted: dict[bytes, Given], size: int) -> None:
        if self._bytes + size > KEPT_BYTES:
            self._pieces.clear()
            self._bytes = 0
        self._bytes += size
        asked = {digest.hex(): piece for digest, piece in wanted.items() if _bytes_of(piece)}
        for digest, tensor in self._run.contents(asked).items():
            if tensor is not None:
                self._pieces[bytes.fromhex(digest)] = tensor.reshape(-1).view(torch.uint8)

    def tensors(self, row: Repeat) -> dict[str, Tensor]:
        """Return the inputs of a step by name, on the CPU; the tensors are the caller's own.

        Raises:
            RunError: one was dropped, or its file was changed.
        """
        given = self.given(row).given
        found: dict[str, Tensor | None] = dict.fromkeys(given)
        for name, each in given.items():
            pieces = [self._pieces[digest] for digest in each.digests if digest in self._pieces]
            if pieces and len(pieces) == len(each.digests):
                found[name] = torch.cat(pieces).view(DTYPES[each.dtype]).reshape(each.shape)
        alone = {name: given[name] for name, tensor in found.items() if tensor is None}
        if alone:
            found |= self._run.contents(alone)
        missing = next((name for name, tensor in found.items() if tensor is None), None)
        if missing is not None:
            raise RunError(
                f"{self._what(row)} was dropped ({missing}), because the batches exceeded the budget "
                "(batch_budget of everystep.record); later steps may still open"
            )
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _what(self, row: Repeat) -> str:
        return f"the input of step {row.step} of {self._run.name}"


def pieces_of(given: Given) -> dict[bytes, Given]:
    """Return each piece that a run holds of an input by its digest: all of it, or a row."""
    shape = given.shape if len(given.digests) == 1 else (1, *given.shape[1:])
    return {digest: Given(given.dtype, shape, (digest,)) for digest in given.digests}


def _bytes_of(given: Given) -> int:
    return math.prod(given.shape) * DTYPES[given.dtype].itemsize if given.dtype in DTYPES else 0
