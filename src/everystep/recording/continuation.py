"""Continuation: what a run has already, when its training goes on.

Training begins at a snapshot. The steps after it that were recorded before are taken again, and compared
with the recording. Nothing of the run changes until a step is taken that it does not have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everystep.errors import RunError
from everystep.recording.contents import unpacked
from everystep.recording.database import Database, Repeat

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
        self._name = directory.resolve().name
        self._database = database
        self._facts = dict(facts)
        self._measurements: list[tuple[str, int, float]] = []

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Keep facts for later."""
        self._facts |= facts

    def measurements(self, rows: Measurements) -> None:
        """Keep measurements for later."""
        self._measurements += rows

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
            recorded = math.nan if expected is None else expected
            if loss != recorded and not (math.isnan(loss) and math.isnan(recorded)):
                raise self.differs(step, f"the loss is {loss!r}, but {recorded!r} was recorded")
        return first + len(again), [*losses[len(again) :]]

    def new_repeats(self, rows: Sequence[Repeat]) -> list[Repeat]:
        """Compare what recorded steps of a loop were given; return the rows of the others.

        Raises:
            RunError: something differs.
        """
        again = [row for row in rows if row.step <= self.recorded]
        if again:
            known = self._database.repeats(again[0].step, again[-1].step)
            for row, before in zip(again, known, strict=True):
                self._compare(row, before)
        return [*rows[len(again) :]]

    def _compare(self, row: Repeat, before: Repeat) -> None:
        """Compare the batch; of other inputs, those that both have: a watch in full has fewer."""
        now, known = (unpacked(each.inputs, f"step {row.step}") or {} for each in (row, before))
        given, recorded = _batch(now), _batch(known)
        is_same = all(given[name] == recorded[name] for name in given.keys() & recorded.keys())
        if now.get("nesting") != known.get("nesting") or not is_same:
            raise self.differs(row.step, "the batch is not the recorded one")
        digests = now.get("digests", {})
        other = [n for n, digest in known.get("digests", {}).items() if digests.get(n, digest) != digest]
        if other:
            raise self.differs(row.step, f"it leaves another state ({shortened(other)})")

    def differs(self, step: int, problem: str) -> RunError:
        """Return the error of a step that is not as recorded when it is taken again."""
        cure = "Restore the code, the data and the versions of the training"
        if self._is_loop:
            cure += (
                "; pass what the loop carries from step to step (counters, lists, its own generators) "
                "as parts, or count from recording.step_count"
            )
        return RunError(
            f"{self._name} cannot be resumed exactly: when step {step} is taken again, {problem}. The "
            f"run is as it was. {cure}. Or resume with --anyway (anyway=True), which discards the "
            "recorded steps after the snapshot"
        )


def _batch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a step was given besides random generators, which depend on what came before."""
    given = inputs.get("given", {})
    return {name: each for name, each in given.items() if name.startswith(("batch/", "input/"))}


def shortened(names: Sequence[str]) -> str:
    """Return the first few names of tensors, without their kinds."""
    shown = ", ".join(name.partition("/")[2] for name in names[:_MOST_NAMED])
    return shown + (", ..." if len(names) > _MOST_NAMED else "")
