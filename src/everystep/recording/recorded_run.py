"""Reads a run. Imports no torch, except to read parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from everystep.errors import DamageWarning, ExperimentError, RunError, UsageError, did_you_mean
from everystep.recording.blocks import LOSS, block_of, series_of
from everystep.recording.connection import fingerprint, last_written
from everystep.recording.contents import Given, StoredPiece, as_tensor, joined, read_pieces
from everystep.recording.database import (
    FILE_NAME,
    Database,
    PieceIndex,
    Pieces,
    Repeat,
    read_from,
    reading,
)
from everystep.recording.directories import RANKS, is_run, name_of, rank_directory
from everystep.recording.facts import DataFileFacts, Facts, RanksFacts, TrainingFacts
from everystep.recording.files import (
    EXPERIMENT_FILE,
    Change,
    FileRow,
    own_path,
    read_data,
    read_file,
    read_tensors,
)
from everystep.recording.health import (
    Finding,
    damage_text,
    missing_steps,
    number_findings,
    structure_findings,
)
from everystep.recording.lock import is_locked
from everystep.recording.snapshots import SnapshotRow, read_snapshot
from everystep.recording.step_columns import numbers_at, step_columns
from everystep.recording.summary import Summary, in_own_precision, summary_of

if TYPE_CHECKING:
    import polars
    from numpy.typing import NDArray
    from torch import Tensor

    from everystep.recording.blocks import Series
    from everystep.step.state import State

__all__ = ["EXPERIMENT_FILE", "RecordedRun", "Stretch", "stretch_at"]

_Found = TypeVar("_Found")


class Stretch(NamedTuple):
    """Steps `first` to `last` (None: the newest) of a run, trained by the same rules.

    facts: of that training; for steps of a parent, the parent's.
    """

    first: int
    last: int | None
    facts: TrainingFacts


def stretch_at(stretches: Sequence[Stretch], step: int) -> int:
    """Return the place of the stretch that a step belongs to; of step 0, the first."""
    # State 0 is before step 1, in the first stretch.
    return max(place for place, each in enumerate(stretches) if each.first <= max(step, 1))


def _place_of_rank(top: Path, rank: int, stretches: Sequence[Stretch]) -> Path:
    """Return the directory of a rank that trained the last of some stretches. top: of rank 0."""
    count = stretches[-1].facts.processes
    # Directories of ranks have other names once the number of processes has changed: see
    # `rank_directory`.
    others = [each.last or 0 for each in stretches if each.facts.processes != count]
    return rank_directory(top, rank, count, max(others, default=0))


class RecordedRun:
    """A run on disk. It reads everything on demand, also during training.

    Every call raises RunError if what it needs is missing, was changed since, or is unreadable.

    common_states, common_steps: the steps of the states that all ranks have, and how many steps, if they
    agreed on that; None: as read. others: how many processes recorded it, if it is continued by another
    number.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._database_path = self.directory / FILE_NAME
        self.common_states: frozenset[int] | None = None
        self.common_steps: int | None = None
        self.others: int | None = None
        self._has_warned = False
        self._facts: tuple[tuple[int, ...], Facts] | None = None
        self._found: tuple[tuple[int, ...], list[Finding]] | None = None

    @property
    def name(self) -> str:
        """The name of the run's directory, after that of its sweep or of its ranks: see `name_of`."""
        return name_of(self.directory)

    @property
    def facts(self) -> Facts:
        """Everything known except numbers per step: status, times, how it was trained."""
        edition = fingerprint(self.directory)
        # Kept while the database is unchanged: reading them takes as long as a small step.
        if self._facts is None or self._facts[0] != edition:
            self._facts = edition, self._read(Database.facts)
        return self._facts[1]

    @property
    def ranks(self) -> list[Self]:
        """The runs of all processes that trained together, by rank; of one process, this run alone.

        Raises:
            RunError: that of a rank is missing, or this one was moved out of its run.
        """
        return [self] if self.known_ranks is None else self.ranks_of(-1)

    def ranks_of(self, place: int) -> list[Self]:
        """Return the runs of all processes that trained the stretch at a place together, by rank.

        Only this one of an earlier stretch without a step that it keeps.
        """
        own, places = self.directory.resolve(), self.places_of_ranks(place)
        for each in places:
            if each != own and (not is_run(each) or each.resolve() != each):  # no link is followed
                raise RunError(
                    f"{self.name} was trained by {len(places)} processes, and the run of one of them is "
                    f"missing: {each}"
                )
        return [self if each == own else type(self)(each) for each in places]

    def places_of_ranks(self, place: int) -> list[Path]:
        """Return the directories of `ranks_of`, whether they exist or not.

        Raises:
            RunError: this one was moved out of its run.
        """
        stretches, facts = self.stretches, self.facts
        first, last, trained = stretches[place]
        own, now = self.directory.resolve(), facts.training.ranks
        if trained.ranks is None or (last and not any(end >= first for _, end in facts.kept(last))):
            return [own]
        top = own if now is None or not now.rank else own.parent.parent
        if now is not None and own != _place_of_rank(top, now.rank, stretches):
            raise RunError(  # what is around it may be anything
                f"{self.name} is rank {now.rank} of a run, and is not in its directory {RANKS}/; put "
                "it back there"
            )
        trained_by = stretches[: place % len(stretches) + 1]
        return [_place_of_rank(top, rank, trained_by) for rank in range(trained.processes)]

    @property
    def within(self) -> Path:
        """Its directory within that of rank 0."""
        return self.directory.resolve().relative_to(self.ranks[0].directory.resolve())

    @property
    def shown_ranks(self) -> list[Self]:
        """The runs with the losses to show for this one: of rank 0, all ranks that can be read."""
        if self.known_ranks is not None and not self.known_ranks.rank:
            with suppress(RunError):
                return [each for each in self.ranks if each.facts]  # raises if it is unreadable
        return [self]

    @cached_property
    def known_ranks(self) -> RanksFacts | None:
        """Which of several processes this one was; None if it trained alone, or did not begin."""
        trained = self.facts.trained
        return None if trained is None else trained.ranks

    def check_alone(self, what: str) -> None:
        """Check that one process trained the run. what: cannot be done with several.

        Raises:
            RunError: several did.
        """
        facts = self.facts
        trained = [each.training for each in facts.earlier] + ([facts.trained] if facts.trained else [])
        count = max((each.processes for each in trained), default=1)
        if count > 1:
            raise RunError(
                f"{self.name} was trained by {count} processes, and everystep cannot {what} yet; "
                "verify, step, diff, why, rows, when and measure work, fork and what-if with lr, and "
                "its script resumes it, or forks it by everystep.record(fork=..., at=...)"
            )

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` (by the user), `failed`, or `killed`."""
        return self.status_by(self.facts)

    def status_by(self, facts: Facts) -> str:
        """Return the status, given facts already read."""
        # "running" is what the writer has noted last: without its lock, it has ended without a word.
        if facts.status != "running" or is_locked(self.directory):
            return facts.status
        # It may have ended since the facts were read.
        status = self.facts.status
        return "killed" if status == "running" else status

    @property
    def last_written(self) -> datetime:
        """When its database was last written."""
        return datetime.fromtimestamp(last_written(self._database_path), UTC)

    @property
    def losses(self) -> polars.DataFrame:
        """The loss of every step: columns step (Int64) and loss, in the loss's own precision."""
        import polars as pl

        steps, losses = self._last_numbers(None)[LOSS]
        return pl.DataFrame({"step": steps, "loss": losses})

    def losses_of_all(self) -> list[float]:
        """Return the loss of every step; warn if an altered number is among them, as `losses` does."""
        found: list[float] = self._last_numbers(None)[LOSS][1].tolist()
        return found

    def _last_numbers(self, count: int | None) -> dict[str, Series]:
        """Return all series of the last steps, the losses in their own precision."""
        # Before it is read: what is written meanwhile must not pass for checked.
        edition = fingerprint(self.directory)
        with reading(self._database_path) as database:
            facts = database.facts()
            since = 0 if count is None else database.newest_step() - count + 1
            # 0 stands for all numbers: then they are checked as a whole.
            since = since if since > 1 else 0
            # The digest of a block is of all its numbers, so these are read, too.
            begin = block_of(since) if since else None
            found = {LOSS: database.series(LOSS, begin)}
            with suppress(RunError):  # a finding reports more
                measured = database.measurements(begin)
                found |= {series_of(name): series for name, series in measured.items()}
            damage = self._findings_in(database, found, since)
        # Only then have all numbers been looked at, so that `findings` need not read them again.
        if not since:
            self._found = edition, damage
        for name, (steps, values) in found.items() if since else ():
            begins = steps.searchsorted(since)
            found[name] = steps[begins:], values[begins:]
        steps, losses = found[LOSS]
        database.check_gap(steps, max(1, since))
        self._warn_of(damage)
        return found | {LOSS: (steps, in_own_precision(losses, facts))}

    @property
    def measurements(self) -> polars.DataFrame:
        """All measurements except the loss: columns name, step and value (Float64)."""
        import polars as pl

        found = self._read(Database.measurements)
        frames = [
            pl.DataFrame({"name": [name] * len(steps), "step": steps, "value": values})
            for name, (steps, values) in found.items()
        ]
        self._warn_of(self.findings())
        # So that there are columns, and types, where nothing was measured.
        empty = pl.DataFrame(schema={"name": pl.String, "step": pl.Int64, "value": pl.Float64})
        return pl.concat([empty, *frames])

    @property
    def measurement_names(self) -> list[str]:
        """The names of all measurements except the loss."""
        return self._read(Database.measurement_names)

    @property
    def latest_measurements(self) -> dict[str, float]:
        """The newest value of each measurement except the loss, by name."""
        with reading(self._database_path) as database:
            latest = ((name, database.last_measured(name)) for name in database.measurement_names())
            return {name: value for name, value in latest if value is not None}

    def measured(self, name: str) -> dict[int, float]:
        """Return the values of one measurement by step, in order.

        Raises:
            UsageError: there is no such measurement.
        """
        values = self.values_of(name)
        if not values and name not in (known := self.measurement_names):
            raise UsageError(f"{self.name} has no measurement {name!r:.80}; {did_you_mean(name, known)}")
        return values

    def values_of(self, name: str) -> dict[int, float]:
        """Return the values of one measurement by step, in order; empty if there is none of the name."""
        steps, values = self._checked_series(series_of(name))
        return dict(zip(steps.tolist(), values.tolist(), strict=True))

    def _checked_series(self, name: str) -> Series:
        with reading(self._database_path) as database:
            series = database.series(name)
            found = number_findings(database, {name: series}, only=name)
        self._warn_of(found)
        return series

    def table_frame(self, last: int | None = None) -> polars.DataFrame:
        """Return `table_columns` as a frame, null where there is no number."""
        import polars as pl

        return pl.DataFrame(self.table_columns(last))

    def table_columns(self, last: int | None = None) -> dict[str, NDArray[Any]]:
        """Return the table of all or the last steps, if any: its columns by title, as arrays (steps).

        `step`, `loss` (unless the run logs none), in the run of rank 0 the losses of each other rank,
        and each measurement; masked where there is no number.
        """
        found = self._last_numbers(last)
        steps, ranks = found[LOSS][0], self.shown_ranks
        first = int(steps[0]) if len(steps) else 1
        columns: dict[str, Any] = {"step": steps}
        for title, measured, rank, holds in step_columns(self.facts, self.measurement_names, len(ranks)):
            name = LOSS if measured is None else series_of(measured)
            if rank:
                series = ranks[rank].losses_as_rank(first, first + len(steps) - 1)
            elif holds and last is not None:
                series = self._checked_series(name)  # it may have changed long before
            else:
                series = found.get(name, (steps[:0], steps[:0].astype("float64")))
            columns[title] = numbers_at(series, steps, holds=holds)
        return columns

    def losses_as_rank(self, first: int, last: int) -> Series:
        """Return the losses of those of steps `first` to `last` that it took as the rank that it is."""
        import numpy as np

        own = self.known_ranks
        for _, end, trained in self.stretches[:-1]:
            if trained.ranks is None or own is None or trained.ranks.rank != own.rank:
                first = max(first, (end or 0) + 1)  # until then, there was no such rank
        losses = self._read(lambda database: database.losses(first, last))
        return np.arange(first, first + len(losses)), in_own_precision(losses, self.facts)

    @property
    def snapshots(self) -> list[int]:
        """The steps with a state on disk (0: before the first step)."""
        return [row.step for row in self.snapshot_rows()]

    def state_near(
        self, step: int, *, after: int = -1, on_problem: Callable[[str], None] = lambda problem: None
    ) -> State | None:
        """Return the newest readable state on disk up to `step`, or None.

        after: only states later than this one; on_problem: called with the reason if one is unreadable.
        """
        for row in reversed([row for row in self.snapshot_rows() if after < row.step <= step]):
            try:
                return read_snapshot(self.directory, row)
            except RunError as error:
                on_problem(str(error))
        return None

    def losses_between(self, first: int, last: int) -> list[float]:
        """Return the losses of these steps, as far as recorded."""
        found: list[float] = self._read(lambda database: database.losses(max(first, 1), last).tolist())
        return found

    def losses_at(self, steps: Sequence[int]) -> dict[int, float]:
        """Return the losses of existing steps."""
        first = min(steps, default=1)
        losses = self.losses_between(first, max(steps, default=0))
        return {step: losses[step - first] for step in steps}

    def experiment(self, facts: TrainingFacts) -> dict[str, Any] | None:
        """Return the experiment of a stretch with these facts, if it has one."""
        from everystep.experiment.specification import parse

        if (lost := self.lost_experiment(facts)) is not None:
            raise RunError(f"{lost} is missing, though the run was trained by it; put it back")
        name = facts.experiment_file or EXPERIMENT_FILE
        if not self.files(name):
            return None
        try:
            return parse(self.read_file(name), str(self.directory / name))
        except ExperimentError as error:
            raise RunError(str(error)) from None

    def lost_experiment(self, facts: TrainingFacts) -> Path | None:
        """Return the experiment file that a stretch was trained by, if it was removed since."""
        name = facts.experiment_file or EXPERIMENT_FILE
        place = own_path(self.directory, name)
        return place if self.files(name) and not place.is_file() else None

    @property
    def stretches(self) -> list[Stretch]:
        """The ranges of steps that were taken in the same way: one, or more for a fork."""
        facts = self.facts
        found: list[Stretch] = []
        first = 1
        for last, training in (*((e.last, e.training) for e in facts.earlier), (None, facts.training)):
            found.append(Stretch(first, last, training))
            first = (last or 0) + 1
        return found

    def newest_step(self) -> int:
        """Return the number of the newest step, 0 if there is none."""
        return self._read(Database.newest_step)

    def summary(self) -> Summary:
        """Return the run in one line."""
        with reading(self._database_path) as database:
            facts = database.facts()
            found = [*structure_findings(database, facts)]
            damage = damage_text(self.name, found) if found else None
            status = self.status_by(facts)
            return summary_of(self.name, facts, status, damage, database)

    def check(self) -> None:
        """Check that the steps of a finished run are there; warn of other damage.

        As far as that shows without reading all numbers.

        Raises:
            RunError: some are missing; or the directory is not a run, or is unreadable.
        """
        with reading(self._database_path) as database:
            facts = database.facts()
            missing = missing_steps(facts, database.newest_step())
            if missing is not None:
                raise RunError(f"{self.name} is damaged: {missing.problem}; {missing.cure}")
            self._warn_of([*structure_findings(database, facts)])

    def findings(self) -> list[Finding]:
        """Return what is missing or altered among the numbers of the run; reads all of them."""
        edition = fingerprint(self.directory)
        # Of the same edition, what was found still holds: all numbers need not be read again.
        if self._found is None or self._found[0] != edition:
            self._found = edition, self._read(lambda database: self._findings_in(database, {}, 0))
        return self._found[1]

    def _findings_in(self, database: Database, known: dict[str, Series], since: int) -> list[Finding]:
        found = structure_findings(database, database.facts())
        return [*found, *number_findings(database, known, since)]

    def database_findings(self) -> list[Finding]:
        """Return what SQLite itself finds wrong with the whole database."""
        return [Finding(FILE_NAME, problem) for problem in self._read(Database.check_quickly)]

    @property
    def damage(self) -> str | None:
        """Missing or altered numbers of the run, in one line; None if there are none."""
        found = self.findings()
        return damage_text(self.name, found) if found else None

    def _warn_of(self, found: list[Finding]) -> None:
        """Warn, once, if the numbers just read are incomplete, or differ from the recording."""
        if found and not self._has_warned:
            self._has_warned = True
            warnings.warn(DamageWarning(damage_text(self.name, found)), stacklevel=3)

    def read_file(self, name: str) -> bytes:
        """Return the content of a program, of its constants, of data or of changes, as recorded.

        name: within the run.
        """
        return read_file(self.directory, self._row_of(name))

    def _row_of(self, name: str) -> FileRow:
        for row in self.files(name):
            return row
        raise RunError(
            f"{own_path(self.directory, name)} has no digest in {FILE_NAME}: everystep did not write "
            "it, or the database was changed"
        )

    def files(self, names: str = "*") -> list[FileRow]:
        """Return the files with digests, by name. names: a pattern of those to return."""
        return self._read(lambda database: database.files(names))

    def change_files(self) -> dict[int, str]:
        """Return the files of what code between two steps changed, by step."""
        return self._read(Database.changes)

    def change(self, name: str) -> Change:
        """Return what code between two steps changed."""
        tensors, gone = read_tensors(self.directory, self._row_of(name))
        return Change(tensors, [*map(str, gone)] if isinstance(gone, list) else [])

    def data(self, fact: DataFileFacts) -> dict[str, Tensor]:
        """Return the data of the run: x, y, and validation_x and validation_y if it has them."""
        return read_data(self.directory, self._row_of(fact.file), fact)

    def snapshot_rows(self) -> list[SnapshotRow]:
        """Return the database rows of the snapshots, in order: of states that all ranks have."""
        rows = self.own_snapshot_rows()
        if self.common_states is not None:
            return [row for row in rows if row.step in self.common_states]
        if self.facts.trained is None:
            return rows
        stretches, common = self.stretches, set[int]()
        for place, stretch in enumerate(stretches):
            # The ranks of each stretch are other runs, so each is looked at by itself.
            steps = {row.step for row in rows if stretch_at(stretches, row.step) == place}
            for each in self.ranks_of(place) if stretch.facts.ranks is not None and steps else ():
                # A rank may have been killed before it wrote the state that the others have.
                steps &= {row.step for row in each.own_snapshot_rows()}
            common |= steps
        return [row for row in rows if row.step in common]

    def own_snapshot_rows(self) -> list[SnapshotRow]:
        """Return the same, of this rank alone."""
        return self._read(Database.snapshots)

    def repeats(self, first: int, last: int) -> list[Repeat]:
        """Return the rows that repeat any of steps `first` to `last`: see `Database.repeats`."""
        return self._read(lambda database: database.repeats(first, last))

    def located(self, numbers: Iterable[int]) -> PieceIndex[Pieces]:
        """Return where pieces of inputs are: see `Database.contents`."""
        return self._read(lambda database: database.contents(numbers))

    def pieces(self, given: Collection[Given], known: Container[int] = ()) -> dict[int, StoredPiece]:
        """Return the pieces of inputs by number, without dropped ones. known: those not to read."""
        numbers = {number for each in given for number in each.numbers() if number not in known}
        if not numbers:  # opening the database takes as long as a small step
            return {}
        index, found = self.located(numbers), dict[int, StoredPiece]()
        for each in given:
            found |= read_pieces(self.directory, index, each, found)
        return found

    def contents(self, given: Mapping[str, Given]) -> dict[str, Tensor | None]:
        """Return the inputs of a step, on the CPU; None for dropped ones."""
        pieces = self.pieces(given.values())
        found = ((name, each, joined(each, pieces)) for name, each in given.items())
        return {n: None if content is None else as_tensor(each, content) for n, each, content in found}

    def _read(self, read: Callable[[Database], _Found]) -> _Found:
        return read_from(self._database_path, read)
