"""Function recording: records the calls of a step function, and steps by programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.recording.facts import FunctionFacts
from everystep.step.build import BuiltPath
from everystep.step.parts import Parts
from everystep.step.path import Path
from everystep.step.stand_in import Around, StandIn
from everystep.training.batch import tensors_of, text_of
from everystep.training.loop_writer import StepUnderWay, changes_of
from everystep.training.record import R, Recording
from everystep.training.step_rows import AnyWatch

__all__ = ["FunctionRecording"]


class _SeenBatch(NamedTuple):
    """What is kept of a batch. era: in which nothing changes it."""

    batch: tuple[Any, ...]
    era: int
    tensors: dict[str, Tensor]
    copies: dict[str, Tensor]
    nesting: list[Any]


class FunctionRecording(Recording[R]):
    """A recording of a step function: its calls, and the steps by programs.

    around: what the current step does besides operations, where somebody asks for it.
    """

    around: Around | None = None
    _seen: _SeenBatch | None = None

    @property
    def parts(self) -> Parts:
        """What is trained."""
        return self._parts

    @property
    def step_count(self) -> int:
        """How many steps were recorded."""
        return self._open().step

    @property
    def last(self) -> tuple[Path, AnyWatch]:
        """The path of the last step, and its watch."""
        path = self._open().last_path
        assert path is not None and self._last is not None
        return path, self._last

    def state_now(self, *, is_settled: bool) -> dict[str, Tensor]:
        """Return the live tensors of the parts. is_settled: nothing has run since the last step."""
        known = self._open().state
        return known if is_settled and known is not None else self._parts.state()

    def program_of(self, path: Path) -> BuiltPath | str:
        """Return the program of an observed step, or why it has none."""
        return self._open().program_of(path)

    def note_function(self, facts: Callable[[], FunctionFacts]) -> None:
        """Note that programs run steps of a function. facts: returns how, so far."""
        self._open().function = facts

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer, has_arguments: bool) -> None:
        if self.around is not None and self._under_way is not None:
            self.around.optimizer_begins(optimizer)
        super()._optimizer_begins(optimizer, has_arguments)

    def take(
        self, stand_in: StandIn, state: dict[str, Tensor], *batch: Any, is_settled: bool, era: int
    ) -> dict[str, Any]:
        """Run a step by a program, on a batch or without one, and record it; return what it logs.

        Args:
            state: the live tensors of the parts; updated to those after the step.
            is_settled: nothing has run since the last step, which a program ran.
            era: the number of the current stretch of such steps.

        Raises:
            NotReplaceableError: the program cannot run this step; nothing has happened yet.
            RecordingError: writing the run failed.
        """
        writer = self._open()
        writer.wait()
        if not is_settled:
            writer.note_changes(state)
        seen, rates = self._batch_of(batch, era), self._parts.rates()
        try:
            watch, logged = stand_in.take(state, seen.tensors, is_settled=is_settled)
        except (RuntimeError, IndexError, ValueError, TypeError):  # the step was not taken to its end
            writer.forget_versions()
            raise
        step = StepUnderWay(watch, rates)
        step.batch, step.nesting = seen.copies, seen.nesting
        step.logged, step.loss = dict(logged), logged.get("loss")
        step.loss_version = changes_of(step.loss)
        writer.add(step, self._elsewhere.copied, state)
        return logged

    def _batch_of(self, batch: tuple[Any, ...], era: int) -> _SeenBatch:
        """Return what is kept of a batch; of the last one again if it is the same, in the same era."""
        seen = self._seen
        if seen is None or seen.era != era or [*map(id, seen.batch)] != [*map(id, batch)]:
            tensors = {name: t for each in batch for name, t in tensors_of(each).items()}
            copies = self._copies.of(tensors, era)
            seen = self._seen = _SeenBatch(batch, era, tensors, copies, [*map(text_of, batch)])
        return seen

    def release(self, stand_in: StandIn) -> None:
        """Give the parts gradients that no program writes into, before Python runs a step."""
        writer = self._open()
        if writer.state is not None and stand_in.release(writer.state):
            writer.note_versions()
