"""Reads a run. Imports no torch, unless parameters are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from everystep.errors import RunError, did_you_mean
from everystep.recording.database import FILE_NAME, LOCK_NAME, SnapshotRow, reading
from everystep.recording.snapshots import read_snapshot

if TYPE_CHECKING:
    import polars
    from torch import Tensor

__all__ = ["RUNS", "RecordedRun", "Summary", "find_run", "find_runs"]

RUNS = Path("runs")


class Summary(NamedTuple):
    """A run in one line. Losses are None where no step was taken."""

    name: str
    directory: Path
    status: str
    steps: int
    planned: int
    first_loss: float | None
    last_loss: float | None
    started: datetime


class RecordedRun:
    """A run on disk. Everything is read when it is asked for, also while training goes on.

    Raises:
        RunError: the directory is no run, or one that cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        with reading(self._database_path):
            pass

    @property
    def name(self) -> str:
        """The name of the run's directory; bytes in it that are no text are replaced."""
        return self.directory.resolve().name.encode("utf-8", "replace").decode()

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that is known besides numbers by step: status, numerics, versions, times."""
        with reading(self._database_path) as database:
            return database.facts()

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` (by the user), `failed`, or `interrupted` (killed)."""
        return self._status(self.facts)

    @property
    def losses(self) -> polars.DataFrame:
        """The loss of every step: columns step (Int64) and loss, in the loss's own precision."""
        return self.last_losses(None)

    def last_losses(self, count: int | None) -> polars.DataFrame:
        """Return the losses of the last `count` steps, or of all."""
        import polars as pl

        with reading(self._database_path) as database:
            rows = database.losses(count)
            dtype = database.facts().get("loss.dtype")
        frame = pl.DataFrame(
            rows, schema={"step": pl.Int64, "loss": pl.Float64}, orient="row"
        ).with_columns(pl.col("loss").fill_null(math.nan))
        return frame if dtype == "float64" else frame.cast({"loss": pl.Float32})

    @property
    def measurements(self) -> polars.DataFrame:
        """What was measured besides the loss: columns name, step and value (Float64)."""
        import polars as pl

        with reading(self._database_path) as database:
            rows = database.measurements()
        schema = {"name": pl.String, "step": pl.Int64, "value": pl.Float64}
        frame = pl.DataFrame(rows, schema=schema, orient="row")
        return frame.with_columns(pl.col("value").fill_null(math.nan))

    def table_frame(self, last: int | None = None) -> polars.DataFrame:
        """Return the losses of all or the last steps with a column for each measurement.

        A step without that measurement has null there. What was measured of state 0, before the
        first step, has no row.
        """
        import polars as pl

        frame = self.last_losses(last)
        measured = self.measurements
        for name in measured["name"].unique(maintain_order=True):
            values = measured.filter(pl.col("name") == name).select("step", pl.col("value").alias(name))
            frame = frame.join(values, on="step", how="left", maintain_order="left")
        return frame

    @property
    def snapshots(self) -> list[int]:
        """The steps (0 is before the first) whose state is on disk."""
        return [row.step for row in self._snapshot_rows()]

    def parameters(self, step: int) -> dict[str, Tensor]:
        """Return the model's parameters after `step` (0: before the first), as its state_dict.

        Negative steps count from the newest snapshot: -1 is the newest.

        Raises:
            RunError: there is no snapshot of that state.
        """
        rows = {row.step: row for row in self._snapshot_rows()}
        if step < 0 and -step <= len(rows):
            step = sorted(rows)[step]
        if step not in rows:
            known = ", ".join(map(str, sorted(rows))) or "none"
            raise RunError(f"{self.name} has no snapshot of state {step}; it has: {known}")
        directory = self.directory / rows[step].directory
        try:
            return read_snapshot(directory)[0]
        except OSError as error:
            raise RunError(f"{directory} cannot be read: {error}") from None

    def summary(self) -> Summary:
        """Return the run in one line."""
        with reading(self._database_path) as database:
            facts = database.facts()
            count, first, last = database.ends()
        nan = math.nan if count else None
        return Summary(
            name=self.name,
            directory=self.directory,
            status=self._status(facts),
            steps=count,
            planned=facts.get("steps", count),
            first_loss=nan if first is None else first,
            last_loss=nan if last is None else last,
            started=_time_of(facts.get("started"), self._database_path),
        )

    def _status(self, facts: dict[str, Any]) -> str:
        status: str = facts.get("status", "interrupted")
        return "interrupted" if status == "running" and not self._is_being_written() else status

    def _is_being_written(self) -> bool:
        lock = FileLock(self.directory / LOCK_NAME)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:  # a place that can only be read is not being written
            return False
        lock.release()
        return False

    def _snapshot_rows(self) -> list[SnapshotRow]:
        with reading(self._database_path) as database:
            return database.snapshots()

    @property
    def _database_path(self) -> Path:
        return self.directory / FILE_NAME


def _time_of(text: str | None, path: Path) -> datetime:
    """Return when the run was started; its file's time where it is just being created."""
    return datetime.fromisoformat(text) if text else datetime.fromtimestamp(path.stat().st_mtime, UTC)


def find_run(name: str | Path, runs: Path = RUNS) -> Path:
    """Return the directory of a run: a path, or a name under `runs`.

    Raises:
        RunError: there is none; names the nearest.
    """
    for candidate in (Path(name), runs / name):
        if (candidate / FILE_NAME).is_file():
            return candidate
    if Path(name).exists():
        raise RunError(f"{name} is no run: it has no {FILE_NAME}")
    known = [path.parent.name for path in runs.glob(f"*/{FILE_NAME}")]
    cure = did_you_mean(str(name), known) if known else f"{runs}/ has no runs; everystep train"
    raise RunError(f"no run {str(name)!r}; {cure or 'everystep runs lists them'}")


def find_runs(directory: str | Path = RUNS) -> Iterator[Path]:
    """Yield the directories of all runs directly in `directory`, sorted by name.

    Raises:
        RunError: the directory does not exist.
    """
    if not Path(directory).is_dir():
        raise RunError(f"{directory} is no directory; everystep train makes the first run")
    yield from sorted(path.parent for path in Path(directory).glob(f"*/{FILE_NAME}"))
