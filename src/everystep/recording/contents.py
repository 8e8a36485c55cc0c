"""Contents: the inputs of watched steps, stored once by a digest of their bytes, as they are read.

See `input_writer` for how they are stored.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import xxhash

from everystep.bounded import MEMORY, decompressed, parse_json
from everystep.errors import RunError
from everystep.recording.database import PieceIndex, Pieces
from everystep.recording.files import BATCHES, batch_file, bytes_of, open_own

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DEFAULT_BATCH_BUDGET",
    "DRAW",
    "PROGRAM",
    "SIZES",
    "Given",
    "Inputs",
    "StoredPiece",
    "as_tensor",
    "digest_of",
    "given_of",
    "inputs_of",
    "joined",
    "packed",
    "packed_program",
    "pieces_of",
    "read_pieces",
    "runs_of",
    "unpacked",
]

#: Bytes of batches and other inputs that a run may keep, by default.
DEFAULT_BATCH_BUDGET = 2_000_000_000
#: Prefix of the names of random generators before a batch was drawn: a resume needs them, no replay.
DRAW = "draw/"
#: The names of the sizes of a step, where others have its program with other sizes; and of the program
#: itself, of a run with too many for a file of each.
SIZES, PROGRAM = "sizes", "program"
#: Rows of fewer bytes than this get no digests of their own.
#: A digest itself takes 16 bytes.
_SMALLEST_ROW = 64
#: A tensor with more rows is one piece.
_MOST_ROWS = 2**20
#: To copy fewer bytes than this takes less time than a second call.
_SHORT = 4096


# The inputs of a step as the database has them, e.g. of a batch of 3 rows (JSON, compressed):
#   {"nesting": ..., "given": {"batch/x": ["float32", [3, 784], "9c0f...", [5, 1, 9, 2]]}}
# The runs [5, 1, 9, 2] are pieces 5, 9 and 10: its rows. `contents` has the place of each piece.
class Given(NamedTuple):
    """An input of a step: dtype, shape, a digest of its content, and the pieces that a run has of it.

    runs: of consecutive numbers of pieces: the first, and how many. The pieces are its rows, or it is
    one piece. Number 0 is that of a piece that the run does not have.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: bytes
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def content(self) -> tuple[str, tuple[int, ...], bytes]:
        """What two inputs with the same content have in common, in any run."""
        return self[:3]

    def numbers(self) -> Iterator[int]:
        """Return the number of each piece."""
        return chain.from_iterable(range(first, first + size) for first, size in self.runs)


def packed(value: Any) -> bytes:
    """Return plain data as a run keeps it: JSON, compressed. Special floats are kept."""
    return _compressed(json.dumps(value, separators=(",", ":")))


@lru_cache(maxsize=16)
def _compressed(text: str) -> bytes:
    return zlib.compress(text.encode(), 1)  # the numbers of most steps are those of the step before


def packed_program(text: str) -> Tensor:
    """Return the JSON of a program as an input of a step (bytes,) uint8."""
    import torch

    return torch.frombuffer(bytearray(zlib.compress(text.encode(), 1)), dtype=torch.uint8)


def unpacked(content: bytes | None, what: str, limit: int = 256_000_000) -> Any:
    """Return the argument of `packed`; None for None.

    Raises:
        RunError: `packed` does not return this.
    """
    if content is None:
        return None
    try:
        return parse_json(decompressed(content, limit))
    except (ValueError, TypeError):
        raise RunError(f"{what} cannot be read: the database was changed") from None


class Inputs(NamedTuple):
    """The inputs of a step.

    given: by `batch/name` and `input/name`, and `sizes` and `program`; nesting: of the batch; digests:
    of the state after the step, by name, if it has any.
    """

    given: dict[str, Given]
    nesting: Any
    digests: dict[str, Any]

    @property
    def opens_with(self) -> dict[str, Given]:
        """Those that opening the step needs."""
        return {name: each for name, each in self.given.items() if not name.startswith(DRAW)}

    @property
    def plain_batch(self) -> str | None:
        """A batch that is one number or text, as text: no tensor shows which batch it is."""
        return repr(self.nesting) if isinstance(self.nesting, int | float | str) else None

    def draws(self) -> Inputs:
        """Return those alone that only a resume needs."""
        return Inputs({n: each for n, each in self.given.items() if n.startswith(DRAW)}, None, {})

    def packed(self) -> bytes:
        """Return them as a run keeps them: see `inputs_of`."""
        given = {
            n: [each.dtype, each.shape, each.digest.hex(), [*chain.from_iterable(each.runs)]]
            for n, each in self.given.items()
        }
        digests = {"digests": self.digests} if self.digests else {}
        return packed({"nesting": self.nesting, "given": given} | digests)


def inputs_of(content: bytes | None, what: str) -> Inputs:
    """Return the inputs of a step. content: as a run keeps them; what: names them in an error.

    Raises:
        RunError: they cannot be read.
    """
    found = unpacked(content, what) or {"given": {}}
    given = {}
    try:
        for name, (dtype, shape, digest, runs) in found["given"].items():
            if not isinstance(dtype, str) or not all(type(x) is int and x >= 0 for x in (*shape, *runs)):
                raise ValueError("an input without dtype, shape and pieces")
            # One piece, or one for each row: a stranger could ask for billions.
            if sum(runs[1::2]) not in (1, *shape[:1]) or sum(runs[1::2]) > _MOST_ROWS:
                raise ValueError("an input with other pieces than its rows")
            pairs = tuple(zip(runs[::2], runs[1::2], strict=True))
            given[name] = Given(dtype, tuple(shape), bytes.fromhex(digest), pairs)
        return Inputs(given, found.get("nesting"), dict(found.get("digests", {})))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RunError(f"{what} cannot be read: the database was changed") from None


def _is_by_row(shape: tuple[int, ...], size: int) -> bool:
    """Return whether to store a tensor of this many bytes row by row."""
    return bool(shape) and 0 < shape[0] <= _MOST_ROWS and size // shape[0] >= _SMALLEST_ROW


def given_of(tensor: Tensor) -> Given:
    """Return the entry of a tensor (on the CPU) that is an input of a step; stores nothing."""
    return pieces_of(tensor)[0]


def pieces_of(tensor: Tensor) -> tuple[Given, list[bytes], list[memoryview]]:
    """Return the entry of a tensor, without numbers; the digests of its pieces; and their bytes."""
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    whole = memoryview(bytes_of(tensor))
    is_by_row = _is_by_row(shape, len(whole))
    # An empty tensor has one piece, without bytes, so that it has a digest.
    size = len(whole) // shape[0] if is_by_row else max(1, len(whole))
    pieces = [whole[place : place + size] for place in range(0, max(1, len(whole)), size)]
    kind = _kind(dtype, shape, is_by_row)
    digests = [_digest(kind, piece) for piece in pieces]
    return Given(dtype, shape, _joint_digest(digests)), digests, pieces


def _joint_digest(digests: Sequence[bytes]) -> bytes:
    """Return the digest of an input from those of its pieces."""
    return digests[0] if len(digests) == 1 else xxhash.xxh3_128_digest(b"".join(digests))


def digest_of(tensor: Tensor) -> str:
    """Return a digest of a tensor: XXH3, 128 bits, over dtype, shape and bytes, in hexadecimal."""
    kind = _kind(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), False)
    return _digest(kind, memoryview(bytes_of(tensor))).hex()


def _kind(dtype: str, shape: tuple[int, ...], is_by_row: bool) -> bytes:
    """Return what a digest covers in addition to bytes: the dtype and the shape."""
    # Not how many rows there are: a row is the same one in a batch of another size.
    return f"{dtype} {shape[1:] if is_by_row else shape}".encode()


def _digest(kind: bytes, piece: memoryview | bytes) -> bytes:
    if len(piece) < _SHORT:
        return xxhash.xxh3_128_digest(kind + piece)
    # `kind + piece` would copy the piece.
    machine = xxhash.xxh3_128(kind)
    machine.update(piece)
    return machine.digest()


def runs_of(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return runs of consecutive numbers: the first, and how many."""
    found: list[list[int]] = []
    for number in numbers:
        # 0, a piece that the run does not have, has no successor.
        if number and found and number == found[-1][0] + found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return tuple([(first, size) for first, size in found])


class StoredPiece(NamedTuple):
    """A piece of an input: its digest, and its bytes."""

    digest: bytes
    content: memoryview


def read_pieces(
    directory: Path, index: PieceIndex[Pieces], given: Given, known: Container[int] = ()
) -> dict[int, StoredPiece]:
    """Return the pieces of an input, by number, without those that were given up.

    known: those not to read; they may be among the result.

    Raises:
        RunError: a file was changed, or an input has an unknown dtype or another size.
    """
    from everystep.ops.arguments import DTYPES

    dtype = DTYPES.get(given.dtype)
    if dtype is None:
        raise RunError(
            f"{directory} has an input of unknown dtype {given.dtype!r:.40}: the database was changed"
        )
    size = math.prod(given.shape) * dtype.itemsize
    is_by_row = _is_by_row(given.shape, size)
    each = size // given.shape[0] if is_by_row else size
    kind = _kind(given.dtype, given.shape, is_by_row)
    found: dict[int, StoredPiece] = {}
    with _BatchFiles(directory) as files:
        # Pieces that lie side by side are read at once, and then compared one by one.
        for row, source, number, end in _side_by_side(index, given, known):
            if size > MEMORY or (row.size != each and source is None):
                raise RunError(
                    f"{directory / BATCHES} was changed after recording: an input has another size"
                )
            begin = row.place + (number - row.number) * row.size
            content = memoryview(files.read(row.file, [begin], (end - number) * row.size))
            if source is not None:
                content = memoryview(_cut_out(files, content, source, each))
            for place, digest in enumerate(row.digests_from(number, end)):
                piece = content[place * each : (place + 1) * each]
                if _digest(kind, piece) != digest:
                    name = directory / batch_file(row.file)
                    raise RunError(f"{name} was changed after recording: the digest of an input differs")
                found[number + place] = StoredPiece(digest, piece)
    return found


def _side_by_side(
    index: PieceIndex[Pieces], given: Given, known: Container[int]
) -> Iterator[tuple[Pieces, Pieces | None, int, int]]:
    """Yield pieces that lie side by side: their row, that of their source, the first, and their end."""
    for number, end in ((first, first + count) for first, count in given.runs):
        while number < end:
            row = None if number in known else index.of(number)
            source = None if row is None or row.source is None else index.of(row.source)
            # What was cut out of data is one piece, and gone if the data was given up.
            after = number + 1 if row is None or row.source is not None else min(end, row.end)
            if row is not None and (row.source is None) == (source is None):
                yield row, source, number, after
            number = after


class _BatchFiles(ExitStack):
    """The files of batches of a run, each opened once."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._opened: dict[int, BinaryIO] = {}

    def read(self, file: int, places: Sequence[int], size: int) -> bytes:
        """Return the bytes at places in a file, `size` at each; none if it is too short."""
        name = batch_file(file)
        try:
            if file not in self._opened:
                self._opened[file] = self.enter_context(open_own(self._directory, name))
            opened = self._opened[file]
            if max(places, default=0) + size > os.fstat(opened.fileno()).st_size:
                return b""
            return b"".join([opened.read(size) for place in places if opened.seek(place) == place])
        except OSError as error:
            raise RunError(f"{self._directory / name} cannot be read: {error.strerror}") from None


def _cut_out(files: _BatchFiles, begins: memoryview, source: Pieces, size: int) -> bytes:
    """Return what was cut out of data: `size` bytes in parts that begin at places in it."""
    # A stranger's size may leave a part of a number at the end, which `iter_unpack` refuses.
    at = [begin for (begin,) in struct.iter_unpack("<i", begins[: len(begins) // 4 * 4])]
    each = size // max(len(at), 1)
    is_within = source.source is None and all(0 <= begin <= source.size - each for begin in at)
    return files.read(source.file, [source.place + b for b in at] if is_within else [], each)


def joined(given: Given, pieces: Mapping[int, StoredPiece]) -> bytearray | None:
    """Return the bytes of an input; None if pieces are missing.

    The number of a piece that was given up may be that of a later one, so the digest of all decides.
    """
    found = [pieces[number] for number in given.numbers() if number in pieces]
    if not found or _joint_digest([piece.digest for piece in found]) != given.digest:
        return None
    return bytearray().join([piece.content for piece in found])


def as_tensor(given: Given, content: bytearray) -> Tensor:
    """Return an input of a step, on the CPU, from its bytes.

    Raises:
        RunError: it has an unknown dtype, or another number of bytes.
    """
    import torch

    from everystep.ops.arguments import DTYPES

    dtype = DTYPES.get(given.dtype)
    if dtype is None or len(content) != math.prod(given.shape) * dtype.itemsize:
        raise RunError("an input of a step has another dtype or size: the database was changed")
    # `frombuffer` refuses a buffer without bytes.
    if not content:
        return torch.empty(given.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(given.shape)
