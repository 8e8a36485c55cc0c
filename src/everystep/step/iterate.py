"""The iteration: takes the steps of a training, eagerly or by a program that is checked against them.

A step is taken by its program where there is one. A step of a kind not met before (the first one,
another batch shape) is taken eagerly and captured, and its program is used from then on if it gives
the very bits. At steps 2, 4, 8, ..., then at an interval that costs under a hundredth of the time,
and at the last step, the program is checked against the eager step again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from everystep.errors import TrainingError
from everystep.program.execute import without_autograd
from everystep.step.build import NotCapturableError, build
from everystep.step.capture import capture
from everystep.step.check import Saved, difference
from everystep.step.eager import EagerStep, Trainee
from everystep.step.known import PythonState, Settings, reason_against
from everystep.step.programs import Programs

__all__ = ["Engine", "Iteration"]

Engine = Literal["auto", "program", "eager"]

#: Checks may take this share of the time, once the steps 2, 4, 8, ... are that far apart.
CHECK_SHARE = 0.01
#: Losses kept on the device until they are collected.
ROOM = 1024


class Iteration:
    """Takes the steps of a training, and keeps their losses until they are collected.

    Args:
        trainee: what is trained, in place.
        steps: the last step that there will be.
        engine: `eager`; `program`, which raises where there is none; or `auto`.
        fold: fold updates into the operations that make their gradients, which changes rounding.
        start: the state that the training is in; steps are counted on from there.

    step: the last step taken; reason: why steps are taken eagerly, or None; eager_from: the first of
    these; checked: the steps at which a program was checked, and held; programs: those captured;
    hyperparameters: (step, the lr and its like by name) of each step since the last `collect` before
    which they may have changed.
    """

    def __init__(
        self,
        trainee: Trainee,
        steps: int,
        engine: Engine = "auto",
        fold: bool = False,
        start: int = 0,
    ) -> None:
        self.trainee = trainee
        self.start = self.step = start
        self.reason: str | None = None
        self.eager_from: int | None = None
        self.programs = Programs(trainee, fold, start + 1)
        self.hyperparameters: list[tuple[int, dict[str, float]]] = []
        self._steps = steps
        self._engine = engine
        self._eager = EagerStep(trainee)
        self._plan = _CheckPlan(start)
        self._losses = torch.empty(0)
        self._slots: tuple[Tensor, ...] = ()
        self._count = 0
        self._collected = 0
        reason = "it was asked for" if engine == "eager" else reason_against(trainee)
        self._verified_step = start
        self._verified = None if reason else Saved(trainee)
        if reason is not None:
            self._go_on_eagerly(reason)

    @property
    def is_full(self) -> bool:
        """Whether losses must be collected before more steps can be taken."""
        return self._count >= ROOM

    def last_loss(self) -> float:
        """Return the loss of the last step."""
        return float(self._losses[(self._count or self._collected) - 1])

    @property
    def checked(self) -> list[int]:
        """The steps at which a program was checked against the eager step, and held."""
        return self._plan.checked

    def advance(self, last: int) -> None:
        """Take steps up to `last`, or until so many losses are kept that they must be collected.

        A failed check brings `step` back to the last step that was checked: what was collected of
        later steps is void.

        Raises:
            TrainingError: a program was demanded, and there is none.
        """
        while self.step < last and self._count < ROOM:
            number = self.step + 1
            if self.step in self.checked[-1:] and self._verified_step != self.step:
                # Not before now: what follows a step (an evaluation, say) belongs to its state.
                self._verified, self._verified_step = Saved(self.trainee), self.step
            if self.reason is not None:
                self._keep(number, self._eager.take(*self.trainee.batch(number)))
            elif not self.programs.has(number):
                self._capture(number)
            elif number >= self._plan.next or number == self._steps:
                self._check(number)
            else:
                last_unchecked = min(self._plan.next, self._steps) - 1
                self._run(number, min(last, last_unchecked, self.step + ROOM - self._count))
            if self.step < number:
                return

    @contextmanager
    def foreign_code(self) -> Iterator[None]:
        """What runs within may change the training; if it does, steps are taken eagerly from here on.

        It may change the numbers of tensors: programs go on with these.
        """
        if self.reason is not None:
            yield
            return
        before = PythonState(self.trainee), Settings(self.trainee)
        if self.step > self.start:
            self.programs.hand_over_gradients(self.step)
        yield
        self.programs.refresh()
        changed = before[0].difference(PythonState(self.trainee), generators=False)
        changed = changed or before[1].difference(Settings(self.trainee))
        if changed is not None:
            self._go_on_eagerly(f"{changed} in an evaluation")

    def collect(self) -> tuple[int, Tensor]:
        """Return the step of the first loss not collected before, and the losses from there on."""
        first, count = self.step - self._count + 1, self._count
        self._count, self._collected = 0, count or self._collected
        self.hyperparameters = []
        return first, self._losses[:count].clone()

    def finish(self) -> None:
        """Leave the gradients of the last step where a user looks for them."""
        if self.reason is None and self.step > self.start and self.step not in self.checked:
            self.programs.hand_over_gradients(self.step)

    def _capture(self, number: int) -> None:
        """Take a step eagerly, capture it, and use its program from now on if it gives the same."""
        python = PythonState(self.trainee)
        before = Saved(self.trainee)
        captured = capture(self._eager, number)
        changed = python.difference(PythonState(self.trainee))
        try:
            if changed is not None:
                raise NotCapturableError(changed)
            self.programs.add(number, build(captured, self.trainee))
        except NotCapturableError as error:
            self._keep(number, captured.loss)
            self._fail(number, str(error))
            return
        if self._compare(number, before, captured.loss):
            self._plan.captured(number)
        else:
            self.programs.discard(number)

    def _check(self, number: int) -> None:
        """Take a step eagerly and by its program, and compare."""
        started = time.perf_counter()
        python = PythonState(self.trainee)
        before = Saved(self.trainee)
        loss = self._eager.take(*self.trainee.batch(number))
        changed = python.difference(PythonState(self.trainee))
        if self._compare(number, before, loss, changed):
            self._plan.passed(number, time.perf_counter() - started)

    def _compare(self, number: int, before: Saved, loss: Tensor, changed: str | None = None) -> bool:
        """Take a step by its program that has just been taken eagerly; tell whether it is the same."""
        expected = Saved(self.trainee)
        wanted = expected.tensors | {"loss": loss.reshape(())}
        wanted |= {f"gradient/{name}": g for name, g in self.trainee.gradients().items()}
        try:
            reason = changed or self._difference(number, before, wanted, expected)
        except Exception as error:  # whatever torch's kernels make of what they are given
            reason = f"its program fails ({error})"
        if reason is None:
            self._keep(number, self.programs.bound(number).loss)
            return True
        expected.restore(self.trainee, forget_new=False)
        self._keep(number, loss)
        self._fail(number, reason)
        return False

    def _difference(
        self, number: int, before: Saved, wanted: dict[str, Tensor], expected: Saved
    ) -> str | None:
        """Take a step by its program, and say in words what is not as it should be, or None."""
        trainee, programs = self.trainee, self.programs
        programs.refresh()
        bound = programs.bound(number)
        before.restore(trainee, forget_new=bound.program.optimizer_step is not None)
        programs.load_batch(number, bound)
        programs.load_rates()
        with without_autograd():
            bound.run()
        found = trainee.named_state() | {"loss": bound.loss.reshape(())}
        found |= {f"gradient/{name}": gradient for name, gradient in bound.gradients.items()}
        derived = {f"gradient/{name}" for name in bound.program.derived_gradients}
        compared = {name: tensor for name, tensor in wanted.items() if name not in derived}
        name = difference(compared, found, folded=programs.is_folded)
        if name is None and not expected.generators.same_as(trainee.device):
            name = "the random generator"
        kind = "numbers too far off" if programs.is_folded else "other bits"
        return None if name is None else f"its program gives {kind} in {name}"

    def _run(self, first: int, last: int) -> None:
        """Take steps by their programs, without a look to the left or right."""
        started = time.perf_counter()
        if self.trainee.schedule is None and not self.trainee.batch.runs_python:
            with without_autograd():
                self._run_alone(first, last)
        else:
            self._run_with_python(first, last)
        self._plan.timed(self.step - first + 1, time.perf_counter() - started)

    def _run_alone(self, first: int, last: int) -> None:
        """Take steps between which none of the user's Python runs."""
        programs, slots, is_fixed = self.programs, self._slots, self.trainee.batch.is_fixed
        bound = programs.bound(first)
        for number in range(first, last + 1):
            if not is_fixed:
                if not programs.has(number):
                    return
                bound = programs.bound(number)
                programs.load_batch(number, bound)
            for call in bound.calls:
                call()
            slots[self._count].copy_(bound.loss)
            self._count += 1
            self.step = number

    def _run_with_python(self, first: int, last: int) -> None:
        """Take steps between which a schedule or a Dataset runs, which may use autograd."""
        programs = self.programs
        for number in range(first, last + 1):
            if not programs.has(number):
                return
            bound = programs.bound(number)
            programs.load_batch(number, bound)
            programs.load_rates()
            with without_autograd():
                bound.run()
            self._keep(number, bound.loss)

    def _keep(self, number: int, loss: Tensor) -> None:
        """A step has been taken: keep its loss, and let the schedule go on."""
        if not self._slots:
            self._losses = torch.empty(ROOM, dtype=loss.dtype, device=loss.device)
            self._slots = tuple(self._losses.view(ROOM, *loss.shape).unbind())
        self._slots[self._count].copy_(loss.detach())
        self._count += 1
        self._note_hyperparameters(number)
        self.step = number
        if self._eager.advance is not None:
            self._eager.advance(number)

    def _note_hyperparameters(self, number: int) -> None:
        if self.trainee.schedule is not None or self.reason is not None:
            self.hyperparameters.append((number, self.trainee.hyperparameters()))

    def _fail(self, number: int, reason: str) -> None:
        """There is no program from here on; what was taken since the last good check does not count.

        The step itself stands where no step was taken by program since then.
        """
        verified = self._verified_step
        if self._verified is not None and verified < number - 1:
            self._verified.restore(self.trainee, forget_new=True, whole=True)
            self._count = max(0, self._count - (number - verified))
            kept = [each for each in self.hyperparameters if each[0] <= verified]
            self.hyperparameters = kept
            self.step = verified
        self._go_on_eagerly(f"{reason} at step {number}")

    def _go_on_eagerly(self, reason: str) -> None:
        if self._engine == "program":
            raise TrainingError(
                f'no program can take these steps: {reason}; engine = "auto" takes them eagerly'
            )
        self.reason = reason
        # A step that was only watched was taken eagerly, too.
        self.eager_from = self.step + 1 if self.checked else self.start + 1


@dataclass
class _CheckPlan:
    """When a program was checked, and when it will be: ever more rarely from `start` on."""

    start: int = 0
    checked: list[int] = field(default_factory=list)
    next: int = 0
    _step_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.next = self.start + 2

    def timed(self, steps: int, seconds: float) -> None:
        """So many steps by program took so long."""
        self._step_seconds = seconds / steps if steps else 0.0

    def captured(self, step: int) -> None:
        """A program was captured at a step, and held."""
        self.checked.append(step)
        if step >= self.next:
            self.next = 2 * step - self.start

    def passed(self, step: int, seconds: float) -> None:
        """A check has passed at a step; it took so long."""
        self.checked.append(step)
        interval = 1
        while interval < step - self.start and interval * self._step_seconds * CHECK_SHARE < seconds:
            interval *= 2
        self.next = step + interval
