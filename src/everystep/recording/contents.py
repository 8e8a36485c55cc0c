"""Contents: data and inputs of watched steps, stored once by a digest of their bytes.

A tensor with rows is stored row by row, in numbered pieces, and a step refers to their numbers: an epoch
that shuffles its rows costs a few bytes per row. Windows of a text, and rows picked out of a table, are
stored as their places in it: 4 bytes each. Files hold the bytes one after the other. If they exceed a
budget, the oldest file is deleted, and the steps that need it can no longer be replayed.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
import zlib
from bisect import bisect
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import xxhash

from everystep.bounded import MEMORY, decompressed, parse_json
from everystep.errors import RunError
from everystep.recording.database import Database, Pieces, Place, Repeat
from everystep.recording.facts import NotKeptFacts
from everystep.recording.files import BATCHES, batch_file, bytes_of, open_own
from everystep.recording.keep import RECENT, Keep

if TYPE_CHECKING:
    from torch import Tensor

    from everystep.step.outside_tensors import Cut

__all__ = [
    "DEFAULT_BATCH_BUDGET",
    "DRAW",
    "PROGRAM",
    "SIZES",
    "Given",
    "Inputs",
    "Piece",
    "Repeats",
    "Taken",
    "digest_of",
    "given_of",
    "inputs_of",
    "joined",
    "packed",
    "packed_program",
    "read_pieces",
    "tensor_of",
    "unpacked",
]

#: Bytes of batches and other inputs that a run may keep, by default.
DEFAULT_BATCH_BUDGET = 2_000_000_000
#: Prefix of the names of random generators before a batch was drawn: a resume needs them, no replay.
DRAW = "draw/"
#: The names of the sizes of a step, where others have its program with other sizes; and of the program
#: itself, of a run with too many for a file of each.
SIZES, PROGRAM = "sizes", "program"
#: The budget is divided into so many files.
FILES = 16
#: Rows of fewer bytes than this get no digests of their own.
_SMALLEST_ROW = 64
#: A tensor with more rows is one piece.
_MOST_ROWS = 2**20
#: Pieces that a row of the database locates: a reader that needs one reads the digests of all.
_TOGETHER = 1024
#: A place in data: little-endian, 4 bytes.
_PLACE = "<i4"
#: To copy fewer bytes than this takes less time than a second call.
_SHORT = 4096


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
    return _given_and_pieces(tensor)[0]


def _given_and_pieces(tensor: Tensor) -> tuple[Given, list[bytes], list[memoryview]]:
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
    return f"{dtype} {shape[1:] if is_by_row else shape}".encode()


def _digest(kind: bytes, piece: memoryview | bytes) -> bytes:
    if len(piece) < _SHORT:
        return xxhash.xxh3_128_digest(kind + piece)
    machine = xxhash.xxh3_128(kind)
    machine.update(piece)
    return machine.digest()


class Piece(NamedTuple):
    """A piece of an input: its digest, and its bytes."""

    digest: bytes
    content: memoryview


def read_pieces(
    directory: Path, places: Mapping[int, Place], given: Given, known: Container[int] = ()
) -> dict[int, Piece]:
    """Return the pieces of an input that are at `places`, by number. known: those not to read.

    Raises:
        RunError: a file was changed, or an input has an unknown dtype or another size.
    """
    from everystep.program.arguments import DTYPES

    dtype = DTYPES.get(given.dtype)
    if dtype is None:
        raise RunError(
            f"{directory} has an input of unknown dtype {given.dtype!r:.40}: the database was changed"
        )
    size = math.prod(given.shape) * dtype.itemsize
    is_by_row = _is_by_row(given.shape, size)
    each = size // given.shape[0] if is_by_row else size
    numbers = {n for n in given.numbers() if n in places and n not in known}
    wanted = sorted((places[number].file, places[number].place, number) for number in numbers)
    if size > MEMORY or any(places[n].size != each and places[n].source is None for n in numbers):
        raise RunError(f"{directory / BATCHES} was changed after recording: an input has another size")
    kind = _kind(given.dtype, given.shape, is_by_row)
    found: dict[int, Piece] = {}
    for number, content in _read_side_by_side(directory, places, wanted):
        place = places[number]
        if place.source is not None:
            content = memoryview(_cut_out(directory, content, places.get(place.source), each))
        if _digest(kind, content) != place.digest:
            name = directory / batch_file(place.file)
            raise RunError(f"{name} was changed after recording: the digest of an input differs")
        found[number] = Piece(place.digest, content)
    return found


def _read_side_by_side(
    directory: Path, places: Mapping[int, Place], wanted: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of pieces; what lies side by side is read at once. wanted: file, place, number."""
    begin = 0
    for index, (file, place, number) in enumerate(wanted):
        end = place + places[number].size
        if index + 1 < len(wanted) and wanted[index + 1][:2] == (file, end):
            continue
        together, begin = wanted[begin : index + 1], index + 1
        first = together[0][1]
        content = memoryview(_bytes_at(directory, file, [first], end - first))
        for _, at, each in together:
            yield each, content[at - first : at - first + places[each].size]


def _cut_out(directory: Path, begins: memoryview, source: Place | None, size: int) -> bytes:
    """Return what was cut out of data: `size` bytes in pieces that begin at places in it."""
    if source is None:
        return b""
    at = [begin for (begin,) in struct.iter_unpack("<i", begins[: len(begins) // 4 * 4])]
    each = size // max(len(at), 1)
    is_within = source.source is None and all(0 <= begin <= source.size - each for begin in at)
    return _bytes_at(directory, source.file, [source.place + b for b in at] if is_within else [], each)


def _bytes_at(directory: Path, file: int, places: Sequence[int], size: int) -> bytes:
    """Return the bytes at places in a file of batches, `size` at each; none if it is too short."""
    name = batch_file(file)
    try:
        with open_own(directory, name) as opened:
            if max(places, default=0) + size > os.fstat(opened.fileno()).st_size:
                return b""
            found = [opened.read(size) for place in places if opened.seek(place) == place]
    except OSError as error:
        raise RunError(f"{directory / name} cannot be read: {error.strerror}") from None
    return b"".join(found)


def joined(given: Given, pieces: Mapping[int, Piece]) -> bytearray | None:
    """Return the bytes of an input; None if pieces are missing.

    The number of a piece that was given up may be that of a later one, so the digest of all decides.
    """
    found = [pieces[number] for number in given.numbers() if number in pieces]
    if not found or _joint_digest([piece.digest for piece in found]) != given.digest:
        return None
    return bytearray().join([piece.content for piece in found])


def tensor_of(given: Given, content: bytearray) -> Tensor:
    """Return an input of a step, on the CPU, from its bytes.

    Raises:
        RunError: it has an unknown dtype, or another number of bytes.
    """
    import torch

    from everystep.program.arguments import DTYPES

    dtype = DTYPES.get(given.dtype)
    if dtype is None or len(content) != math.prod(given.shape) * dtype.itemsize:
        raise RunError("an input of a step has another dtype or size: the database was changed")
    if not content:
        return torch.empty(given.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(given.shape)


class Taken(NamedTuple):
    """Watched steps, as they are written: `count` of them, from `step` on.

    program: its number, None if nothing repeats the steps; numbers: of its operators, and those that
    Python read; inputs: of each step, on the CPU, by name; nesting: the nesting of its batch; bytes: of
    new inputs; digests: of the state afterwards, by name, if computed, of a single step only; cuts:
    where inputs were cut out of data, by name.
    """

    step: int
    program: int | None
    numbers: list[int | float] | None
    inputs: dict[str, Tensor]
    nesting: Any
    bytes: int
    digests: dict[str, str]
    count: int = 1  # type: ignore[assignment]  # the method of tuples is not needed
    cuts: Mapping[str, Cut] = MappingProxyType({})


@dataclass
class BatchFile:
    """A file of batches: its bytes, the step at which it was begun (0 if unknown), and its uses.

    newest_step: the last that needs it to open, 0 for none; draws: the first and the last with draws in
    it, noted only where steps are given up.
    """

    size: int = 0
    begun: int = 0
    newest_step: int = 0
    draws: tuple[int, int] = (0, 0)


class _Group(NamedTuple):
    """Pieces with the numbers from `first` up to `end`, and their file.

    source: the number of the data that they were cut out of, if they were.
    """

    first: int
    end: int
    file: int
    source: int | None


def _runs_of(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return runs of consecutive numbers: the first, and how many."""
    found: list[list[int]] = []
    for number in numbers:
        if number and found and number == found[-1][0] + found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return tuple([(first, size) for first, size in found])


class Repeats:
    """The one writer of what repeats steps, and of the contents of their inputs.

    Args:
        budget: maximum bytes of batches and other inputs.
        recorded: the newest step that the run has.
        keep: which steps are kept, None for all.
        is_kept: returns whether a step is kept; of others, only draws are written.

    lost_to: the last step that needs dropped inputs; files: of batches, by number; recent: the bytes of
    new contents of the newest steps.
    """

    def __init__(
        self,
        database: Database,
        budget: float,
        recorded: int,
        keep: Keep | None = None,
        is_kept: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self.lost_to = self._bytes = 0
        self.recent: deque[int] = deque(maxlen=RECENT)
        self._database = database
        self._budget = budget
        self._recorded = recorded
        self._keep = keep
        self._is_kept = is_kept
        #: The files that are being written: of draws, which may have to stay longer, and of the others.
        self._open: dict[bool, tuple[int, BinaryIO]] = {}
        self.files: dict[int, BatchFile] = {}
        #: The number of each content, by its digest; and where pieces are, in order of their numbers.
        self._known: dict[bytes, int] = {}
        self._groups: list[_Group] = []
        self._rows: list[Pieces] = []
        self._given: dict[int, tuple[Any, Given, set[int]]] = {}
        self._packed_key: Any = None
        self._packed = b""
        for row in database.all_contents():
            self._known |= zip(row.digests_of_each(), count(row.number), strict=False)
            self._groups.append(_Group(row.number, row.number + row.count, row.file, row.source))
            file = self.files.setdefault(
                row.file, BatchFile(newest_step=recorded if keep is None else 0)
            )
            file.size = max(file.size, row.place + row.size * row.count)
        self._newest = max(self.files, default=0)
        self._next = self._groups[-1].end if self._groups else 1
        self._forget_lost()
        for repeat in () if keep is None else database.repeats(1):
            for name, each in inputs_of(repeat.inputs, f"step {repeat.step}").given.items():
                self._use(repeat.last, name, self._files_of(each.numbers()))

    def write(self, rows: Sequence[Taken], compare: Callable[[list[Repeat]], list[Repeat]]) -> None:
        """Write steps. compare: compares steps that the run already has, and returns the new ones.

        Raises:
            RunError: a step differs from the recording.
            RecordingError: they cannot be written.
        """
        found: list[Repeat] = []
        for row in rows:
            last = row.step + row.count - 1
            if last > self._recorded and not self._is_kept(last):
                draws = {name: each for name, each in row.inputs.items() if name.startswith(DRAW)}
                if not draws:
                    self.recent.append(0)
                    continue
                row = Taken(row.step, None, None, draws, None, 0, {}, row.count)
            before = self._bytes
            cuts = row.cuts
            given = {n: self._add_once(last, n, each, cuts.get(n)) for n, each in row.inputs.items()}
            self.recent.append(self._bytes - before)
            inputs = self._packed_inputs(Inputs(given, row.nesting, row.digests))
            numbers = packed(row.numbers) if row.numbers else None
            now = Repeat(row.step, row.program, numbers, inputs, row.count)
            # Steps with batches by rule often have everything in common.
            is_alike = bool(found) and not given and not row.digests and found[-1][1:4] == now[1:4]
            if is_alike and found[-1].last + 1 == now.step:
                found[-1] = found[-1]._replace(count=found[-1].count + now.count)
            else:
                found.append(now)
        new = compare(found)
        self._close_files(rows[-1].step)
        old = self.oldest(self._budget, spared=self._newest)  # the steps just taken need that file
        lost_to = max([self.lost_to, *(self.files[number].newest_step for number in old)])
        with self._database.removing(self.drop(old)):
            self._database.enter(self._rows)
            self._database.enter(new)
            if lost_to > self.lost_to:
                self._database.write_facts({"batches_lost_to": lost_to})
        self.lost_to, self._rows = lost_to, []

    @property
    def size(self) -> int:
        """The bytes of all contents on the disk."""
        return sum(file.size for file in self.files.values())

    def close(self) -> None:
        """Close the files. Data that did not fit on the disk belongs to no recorded step."""
        for _, file in self._open.values():
            with suppress(OSError):
                file.close()

    def forget(self, not_kept: Sequence[NotKeptFacts], resumed: Sequence[tuple[int, int]]) -> None:
        """Give up what repeats steps; to be called in a transaction.

        not_kept: the steps; resumed: ranges of steps; a resume may need their draws.
        """
        for each in not_kept:
            since = min((begin for begin, end in resumed if end >= each.first), default=each.last + 1)
            for row in self._database.forget_repeats(each.first, each.last, since):
                draws = inputs_of(row.inputs, f"step {row.step}").draws()
                if draws.given and (row.step == 1 or row.step >= since):
                    kept = row._replace(program=None, numbers=None, inputs=draws.packed())
                    self._database.enter([kept])

    def unneeded(self, resumed: Sequence[tuple[int, int]]) -> list[int]:
        """Return the complete files that no step needs which is kept, and no resume; see `forget`."""
        return [n for n, file in self._closed_files().items() if not self._is_needed(file, resumed)]

    def _is_needed(self, file: BatchFile, resumed: Sequence[tuple[int, int]]) -> bool:
        first, last = file.draws
        # Workers that stay from epoch to epoch were started with the first draw.
        if first == 1 or any(begin <= last and first <= end for begin, end in resumed if last):
            return True
        return file.newest_step > 0 and self._is_kept(file.newest_step)

    def _closed_files(self) -> dict[int, BatchFile]:
        """Return the files that are complete, by number."""
        written = {number for number, _ in self._open.values()}
        return {number: file for number, file in self.files.items() if number not in written}

    def oldest(self, budget: float, spared: int = 0) -> list[int]:
        """Return the complete files to give up to stay within a budget; draws, of a resume, go last.

        A batch that comes again is stored once, so later steps may need its file, too: the files that no
        step has needed for longest go first. spared: a file that stays.
        """
        closed = {n: file for n, file in self._closed_files().items() if n != spared}
        has_only_draws = {n: file.draws > (0, 0) and not file.newest_step for n, file in closed.items()}
        found, left = [], self.size
        for number in sorted(closed, key=lambda n: (has_only_draws[n], closed[n].newest_step, n)):
            if left <= budget:
                break
            found.append(number)
            left -= closed[number].size
        return found

    def drop(self, files: Sequence[int]) -> list[str]:
        """Give up the contents in files; return their names, for `Database.removing`."""
        if files:
            for file in files:
                del self.files[file]
            self._forget_lost()
        return [batch_file(file) for file in files]

    def _packed_inputs(self, inputs: Inputs) -> bytes:
        """Return the inputs of a step in database form; pack repeated ones only once."""
        key = repr(inputs.nesting), inputs
        if key != self._packed_key:
            self._packed_key, self._packed = key, inputs.packed()
        return self._packed

    def _close_files(self, step: int) -> None:
        """Write out the files; close those that are full, or old at this step."""
        for is_draw, (number, opened) in [*self._open.items()]:
            # The database is about to name these bytes, and a killed process loses what Python holds.
            opened.flush()
            file = self.files[number]
            is_old = self._keep is not None and step - file.begun >= self._keep.chunk
            is_first = is_draw and file.begun == 1  # it stays, so others begin another file
            if is_old or is_first or file.size >= self._budget / FILES:
                opened.close()
                del self._open[is_draw]
        self._given = {place: each for place, each in self._given.items() if each[0]() is not None}

    def _add_once(self, step: int, name: str, tensor: Tensor, cut: Cut | None = None) -> Given:
        """Add a tensor; skip one that was added before and is still alive. cut: out of data."""
        known = self._given.get(id(tensor))
        if known is not None and known[0]() is tensor and self._are_fresh(known[2], step):
            self._use(step, name, known[2])
            return known[1]
        given, digests, pieces = _given_and_pieces(tensor)
        is_draw = self._is_draw(name)
        may_be_old = is_draw or self._keep is None
        new = dict(zip(digests, pieces, strict=True))
        for digest in new.keys() & self._known.keys():
            if may_be_old or self._are_fresh(self._files_of([self._known[digest]]), step):
                del new[digest]
        # Repeated steps are only compared: the run does not change before the first new one.
        if new and step > self._recorded:
            places = None if cut is None else self._places(step, pieces[0], cut)
            if places is None:
                self._write(step, is_draw, new)
            else:
                self._write(step, is_draw, {digests[0]: places[0]}, places[1])
        numbers = [self._known.get(digest, 0) for digest in digests]
        given = given._replace(runs=_runs_of(numbers))
        files = self._files_of(filter(None, numbers))
        self._use(step, name, files)
        if all(numbers):
            self._given[id(tensor)] = weakref.ref(tensor), given, files
        return given

    def _places(self, step: int, piece: memoryview, cut: Cut) -> tuple[memoryview, int] | None:
        """Return the places of an input in data, and the number of that; None if it has other bytes."""
        import numpy as np
        from numpy.lib.stride_tricks import sliding_window_view

        source, begins = bytes_of(cut.source), np.asarray(cut.begins, np.int64)
        size = piece.nbytes // max(len(begins), 1)
        is_within = size * len(begins) == piece.nbytes > 8 * len(begins)
        is_all = piece.nbytes == len(source)  # its digest would be that of the data
        if not is_within or is_all or begins.min() < 0 or begins.max() + size > len(source):
            return None
        # The data may have been changed since it was copied: then the bytes are not there.
        if not np.array_equal(sliding_window_view(source, size)[begins].reshape(-1), piece):
            return None
        (number,) = self._add_once(step, "source", cut.source).numbers()
        places = memoryview(begins.astype(_PLACE).tobytes())
        # Data that is kept as places itself would be places in places.
        group = self._group_of(number)
        return (places, number) if group is not None and group.source is None else None

    def _group_of(self, number: int) -> _Group | None:
        """Return the pieces that one is of, by its number; None if it was given up."""
        index = bisect(self._groups, (number + 1,)) - 1
        return self._groups[index] if index >= 0 and number < self._groups[index].end else None

    def _files_of(self, numbers: Iterable[int]) -> set[int]:
        """Return the files that hold pieces, and the data that these were cut out of."""
        found: set[int] = set()
        group: _Group | None = None
        for number in numbers:
            if group is not None and group.first <= number < group.end:
                continue
            group = self._group_of(number)
            if group is not None:
                found.add(group.file)
                if group.source is not None:
                    found |= self._files_of([group.source])
        return found

    def _are_fresh(self, files: set[int], step: int) -> bool:
        """Return whether steps may refer to files; old ones could not be given up then."""
        newest = self._keep and self._keep.newest
        known = [self.files[each] for each in files if each in self.files]
        are_old = newest is not None and any(step - file.begun > newest for file in known)
        return len(known) == len(files) and not are_old

    def _is_draw(self, name: str) -> bool:
        return self._keep is not None and name.startswith(DRAW)

    def _use(self, step: int, name: str, files: set[int]) -> None:
        """Note that a step has an input in files."""
        for file in map(self.files.__getitem__, files):
            if self._is_draw(name):
                file.draws = file.draws[0] or step, step
            else:
                file.newest_step = step

    def _write(
        self,
        step: int,
        is_draw: bool,
        pieces: Mapping[bytes, memoryview],
        source: int | None = None,
    ) -> None:
        """Write pieces of a tensor, by their digest; with a source, places in that."""
        if is_draw not in self._open:
            self._newest += 1
            path = self._database.directory / batch_file(self._newest)
            path.parent.mkdir(exist_ok=True)
            self._open[is_draw] = self._newest, path.open("wb")
            self.files[self._newest] = BatchFile(begun=step)
        number, opened = self._open[is_draw]
        file = self.files[number]
        size = len(next(iter(pieces.values())))  # of each
        digests = [*pieces]
        for begin in range(0, len(digests), _TOGETHER):
            some = digests[begin : begin + _TOGETHER]
            at = self._next + begin, number, file.size + size * begin, size
            self._rows.append(Pieces(*at, b"".join(some), source))
        self._known |= zip(digests, count(self._next), strict=False)
        self._groups.append(_Group(self._next, self._next + len(digests), number, source))
        self._next += len(digests)
        opened.writelines(pieces.values())
        file.size += size * len(digests)
        self._bytes += size * len(digests)

    def _forget_lost(self) -> None:
        """Forget pieces of files that are gone, and what was cut out of data that is gone."""
        self._groups = [group for group in self._groups if group.file in self.files]
        self._groups = [
            group
            for group in self._groups
            if group.source is None or self._group_of(group.source) is not None
        ]
        self._known = {d: n for d, n in self._known.items() if self._group_of(n) is not None}
