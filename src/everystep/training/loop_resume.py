"""Resuming a user's loop: the state that it goes on from, and its place in the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from everystep.errors import RunError
from everystep.recording.contents import Given, given_of, unpacked
from everystep.recording.facts import Facts, LoopFacts
from everystep.recording.run import RecordedRun
from everystep.step.parts import Parts
from everystep.step.state import State
from everystep.training.batch import tensors_of
from everystep.training.facts import facts_of_loop
from everystep.training.place import DRAW, Drawn, Recorded
from everystep.training.resumed import (
    changed_at,
    changes,
    check_changes,
    check_rules,
    facts_resumed,
    resume_facts,
)

__all__ = ["ResumedLoop", "resumed_loop"]


class ResumedLoop(NamedTuple):
    """Where a loop goes on.

    state: on disk; later: another one, which the loop must reach again, None if there is none; facts: of
    the run, to be written with its first new step; is_finite: whether each loss so far was; has_loss:
    whether the loop logs one; rates: the learning rates, by name; goal: the place in the batches, None
    if the loop does not iterate over `steps`; draw: returns the draw of a step.
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


def resumed_loop(run: RecordedRun, parts: Parts, *, is_accepted: bool) -> ResumedLoop:
    """Return where a recorded loop goes on.

    That is the second newest snapshot if there is one: the state at the newest is then compared, which
    shows that nothing the loop carries was left out.

    Args:
        run: of a loop.
        parts: as they were before the training.
        is_accepted: go on although something changed.

    Raises:
        RunError: the run is of another kind, has no snapshot, or something changed.
    """
    before = run.facts
    if before.training.loop is None:
        raise RunError(
            f"{run.name} was not recorded from your own loop; resume it with everystep resume {run.name}"
        )
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
    at, later = (state.step, None) if is_accepted else (recorded, state)
    earlier = run.state_near(state.step - 1, on_problem=problems.append)
    if later is None or earlier is None or earlier.step < changed_at(before):
        later = None
    else:
        state = earlier
    resumed = resume_facts(run, at, changed)
    if changed:
        facts = facts_resumed(run, now, at, resumed)
    else:
        facts = Facts(resumed=(*before.resumed, resumed), finished=None)
    nonfinite = before.nonfinite_step
    return ResumedLoop(
        state=state,
        later=later,
        facts=facts,
        is_finite=nonfinite is None or nonfinite > state.step,
        has_loss=before.training.loop.has_loss,
        loss_dtype=before.loss_dtype if before.training.loop.has_loss else "float64",
        rates={name: rate for name in parts.rates() for rate in _rate(run, name, state.step)},
        goal=_goal(run, state),
        draw=lambda step: _drawn(run, step),
    )


def _rate(run: RecordedRun, name: str, step: int) -> list[float]:
    """Return the learning rate of a step, or of the last one before at which it changed."""
    return [rate for at, rate in run.measured(name).items() if at <= step][-1:]


def _goal(run: RecordedRun, state: State) -> Recorded | None:
    """Return the place in the batches that a state has, None if it has none.

    Raises:
        RunError: it is not valid, or state 0 cannot be read.
    """
    place = state.settings.get("place")
    if not isinstance(place, Mapping):
        return None if state.step else Recorded(0, 0, None, {}, {})
    call, taken = place.get("call"), place.get("taken")
    if not isinstance(call, int) or not isinstance(taken, int):
        raise RunError(f"the snapshot of step {state.step} has no valid place in the batches")
    problems: list[str] = []
    first = run.state_near(0, on_problem=problems.append)
    if first is None:
        raise RunError(f"{run.name} cannot find its place in the batches: {'; '.join(problems)}")
    return Recorded(call, taken, place.get("loader"), state.rest, first.generators.tensors())


def _drawn(run: RecordedRun, step: int) -> Drawn:
    """Return what the recording knows of the draw of a batch.

    Raises:
        RunError: the recording has not kept it.
    """
    rows = run.repeats(step, step)
    content = unpacked(rows[0].inputs, f"the input of step {step}") if rows else None
    given = {n: Given.from_json(each) for n, each in ((content or {}).get("given") or {}).items()}
    draws = {name: each for name, each in given.items() if name.startswith(DRAW)}
    generators = run.contents(draws)
    if any(tensor is None for tensor in generators.values()):
        raise RunError(
            f"{run.name} cannot find its place in the batches: what those up to step {step} were drawn "
            "with was dropped to stay within batch_budget; use a loader with a state_dict, such as "
            "torchdata's StatefulDataLoader"
        )
    known = {n.removeprefix("batch/"): each for n, each in given.items() if n.startswith("batch/")}

    def matches(batch: Any) -> bool:
        tensors = tensors_of(batch)
        return all(
            name in tensors and given_of(tensors[name].detach().cpu()) == each
            for name, each in known.items()
        )

    return Drawn({n: t for n, t in generators.items() if t is not None}, matches)
