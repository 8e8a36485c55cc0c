"""Sweeps: a training with many settings, each a separate run, and how the runs ended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everystep.bounded import parse_json, read_regular
from everystep.errors import EverystepError, Fault, RunError
from everystep.experiment.metrics import METRICS, VALIDATION, metric_of
from everystep.recording.directories import is_run
from everystep.recording.files import write_whole
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.summary import Summary
from everystep.replay.shown import Shown
from everystep.training.interrupt import REASONS

if TYPE_CHECKING:
    import polars
    from plotnine import ggplot

__all__ = ["Sweep", "SweepRun", "note_settings", "sweep_of", "sweep_run"]

#: Bytes of the file with the settings of all runs.
_LARGEST = 100_000_000


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    name: within the sweep; run: None if it was not begun; problem: why some of its steps are missing;
    best: the best value of the sweep's metric.
    """

    name: str
    settings: Mapping[str, Any]
    run: RecordedRun | None = field(default=None, repr=False)
    summary: Summary | None = None
    problem: str | None = None
    best: float | None = None

    @property
    def status(self) -> str:
        """As of a run; or `failed` or `not begun`, if there is none."""
        if self.summary is None or (self.problem and self.summary.status == "finished"):
            return "failed" if self.problem else "not begun"
        return self.summary.status

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to continue: it is finished, or stopped by a condition of its own."""
        # A run that the user stopped is not over, but one that has stopped itself, as at a NaN, is.
        if self.run is None or self.status != "stopped":
            return self.status == "finished"
        return self.run.facts.reason not in REASONS.values()


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """The runs of a sweep, the best first: by the metric, or else by the last loss.

    metric: the name of a measurement that the runs have, None if they have none.
    """

    directory: Path
    metric: str | None
    cases: tuple[SweepRun, ...]

    @property
    def runs(self) -> list[Any]:
        """The runs that were begun, the best first."""
        return [case.run for case in self.cases if case.run is not None]

    @property
    def is_finished(self) -> bool:
        """Whether all runs are finished, or stopped by a condition of their own that is not a NaN."""
        return all(
            case.status == "finished"
            or (case.is_over and case.summary is not None and case.summary.nonfinite_step is None)
            for case in self.cases
        )

    def table(self) -> polars.DataFrame:
        """Return a row for each run, the best first: its settings, and how it ended."""
        import polars as pl

        rows = []
        for case in self.cases:
            about = case.summary._asdict() if case.summary else {}
            known = {name: about.get(name) for name in ("first_loss", "last_loss", "seconds")}
            found = {"status": case.status, **known, f"best {self.metric}": case.best}
            rows.append({"run": case.name, **case.settings, **found, "problem": case.problem})
        return pl.DataFrame(rows, strict=False)

    def plot(self, log: bool = False) -> ggplot:
        """Return the losses of all runs: colours for one setting, panels for another.

        log: a log10 axis, as in `Run.plot`.
        """
        assert self.view is not None
        return self.view.plot(self, log=log)


def sweep_run(
    open_run: Callable[[Path], RecordedRun],
    directory: Path,
    settings: Mapping[str, Any],
    problem: str | None = None,
) -> SweepRun:
    """Return a run of a sweep as it is on disk. problem: why its process failed."""
    found = SweepRun(directory.name, settings, problem=problem)
    try:
        if not is_run(directory):
            return found
        run = open_run(directory)
        return replace(found, run=run, summary=run.summary(), problem=problem or run.facts.reason)
    except EverystepError as error:
        return replace(found, problem=problem or str(error))


def note_settings(file: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Note the settings of each run, and check that the existing runs were trained with them.

    runs: the settings by the name of the run.

    Raises:
        RunError: the sweep has a run of that name with different settings; lists what differs.
    """
    # As they are read back later: JSON turns tuples into lists.
    wanted = {name: json.loads(json.dumps(settings, default=str)) for name, settings in runs.items()}
    try:
        noted = parse_json((read_regular(file, _LARGEST) if file.exists() else b"") or "{}")
        before = {name: dict(settings) for name, settings in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise RunError(f"{file} cannot be read: the sweep, which needs another directory") from None
    faults = []
    for name, now in wanted.items():
        # A run that was not begun may still have other settings.
        known = before.get(name, now) if is_run(file.parent / name) else now
        for path in sorted({*known, *now}):
            if known.get(path) != now.get(path):
                pair = f"{known.get(path)!s:.80} | {now.get(path)!s:.80}"
                faults.append(Fault(name, f"was trained with different settings: {path} {pair}"))
    if faults:
        raise RunError(faults, "the sweep, which needs another directory")
    write_whole(file, json.dumps(before | wanted).encode())


def sweep_of(directory: Path, cases: Iterable[SweepRun]) -> Sweep:
    """Return a sweep of these runs."""
    cases = [*cases]
    measured = {name for case in cases if case.run for name in case.run.measurement_names}
    # By metric first: accuracy on validation rows, accuracy on all, r2 on validation rows, ...
    names = (f"{kind}{metric}" for metric in METRICS for kind in (VALIDATION, ""))
    metric = next((name for name in names if name in measured), None)
    about = metric_of(metric or "")
    # So that the smallest is the best, for every metric.
    sign = -1 if about is not None and about.better == "up" else 1

    def best(case: SweepRun) -> float | None:
        values = {} if case.run is None or metric is None else case.run.values_of(metric)
        return min(filter(math.isfinite, values.values()), key=lambda each: sign * each, default=None)

    def order(case: SweepRun) -> tuple[float, float]:
        numbers = case.best and sign * case.best, case.summary and case.summary.last_loss
        # Runs without a number come last.
        one, other = (math.inf if n is None or math.isnan(n) else n for n in numbers)
        return one, other

    found = [replace(case, best=best(case)) for case in cases]
    return Sweep(directory, metric, tuple(sorted(found, key=order)))
