"""Replay: go to any state of a run, and open any step; states on the way stay in memory.

The way to a state starts at the nearest available one: on disk, in memory, or the current one. Each loss
on the way is compared with the recorded one, bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from everystep import clock, numerics
from everystep.device import select
from everystep.errors import RunError, StepError, say
from everystep.experiment.batches import RowsOf
from everystep.program.precision import Precision
from everystep.recording.blocks import same_number
from everystep.recording.recorded_run import RecordedRun, Stretch, stretch_at
from everystep.replay.opened_step import Step
from everystep.replay.rank_stepper import RankStepper
from everystep.replay.recorded_batches import batch_source
from everystep.replay.recorded_steps import RecordedSteps, check_kept
from everystep.replay.replay_stepper import NOWHERE, ReplayStepper
from everystep.step.generators import Generators, generators_preserved
from everystep.step.state import State

__all__ = ["CountingSteps", "LossDifference", "Replay", "no_such_step", "uncounted"]

#: Shows how many steps of a number have run: called with what they do and the number, it yields what to
#: call with the number of new ones.
CountingSteps = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

#: Seconds of replay between states in memory, so that stepping back is quick.
KEPT_SECONDS = 0.005
#: Bytes that states in memory, and opened steps, may take.
KEPT_BYTES = 256_000_000
#: A replay that takes as long as this is announced.
LONG_SECONDS = 5.0
#: Recorded losses to read at once.
BLOCK = 1024


def uncounted(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show nothing; see `CountingSteps`."""
    return nullcontext(lambda steps: None)


# Where the way to state 137 begins: the latest state up to it, of all that are there.
#   disk     0, 64, 128       snapshots
#   memory   110, 120, 130    kept on the way to earlier questions, with all ranks
#   here     131              where the stepper itself is: six steps are left
class LossDifference(NamedTuple):
    """A step with another loss in the replay."""

    step: int
    recorded: float
    replayed: float


class Replay:
    """A run with replayable steps. Only one thread may use it at a time.

    data: of the run, where it does not hold that itself; threads: number of threads that torch uses;
    default: as many as in the training; conversion: of its programs, to another precision; counting:
    shows the progress of a long replay; default: it is only announced; problems: found so far, such as
    an unreadable snapshot; diverged_at: the first step with a different loss in the replay, None if
    there was none.
    """

    def __init__(
        self,
        run: RecordedRun,
        data: Any = None,
        threads: int | None = None,
        conversion: Precision | None = None,
        counting: CountingSteps = uncounted,
    ) -> None:
        self.run = run
        self.problems: list[str] = []
        self.diverged_at: int | None = None
        # A finished run need not be read again.
        self._is_over = run.status != "running"
        #: The losses read last, and the step that they begin with.
        self._losses: tuple[int, list[float]] = 1, []
        self.stretches = run.stretches
        self.data = data
        self._threads = threads
        self._conversion = conversion
        self._counting = counting
        self._steppers: dict[int, ReplayStepper] = {}
        #: Batches by the facts that they follow from: a fork has those of its parent.
        self._rules: dict[str, RowsOf] = {}
        self._at = 0
        self._generators: Generators | None = None
        #: States in memory, of all ranks, by their stretch and step.
        self._kept: OrderedDict[tuple[int, int], list[State]] = OrderedDict()
        self._opened: OrderedDict[int, Step] = OrderedDict()
        self._step_seconds = 0.0

    def step(self, number: int) -> Step:
        """Open a step.

        Raises:
            StepError: the run has no such step, or not yet.
            RunError: a needed file is missing or unreadable.
        """
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        self.recorded_loss(number)
        check_kept(self.run, number)
        # A large step goes before the next one needs its memory.
        while sum(step.bytes for step in self._opened.values()) > KEPT_BYTES:
            self._opened.popitem(last=False)
        with self.in_force(number):
            self._go_to_start_of(number)
            self._opened[number] = self.next_step()
        return self._opened[number]

    def state(self, number: int) -> State:
        """Return the state after a step (0: before the first); raises as `step`."""
        state = self.run.state_near(number, on_problem=self._note, after=number - 1)
        if state is not None:
            return state
        if number:
            self.recorded_loss(number)
            check_kept(self.run, number)
        with self.in_force(max(number, 1)):
            return self.go_to(number).capture()

    @property
    def stepper(self) -> ReplayStepper:
        """The stepper, at the current state of the replay."""
        return self.stepper_of(self._at)

    def go_to(self, state: int, at: int | None = None) -> ReplayStepper:
        """Run the steps up to a state, in the stretch `at`; call it inside `in_force`."""
        at = self.stretch_of(state) if at is None else at
        stepper = self.stepper_of(at)
        self._start_near(stepper, at, state)
        with self._announced(stepper.state, state) as advance:
            while (left := state - stepper.state) > 0:
                # The first few steps show how long one takes.
                spacing = max(1, int(KEPT_SECONDS / self._step_seconds)) if self._step_seconds else 8
                count = min(left, spacing)
                self._advance(stepper, stepper.state + count)
                advance(count)
                left -= count
                # Of large states, only the last before the target is kept: stepping back begins there.
                if 0 < left <= spacing or (left and stepper.size <= KEPT_BYTES):
                    self._keep(stepper)
        return stepper

    def _announced(self, begin: int, end: int) -> AbstractContextManager[Callable[[int], None]]:
        """Report how long the steps between two states will take, if that is long; count them within."""
        count = max(0, end - begin)
        # As if a replay took as long as the training did.
        seconds = count and (self.run.facts.seconds or 0.0) * count / max(1, self.run.newest_step())
        if not count or seconds < LONG_SECONDS:
            return uncounted("replaying", count)
        say(f"steps {begin + 1:,} to {end:,} are replayed first: about {seconds:,.0f} seconds")
        return self._counting("replaying", count)

    def next_step(self) -> Step:
        """Open the step after the current state; call it inside `in_force`."""
        step = self.stepper.open()
        recorded = self.recorded_loss(step.number)
        self.compare(step.number, [step.loss])
        diverged = self.diverged_at
        is_exact = diverged is None or diverged > step.number
        return replace(step, recorded_loss=recorded, diverged_at=None if is_exact else diverged)

    def recorded_loss(self, number: int) -> float:
        """Return the recorded loss of a step; raises `StepError` if the run does not have it yet."""
        found = self.recorded_losses(number, number)
        if number < 1 or not found:
            raise no_such_step(self.run, number)
        return found[0]

    def recorded_losses(self, first: int, last: int) -> list[float]:
        """Return the recorded losses of steps, as far as they exist."""
        begin, known = self._losses
        # A training still adds losses, and may take some back.
        if not (self._is_over and begin <= first and last < begin + len(known)):
            end = max(last, first + BLOCK) if self._is_over else last
            begin, known = self._losses = max(first, 1), self.run.losses_between(first, end)
        return known[max(first - begin, 0) : last - begin + 1]

    @contextmanager
    def in_force(self, step: int) -> Iterator[None]:
        """Apply the numerics of a step; the caller's random generators keep their state."""
        facts = self.stretches[self.stretch_of(step)].facts
        device, known = select(facts.device), facts.numerics
        threads = self._threads or known.threads
        held = numerics.in_force(threads, known, suspends_device=True)
        with held, generators_preserved(device):
            # The replay has random generators of its own, which continue from call to call.
            if self._generators is not None:
                self._generators.restore(device)
            try:
                yield
            except BaseException:
                self._forget_where()
                raise
            finally:
                self._generators = Generators.capture(device)

    def step_after(self, state: State) -> Step:
        """Open the step after a state that is given."""
        with self.in_force(state.step + 1):
            self._forget_where()
            self._kept.clear()
            self._at = self.stretch_of(state.step + 1)
            self.stepper.load(state)
            return self.next_step()

    def let_go(self) -> None:
        """Free the memory of all states and opened steps."""
        self._steppers, self._opened = {}, OrderedDict()
        self._kept.clear()

    def _forget_where(self) -> None:
        """After a step that may be incomplete: continue from a stored state."""
        for stepper in self._steppers.values():
            stepper.state = NOWHERE

    def _go_to_start_of(self, number: int) -> None:
        """Go to the state before a step, with the gradients of the step before still there."""
        at = self.stretch_of(number)
        stepper = self.stepper_of(at)
        if at == self._at and stepper.state == number - 1 and stepper.has_gradients:
            return
        if number > self.stretches[at].first and self.stretches[at].facts.loop is None:
            # Their states do not hold the gradients that the next step drops.
            self.go_to(number - 2, at)
            self._advance(stepper, number - 1)
        self.go_to(number - 1, at)

    def _start_near(self, stepper: ReplayStepper, at: int, state: int) -> None:
        lowest = self.stretches[at].first - 1
        here = stepper.state if self._at == at and lowest <= stepper.state <= state else NOWHERE
        known = (s for stretch, s in self._kept if stretch == at and lowest <= s <= state)
        kept = max(known, default=NOWHERE)
        self._at, after = at, max(lowest - 1, here, kept)
        found = self.run.state_near(state, on_problem=self._note, after=after)
        if found is not None:
            stepper.load(found)
        elif kept > here:
            self._kept.move_to_end((at, kept))
            stepper.load(*self._kept[at, kept])
        elif here < 0 and at:  # the state that the stretch begins with cannot be read
            stepper.load(self.go_to(lowest, at - 1).capture())
            self._at = at
        elif here < 0:
            why = self.problems[-1] if self.problems else "it is missing"
            raise RunError(f"{self.run.name} cannot be replayed from its first state: {why}")

    def _advance(self, stepper: ReplayStepper, last: int) -> None:
        first = stepper.state + 1
        started = clock.now()
        losses = stepper.run(last)
        self._step_seconds = (clock.now() - started) / len(losses)
        self.compare(first, losses)

    def compare(self, first: int, losses: list[float]) -> list[LossDifference]:
        """Compare losses of consecutive steps with the recorded ones, and note the first difference."""
        recorded = self.recorded_losses(first, first + len(losses) - 1)
        if len(recorded) < len(losses):
            missing = first + len(recorded)
            raise RunError(f"the run has no loss for step {missing}: the database was changed")
        both = enumerate(zip(recorded, losses, strict=True), start=first)
        found = [LossDifference(step, *pair) for step, pair in both if not same_number(*pair)]
        if found:
            self._diverge(found[0].step)
        return found

    def _keep(self, stepper: ReplayStepper) -> None:
        place = self._at, stepper.state
        if place not in self._kept:
            kept = self._kept
            kept[place] = stepper.capture_ranks()
            # The newest stays, however large it is: stepping back begins there.
            while len(kept) > 1 and sum(s.size for states in kept.values() for s in states) > KEPT_BYTES:
                kept.popitem(last=False)

    def stepper_of(self, at: int) -> ReplayStepper:
        """Return the stepper of a stretch."""
        if at not in self._steppers:
            recorded = partial(RecordedSteps, conversion=self._conversion)
            self._steppers[at] = self.stepper_for(at, recorded, self._diverge)
        return self._steppers[at]

    def stepper_for(
        self,
        at: int,
        steps_of: Callable[[RecordedRun, Stretch, RowsOf | None], RecordedSteps],
        diverged: Callable[[int, str], object],
    ) -> ReplayStepper:
        """Return a new stepper of a stretch, and of that of all ranks.

        steps_of: returns the steps of a rank, given its run, its stretch and the rule of its batches, if
        they follow one; diverged: as `ReplayStepper` has it.
        """
        facts, rule = self.stretches[at].facts, None
        if facts.loop is None and not facts.data.lazy:  # else each row holds its batch
            data = facts.data, facts.data_file, facts.preparation
            by_rule = repr((*data, facts.batches, facts.ranks, facts.device))
            if by_rule not in self._rules:
                device, conversion = select(facts.device), self._conversion
                found = batch_source(self.run, facts, self.data, device, conversion)
                assert isinstance(found, RowsOf)
                self._rules[by_rule] = found
            rule = self._rules[by_rule]
        steps = steps_of(self.run, self.stretches[at], rule)
        ranks = steps.facts.ranks
        if ranks is None:
            return ReplayStepper(steps, diverged)
        others = {
            rank: steps_of(run, run.stretches[at], rule and rule.of_rank(rank, ranks.count))
            for rank, run in enumerate(self.run.ranks_of(at))
            if rank != ranks.rank
        }
        return RankStepper(steps, diverged, ranks.rank, others)

    def _diverge(self, step: int, problem: str = "") -> None:
        """Note that a step differs from the recording, and how if its loss does not show it."""
        self.diverged_at = step if self.diverged_at is None else min(step, self.diverged_at)
        if problem:
            self._note(problem)

    def stretch_of(self, step: int) -> int:
        """Return the stretch of a step or state."""
        return stretch_at(self.stretches, step)

    def _note(self, problem: str) -> None:
        self.problems = [*(each for each in self.problems if each != problem), problem]


def no_such_step(run: RecordedRun, number: int) -> StepError:
    """Return the error that lists the existing steps."""
    count = run.newest_step()
    known = f"it has steps 1 to {count}" if count else "it has no steps"
    if number == 0:
        known += "; use run.parameters(0) for the state before the first step"
    elif run.status == "running":
        known += ", and is still training"
    return StepError(f"{run.name} has no step {number}: {known}")
