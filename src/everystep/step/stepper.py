"""The stepper: runs the steps of a training, by a program where one may, else in Python.

A step of a new kind (the first one, another batch shape) runs in Python and is captured; its program
runs later steps if it gives identical bits. At steps 2, 4, 8, ..., then at an interval that costs less
than a hundredth of the time, and at the last step, the program is checked against Python again.

`acceleration` decides whether a program may run steps at all. If not, Python runs all of them, each
watched (see `training/watched_steps.py`). After a schedule or a metric of the user's has run, everystep
compares what programs rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from everystep import clock
from everystep.errors import DatasetChangedError, TrainingError
from everystep.program.execute import BoundProgram
from everystep.step.acceleration import Acceleration
from everystep.step.advance import Losses, advance, take
from everystep.step.build import NotCapturableError, build
from everystep.step.capture import Capture, take_watched
from everystep.step.checkpoint import Change, ChangeLog, Checkpoint
from everystep.step.eager import EagerStep, Training
from everystep.step.programs import Programs
from everystep.step.recorder import StepRecorder
from everystep.step.torchs_own import is_torchs_schedule
from everystep.step.verified import CheckPlan, Verifier, WayBack

__all__ = ["Engine", "Stepper"]

Engine = Literal["auto", "program", "eager"]

#: How often in a row programs may be captured again without one running a step.
MOST_CAPTURES = 3


class Stepper:
    """Runs the steps of a training, and keeps their losses until they are collected.

    Args:
        training: the training; modified in place.
        steps: the last step.
        engine: `eager`; `program`, which trusts code that is not torch's, and raises if no program can
            run a step; or `auto`.
        start: the initial state of the training; steps are counted from there.
        by_python: takes a whole step on a batch, in Python, and advances the schedule; returns the loss.

    step: the last step that ran; reason: why Python runs steps, or None; eager_from: the first of these;
    checked: the steps at which a program passed a check; programs: those captured; hyperparameters:
    (step, the lr and similar settings by name) of each step since the last `collect` before which they
    may have changed.

    Raises:
        TrainingError: `engine="program"`, and no program can run a step.
    """

    def __init__(
        self,
        training: Training,
        steps: int,
        engine: Engine = "auto",
        start: int = 0,
        *,
        by_python: Callable[[int, Tensor, Tensor], Tensor],
    ) -> None:
        self.training = training
        self.start = self.step = start
        self.reason: str | None = None
        self.eager_from: int | None = None
        self.programs = Programs(training, start + 1)
        self.hyperparameters: list[tuple[int, dict[str, float]]] = []
        self._steps = steps
        self._engine = engine
        self._by_python = by_python
        self._plan = CheckPlan(start)
        self._losses = Losses()
        self._changes = ChangeLog()
        #: The program that ran the last step, None if Python did.
        self._last: BoundProgram | None = None
        self._captures = 0
        self._moved = 0
        self._has_other_code_run = False
        self._way_back = WayBack(start)
        self.acceleration = Acceleration(training, is_vouched=engine == "program")
        self._look_again()
        if self.reason is None:
            self._keep_way_back()

    @property
    def is_full(self) -> bool:
        """Whether losses must be collected before more steps can run."""
        return self._losses.room <= 0

    def last_loss(self) -> float:
        """Return the loss of the last step."""
        return self._losses.last()

    @property
    def checked(self) -> list[int]:
        """The steps at which a program was checked against the eager step, and passed."""
        return self._plan.checked

    def advance(self, last: int) -> None:
        """Run steps up to `last`, or until there are enough losses to collect.

        A failed check may move `step` back to the last checked step; what was collected of later steps
        is then void.

        Raises:
            TrainingError: `engine="program"`, and no program can run a step; or a check failed, and
                training cannot go back.
        """
        while self.step < last and not self.is_full:
            number = self.step + 1
            if self.step in self.checked[-1:] and self._way_back.step != self.step:
                # Not before now: what follows a step (an evaluation, say) belongs to its state.
                self._keep_way_back()
            if self._has_other_code_run:
                # Not before now: the training may end before there is such a step.
                self._has_other_code_run = False
                self.hyperparameters.append((number, self.training.hyperparameters()))
            if self.reason is not None:
                self._take_eagerly(number)
                self._check_dataset()
            elif not self.programs.has(number):
                self._capture(number)
                self._after_python()
            elif self._plan.is_due(number, self._steps):
                self._check(number)
                self._after_python()
            else:
                last_unchecked = self._plan.until(self._steps) - 1
                self._run(number, min(last, last_unchecked, self.step + self._losses.room))
            if self.step < number:
                return

    @contextmanager
    def foreign_code(self) -> Iterator[None]:
        """Run code that may change the training; note its changes, which stay.

        Where Python runs the steps, the watch of the next step notes them.

        Programs continue with changed values of tensors. If something else changes that they depend on,
        they are captured again.
        """
        if self.reason is not None:
            yield
            self._has_other_code_run = True
            return
        self._hand_over_gradients()
        with self._changes.noting(self.training, self.step):
            yield
        self._way_back.close()
        self._has_other_code_run = True
        self._check_dataset()
        self._compare_guards("during an evaluation")

    def _hand_over_gradients(self) -> None:
        """Set the gradients of the last step where other code looks for them."""
        if self._last is not None:
            self.programs.hand_over_gradients(self._last, as_copies=True)

    def _check_dataset(self) -> None:
        """Check that a Dataset read once would still return the same rows, as far as that is fast.

        Raises:
            TrainingError: it would not.
        """
        guards = self.training.batch.guards
        changed = None if guards is None else guards.difference(is_thorough=False)
        if changed is not None:
            raise DatasetChangedError(changed, self.step)

    def collect_changes(self) -> list[tuple[int, Change]]:
        """Return the changes by other code, with their steps, since the last call."""
        return self._changes.collect()

    def collect(self) -> tuple[int, Tensor]:
        """Return the step of the first loss not yet collected, and the losses from there on."""
        first = self.step - self._losses.count + 1
        self.hyperparameters = []
        return first, self._losses.collect()

    def finish(self) -> None:
        """Set the gradients of the last step where a user looks for them."""
        is_changed = self.training.schedule is not None or self._has_other_code_run
        if is_changed and self.training.has_tensor_settings:
            # Such settings are state, and the last state has them as the next step would.
            self.hyperparameters.append((self.step + 1, self.training.hyperparameters()))
        if self._last is not None:
            self.programs.hand_over_gradients(self._last)

    # What runs the steps.

    def _look_again(self) -> None:
        """Examine the training: at first, and after a change to something that programs depend on."""
        self.acceleration = Acceleration(self.training, is_vouched=self._engine == "program")
        self._eager = EagerStep(self.training)
        self._verifier = Verifier(self.training, self.programs, self._eager)
        reason = 'engine="eager" is set' if self._engine == "eager" else self.acceleration.reason
        if reason is not None:
            self._go_on_eagerly(reason)

    def _after_python(self) -> None:
        """After a Python step: compare what programs depend on, if the step may have changed it."""
        self._check_dataset()
        if self.reason is None and self.acceleration.has_foreign_code:
            self._compare_guards()

    def _compare_guards(self, when: str = "") -> bool:
        """Compare what programs depend on after other code has run; return whether it still holds."""
        state = self.training.named_state()
        self._moved = self._moved + 1 if self.programs.refresh(state) else 0
        if self._moved > MOST_CAPTURES:
            self._go_on_eagerly("parameters move to other memory at every step")
            return False
        self.programs.load_rates()
        since = self.programs.since(self.step)
        changed = self.acceleration.difference(state) or self.programs.misfit(state, since)
        if changed is None:
            return True
        self._captures += 1
        if self._captures > MOST_CAPTURES:
            self._go_on_eagerly(f"{changed} {when}".strip() + " repeatedly")
            return False
        self.programs.renew(self.step + 1)
        self._last = None
        self._look_again()
        return False

    def _go_on_eagerly(self, reason: str, first: int | None = None) -> None:
        """Run all steps from `first` on (or the next) in Python."""
        if self._engine == "program":
            raise TrainingError(
                f'no program can run these steps: {reason}; engine="auto" runs them in Python'
            )
        self.reason = reason
        self.eager_from = self.step + 1 if first is None else first

    # Steps.

    def _take_eagerly(self, number: int) -> None:
        x, y = self.training.batch(number)
        self._last = None
        self._note_hyperparameters(number)
        self._keep_loss(number, self._by_python(number, x, y))

    def _take_again(self, number: int, before: Checkpoint, reason: str) -> None:
        """Take a step once more in Python, and all later ones: no program stands in for it."""
        before.restore(self.training, forget_new=True)
        self._go_on_eagerly(f"{reason} at step {number}", number)
        x, y = self.training.batch(number)
        self._keep_loss(number, self._by_python(number, x, y))

    def _capture(self, number: int) -> None:
        """Run a step eagerly, capture it, and use its program from now on if its result is identical."""
        training = self.training
        self._last = None
        if self.programs.since(number) == number:
            self.acceleration.begin()
        before = Checkpoint(training)
        self._note_hyperparameters(number)
        started = clock.now()
        captured = take_watched(self._eager, number, StepRecorder(training.device))
        seconds = clock.now() - started
        try:
            built = build(captured, training)
            if built.program.optimizer_step is None:
                reads_rates = built.program.reads_rates
                self.acceleration.guard_update(but_lr=reads_rates or training.schedule is not None)
            self.programs.add(number, built)
            # The program of a first step takes no other: going back alone needs it.
            takes_more = number > self.programs.since(number)
            reason = None
            if takes_more or number == self._steps or self._plan.is_light(seconds):
                reason = self._compare_captured(number, before, captured)
        except NotCapturableError as error:
            reason = str(error)
        if reason is None:
            self._keep(number, captured.loss)
        else:
            self._take_again(number, before, reason)

    def _compare_captured(self, number: int, before: Checkpoint, captured: Capture) -> str | None:
        """Compare the new program of a step with the step; return in words what differs, or None."""
        started = clock.now()
        reason = self._verifier.compare(number, before, captured.loss, forget_new=True)
        if reason is None:
            self._plan.captured(number, clock.now() - started)
        else:
            self.programs.discard(number)
        return reason

    def _check(self, number: int) -> None:
        """Run a step by its program and eagerly, and compare; the eager step counts."""
        started = clock.now()
        self._last = None
        self._note_hyperparameters(number)
        before = Checkpoint(self.training)
        loss, reason = self._verifier.check(number, before)
        if reason is not None and self._way_back.step >= number - 1:
            self._take_again(number, before, reason)
            return
        self._keep(number, loss)
        if reason is None:
            self._plan.passed(number, clock.now() - started)
        else:
            self._fail(number, reason)

    def _run(self, first: int, last: int) -> None:
        """Run steps by their programs, without checks."""
        started = clock.now()
        if self.training.schedule is None:
            is_steady = self.training.batch.is_fixed
            advance(first, last, self._begin, self._keep_by_program, is_steady=is_steady)
            if self.step == last:
                self._captures = 0
        else:
            self._run_with_python(first, last)
        self._plan.timed(self.step - first + 1, clock.now() - started)

    def _begin(self, number: int) -> BoundProgram | None:
        """Prepare a step that no user code runs before."""
        if not self.programs.has(number):
            return None
        self._last = bound = self.programs.bound(number)
        self.programs.load_batch(number, bound)
        self._losses.make_room(bound.loss)
        return bound

    def _keep_by_program(self, number: int, bound: BoundProgram) -> None:
        self._losses.keep(bound.loss)
        self.step = number

    def _run_with_python(self, first: int, last: int) -> None:
        """Run steps with a schedule between them."""
        programs = self.programs
        for number in range(first, last + 1):
            if not programs.has(number):
                return
            self._note_hyperparameters(number)
            bound = take(programs, number)
            self._captures = 0
            self._last = bound
            self._keep(number, bound.loss)
            self._check_dataset()
            if self.acceleration.has_foreign_code:
                self._way_back.close()
                if not self._compare_guards():
                    return

    def _keep(self, number: int, loss: Tensor) -> None:
        """After a step: keep its loss, and advance the schedule."""
        self._keep_loss(number, loss)
        if self._eager.advance is None:
            return
        if is_torchs_schedule(self.training.schedule):
            self._eager.advance(number)
            return
        self._hand_over_gradients()
        with self._changes.noting(self.training, number):
            self._eager.advance(number)

    def _keep_loss(self, number: int, loss: Tensor) -> None:
        self._losses.make_room(loss)
        self._losses.keep(loss.detach())
        self.step = number

    def _note_hyperparameters(self, number: int) -> None:
        """Note the lr and similar settings before a step, if something may have changed them."""
        if self.training.schedule is not None or self.reason is not None:
            self.hyperparameters.append((number, self.training.hyperparameters()))

    def _keep_way_back(self) -> None:
        """Keep a copy of the verified state, if it may be needed."""
        is_possible = not self.acceleration.has_foreign_code
        self._way_back.keep(self.training, self.step, is_possible=is_possible)

    def _fail(self, number: int, reason: str) -> None:
        """After a failed check, go back to the last good one; no program runs from there on.

        Raises:
            TrainingError: other code has run since the last good check, and cannot be undone.
        """
        verified = self._way_back.step
        self._way_back.go(self.training, number, reason)
        self._losses.drop(number - verified)
        self.hyperparameters = [each for each in self.hyperparameters if each[0] <= verified]
        self._changes.forget_after(verified)
        self.step = verified
        self._go_on_eagerly(f"{reason} at step {number}", verified + 1)
