"""Input writer: the inputs of watched steps, as they are written.

A tensor with rows is stored row by row, in numbered pieces, and a step refers to their numbers: an epoch
that shuffles its rows costs a few bytes per row. Windows of a text, and rows picked out of a table, are
stored as their places in it: 4 bytes each. Files hold the bytes one after the other. If they exceed a
budget, the oldest file is deleted, and the steps that need it can no longer be replayed.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from everystep.recording.contents import DRAW, Given, Inputs, inputs_of, packed, pieces_of, runs_of
from everystep.recording.database import Database, PieceIndex, Pieces, Repeat
from everystep.recording.facts import NotKeptFacts
from everystep.recording.files import batch_file, bytes_of
from everystep.recording.keep import RECENT, Keep

if TYPE_CHECKING:
    from torch import Tensor

    from everystep.step.outside_tensors import Cut

__all__ = ["Repeats", "Taken"]

#: The budget is divided into so many files.
FILES = 16
#: Pieces that a row of the database locates: a reader that needs one reads the digests of all.
_TOGETHER = 1024
#: A place in data: little-endian, 4 bytes.
_PLACE = "<i4"


# How a batch is stored, e.g. of 3 rows; the run has two of them already:
#   digests of its rows       a, b, c          known: {a: 5, c: 9}
#   written                   b                as piece 12, at the end of the current file
#   the step refers to        5, 12, 9         as runs ((5, 1), (12, 1), (9, 1))
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
    it.
    """

    size: int = 0
    begun: int = 0
    newest_step: int = 0
    draws: tuple[int, int] = (0, 0)


class _Span(NamedTuple):
    """Pieces of one file, from `number` up to `end`; source: the number of what they were cut out of."""

    number: int
    end: int
    file: int
    source: int | None


class Repeats:
    """The one writer of what repeats steps, and of the contents of their inputs.

    Args:
        budget: maximum bytes of batches and other inputs.
        recorded: the newest step that the run has.
        keep: which steps are kept, None for all.
        is_kept: returns whether a step is kept; of others, only draws are written.
        resumed: returns ranges of steps; a resume needs their draws, which no budget gives up.

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
        resumed: Callable[[], Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        self.lost_to, self._bytes = database.facts().batches_lost_to or 0, 0
        self.recent: deque[int] = deque(maxlen=RECENT)
        self._database = database
        self._budget = budget
        self._recorded = recorded
        self._keep = keep
        self._is_kept = is_kept
        self._resumed = resumed
        #: The files that are being written: of draws, which may have to stay longer, and of the others.
        self._open: dict[bool, tuple[int, BinaryIO]] = {}
        self.files: dict[int, BatchFile] = {}
        #: The number of each content, by its digest; there may be millions, so of where they are, the
        #: run's database alone has all.
        self._known: dict[bytes, int] = {}
        self._spans = PieceIndex[_Span]([])
        self._rows: list[Pieces] = []
        #: By the id of a tensor that is alive: the same one, such as a mask, is often given at each
        #: step.
        self._given: dict[int, tuple[Any, Given, set[int]]] = {}
        self._packed_key: Any = None
        self._packed = b""
        for row in database.all_contents():
            self._know(row)
            file = self.files.setdefault(row.file, BatchFile())
            file.size = max(file.size, row.place + row.size * (row.end - row.number))
        self._newest = max(self.files, default=0)
        self._next = self._spans.rows[-1].end if self._spans.rows else 1
        self._forget_lost()
        # Of a new run, all uses are noted; of another, they are looked up once a file is to be given up.
        self._has_uses = not self.files
        # Lost pieces have numbers, too: none is given again, or what a step needs would seem to be
        # there, and altered.
        if keep is not None or self.lost_to > 0:
            self._look_up_uses()

    def _look_up_uses(self) -> None:
        """Note which steps use the files of before, and the numbers of lost pieces; reads all steps."""
        self._has_uses = True
        for repeat in self._database.repeats(1):
            for name, each in inputs_of(repeat.inputs, f"step {repeat.step}").given.items():
                self._next = max([self._next, *(first + size for first, size in each.runs)])
                self._use(repeat.last, name, self._files_of(each.numbers()))

    def write(self, rows: Sequence[Taken], compare: Callable[[list[Repeat]], list[Repeat]]) -> None:
        """Write steps. compare: compares steps that the run already has, and returns the new ones.

        Raises:
            RunError: a step differs from the recording.
            RecordingError: they cannot be written.
        """
        found: list[Repeat] = []
        for row in rows:
            # Only steps of everystep's own come several in a row, and these have no `keep`.
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
        # Before anything is written: a step that differs raises, and the run stays as it was.
        new = compare(found)
        if not new:  # only the first new step changes the run: until then, nothing is given up
            return
        spared = {self._newest, *(number for number, _ in self._open.values())}
        self._close_files(rows[-1].step)
        old = self.oldest(self._budget, spared)  # the steps just taken need those files
        lost_to = max([self.lost_to, *(self.files[number].newest_step for number in old)])
        with self._database.removing(self.drop(old)):
            self._database.enter(self._rows)
            self._database.enter(new)
            self._database.write_facts({"batches_lost_to": lost_to} if old else {})
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
        is_kept = file.newest_step > 0 and self._is_kept(file.newest_step)
        return is_kept or _has_draws_of(file, resumed)

    def _closed_files(self) -> dict[int, BatchFile]:
        written = {number for number, _ in self._open.values()}
        return {number: file for number, file in self.files.items() if number not in written}

    def oldest(self, budget: float, spared: Collection[int] = ()) -> list[int]:
        """Return the complete files to give up to stay within a budget. spared: files that stay."""
        found, left = list[int](), self.size
        if left <= budget:
            return found
        if not self._has_uses:
            self._look_up_uses()
        resumed = None if self._resumed is None else self._resumed()
        closed = {
            number: file
            for number, file in self._closed_files().items()
            if number not in spared and not (resumed is not None and _has_draws_of(file, resumed))
        }
        # A batch that comes again is stored once, so later steps may need its file, too: the files that
        # no step has needed for longest go first.
        for number in sorted(closed, key=lambda n: (max(closed[n].newest_step, closed[n].draws[1]), n)):
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
        # Packing takes longer than a small step, and many steps have the inputs of the one before.
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
        given, digests, pieces = pieces_of(tensor)
        is_draw = name.startswith(DRAW)
        may_be_old = is_draw or self._keep is None
        new = dict(zip(digests, pieces, strict=True))
        for digest in new.keys() & self._known.keys():
            if may_be_old or self._are_fresh(self._files_of([self._known[digest]]), step):
                del new[digest]
        # Repeated steps are only compared: the run does not change before the first new one.
        if new and step > self._recorded:
            # What was cut out is given as its bytes (bytes,), which are one piece.
            places = None if cut is None else self._places(step, pieces[0], cut)
            if places is None:
                self._write(step, is_draw, new)
            else:
                self._write(step, is_draw, {digests[0]: places[0]}, places[1])
        numbers = [self._known.get(digest, 0) for digest in digests]
        given = given._replace(runs=runs_of(numbers))
        files = self._files_of(filter(None, numbers))
        self._use(step, name, files)
        # If a piece was not written (of a repeated step), a later step may have to.
        if all(numbers):
            self._given[id(tensor)] = weakref.ref(tensor), given, files
        return given

    def _places(self, step: int, piece: memoryview, cut: Cut) -> tuple[memoryview, int] | None:
        """Return the places of an input in data, and the number of that; None if it has other bytes."""
        import numpy as np
        from numpy.lib.stride_tricks import sliding_window_view

        source, begins = bytes_of(cut.source), np.asarray(cut.begins, np.int64)
        size = piece.nbytes // max(len(begins), 1)
        # Places take 4 bytes each: to be worth it, the pieces must be longer than two of them.
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
        span = self._spans.of(number)
        return (places, number) if span is not None and span.source is None else None

    def _files_of(self, numbers: Iterable[int]) -> set[int]:
        """Return the files that hold pieces, and the data that these were cut out of."""
        found: set[int] = set()
        span: _Span | None = None
        for number in numbers:
            if span is not None and span.number <= number < span.end:
                continue
            span = self._spans.of(number)
            source = None if span is None or span.source is None else self._spans.of(span.source)
            found |= {each.file for each in (span, source) if each is not None}
        return found

    def _know(self, row: Pieces) -> None:
        self._known |= zip(row.digests_from(row.number, row.end), count(row.number), strict=False)
        # Rows that follow each other become one span, so a few stand for millions of pieces.
        new, spans = _Span(row.number, row.end, row.file, row.source), self._spans.rows
        if spans and (spans[-1].end, *spans[-1][2:]) == (new.number, *new[2:]):
            new = new._replace(number=spans.pop().number)
        spans.append(new)

    def _are_fresh(self, files: set[int], step: int) -> bool:
        """Return whether steps may refer to files; old ones could not be given up then."""
        # A file is given up as a whole: one step that refers to an old one would keep all of it.
        newest = self._keep and self._keep.newest
        known = [self.files[each] for each in files if each in self.files]
        are_old = newest is not None and any(step - file.begun > newest for file in known)
        return len(known) == len(files) and not are_old

    def _use(self, step: int, name: str, files: set[int]) -> None:
        """Note that a step has an input in files."""
        for file in map(self.files.__getitem__, files):
            if name.startswith(DRAW):
                first, last = file.draws
                file.draws = min(first or step, step), max(last, step)
            else:
                file.newest_step = max(file.newest_step, step)

    def _write(
        self,
        step: int,
        is_draw: bool,
        pieces: Mapping[bytes, memoryview],
        source: int | None = None,
    ) -> None:
        """Write pieces of a tensor, by their digest; with a source, places in that."""
        # Draws have files of their own, since they may have to stay when the others go.
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
            self._know(self._rows[-1])
        self._next += len(digests)
        opened.writelines(pieces.values())
        file.size += size * len(digests)
        self._bytes += size * len(digests)

    def _forget_lost(self) -> None:
        """Forget pieces of files that are gone, and what was cut out of data that is gone."""
        kept = PieceIndex(span for span in self._spans.rows if span.file in self.files)
        of = kept.of
        spans = (each for each in kept.rows if each.source is None or of(each.source) is not None)
        self._spans = PieceIndex(spans)
        self._known = {d: n for d, n in self._known.items() if self._spans.of(n) is not None}


def _has_draws_of(file: BatchFile, resumed: Sequence[tuple[int, int]]) -> bool:
    """Return whether a file has draws of steps in some ranges, or of the first step."""
    first, last = file.draws
    # Workers that stay from epoch to epoch were started with the first draw.
    return first == 1 or any(begin <= last and first <= end for begin, end in resumed if last)
