"""Verified: compares programs with the eager step, and decides when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from everystep.errors import TrainingError
from everystep.program.execute import BoundProgram
from everystep.step.advance import take
from everystep.step.check import difference
from everystep.step.checkpoint import Checkpoint
from everystep.step.eager import EagerStep, Training
from everystep.step.generators import Generators
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
        has_update: whether programs run the update, too; without it, the optimizer itself does.
    """

    def __init__(
        self, training: Training, programs: Programs, eager: EagerStep, has_update: bool
    ) -> None:
        self.training = training
        self.programs = programs
        self.has_update = has_update
        self._eager = eager

    def check(self, number: int) -> tuple[Tensor, str | None]:
        """Run a whole step both ways.

        Returns the loss, and what differs, in words, or None.
        """
        before = self.saved()
        if self.has_update:
            loss = self._eager.take(*self.training.batch(number))
            return loss, self.compare(number, before, loss, forget_new=False)
        loss, reason = self._check_until_update(number, before)
        self._eager.update()
        return loss, reason

    def saved(self) -> Checkpoint:
        """Return a copy of the state, as far as programs change it."""
        return Checkpoint(self.training, has_optimizer=self.has_update)

    def compare(
        self,
        number: int,
        before: Checkpoint,
        loss: Tensor,
        *,
        forget_new: bool,
        held: Mapping[Tensor, Tensor] = MappingProxyType({}),
    ) -> str | None:
        """Run the program of a step that just ran eagerly, from the state before, and compare.

        forget_new: whether to drop optimizer state created since; held: copies of gradients from before
        the backward pass, by parameter.

        Returns what differs, in words, or None; the training is then as the eager step left it.
        """
        expected = self.saved()
        wanted = expected.tensors | {"loss": loss.reshape(())}
        wanted |= {f"gradient/{name}": g.clone() for name, g in self.training.gradients().items()}
        gradients = {p: p.grad for p in self.programs.parameters_by_name().values()}
        try:
            reason = self._difference(number, before, wanted, expected, held, forget_new)
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
        held: Mapping[Tensor, Tensor],
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
        self._add_held(wanted, found, held)
        return self._what_differs(wanted, found, expected)

    def _check_until_update(self, number: int, before: Checkpoint) -> tuple[Tensor, str | None]:
        """Run a step by its program and eagerly up to its update, and compare; the eager step counts.

        Returns the loss, and in words what differs, or None.
        """
        training = self.training
        bound = self.programs.bound(number)
        failed = None
        try:
            take(self.programs, number)
        except Exception as error:  # whatever torch's kernels make of what they are given
            failed = f"its program fails ({error})"
        of_program = Checkpoint(training, has_optimizer=False)
        found = of_program.tensors | {n: t.clone() for n, t in self._given_by(bound).items()}
        before.restore(training, forget_new=False)
        held: dict[Tensor, Tensor] = {}
        loss = self._eager.differentiate(*training.batch(number), held)
        expected = Checkpoint(training, has_optimizer=False)
        wanted = expected.tensors | {"loss": loss.reshape(())}
        wanted |= {f"gradient/{name}": gradient for name, gradient in training.gradients().items()}
        self._add_held(wanted, found, held)
        return loss, failed or self._what_differs(wanted, found, expected, of_program)

    def _add_held(
        self, wanted: dict[str, Tensor], found: dict[str, Tensor], held: Mapping[Tensor, Tensor]
    ) -> None:
        """Add a program's gradients to those that an optimizer had not dropped, as autograd does."""
        for name, parameter in self.programs.parameters_by_name().items():
            key = f"gradient/{name}"
            if parameter in held and key in found:
                found[key] = held[parameter] + found[key]
            elif parameter in held:
                wanted.pop(key, None)

    def _what_differs(
        self,
        wanted: dict[str, Tensor],
        found: dict[str, Tensor],
        expected: Checkpoint,
        of_program: Checkpoint | None = None,
    ) -> str | None:
        """Return in words what a program computed differently from Python, or None."""
        name = difference(wanted, found)
        device = self.training.device
        generators = of_program.generators if of_program else Generators.capture(device)
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
