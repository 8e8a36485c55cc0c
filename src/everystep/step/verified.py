"""Verified: compares programs with the eager step, and decides when."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from everystep.errors import TrainingError
from everystep.program.execute import BoundProgram
from everystep.step.advance import take
from everystep.step.check import difference
from everystep.step.checkpoint import Checkpoint
from everystep.step.eager import EagerStep, Training
from everystep.step.generators import Generators
from everystep.step.named_state import first_names, parameter_names
from everystep.step.programs import Programs

__all__ = ["CheckPlan", "Verifier", "WayBack"]

#: Checks may take this share of the time, once the steps 2, 4, 8, ... are that far apart. A check that
#: takes longer than so many seconds may not take more before either, nor at the last step.
CHECK_SHARE = 0.01
LIGHT_SECONDS = 0.03


class Verifier:
    """Runs a step by its program and in Python, and compares the two; Python's step counts.

    Args:
        training: the training.
        programs: the programs to compare.
        eager: the step in Python.
    """

    def __init__(self, training: Training, programs: Programs, eager: EagerStep) -> None:
        self.training = training
        self.programs = programs
        self._eager = eager

    def check(self, number: int, before: Checkpoint) -> tuple[Tensor, str | None]:
        """Run a whole step both ways, from the current state, `before`.

        Returns the loss, and what differs, in words, or None.
        """
        loss = self._eager.take(*self.training.batch(number))
        return loss, self.compare(number, before, loss, forget_new=False)

    def compare(
        self,
        number: int,
        before: Checkpoint,
        loss: Tensor,
        *,
        forget_new: bool,
    ) -> str | None:
        """Run the program of a step that just ran eagerly, from the state before, and compare.

        forget_new: whether to drop optimizer state created since.

        Returns what differs, in words, or None; the training is then as the eager step left it.
        """
        expected = Checkpoint(self.training)
        wanted = expected.tensors | {"loss": loss.reshape(())}
        wanted |= {f"gradient/{name}": g.clone() for name, g in self.training.gradients().items()}
        model, optimizer = self.training.model, self.training.optimizer
        parameters = first_names(model) | parameter_names(model, optimizer)
        gradients = {parameter: parameter.grad for parameter in parameters}
        try:
            reason = self._difference(number, before, wanted, expected, forget_new)
        except Exception as error:  # whatever torch's kernels make of what they are given
            reason = f"its program fails ({error})"
        for parameter, gradient in gradients.items():  # a program hands its own to an optimizer
            parameter.grad = gradient
        if reason is not None:
            expected.restore(self.training, forget_new=False)
        return reason

    def _difference(
        self,
        number: int,
        before: Checkpoint,
        wanted: dict[str, Tensor],
        expected: Checkpoint,
        forget_new: bool,
    ) -> str | None:
        """Run a step by its program, and return in words what differs, or None."""
        training, programs = self.training, self.programs
        programs.refresh()
        program = programs.bound(number).program
        before.restore(training, forget_new=forget_new and program.optimizer_step is not None)
        bound = take(programs, number)
        found = {n: t for n, t in training.named_state().items() if n in expected.tensors}
        found |= self._given_by(bound)
        return self._what_differs(wanted, found, expected)

    def _what_differs(
        self, wanted: dict[str, Tensor], found: dict[str, Tensor], expected: Checkpoint
    ) -> str | None:
        """Return in words what a program computed differently from Python, or None."""
        name = difference(wanted, found)
        generators = Generators.capture(self.training.device)
        if name is None and not expected.generators.same_as(generators):
            name = "the random generator"
        return None if name is None else f"its program gives different bits in {name}"

    def _given_by(self, bound: BoundProgram) -> dict[str, Tensor]:
        """Return the loss and the gradients of a program."""
        gradients = {f"gradient/{name}": gradient for name, gradient in bound.gradients.items()}
        return gradients | {"loss": bound.loss.reshape(())}


@dataclass
class CheckPlan:
    """When a program was checked, and when it will be: ever more rarely from `start` on."""

    start: int = 0
    checked: list[int] = field(default_factory=list)
    next: int = 0
    _step_seconds: float = 0.0
    _seconds: float = 0.0

    def __post_init__(self) -> None:
        self.next = self.start + 2

    def timed(self, steps: int, seconds: float) -> None:
        """Note the time of steps by program."""
        self._step_seconds = seconds / steps if steps > 0 else 0.0

    def captured(self, step: int, seconds: float) -> None:
        """Note that a program was captured at a step and passed, and the time of comparing the two."""
        if step >= self.next:
            self.passed(step, 2 * seconds)  # a check also runs the step in Python
        else:
            self.checked.append(step)

    def is_due(self, step: int, last: int | None) -> bool:
        """Tell whether to check at a step; the last step of a training is checked if that is cheap."""
        return step >= self.next or (step == last and self._is_cheap(step))

    def until(self, last: int) -> int:
        """Return the next step to check, or the one after the last."""
        ends = last if self._is_cheap(last) else last + 1
        return min(self.next, ends)

    def _is_cheap(self, step: int) -> bool:
        since = step - (self.checked[-1] if self.checked else self.start)
        allowed = since * self._step_seconds * CHECK_SHARE
        return self.is_light(self._seconds) or allowed >= self._seconds

    def is_light(self, seconds: float) -> bool:
        """Tell whether something takes too little time to matter."""
        return seconds < LIGHT_SECONDS

    def passed(self, step: int, seconds: float) -> None:
        """Note that a check passed at a step, and its time."""
        self.checked.append(step)
        self._seconds = seconds
        # A check runs a step twice, and at the first check no step was timed alone.
        allowed = (self._step_seconds or seconds / 2) * CHECK_SHARE
        is_light = self.is_light(seconds)
        interval = 1
        while interval * allowed < seconds and (interval < step - self.start or not is_light):
            interval *= 2
        self.next = step + interval


class WayBack:
    """The last verified state, which training can go back to unless that is closed.

    step: the step after which it is.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._checkpoint: Checkpoint | None = None

    def keep(self, training: Training, step: int, *, is_possible: bool) -> None:
        """Keep a copy of the verified state, if going back to it may be possible."""
        self.step = step
        self._checkpoint = Checkpoint(training) if is_possible else None

    def close(self) -> None:
        """Close the way back: unknown code has run, and cannot be undone."""
        self._checkpoint = None

    def go(self, training: Training, number: int, reason: str) -> None:
        """Restore the state, because step `number` cannot be trusted.

        Raises:
            TrainingError: there is no way back.
        """
        if self._checkpoint is None:
            raise TrainingError(
                f"step {number} cannot be trusted: {reason}. Your code has run since the last check, "
                f"at step {self.step}, so training cannot go back. Steps up to {self.step} are "
                'verified, later ones are not; engine="eager" trains without programs'
            )
        self._checkpoint.restore(training, forget_new=True, has_schedule=True)
