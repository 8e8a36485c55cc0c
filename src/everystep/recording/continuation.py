"""Continuation: the data that a run already has when its training continues, or inherits as a fork.

Training begins at a snapshot. Steps that were recorded after it are repeated, and compared with the
recording. The run does not change before the first new step.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from everystep.bounded import MOST_STEPS
from everystep.errors import RunError, named, say
from everystep.recording.blocks import LOSS, same_number, series_of
from everystep.recording.contents import inputs_of
from everystep.recording.database import FILE_NAME, Database, Repeat, cut, reading
from everystep.recording.facts import EarlierFacts
from everystep.recording.files import (
    BATCHES,
    CHANGES,
    EXPERIMENT_FILE,
    PROGRAMS,
    SNAPSHOTS,
    FileRow,
    batch_file,
    remove,
    state_folder,
    take_file,
)
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.snapshots import SnapshotPlan, read_snapshot, snapshots_in

__all__ = ["Continuation", "inherit", "tidy"]

Measurements = Sequence[tuple[str, int, float]]


# A run of 1,000 steps was killed; its newest snapshot is of step 960. The resumed training takes steps
# 961 to 1,000 again, and each must be as recorded. Only with step 1,001 are its facts, and what it has
# measured meanwhile, written: if a step differs, the run stays as it was.
class Continuation:
    """Compares repeated steps, and keeps what will be written with the first new step.

    facts: to be written with the first new step, by name; recorded: the newest step that the run has.
    """

    def __init__(self, database: Database, facts: Mapping[str, Any]) -> None:
        self.recorded = database.newest_step()
        before = database.facts()
        # If a repeated step differs, the run is left as it was, which includes how it had ended.
        self._before = {name: getattr(before, name) for name in ("status", "reason", "finished")}
        self._is_loop = before.trained is not None and before.trained.loop is not None
        self._fork = before.fork
        self._name = database.directory.resolve().name
        self._database = database
        self.facts = dict(facts)
        self._measured: dict[tuple[str, int], float] = {}

    def keep(self, rows: Measurements, facts: Mapping[str, Any]) -> None:
        """Keep facts and measurements."""
        self.facts |= facts
        # A name may be logged in a step, and again after it: the last value counts.
        self._measured |= {(name, step): value for name, step, value in rows}

    def new_measured(self) -> Measurements:
        """Return the measurements that the run does not have; report the first that differs."""
        new, has_differed = [], False
        for (name, step), value in self._measured.items():
            known: list[float] = []
            if step <= self.recorded:
                known = self._database.series(series_of(name), step, step)[1].tolist()
            if not known:
                new.append((name, step, value))
            elif not has_differed and not same_number(value, known[0]):
                has_differed = True
                say(
                    f"when step {step} of {self._name} is repeated, {name} is {value!r}; the recorded "
                    f"{known[0]!r} is kept. Unless it is a time or the like, pass what the loop carries "
                    "from step to step as parts, or later values will differ, too"
                )
        return new

    def at_end(self, facts: Mapping[str, Any]) -> tuple[Measurements, Mapping[str, Any]]:
        """Return the measurements, such as of its last epoch, and facts to close a run with."""
        # A run that could not be continued has not failed: what it was before still holds.
        is_failed = facts.get("status") == "failed"
        return ((), self._before) if is_failed else (self.new_measured(), facts)

    def new_losses(self, first: int, losses: Sequence[float]) -> tuple[int, list[float]]:
        """Compare the losses of steps that were recorded; return the first new step, and the others.

        Raises:
            RunError: one differs.
        """
        again = [*losses[: max(0, self.recorded - first + 1)]]
        known = self._database.series(LOSS, first, first + len(again) - 1)[1].tolist()
        for step, (loss, recorded) in enumerate(zip(again, known, strict=True), start=first):
            if not same_number(loss, recorded):
                raise self.differs(step, f"the loss is {loss!r}, but {recorded!r} was recorded")
        return first + len(again), [*losses[len(again) :]]

    def new_repeats(self, rows: Sequence[Repeat]) -> list[Repeat]:
        """Compare the inputs of recorded steps of a loop; return the rows of the new steps.

        Raises:
            RunError: something differs.
        """
        again = cut(rows, 1, self.recorded)
        known = self._database.repeats(again[0].step, again[-1].last) if again else []
        for row in again:
            # Either side may have several steps in a row: those of each known row are compared at once.
            for before in cut(known, row.step, row.last):
                self._compare(row._replace(step=before.step), before)
        return cut(rows, self.recorded + 1, MOST_STEPS)

    def _compare(self, row: Repeat, before: Repeat) -> None:
        """Compare the batch; and other inputs, if the step has as many, of the same sizes.

        The first step of a resumed loop may make what later ones only read, such as a mask: others then
        have its name.
        """
        now, known = (inputs_of(each.inputs, f"step {row.step}") for each in (row, before))
        if before.program is None and known == known.draws():  # the step was not kept
            return
        both = now.given.keys() & known.given.keys()
        others = [name for name in both if now.given[name].content != known.given[name].content]
        plain = {each.plain_batch for each in (now, known)} - {None}
        if any(name.startswith("batch/") for name in others) or len(plain) > 1:
            raise self.differs(row.step, "the batch is not the recorded one")
        here, there = (
            {name: each.content for name, each in side.given.items() if name.startswith("input/")}
            for side in (now, known)
        )
        sizes = ({name: content[:2] for name, content in side.items()} for side in (here, there))
        if operator.eq(*sizes) and here != there:
            raise self.differs(
                row.step,
                "it reads different numbers from a tensor that is neither of its batch nor of a part",
            )
        digests = known.digests.items()
        other = [n.partition("/")[2] for n, digest in digests if now.digests.get(n, digest) != digest]
        if other:
            raise self.differs(row.step, f"it leaves a different state ({named(other)})")

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
            import torch

            scripted: Any = torch.jit._state._python_cu  # torch declares no results of its methods
            if scripted.get_functions():
                cure += (
                    "; functions of torch.jit.script compute with different results after their first "
                    "calls in a process: set PYTORCH_JIT=0 from the start of a training"
                )
        return RunError(
            f"{self._name} cannot be resumed exactly: when step {step} is repeated, {problem}. The "
            f"run is unchanged. {cure}. Or resume with --force (force=True), which discards the "
            "recorded steps after the snapshot"
        )


def inherit(database: Database, plan: SnapshotPlan, parent: RecordedRun, at: int) -> dict[str, Any]:
    """Take over a parent's recording up to state `at`; hard-link files if possible.

    The state itself is taken over from a loop alone: other forks start with their own. Runs in a
    transaction of the database. Returns the facts of the fork that follow from the parent, by name.

    Raises:
        OSError: a file cannot be linked or copied.
        RunError: the parent refers to files that are not its own.
        RecordingError: the database cannot be written.
    """
    with reading(parent.directory / FILE_NAME) as known:
        database.take_numbers(known, at)
        files = known.files()
        repeats, contents = cut(known.repeats(1, at), 1, at), known.all_contents()
    database.enter(repeats)
    if repeats:
        database.enter(contents)
        for number in {place.file for place in contents}:
            take_file(parent.directory, batch_file(number), database.directory)
    # A fork of a loop begins with a snapshot of its parent; other forks write their own. The last
    # snapshot includes changes after the loop's last step.
    is_loop = parent.facts.training.loop is not None
    begins_there = is_loop and (at < parent.newest_step() or not at)
    states = [row for row in snapshots_in(files) if row.step < at + begins_there]
    # Changes of the parent's loop before its next step are up to the loop of the fork.
    last_change = at - is_loop
    experiments = {row.name: row for row in files if row.name.endswith(".toml")}
    # Experiments get names of their own in a fork, which may have one of each stretch.
    taken = [row for row in files if row.step is None and row.name not in experiments]
    taken += [row for row in files if row.name.startswith(CHANGES) and (row.step or 0) <= last_change]
    taken += [file for state in states for file in state.files]
    for file in taken:
        take_file(parent.directory, file.name, database.directory)
    database.enter(taken)
    plan.kept |= {state.step: state.size for state in states}
    facts = parent.facts
    return facts.up_to(at) | {
        "earlier": tuple(_earlier_facts(database, parent, at, experiments)),
        "measured": facts.measured,
        "loss_dtype": facts.loss_dtype,
        "data_file": facts.training.data_file,
    }


def _earlier_facts(
    database: Database, parent: RecordedRun, at: int, experiments: Mapping[str, FileRow]
) -> Iterator[EarlierFacts]:
    """Yield how the parent's steps up to `at` were trained; take over the experiments that they name.

    experiments: the files of the parent, by name.
    """
    for stretch in parent.stretches:
        if stretch.first > at:
            continue
        training = stretch.facts
        experiment = experiments.get(training.experiment_file or EXPERIMENT_FILE)
        if experiment is not None:
            name = f"experiment-{stretch.first}.toml"
            take_file(parent.directory, experiment.name, database.directory, name)
            database.enter([experiment._replace(name=name)])
            training = training.model_copy(update={"experiment_file": name})
        yield EarlierFacts(last=min(at, stretch.last or at), training=training)


def tidy(database: Database, recorded: int, at: int, *, changes_again: bool = False) -> None:
    """Remove files that belong to no recorded step, temporary files, and unreadable snapshots.

    recorded: the newest step that stays; at: the state that the training continues from, which writes
    later ones again; changes_again: remove what code changed after the newest step: others may change
    other things.
    """
    removed = []
    for row in database.snapshots():
        try:
            if row.step > at:
                read_snapshot(database.directory, row)
            if row.step > recorded:
                removed.append(row.step)
        except RunError:
            removed.append(row.step)
    changes = [file for step, file in database.changes().items() if step > recorded - changes_again]
    with database.removing([*map(state_folder, removed), *changes]):
        database.forget_after(recorded)
    known = {row.name for row in database.files()}
    known |= {row.directory for row in database.snapshots()}
    known |= {batch_file(place.file) for place in database.all_contents()}
    # Those at the top are of a process that was killed.
    for pattern in (".*.tmp", *(f"{folder}/*" for folder in (SNAPSHOTS, CHANGES, PROGRAMS, BATCHES))):
        for path in database.directory.glob(pattern):
            if path.relative_to(database.directory).as_posix() not in known:
                remove(path)
