"""Step functions: a user's step, called for each batch and recorded, or run by programs where the user
vouches for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from everystep import clock
from everystep.errors import UsageError
from everystep.recording.facts import FunctionFacts
from everystep.step.around import Around
from everystep.step.stand_in import Number, StandIn
from everystep.step.surroundings import Surroundings
from everystep.training.acceleration import Acceleration
from everystep.training.batch import key_of, text_of
from everystep.training.dataset import called
from everystep.training.record import Recording
from everystep.training.watched_steps import StepUnderWay

__all__ = ["VouchedStep", "run_step"]


Step = Callable[..., Any]


def run_step(step: Step, recording: Recording[Any], *batch: Any) -> dict[str, Any]:
    """Run a step in Python, on a batch or without one, and record it; return what it logs.

    Raises:
        UsageError: it returns something that cannot be logged.
    """
    with recording.step(*batch):
        logged = _logged(step(*batch))
        recording.log(**logged)
    return logged


class _SeenBatch(NamedTuple):
    """A batch. era: in which nothing changes it; key: of its kind."""

    batch: tuple[Any, ...]
    era: int
    key: Any
    tensors: dict[str, Tensor]
    nesting: list[Any]


class VouchedStep(Acceleration):
    """A vouched step function: programs run its steps, and are compared with Python.

    Args:
        step: returns the loss, or numbers by name including `loss`, or None.
        recording: open.
        steps: the last step, None if unknown.
        is_quiet: whether only torch's code runs between two steps.

    Raises:
        TrainingError: no program can run such steps.
    """

    def __init__(self, step: Step, recording: Recording[Any], steps: int | None, is_quiet: bool) -> None:
        self._step = step
        self._recording = recording
        self._writer = writer = recording.writer
        given = writer.watched, Surroundings(writer.parts), writer.step, steps
        super().__init__(*given, is_known=False, is_quiet=is_quiet)
        self._seen: _SeenBatch | None = None
        self._parameters: list[Tensor] = []
        self._compare_guards(writer.step)

    @property
    def facts(self) -> FunctionFacts:
        """How the steps ran."""
        kinds, checked = len(self._kinds), self.checked
        unmet = f"there are {kinds} kinds of batches, and none came often enough"
        return FunctionFacts(
            after=self._plan.start,
            by_program=self.by_program,
            checks=len(checked),
            verified_to=checked[-1] if checked else 0,
            reason=unmet if not self.by_program and kinds > 1 else None,
        )

    def take(self, *batch: Any) -> dict[str, Any]:
        """Run a step; return what it logs.

        Args:
            batch: one, or none.

        Raises:
            UsageError: the step returns something that cannot be logged.
            TrainingError: no program can run such steps, or a check failed.
        """
        number = self._writer.step + 1
        if not self._is_settled:
            self._era += 1
            self._compare_guards(number - 1)
            self._parameters = [*self.watched.parts.parameter_names()]
        # Steps are of one kind if their batches are, and the same gradients are pending.
        pending = tuple([parameter.grad is None for parameter in self._parameters])
        return self._take(number, number, (self._seen_batch(batch).key, pending), batch)

    def _seen_batch(self, batch: tuple[Any, ...]) -> _SeenBatch:
        """Return what is known of a batch; of the last one if it is the same, in the same era."""
        seen, era = self._seen, self._era
        if seen is None or seen.era != era or [*map(id, seen.batch)] != [*map(id, batch)]:
            places = {tensor.untyped_storage()._cdata for tensor in self._state().values()}
            about = key_of(batch, places), self._tensors_of(0, batch), [*map(text_of, batch)]
            seen = self._seen = _SeenBatch(batch, era, *about)
        return seen

    def _by_python(self, number: int, batch: tuple[Any, ...]) -> dict[str, Any]:
        """Run a step in Python, and record it."""
        self._release()
        self.watched.around = Around(self.watched.parts)
        return run_step(self._step, self._recording, *batch)

    def _by_program(
        self,
        number: int,
        last: int,
        stand_in: StandIn,
        numbers: list[Number],
        state: dict[str, Tensor],
        batch: tuple[Any, ...],
    ) -> dict[str, Any]:
        """Run a step by a program, and record it."""
        started, writer = clock.now(), self._writer
        is_settled, self._is_settled = self._is_settled, False
        writer.recorder.wait()
        if not is_settled:
            writer.note_changes(state)
        seen, rates = self._seen_batch(batch), self.watched.parts.rates()
        copies = self.watched.copies.of(seen.tensors, self._era)
        try:
            watch, logged = stand_in.take(state, numbers, seen.tensors, is_settled=is_settled)
        except (RuntimeError, IndexError, ValueError, TypeError):  # the step was not taken to its end
            self.watched.forget_versions()
            raise
        step = StepUnderWay(watch, rates)
        step.batch, step.nesting = copies, seen.nesting
        step.logged = dict(logged)
        step.has_loss(logged.get("loss"))
        writer.add(step, state)
        self._ran(1, started)
        self._is_settled = self._is_quiet and not stand_in.schedulers
        return logged


def _logged(result: Any) -> dict[str, Any]:
    """Return the values that a step logs, by name.

    Raises:
        UsageError: it returned neither a number nor numbers by name.
    """
    if result is None:
        return {}
    if isinstance(result, Tensor | int | float):
        return {"loss": result}
    if isinstance(result, Mapping) and all(isinstance(name, str) for name in result):
        return dict(result)
    raise UsageError(
        f'the step returns {called(result)}; return the loss, or numbers by name: {{"loss": loss, '
        '"accuracy": accuracy}'
    )
