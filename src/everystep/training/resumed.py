"""Continuing a run: what must be unchanged, what the run records about changes, and for a user's loop
the state that it continues from, and its place in the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from everystep.errors import RunError
from everystep.recording.contents import given_of, inputs_of
from everystep.recording.facts import (
    EarlierFacts,
    Facts,
    ForkFacts,
    LoopFacts,
    ResumeFacts,
    TrainingFacts,
)
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.settings_diff import asked_differences
from everystep.step.parts import Parts
from everystep.step.state import State
from everystep.training.batch import tensors_of
from everystep.training.description import facts_of_loop
from everystep.training.loader_position import Drawn, Epoch, Recorded

__all__ = [
    "ResumedLoop",
    "changes",
    "check_changes",
    "check_rules",
    "check_taken_by_loop",
    "facts_resumed",
    "forked_loop",
    "resume_facts",
    "resumed_loop",
]

#: Characters of a value that a message shows.
_MOST_SHOWN = 200


def changes(before: TrainingFacts, now: TrainingFacts, left_out: Iterable[str] = ()) -> tuple[str, ...]:
    """Return what changed, as `name: before | now`: settings, versions, numerics.

    left_out: prefixes of the names of settings that do not count.
    """
    found = asked_differences(before, now, of_own_classes=False)
    found = {name: pair for name, pair in found.items() if not name.startswith(tuple(left_out))}
    versions = {
        name: (before.versions.get(name), now.versions.get(name))
        for name in before.versions.keys() | now.versions.keys()
    }
    found |= {f"version of {name}": v for name, v in sorted(versions.items()) if v[0] != v[1]}
    found |= before.numerics.differences(now.numerics)
    return tuple(f"{name}: {_shown(a)} | {_shown(b)}" for name, (a, b) in found.items())


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def check_changes(run: RecordedRun, changed: tuple[str, ...], *, is_accepted: bool) -> None:
    """Check that nothing changed, before anything runs.

    Raises:
        RunError: lists what changed.
    """
    if not changed or is_accepted:
        return
    raise RunError(
        "\n  ".join([f"{run.name} was trained with different settings (before | now):", *changed])
        + "\nrestore what changed, or accept this with --force (force=True), which discards "
        "the recorded steps after the newest snapshot; to train with other settings, fork the run"
    )


def check_rules(run: RecordedRun, step: int) -> None:
    """Check that the steps after a state were taken by the rules that a run has now.

    Raises:
        RunError: a fork's parent took some, or the training before a change that was accepted.
    """
    facts = run.facts
    if facts.fork is not None and step < facts.fork.at and facts.training.loop is None:
        raise RunError(
            f"{run.name} cannot be resumed: it ended before the state that it begins with was on disk, "
            f"or that snapshot is damaged; fork {facts.fork.parent} again (--at {facts.fork.at})"
        )
    if step < (since := _changed_at(facts)):
        raise RunError(
            f"{run.name} cannot be resumed: from step {since + 1:,} on it was trained with "
            f"different settings, and its snapshots from step {since:,} on are missing or damaged; fork "
            f"it at step {step:,}"
        )


def _changed_at(facts: Facts) -> int:
    """Return the state from which on a run was trained by the rules that it has now."""
    return max((each.at for each in facts.resumed if each.changed), default=0)


def resume_facts(run: RecordedRun, at: int, changed: tuple[str, ...] = ()) -> ResumeFacts:
    """Return the facts of continuing after step `at`, with what changed."""
    facts = run.facts
    now = datetime.now(UTC).replace(microsecond=0)
    return ResumeFacts(at=at, began=now, seconds=_seconds(run, facts), changed=changed)


def _seconds(run: RecordedRun, facts: Facts) -> float | None:
    """Return how long the training has taken; of one that was killed, up to its last write."""
    if facts.status != "running":
        return facts.seconds
    last = facts.resumed[-1] if facts.resumed else None
    began, before = (facts.started, 0.0) if last is None else (last.began, last.seconds)
    if began is None or before is None:
        return None
    return before + max(0.0, (run.last_written - began).total_seconds())


def facts_resumed(run: RecordedRun, trained: TrainingFacts, steps: int, resumed: ResumeFacts) -> Facts:
    """Return the facts of a run that is resumed, to be written with its first new step."""
    before = run.facts
    earlier = before.earlier
    if resumed.at > max((each.last for each in earlier), default=0):
        earlier = (*earlier, EarlierFacts(last=resumed.at, training=before.training))
    return Facts(
        steps=steps, trained=trained, earlier=earlier, resumed=(*before.resumed, resumed), finished=None
    )


class ResumedLoop(NamedTuple):
    """Where a loop continues.

    state: on disk; later: a later one, which the loop must reach again, if any; facts: of the run, to be
    written with its first new step; is_finite: whether each loss so far was; has_loss: whether the loop
    logs one; rates: the learning rates, by name; goal: the place in the batches, None if the loop does
    not iterate over `steps`; draw: returns the draw of a step.
    """

    state: State
    later: State | None
    facts: Facts
    is_finite: bool
    has_loss: bool
    loss_dtype: str
    rates: dict[str, float]
    goal: Recorded | None
    draw: Callable[[int], Drawn]


def resumed_loop(
    run: RecordedRun, parts: Parts, *, is_accepted: bool, is_new: bool = False
) -> ResumedLoop:
    """Return where a recorded loop continues.

    That is the second newest snapshot if there is one: the state at the newest is then compared, which
    shows that no part of the loop is missing.

    Args:
        run: of a loop.
        parts: in their state before the training.
        is_accepted: continue although something changed.
        is_new: the run is a fork that has just been made.

    Raises:
        RunError: the run is of another kind, has no snapshot, or something changed.
    """
    before = run.facts
    _check_is_loop(run, "resume it with everystep resume")
    now = facts_of_loop(parts, LoopFacts.of(parts.named))
    changed = changes(before.training, now)
    check_changes(run, changed, is_accepted=is_accepted)
    recorded = run.newest_step()
    problems: list[str] = []
    state = run.state_near(recorded, on_problem=problems.append)
    if state is None:
        reason = "; ".join(problems) or "the training ended before it wrote one"
        raise RunError(
            f"{run.name} has no readable snapshot to continue from: {reason}; record it again"
        )
    check_rules(run, state.step)
    begun = 0 if before.fork is None else before.fork.at
    if is_accepted and state.step < begun:
        raise RunError(
            f"{run.name} cannot discard steps of its parent: it has no snapshot from step {begun:,} on; "
            "fork the parent again"
        )
    at, later = (state.step, None) if is_accepted else (recorded, state)
    earlier = run.state_near(state.step - 1, on_problem=problems.append)
    if later is None or earlier is None or earlier.step < max(begun, _changed_at(before)):
        later = None
    else:
        state = earlier
    resumed = resume_facts(run, at, changed)
    if changed:
        facts = facts_resumed(run, now, at, resumed)
    else:
        facts = Facts(resumed=(*before.resumed, *([] if is_new else [resumed])), finished=None)
    return _continued(run, parts, state, later, facts)


def forked_loop(parent: RecordedRun, parts: Parts, at: int) -> Facts:
    """Return the facts of a fork of a recorded loop.

    Its loop repeats the steps from the newest snapshot to `at`, as a resumed loop does: only a snapshot
    holds everything that a loop carries.

    Args:
        parent: the run.
        parts: of the loop that makes the fork.
        at: the step after which it begins.

    Raises:
        RunError: the parent is of another kind, or has no such step.
    """
    _check_is_loop(parent, "fork it with everystep fork")
    if at > (newest := parent.newest_step()):
        raise RunError(f"{parent.name} has no step {at}: it has {newest:,} steps")
    if at and not any(_goal(parent, state) for state in [parent.state_near(newest)] if state):
        raise RunError(
            f"{parent.name} marks its steps with recording.step, so nothing shows what its loop does "
            "between them; fork loops over recording.steps(batches), or fork it at step 0"
        )
    trained = facts_of_loop(parts, LoopFacts.of(parts.named))
    fork = ForkFacts(parent=parent.name, directory=str(parent.directory), at=at, changed={})
    return Facts(started=datetime.now(UTC), steps=at, trained=trained, fork=fork)


def _check_is_loop(run: RecordedRun, cure: str) -> None:
    facts = run.facts
    if facts.training.loop is None:
        raise RunError(f"{run.name} was not recorded from your own loop; {cure} {run.name}")
    check_taken_by_loop(facts)


def check_taken_by_loop(facts: Facts) -> None:
    """Check that a run of a loop was not forked by its programs alone.

    Raises:
        RunError: it was: no snapshot has what the loop carries besides tensors.
    """
    if facts.training.engine is not None and facts.fork is not None:
        parent, at = facts.fork.directory, facts.fork.at
        raise RunError(
            f"programs took the steps of {facts.name} from step {at + 1:,} on, and a loop cannot "
            f"continue theirs; fork their parent in your code, and change it there once "
            f"recording.step_count is {at}: everystep.record(fork={parent!r}, at={at}, ...)"
        )


def _continued(
    run: RecordedRun, parts: Parts, state: State, later: State | None, facts: Facts
) -> ResumedLoop:
    before = run.facts
    nonfinite, loop = before.nonfinite_step, before.training.loop
    has_loss = loop is not None and loop.has_loss
    return ResumedLoop(
        state=state,
        later=later,
        facts=facts,
        is_finite=nonfinite is None or nonfinite > state.step,
        has_loss=has_loss,
        loss_dtype=before.loss_dtype if has_loss else "float64",
        rates={name: rate for name in parts.rates() for rate in _rate(run, name, state.step)},
        goal=_goal(run, state),
        draw=lambda step: _drawn(run, step),
    )


def _rate(run: RecordedRun, name: str, step: int) -> list[float]:
    """Return the learning rate of a step, or of the last one before at which it changed."""
    return [rate for at, rate in run.measured(name).items() if at <= step][-1:]


def _goal(run: RecordedRun, state: State) -> Recorded | None:
    """Return the place in the batches of a state, if it has one.

    Raises:
        RunError: it is not valid, or state 0 cannot be read.
    """
    place = state.settings.get("place")
    if not isinstance(place, Mapping):
        return None if state.step else Recorded(0, 0, None, {}, {})
    call, taken = place.get("call"), place.get("taken")
    begun = place.get("epoch", [0, 0, 0])
    is_epoch = isinstance(begun, list) and len(begun) == 3 and all(type(n) is int for n in begun)
    if not isinstance(call, int) or not isinstance(taken, int) or not is_epoch:
        raise RunError(f"the snapshot of step {state.step} has no valid place in the batches")
    problems: list[str] = []
    first = run.state_near(0, on_problem=problems.append)
    if first is None:
        raise RunError(f"{run.name} cannot find its place in the batches: {'; '.join(problems)}")
    at_first = first.generators.tensors()
    epoch = Epoch(*begun) if "epoch" in place else None
    has_workers = bool(place.get("has_workers"))
    return Recorded(call, taken, place.get("loader"), state.rest, at_first, epoch, has_workers)


def _drawn(run: RecordedRun, step: int) -> Drawn:
    """Return the recorded data of the draw of a batch.

    Raises:
        RunError: the recording has not kept it.
    """
    rows = run.repeats(step, step)
    inputs = inputs_of(rows[0].inputs if rows else None, f"the input of step {step}")
    generators = run.contents(inputs.draws().given)
    if any(tensor is None for tensor in generators.values()):
        raise RunError(
            f"{run.name} cannot find its place in the batches: what those up to step {step} were drawn "
            "with was dropped to stay within batch_budget; use a loader with a state_dict, such as "
            "torchdata's StatefulDataLoader"
        )
    known = {
        n.removeprefix("batch/"): each for n, each in inputs.given.items() if n.startswith("batch/")
    }

    def matches(batch: Any) -> bool:
        tensors = tensors_of(batch)
        return all(
            name in tensors and given_of(tensors[name].detach().cpu()) == each
            for name, each in known.items()
        )

    return Drawn({n: t for n, t in generators.items() if t is not None}, matches)
