"""Stored inputs: what watched steps were given, read from a run for many steps at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.errors import RunError
from everystep.program.arguments import DTYPES
from everystep.recording.contents import Given, Inputs, inputs_of
from everystep.recording.database import Repeat
from everystep.recording.run import RecordedRun
from everystep.replay.step import reading

__all__ = ["StoredInputs"]

#: Bytes of contents that stay in memory, because later steps may need them again.
KEPT_BYTES = 64_000_000
#: Bytes of contents that are read ahead at once.
AHEAD_BYTES = 16_000_000
#: Steps with their inputs decoded.
KEPT_STEPS = 512


class _Wanted(NamedTuple):
    """Contents to read: inputs as a whole, and rows by dtype and shape."""

    whole: dict[bytes, Given]
    rows: dict[tuple[str, tuple[int, ...]], dict[bytes, None]]


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
        wanted = _Wanted({}, {})
        size = 0
        try:
            for row in rows:
                for given in self.given(row).given.values():
                    size += self._want(given, wanted)
                if size > AHEAD_BYTES:
                    break
            if size:
                self._read(wanted, size)
        except RunError:
            return

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

    def _want(self, given: Given, wanted: _Wanted) -> int:
        """Add what is not known yet of an input; return how many bytes that is."""
        if given.dtype not in DTYPES or math.prod(given.shape) == 0:
            return 0
        size = math.prod(given.shape) * DTYPES[given.dtype].itemsize
        if len(given.digests) == 1:
            if given.digests[0] in self._pieces or given.digests[0] in wanted.whole:
                return 0
            wanted.whole[given.digests[0]] = given
            return size
        rows = wanted.rows.setdefault((given.dtype, given.shape[1:]), {})
        before = len(rows)
        rows.update(dict.fromkeys(d for d in given.digests if d not in self._pieces))
        return (len(rows) - before) * (size // len(given.digests))

    def _read(self, wanted: _Wanted, size: int) -> None:
        asked = {f"{n}": given for n, given in enumerate(wanted.whole.values())}
        asked |= {
            f"rows of {dtype} {shape}": Given(dtype, (len(digests), *shape), tuple(digests))
            for (dtype, shape), digests in wanted.rows.items()
            if digests
        }
        if self._bytes + size > KEPT_BYTES:
            self._pieces.clear()
            self._bytes = 0
        self._bytes += size
        for name, tensor in self._run.contents(asked).items():
            if tensor is not None:
                pieces = tensor.reshape(len(asked[name].digests), -1).view(torch.uint8)
                self._pieces.update(zip(asked[name].digests, pieces, strict=True))
