"""Parallel: replays many steps of a run, in spans shared by processes.

The spans are between snapshots. Each process computes with one thread, which is the fastest way to use
all cores. If losses or the final state differ from the recording, the span is replayed again with as
many threads as in the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from everystep.device import select
from everystep.numerics import Numerics
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.processes import Opener, needs_worker, process_count, shared
from everystep.replay.recorded_steps import NotReplayedError
from everystep.replay.run_replay import LossDifference, Replay
from everystep.step.state import StateDifference, state_differences

__all__ = [
    "Replayed",
    "Span",
    "Visitor",
    "parallel",
    "replay_span",
    "spans",
]

#: Steps that run between two looks at the losses.
STRIDE = 256
#: Spans for each core, where spans should be long.
SPANS_EACH = 8


class Span(NamedTuple):
    """Steps `first` to `last`, from one snapshot to the next, within one stretch."""

    first: int
    last: int

    @property
    def steps(self) -> int:
        """How many they are."""
        return self.last - self.first + 1


@dataclass
class Replayed:
    """The result of replaying a span.

    losses: of its steps; computed_losses: how many of them operations computed; different_losses,
    first_loss: how many differ, and the first of them; states: tensors of the final state that differ;
    compared: whether there was a final state to compare; stopped_at: the first step that cannot be
    replayed, None if all were, or no more were needed; numerics: under which they ran; result: of the
    visitor.
    """

    span: Span
    numerics: Numerics
    losses: list[float] = field(default_factory=list)
    computed_losses: int = 0
    different_losses: int = 0
    first_loss: LossDifference | None = None
    states: list[StateDifference] = field(default_factory=list)
    compared: bool = False
    stopped_at: int | None = None
    problems: list[str] = field(default_factory=list)
    result: Any = None

    @property
    def is_exact(self) -> bool:
        """Whether all losses and states of the steps taken match the recording."""
        return self.different_losses == 0 and not self.states

    @property
    def taken(self) -> int:
        """The number of steps that were taken, for a visitor that needs all of them."""
        return self.span.steps if self.stopped_at is None else self.stopped_at - self.span.first

    @property
    def unsound_from(self) -> int | None:
        """The first step that may differ from the recorded one, or was not taken."""
        # If only the final state differs, the first differing step of the span is unknown.
        differs = self.first_loss.step if self.first_loss else self.span.first if self.states else None
        return min((each for each in (differs, self.stopped_at) if each is not None), default=None)


class Visitor:
    """Runs the steps of a span; a subclass uses them. It is sent to other processes.

    may_share: whether it may use the replay that opens steps: not if user code runs in between, or if
    everything must be read from disk again; is_done: whether it needs no more steps.
    """

    may_share = False
    is_done = False

    def begin(self, replay: Replay, span: Span) -> int:
        """Return the state to start from: that before the span, or an earlier one."""
        return span.first - 1

    def run(self, replay: Replay, last: int) -> list[float]:
        """Run the steps after the replay's current state, `last` at most; return their losses.

        If nothing repeats a step, return the losses of those before it: the next call raises.

        Raises:
            RunError: a step fails.
        """
        return replay.stepper.run(last)

    def result(self) -> Any:
        """Return the result for the span."""


def spans(run: RecordedRun, first: int, last: int, *, are_long: bool = False) -> list[Span]:
    """Return the spans that cover steps `first` to `last`, except those that were not kept.

    are_long: `SPANS_EACH` for each core, if there are more, for visitors that need the step before each
    span, and so must replay the span before.
    """
    kept = run.facts.kept(last)
    ends = [row.step for row in run.snapshot_rows() if first <= row.step < last]
    size = 1
    if are_long:
        from loky import cpu_count

        size = max(1, -(-len(ends) // (SPANS_EACH * cpu_count())))
    # A span has one stretch: another one may need other programs, data and numerics.
    begins = {stretch.first - 1 for stretch in run.stretches if first <= stretch.first - 1 < last}
    between = {*ends[::size], *begins}
    found: list[Span] = []
    for one, two in ((max(one, first), two) for one, two in kept if two >= first):
        within = sorted(end for end in between if one <= end < two)
        found += [Span(begin + 1, end) for begin, end in pairwise([one - 1, *within, two])]
    return found


def parallel(
    opener: Opener,
    wanted: list[Span],
    visitor: Visitor,
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[Replayed]:
    """Replay spans of a run, and yield each when it is done, in any order.

    processes: their number; 1: only this one; default: one per core, if worth their start; on_progress:
    called with the number of steps just replayed.
    """
    run, threads = opener.run, opener.run.facts.training.numerics.threads
    count = process_count(run, sum(span.steps for span in wanted), processes, len(wanted), threads=1)
    if count == 1 and not needs_worker(run.facts):
        replay = opener.replay_here(may_share=visitor.may_share)
        for span in wanted:
            yield replay_span(replay, span, visitor)
            on_progress(span.steps)
        return
    left = [*wanted]
    # A run that was trained with more threads, which matters, is not continued with one.
    # First with one thread for each process. As soon as a span differs, all that are left are replayed
    # by one process with as many threads as the training had, which decides.
    for each in (1, threads) if count > 1 else (threads,):
        tasks = [(span, visitor) for span in left]
        # A `break` must end the processes, not leave them to compute the other spans.
        with closing(shared(opener, count if each == 1 else 1, each, replay_span, tasks)) as found:
            for replayed in found:
                if not replayed.is_exact and threads != each:
                    break
                left.remove(replayed.span)
                yield replayed
                on_progress(replayed.span.steps)
        if not left:
            return


def replay_span(replay: Replay, span: Span, visitor: Visitor) -> Replayed:
    """Replay a span, and compare its losses and its last state with the recording."""
    known, at = replay.diverged_at, replay.stretch_of(span.first)
    with replay.in_force(span.first):
        found = Replayed(span, Numerics.read(select(replay.stretches[at].facts.device)))
        start = visitor.begin(replay, span)
        stepper = replay.go_to(start, at)
        known_losses = stepper.computed_losses
        step = start
        while step < span.last and not visitor.is_done:
            try:
                last = min(span.last, step + STRIDE)
                losses = visitor.run(replay, last)
            except NotReplayedError as error:
                # The steps before it, and after it, may be as recorded.
                replay.problems.append(str(error))
                found.stopped_at = max(step + 1, span.first)
                break
            last = step + len(losses)
            differing = [d for d in replay.compare(step + 1, losses) if d.step >= span.first]
            found.different_losses += len(differing)
            found.first_loss = found.first_loss or next(iter(differing), None)
            found.losses += losses
            step = last
        found.computed_losses = stepper.computed_losses - known_losses
        if step == span.last:
            _compare_state(found, replay, at)
    replay.diverged_at = known  # of the opened steps; the result has those of the span
    found.result = visitor.result()
    found.problems = list(replay.problems)
    return found


def _compare_state(found: Replayed, replay: Replay, at: int) -> None:
    last = found.span.last
    if all(row.step != last for row in replay.run.snapshot_rows()):
        return
    stepper = replay.go_to(last, at)
    # They are only compared, before the next step: no copies are needed.
    states = stepper.capture_ranks(is_live=True)
    others = ((f"rank {number}: ", other.steps.run) for number, other in stepper.others.items())
    runs = [("", replay.run), *others]
    # A fork may begin with another optimizer, or other random numbers, than its parent ended with.
    is_fork = replay.stretch_of(last + 1) != at
    for (rank, run), here in zip(runs, states, strict=True):
        problems: list[str] = []
        recorded = run.state_near(last, after=last - 1, on_problem=problems.append)
        replay.problems += [f"{rank}{problem}" for problem in problems]
        if recorded is not None:
            # Of the run itself; what other ranks have is compared, too, but not counted.
            found.compared |= not rank
            differences = state_differences(recorded, here, only_model=is_fork, only_seen=True)
            found.states += [each._replace(tensor=f"{rank}{each.tensor}") for each in differences]
