"""Where the run of a recorded loop begins: new, at a snapshot of a run that is resumed, or as a fork."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from everystep.errors import RunError, say
from everystep.recording.contents import given_of, inputs_of
from everystep.recording.facts import Facts, ForkFacts, TrainingFacts
from everystep.recording.keep import Keep
from everystep.recording.recorded_run import RecordedRun, stretch_at
from everystep.recording.recorder import Recorder
from everystep.step.parts import Parts
from everystep.step.parts_state import AtFirst, PartsState
from everystep.step.state import State
from everystep.training.agreement import Agreement, run_to_continue, run_to_fork
from everystep.training.batch import unnested
from everystep.training.batch_sources import BatchSources
from everystep.training.description import facts_of_loop
from everystep.training.loader_position import Drawn, LoaderPosition, Recorded
from everystep.training.loop_writer import LoopWriter
from everystep.training.resumed import (
    accepted_changes,
    check_rules,
    check_taken_by_loop,
    facts_resumed,
    resume_facts,
)
from everystep.training.writer import now

__all__ = ["LoopStart"]


class _Ended(NamedTuple):
    """The recording that ended last in this process, which a notebook may continue with its objects.

    run: its directory; left: the facts of its parts at the end; at_first: see `PartsState`; noted: what
    batches were drawn from.
    """

    run: Path
    left: TrainingFacts
    at_first: Mapping[str, AtFirst]
    noted: BatchSources


_ended: list[_Ended] = []


@dataclass(frozen=True)
class LoopStart:
    """A request: the run that a recorded loop begins, or the one that it continues.

    directory: of a new run, None for the next free one; snapshot_budget, batch_budget: bytes that the
    run may keep; keep: the steps, None for all; advanced: called with a step that was written, and the
    losses from it on; resumed: the run to continue; fork: the run to make a fork of, and the step after
    which it begins; is_accepted: continue although something changed; user_facts: those of the user.
    """

    directory: Path | None
    snapshot_budget: float
    batch_budget: float
    keep: Keep | None
    advanced: Callable[[int, Sequence[float]], None] | None = None
    resumed: RecordedRun | None = None
    fork: tuple[RecordedRun, int] | None = None
    is_accepted: bool = False
    user_facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def earlier(self) -> RecordedRun | None:
        """The run that is continued, or that this one is a fork of."""
        return self.fork[0] if self.fork is not None else self.resumed

    def begin(self, parts: Parts, place: LoaderPosition) -> LoopWriter:
        """Begin the run, or bring the parts to its newest snapshot; return what writes it.

        Raises:
            RunError: the run or the parts are other ones.
        """
        agreement = Agreement()
        agreement.check(self._about(parts))
        if self.fork is not None:
            parent, at = self.fork
            return self._forked(run_to_fork(parent, at, agreement), at, parts, place, agreement)
        if self.resumed is not None:
            run = run_to_continue(self.resumed, agreement)
            return self._continued(run, parts, place, agreement)
        directory = agreement.directory(self.directory, "loop")
        whole = PartsState(parts)
        # Both have the random generators as they are now, and nothing between them draws.
        place.begin()
        beginning = whole.snapshot(0)
        facts = Facts(
            name=directory.name, started=now(), steps=0, trained=facts_of_loop(parts), **self.user_facts
        )
        recorder = Recorder(directory, facts, self.snapshot_budget, **self._kept)
        recorder.snapshot(beginning)
        return LoopWriter(recorder, 0, facts, whole, place, self.advanced)

    def note_end(self, run: Path, writer: LoopWriter, place: LoaderPosition) -> None:
        """Note how a recording has left its parts. run: its directory."""
        _ended[:] = [
            _Ended(run.resolve(), facts_of_loop(writer.parts), writer.whole.at_first, place.noted)
        ]

    def _about(self, parts: Parts) -> dict[str, Any]:
        """Return what must be equal on all ranks."""
        return {
            "the run": None if self.directory is None else str(self.directory),
            "the run to resume": None if self.resumed is None else self.resumed.directory.name,
            "the run to fork": None if self.fork is None else str(self.fork[0].directory.resolve()),
            "the step to fork at": None if self.fork is None else self.fork[1],
            "keep": repr(self.keep),
            "parts": [*parts.named],
            "everystep": version("everystep"),
            "torch": torch.__version__,
        }

    @property
    def _kept(self) -> dict[str, Any]:
        return {"batch_budget": self.batch_budget, "keep": self.keep}

    def _forked(
        self, parent: RecordedRun, at: int, parts: Parts, place: LoaderPosition, agreement: Agreement
    ) -> LoopWriter:
        """Make a run of a parent's steps up to `at`, and continue it.

        Its loop repeats the steps from a snapshot to `at`, as a resumed loop does: only a snapshot holds
        everything that a loop carries.
        """
        _check_is_loop(parent, "fork it with everystep fork")
        if at > (newest := min(each.newest_step() for each in parent.ranks)):
            raise RunError(f"{parent.name} has no step {at}: it has {newest:,} steps")
        state = parent.state_near(newest)
        # Any state of the parent shows whether it has places in its batches.
        if at and (state is None or _goal(parent, state) is None):
            raise RunError(
                f"{parent.name} marks its steps with recording.step, so nothing shows what its loop "
                "does between them; fork loops over recording.steps(batches), or fork it at step 0, "
                f"with the change once recording.step_count is {at}"
            )
        trained = facts_of_loop(parts)
        fork = ForkFacts(parent=parent.name, directory=str(parent.directory), at=at, changed={})
        directory = agreement.directory(self.directory, f"{parent.name}-fork", parent)
        try:
            with agreement.together():
                begin = parent.state_near(0)
                if begin is not None:
                    count = f"once recording.step_count is {at}"
                    cure = f"pass the parts as they were then, and change what should differ {count}"
                    PartsState(parts).check_begins_as(begin, cure)
                facts = Facts(name=directory.name, started=now(), steps=at, trained=trained, fork=fork)
                # First a whole run of the parent's steps, which is then resumed as any other.
                Recorder(directory, facts, self.snapshot_budget, parent, at, self.batch_budget).finish(
                    {}
                )
            run = agreement.continued(RecordedRun(directory))
            return self._continued(run, parts, place, agreement)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)  # made just now, and not started
            raise

    def _continued(
        self, run: RecordedRun, parts: Parts, place: LoaderPosition, agreement: Agreement
    ) -> LoopWriter:
        """Continue a run from its second newest snapshot, if there is one.

        The state at the newest is then compared, which shows that no part of the loop is missing.
        """
        is_new = self.fork is not None  # and has just been made
        # A new fork has nothing to discard: its steps up to the fork are its parent's. Another number of
        # processes has other batches, so nothing can be compared.
        is_accepted = (self.is_accepted and not is_new) or run.others is not None
        with agreement.together():  # nothing is written before all ranks know that they can continue
            last = next((each for each in _ended if each.run == run.directory.resolve()), None)
            if last is not None:
                last.noted.reset()
            whole = PartsState(parts, {} if last is None else last.at_first)
            before = run.facts
            _check_is_loop(run, "resume it with everystep resume")
            trained, is_forced = facts_of_loop(parts), self.is_accepted and not is_new
            left = None if last is None else last.left
            changed = accepted_changes(run, trained, is_accepted=is_forced, left=left)
            # Steps that not all ranks have are taken again, and none of them is kept of one rank alone.
            recorded = run.newest_step() if run.common_steps is None else run.common_steps
            problems: list[str] = []
            # Where a snapshot is damaged, an older one serves as well.
            state = run.state_near(recorded, on_problem=problems.append)
            if state is None:
                reason = "; ".join(problems) or "the training ended before it wrote one"
                raise RunError(
                    f"{run.name} has no readable snapshot to continue from: {reason}; record it again"
                )
            check_rules(run, state.step)
            # Not from before a change of settings: the steps up to `later` would be others.
            since = run.stretches[stretch_at(run.stretches, recorded)].first - 1
            # A fork at a snapshot begins there: its loop may have other settings from its first step on.
            is_there = is_new and state.step == recorded
            # Of two numbers, the order in which they are added makes no difference.
            is_pair = trained.processes < 3
            first, at = state, -1 if is_accepted or is_there else state.step - 1
            near = partial(run.state_near, after=since - 1, on_problem=problems.append)
            while first is state and (earlier := near(at)) is not None:
                # In its first steps, a process lays out gradients twice, and a new one at other steps.
                if is_pair or not earlier.step or None not in earlier.settings.get("layouts", ()):
                    first = earlier
                at = earlier.step - 1
        # An older state may be unreadable on one rank alone.
        is_exact = is_pair or (
            agreement.is_same(first.step) and whole.layouts.restore(first, agreement.is_same)
        )
        with agreement.together():
            if not (is_exact or is_new or run.others is not None):
                order = (
                    f"DistributedDataParallel adds the gradients of {trained.processes} processes in "
                    "another order than before"
                )
                first, is_accepted, changed = state, True, (*changed, order)
                if not agreement.rank:
                    say(
                        f"{run.name} continues after step {state.step:,}, and results may differ from "
                        f"those of an uninterrupted training by rounding: {order}; later steps "
                        "that were recorded are discarded"
                    )
            begun = 0 if before.fork is None else before.fork.at
            if is_accepted and state.step < begun:
                raise RunError(
                    f"{run.name} cannot discard steps of its parent: it has no snapshot from step "
                    f"{begun:,} on; fork the parent again"
                )
            at = state.step if is_accepted else recorded
            state, later = first, None if first is state else state
            resumed = resume_facts(run, at, changed)
            # Unchanged facts are left out, so that the recorder keeps those of the run.
            if changed:
                facts = facts_resumed(run, trained, at, resumed)
            else:
                facts = Facts(resumed=(*before.resumed, *([] if is_new else [resumed])), finished=None)
            facts, goal = facts.model_copy(update=dict(self.user_facts)), _goal(run, state)
            taken_by = run.stretches[stretch_at(run.stretches, state.step)].facts.processes
            if goal is not None and (taken_by == trained.processes or not state.step):
                goal = goal.model_copy(update={"size": None})
            elif goal is not None and goal.size is None:  # the epoch begins again
                goal = goal.model_copy(update={"taken": 0})
            # Before the recorder opens the run: if the parts do not fit, nothing was written.
            whole.restore(state)
        # With those of groups that came or went on the way; each as of the last step with a change.
        names = filter(run.facts.training.is_setting, run.measurement_names)
        noted = ((name, *each) for name in names for each in run.values_of(name).items())
        rates = {name: rate for name, step, rate in noted if step <= state.step}
        if trained.ranks is None or not trained.ranks.rank:
            _say_where(run, state.step, recorded, goal, is_new=is_new)
        place.go_to(goal)
        resuming = {"at": state.step, "is_resumed": True} | self._kept
        recorder = Recorder(run.directory, facts, self.snapshot_budget, **resuming)
        writer = LoopWriter(recorder, state.step, facts, whole, place, self.advanced, before)
        writer.rates, writer.beginning, writer.later = rates, state, later
        return writer


def _check_is_loop(run: RecordedRun, cure: str) -> None:
    facts = run.facts
    if facts.training.loop is None:
        raise RunError(f"{run.name} was not recorded from your own loop; {cure} {run.name}")
    check_taken_by_loop(facts)


def _say_where(
    run: RecordedRun, step: int, recorded: int, goal: Recorded | None, *, is_new: bool
) -> None:
    """Report from where a loop continues, and what it must do itself."""
    message = f"{run.name} continues after step {step:,}"
    if step < recorded:
        steps = f"step {recorded:,}" if step + 1 == recorded else f"steps {step + 1:,} to {recorded:,}"
        message += f"; {steps} {'is' if step + 1 == recorded else 'are'} repeated, and compared"
    if goal is None:
        message += "; the loop must begin at recording.step_count"
    elif goal.epoch is None and goal.call and not is_new:
        message += (
            "; code around the steps of epochs that are past runs again: iterate over "
            "recording.epochs(n), or skip it while recording.is_resuming"
        )
    say(message)


def _goal(run: RecordedRun, state: State) -> Recorded | None:
    """Return the place in the batches of a state, if it has one."""
    place = state.settings.get("place")
    draw_of = partial(_drawn, run)
    if not isinstance(place, Mapping):
        return None if state.step else Recorded(step=0, draw_of=draw_of, call=0, taken=0)
    problems: list[str] = []
    first = run.state_near(0, on_problem=problems.append)
    if first is None:
        raise RunError(f"{run.name} cannot find its place in the batches: {'; '.join(problems)}")
    known = {"tensors": state.rest, "at_first": first.generators.tensors()}
    try:
        return Recorded(**{**place, **known, "step": state.step, "draw_of": draw_of})
    except ValueError:
        raise RunError(f"the snapshot of step {state.step} has no valid place in the batches") from None


def _drawn(run: RecordedRun, step: int) -> Drawn:
    rows = run.repeats(step, step)
    inputs = inputs_of(rows[0].inputs if rows else None, f"the input of step {step}")
    generators = run.contents(inputs.draws().given)
    if any(tensor is None for tensor in generators.values()):
        raise RunError(
            f"{run.name} cannot find its place in the batches: what those up to step {step} were drawn "
            "with was given up (everystep prune); use a loader with a state_dict, such as "
            "torchdata's StatefulDataLoader"
        )
    # Digests, so that the batches themselves need not be in the run any more.
    known = {name: each.content for name, each in inputs.given.items() if name.startswith("batch/")}

    def matches(batch: Any) -> bool:
        tensors, nesting = unnested(batch)
        if inputs.plain_batch is not None:
            return inputs.plain_batch == repr(nesting)
        found = {f"batch/{n}": given_of(t.detach().cpu()).content for n, t in tensors.items()}
        # Without what the recorded loop had put into a batch that came again.
        both = known.keys() & found.keys()
        return bool(both or not known) and all(known[name] == found[name] for name in both)

    return Drawn({n: t for n, t in generators.items() if t is not None}, matches)
