"""Continuation: what a run has already, when its training goes on.

Training begins at a snapshot. The steps after it that were recorded before are taken again, and compared
with the recording. Nothing of the run changes until a step is taken that it does not have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everystep.bounded import MOST_STEPS
from everystep.errors import RunError
from everystep.recording.contents import unpacked
from everystep.recording.database import Database, Repeat, cut
from everystep.recording.notice import say

__all__ = ["Continuation", "shortened"]

#: Tensors that a message names.
_MOST_NAMED = 3
Measurements = Sequence[tuple[str, int, float]]


class Continuation:
    """Compares steps that are taken again, and keeps what is to be written with the first new step.

    Args:
        directory: of the run.
        database: of the run.
        facts: to be written with the first new step, by name.

    recorded: the newest step that the run has; is_over: whether a new step was written.
    """

    def __init__(self, directory: Path, database: Database, facts: Mapping[str, Any]) -> None:
        self.recorded = database.newest_step()
        self.is_over = False
        before = database.facts()
        self._before = {name: getattr(before, name) for name in ("status", "reason", "finished")}
        self._is_loop = before.trained is not None and before.trained.loop is not None
        self._fork = before.fork
        self._name = directory.resolve().name
        self._database = database
        self._facts = dict(facts)
        self._measurements: list[tuple[str, int, float]] = []
        self._recorded_values: dict[tuple[str, int], float | None] | None = None
        self._has_differed = False

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Keep facts for later."""
        self._facts |= facts

    def measurements(self, rows: Measurements) -> None:
        """Keep measurements for later, but for those that the run has; say so where one differs."""
        again = [row for row in rows if row[1] <= self.recorded]
        if again and self._recorded_values is None:
            known = self._database.measurements(min(step for _, step, _ in again))
            self._recorded_values = {(name, step): value for name, step, value in known}
        for row in rows:
            place = row[:2]
            if self._recorded_values is None or place not in self._recorded_values:
                self._measurements.append(row)
            elif not self._has_differed and not _is_same(row[2], self._recorded_values[place]):
                self._has_differed = True
                say(self._other_measurement(*row))

    def _other_measurement(self, name: str, step: int, value: float) -> str:
        assert self._recorded_values is not None
        cure = "pass what the loop carries from step to step as parts, or later values will differ, too"
        return (
            f"when step {step} of {self._name} is repeated, {name} is {value!r}; the recorded "
            f"{self._recorded_values[name, step]!r} is kept. Unless it is a time or the like, {cure}"
        )

    def begin(self) -> None:
        """Write what was kept, in a transaction: the first new step is about to be written."""
        self.is_over = True
        self._database.write_facts(self._facts)
        self._database.write_measurements(self._measurements)
        self._facts, self._measurements = {}, []

    def last_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the facts to close the run with: of a failure before a new step, those from before."""
        if self.is_over or facts.get("status") != "failed":
            return dict(facts)
        return dict(self._before)

    def new_losses(self, first: int, losses: Sequence[float]) -> tuple[int, list[float]]:
        """Compare the losses of steps that were recorded; return the first new step, and the others.

        Raises:
            RunError: one differs.
        """
        again = [*losses[: max(0, self.recorded - first + 1)]]
        known = self._database.losses_between(first, first + len(again) - 1) if again else []
        for loss, (step, expected) in zip(again, known, strict=True):
            if not _is_same(loss, expected):
                recorded = math.nan if expected is None else expected
                raise self.differs(step, f"the loss is {loss!r}, but {recorded!r} was recorded")
        return first + len(again), [*losses[len(again) :]]

    def new_repeats(self, rows: Sequence[Repeat]) -> list[Repeat]:
        """Compare what recorded steps of a loop were given; return the rows of the other steps.

        Raises:
            RunError: something differs.
        """
        again = cut(rows, 1, self.recorded)
        known = self._database.repeats(again[0].step, again[-1].last) if again else []
        for row in again:
            for before in cut(known, row.step, row.last):
                self._compare(row._replace(step=before.step), before)
        return cut(rows, self.recorded + 1, MOST_STEPS)

    def _compare(self, row: Repeat, before: Repeat) -> None:
        """Compare the batch; of other inputs, those that both have: a watch in full has fewer."""
        now, known = (unpacked(each.inputs, f"step {row.step}") or {} for each in (row, before))
        given, recorded = (each.get("given", {}) for each in (now, known))
        others = [name for name in given.keys() & recorded.keys() if given[name] != recorded[name]]
        if now.get("nesting") != known.get("nesting") or any(n.startswith("batch/") for n in others):
            raise self.differs(row.step, "the batch is not the recorded one")
        if any(name.startswith("input/") for name in others):
            raise self.differs(
                row.step,
                "it reads different numbers from a tensor that is neither of its batch nor of a part",
            )
        digests = now.get("digests", {})
        other = [n for n, digest in known.get("digests", {}).items() if digests.get(n, digest) != digest]
        if other:
            raise self.differs(row.step, f"it leaves a different state ({shortened(other)})")

    def differs(self, step: int, problem: str) -> RunError:
        """Return the error of a step that is not as recorded when it is taken again."""
        if self._fork is not None and step <= self._fork.at:
            return RunError(
                f"{self._fork.parent} cannot be forked at step {self._fork.at}: when step {step} is "
                f"repeated, {problem}. The loop takes the steps from the newest snapshot to the fork "
                f"again: change it only once recording.step_count is {self._fork.at}, or fork at a step "
                "with a snapshot"
            )
        cure = "Restore the code, the data and the versions of the training"
        if self._is_loop:
            cure += (
                "; pass what the loop carries from step to step (counters, lists, its own generators) "
                "as parts, or count from recording.step_count"
            )
        return RunError(
            f"{self._name} cannot be resumed exactly: when step {step} is repeated, {problem}. The "
            f"run is as it was. {cure}. Or resume with --anyway (anyway=True), which discards the "
            "recorded steps after the snapshot"
        )


def _is_same(number: float, recorded: float | None) -> bool:
    """Tell whether a number is the recorded one; None means NaN."""
    return math.isnan(number) if recorded is None else number == recorded


def shortened(names: Sequence[str]) -> str:
    """Return the first few names of tensors, without their kinds."""
    shown = ", ".join(name.partition("/")[2] for name in names[:_MOST_NAMED])
    return shown + (", ..." if len(names) > _MOST_NAMED else "")
