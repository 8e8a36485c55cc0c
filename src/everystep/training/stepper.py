"""The stepper: runs the steps of a training, by a program where one may, else in Python.

Python's steps are watched (see `watched_steps`). What the first two of a kind (another batch shape) have
done becomes a program, which runs later steps of that kind in its place. At steps 2, 4, 8, ..., then at
an interval that costs less than a hundredth of the time, and at the last step, Python runs the step and
the program is compared with it.

`acceleration` decides whether a program may run steps at all. If not, Python runs all of them. After a
scheduler or a metric of the user's has run, everystep compares what programs rely on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from everystep import clock
from everystep.errors import DatasetChangedError, TrainingError
from everystep.program.calls import without_autograd
from everystep.recording.contents import Taken
from everystep.step.acceleration import Acceleration, CheckPlan, WayBack
from everystep.step.comparison import PartsCopy
from everystep.step.cursor import Cursor
from everystep.step.eager import EagerStep, Training
from everystep.step.generators import Generators
from everystep.step.stand_in import CreatesTensorsError, NotReplaceableError, StandIn
from everystep.step.state import copy_of, same_bits
from everystep.training.batch import text_of
from everystep.training.step_rows import StepWriter
from everystep.training.watched_steps import WatchedSteps

__all__ = ["Engine", "Stepper"]

Engine = Literal["auto", "program", "eager"]

#: How often in a row programs may be made again without one running a step.
MOST_RENEWALS = 3


class Stepper:
    """Runs the steps of a training, and keeps their losses until they are collected.

    Args:
        training: the training; modified in place.
        writer: of the run.
        steps: the last step.
        engine: `eager`; `program`, which trusts code that is not torch's, and raises if no program can
            run a step; or `auto`.
        start: the initial state of the training; steps are counted from there.
        is_by_rule: whether the run has the rows of the batches, so that a rule finds those of each step.

    step: the last step that ran; reason: why Python runs steps, or None; eager_from: the first of these;
    by_program: how many steps programs have run; checked: the steps at which a program passed a check;
    watched: its steps; taken: the rows of the steps since the last `collect`; hyperparameters: (step,
    the lr and similar settings by name) of each of these steps before which they may have changed.

    Raises:
        TrainingError: `engine="program"`, and no program can run a step.
    """

    def __init__(
        self,
        training: Training,
        writer: StepWriter,
        steps: int,
        engine: Engine = "auto",
        start: int = 0,
        *,
        is_by_rule: bool = True,
    ) -> None:
        self.training = training
        self.start = self.step = start
        self.reason: str | None = None
        self.eager_from: int | None = None
        self.by_program = 0
        self.taken: list[Taken] = []
        self.hyperparameters: list[tuple[int, dict[str, float]]] = []
        self.watched = WatchedSteps(training.parts, writer)
        self._is_by_rule = is_by_rule
        #: How often the rows of the data had been changed when the rule was last known to hold.
        self._data_versions: list[int | None] | None = None
        self._steps = steps
        self._engine = engine
        self._eager = EagerStep(training)
        self._plan = CheckPlan(start)
        self._losses: list[Tensor] = []
        self._last_loss = math.nan
        #: The programs, by the shape of their batches; the step before the first that they may run.
        self._stand_ins: dict[Any, StandIn] = {}
        self._since = start
        #: The program that ran the last step, None if Python did.
        self._last: StandIn | None = None
        #: Of the last step that Python took: its loss, and how its batch was nested.
        self._seen_loss = torch.empty(0)
        self._nesting: Any = None
        self._renewals = 0
        self._era = 0
        self._has_other_code_run = False
        self._way_back = WayBack(start)
        self.acceleration = Acceleration(training, is_vouched=engine == "program")
        self._examine()
        if self.reason is None:
            self._keep_way_back()

    @property
    def has_rule(self) -> bool:
        """Whether a rule still finds the rows of each step: not if the data was changed."""
        return self._is_by_rule and self._data_versions in (None, self.training.batch.versions())

    def last_loss(self) -> float:
        """Return the loss of the last step."""
        return float(self._losses[-1]) if self._losses else self._last_loss

    @property
    def checked(self) -> list[int]:
        """The steps at which a program was compared with Python, and passed."""
        return self._plan.checked

    def advance(self, last: int) -> None:
        """Run steps up to `last`.

        A failed check may move `step` back to the last checked step; what was collected of later steps
        is then void.

        Raises:
            TrainingError: `engine="program"`, and no program can run a step; or a check failed, and
                training cannot go back.
        """
        while self.step < last:
            number = self.step + 1
            if self.step in self.checked[-1:] and self._way_back.step != self.step:
                # Not before now: what follows a step (an evaluation, say) belongs to its state.
                self._keep_way_back()
            if self._has_other_code_run:
                # Not before now: the training may end before there is such a step.
                self._has_other_code_run = False
                self.hyperparameters.append((number, self.training.hyperparameters()))
            stand_in = self._ready(number) if self.reason is None else None
            if self.reason is not None:
                self._by_python(number)
            elif stand_in is None:
                self._make(number)
            elif self._plan.is_due(number, self._steps):
                self._check(number, stand_in)
            else:
                last_unchecked = self._plan.until(self._steps) - 1
                self._run(number, min(last, last_unchecked))
            if self.step < number:
                return

    def restart(self, step: int) -> None:
        """Continue after another state, which somebody has brought the training to."""
        self._losses = []
        self._forget_after(step)
        self.step, self._last, self._era = step, None, self._era + 1
        if self.reason is None:
            self._keep_way_back()

    @contextmanager
    def foreign_code(self) -> Iterator[None]:
        """Run code that may change the training; note its changes, which stay.

        Programs continue with changed values of tensors. If something else changes that they depend on,
        they are made again.
        """
        self._hand_over_gradients(as_copies=True)
        # By value: torch does not count every change.
        before = {name: tensor.detach().clone() for name, tensor in self._carried().items()}
        yield
        now = self._carried()
        changed = [n for n, each in now.items() if n not in before or not same_bits(each, before[n])]
        drawn = {name: copy_of(now[name]) for name in changed if name.startswith("generator/")}
        self.watched.note_changes(self.step, self.watched.parts.state(), changed, drawn)
        self._way_back.close()
        self._has_other_code_run, self._era = True, self._era + 1
        self._check_dataset()
        if self.reason is None:
            self._compare_guards()

    def _carried(self) -> dict[str, Tensor]:
        generators = Generators.capture(self.training.device).tensors()
        return self.training.named_state() | {f"generator/{name}": t for name, t in generators.items()}

    def _hand_over_gradients(self, *, as_copies: bool) -> None:
        """Set the gradients of the last step where other code looks for them.

        as_copies: for code that may keep them while programs continue to write into their own.
        """
        if self._last is not None:
            self._last.hand_out(self.watched.parts.state(), as_copies=as_copies)
            self.watched.note_versions()

    def _check_dataset(self) -> None:
        """Check that a Dataset read once would still return the same rows, as far as that is fast.

        Raises:
            TrainingError: it would not.
        """
        guards = self.training.batch.guards
        changed = None if guards is None else guards.difference(is_thorough=False)
        if changed is not None:
            raise DatasetChangedError(changed, self.step)

    def collect(self) -> tuple[int, Tensor]:
        """Return the step of the first loss not yet collected, and the losses from there on."""
        losses, first = self._losses, self.step - len(self._losses) + 1
        self._losses, self.taken, self.hyperparameters = [], [], []
        if not losses:
            return first, torch.empty(0)
        # One loss may be wider than others, or have a dimension.
        found = torch.cat([loss.reshape(1) for loss in losses])
        self._last_loss = float(found[-1])
        return first, found

    def finish(self) -> None:
        """Set the gradients of the last step where a user looks for them."""
        is_changed = self.training.scheduler is not None or self._has_other_code_run
        if is_changed and self.training.has_tensor_settings:
            # Such settings are state, and the last state has them as the next step would.
            self.hyperparameters.append((self.step + 1, self.training.hyperparameters()))
        self._hand_over_gradients(as_copies=False)

    # What runs the steps.

    def _examine(self) -> None:
        """Examine the training: at first, and after a change to something that programs depend on."""
        self.acceleration = Acceleration(self.training, is_vouched=self._engine == "program")
        reason = 'engine="eager" is set' if self._engine == "eager" else self.acceleration.reason
        if reason is not None:
            self._leave_to_python(reason)

    def _compare_guards(self) -> None:
        """Compare what programs depend on after other code has run; make them again if it changed."""
        if not self.has_rule:
            self._leave_to_python("your code changes the data")
            return
        changed = self.acceleration.difference(self.training.named_state())
        if changed is None:
            return
        self._renewals += 1
        if self._renewals > MOST_RENEWALS:
            self._leave_to_python(f"{changed} during an evaluation repeatedly")
            return
        self._stand_ins, self._last, self._since = {}, None, self.step
        self._examine()

    def _leave_to_python(self, reason: str, first: int | None = None) -> None:
        """Run all steps from `first` on (or the next) in Python."""
        if self._engine == "program":
            raise TrainingError(
                f'no program can run these steps: {reason}; engine="auto" runs them in Python'
            )
        self._hand_over_gradients(as_copies=True)
        self._stand_ins, self._last = {}, None
        self.reason = reason
        self.eager_from = self.step + 1 if first is None else first

    def _ready(self, number: int) -> StandIn | None:
        """Return the program of a step on the current tensors, None if it has none."""
        stand_in = self._stand_ins.get(self.training.batch.shape(number))
        if stand_in is None or not stand_in.is_ready(self.watched.parts.state(), self._era):
            return None
        return stand_in

    # Steps.

    def _by_python(self, number: int) -> tuple[Tensor, Tensor]:
        """Run a step in Python; return its batch."""
        self._hand_over_gradients(as_copies=True)
        self._last, self._era = None, self._era + 1
        if self.training.scheduler is not None or self.reason is not None:
            self.hyperparameters.append((number, self.training.hyperparameters()))
        x, y = self.training.batch(number)
        self._keep_loss(number, self.watch(number, x, y))
        self._check_dataset()
        return x, y

    def watch(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        """Run a whole step in Python on a batch, watched, and advance the scheduler; return the loss.

        Raises:
            as `EagerStep.take`.
        """
        watched, eager = self.watched, self._eager
        watched.follow()
        state = watched.parts.state()
        watched.note_changes(number - 1, state)
        inputs, tensors = self._inputs(x, y), {"x": x, "y": y}
        step = watched.begin(state)
        try:
            step.watch.add_batch(tensors)
            step.nesting.append(text_of((x, y)))
            loss = eager.take(x, y, step.has_loss, watched.enter)
            watched.enter("other")
            if eager.advance is not None:
                eager.advance(number)
        finally:
            watched.close()
        self.taken.append(watched.end(number, step, watched.parts.state(), inputs))
        self._seen_loss, self._nesting = loss, step.nested
        return loss

    def _inputs(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the batch as a row has it: nothing where a rule finds it."""
        if self.has_rule:
            self._data_versions = self.training.batch.versions()
            return {}
        # A step, or other code, has written into the data itself: from then on a rule finds other rows.
        copies = self.watched.copies.of({"x": x, "y": y})
        return {f"batch/{name}": copy for name, copy in copies.items()}

    def _make(self, number: int) -> None:
        """Run a step in Python, and make a program for such steps of what it has done."""
        is_first = self._since == self.step
        if is_first:
            self.acceleration.begin()
        before = None if is_first else PartsCopy.of(self.watched.parts)
        x, y = self._by_python(number)
        started = clock.now()
        try:
            stand_in = self.stand_in(x, y)
            # The first step may begin without gradients, and make what later ones find.
            if before is None:
                return
            reason = self._difference(stand_in, None, before, x, y)
        except CreatesTensorsError as error:
            if before is None:
                return
            reason = str(error)
        except NotReplaceableError as error:
            reason = str(error)
        if reason is not None:
            self._leave_to_python(f"{reason} at step {number}", number)
            return
        self._stand_ins[self.training.batch.shape(number)] = stand_in
        self._plan.captured(number, clock.now() - started)

    def stand_in(self, x: Tensor, y: Tensor) -> StandIn:
        """Return a program that runs steps like the last one, which Python took on such a batch.

        Raises:
            NotReplaceableError: there is none; gives the reason.
        """
        path, seen = self.watched.last
        built = self.watched.program_of(path)
        if isinstance(built, str):
            raise NotReplaceableError(built)
        if path.loss is None or path.storages[path.tensors[path.loss].storage].kind != "temporary":
            raise NotReplaceableError("the loss is not the result of an operation of the step")
        assert isinstance(seen, Cursor)
        batch = {"x": x, "y": y}
        did: Any = [self.training.optimizer], []
        fixed = batch if self.training.batch.is_fixed else {}
        known = self.watched.parts, built, path, seen, *did, batch, {}
        return StandIn(*known, is_quiet=True, fixed=fixed)

    def _difference(
        self,
        stand_in: StandIn,
        numbers: Sequence[int | float] | None,
        before: PartsCopy,
        x: Tensor,
        y: Tensor,
    ) -> str | None:
        """Compare a program with the last step, which Python took; return in words what differs.

        Args:
            stand_in: the program.
            numbers: that were predicted for the step, None if none were.
            before: the state before it.
            x, y: its batch.
        """
        path, seen = self.watched.last
        if path != stand_in.path:
            return "Python runs different operations than before"
        assert isinstance(seen, Cursor)
        numbers = seen.numbers if numbers is None else numbers
        logged = {"loss": self._seen_loss}
        return stand_in.difference(numbers, seen, before, {"x": x, "y": y}, logged)

    def _check(self, number: int, stand_in: StandIn) -> None:
        """Run a step in Python, and compare its program with it; Python's step counts.

        Raises:
            TrainingError: they differ, and other code has run since the last good check.
        """
        started = clock.now()
        numbers = self._numbers_of(number, stand_in)
        if numbers is None:
            self._make(number)
            return
        before = PartsCopy.of(self.watched.parts)
        x, y = self._by_python(number)
        reason = self._difference(stand_in, numbers, before, x, y)
        if reason is None:
            self._plan.passed(number, clock.now() - started)
        elif self._way_back.step >= number - 1:
            self._leave_to_python(f"{reason} at step {number}", number)
        else:
            self._go_back(number, reason)

    def _go_back(self, number: int, reason: str) -> None:
        """After a failed check, go back to the last good one; no program runs from there on.

        Raises:
            TrainingError: other code has run since the last good check, and cannot be undone.
        """
        verified = self._way_back.step
        self._way_back.go(self.training, number, reason)
        self._losses = self._losses[: max(0, len(self._losses) - number + verified)]
        self.hyperparameters = [each for each in self.hyperparameters if each[0] <= verified]
        self._forget_after(verified)
        self.step, self._last = verified, None
        self._leave_to_python(f"{reason} at step {number}", verified + 1)

    def _run(self, first: int, last: int) -> None:
        """Run steps by their programs, without checks, up to one that has none."""
        started = clock.now()
        stand_in: StandIn | None = None
        while self.step < last:
            number = self.step + 1
            wanted = self._stand_ins.get(self.training.batch.shape(number))
            if wanted is None or wanted is not stand_in:
                stand_in = self._ready(number)
            numbers = None if stand_in is None else self._numbers_of(number, stand_in)
            if stand_in is None or numbers is None:
                break
            if self.training.scheduler is None:
                self._run_alike(stand_in, numbers, last)
                continue
            self.hyperparameters.append((number, self.training.hyperparameters()))
            self._run_alike(stand_in, numbers, number)
            if self._eager.advance is not None:
                self._eager.advance(number)
        self._renewals = 0
        self._check_dataset()
        self._plan.timed(self.step - first + 1, clock.now() - started)

    def _numbers_of(self, number: int, stand_in: StandIn) -> list[int | float] | None:
        """Return the numbers of a step, None if its program cannot run it any more."""
        try:
            return stand_in.numbers()
        except NotReplaceableError:
            del self._stand_ins[self.training.batch.shape(number)]
            return None

    def _run_alike(self, stand_in: StandIn, numbers: list[int | float], last: int) -> None:
        """Run steps with the same program and the same numbers, up to one that needs another program."""
        batch, live, begin = self.training.batch, stand_in.live, self.step + 1
        assert live is not None
        self._last, shape = stand_in, batch.shape(begin)
        taken = stand_in.begin(numbers)
        if batch.is_fixed:
            stand_in.load(dict(zip("xy", batch(begin), strict=True)))
        try:
            with without_autograd():
                for number in range(begin, last + 1):
                    if not batch.is_fixed:
                        if number > begin and batch.shape(number) != shape:
                            break
                        batch.into(number, *stand_in.places)
                    live.run()
                    self._losses.append(live.loss.clone())
                    self.step = number
        finally:
            if self.step >= begin:
                stand_in.end(taken)
                count = self.step - begin + 1
                self.taken += self.watched.ran(begin, count, taken, stand_in.path, self._nesting)
                self.by_program += count

    def _forget_after(self, step: int) -> None:
        """Discard what was kept of later steps: the training goes back to the state after this one."""
        self.taken = [
            row._replace(count=min(row.count, step - row.step + 1))
            for row in self.taken
            if row.step <= step
        ]
        self.watched.forget_generator()
        self.watched.note_versions()

    def _keep_loss(self, number: int, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self.step = number

    def _keep_way_back(self) -> None:
        """Keep a copy of the verified state."""
        self._way_back.keep(self.training, self.step)
