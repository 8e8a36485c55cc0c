"""Function recording: records the calls of a step function, and steps by programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.memory import copy_into
from everystep.recording.facts import FunctionFacts
from everystep.step.check import same_bits
from everystep.step.checkpoint import PartsCheckpoint
from everystep.step.elsewhere import Elsewhere
from everystep.step.follow import Follower
from everystep.step.optimizer_numbers import OptimizerNumbers
from everystep.step.parts import Parts
from everystep.step.path import Path
from everystep.step.plain import BuiltPath
from everystep.step.purity.step_reader import StrictWatch
from everystep.step.stand_in import StandIn
from everystep.training.batch import tensors_of, text_of
from everystep.training.loop_writer import AnyWatch, StepUnderWay, changes_of
from everystep.training.record import R, Recording

__all__ = ["FunctionRecording"]


class _SeenBatch(NamedTuple):
    """What is kept of a batch. era: in which nothing changes it."""

    batch: tuple[Any, ...]
    era: int
    tensors: dict[str, Tensor]
    copies: dict[str, Tensor]
    nesting: list[Any]


class FunctionRecording(Recording[R]):
    """A recording of a step function: its calls, and the steps by programs."""

    _seen: _SeenBatch | None = None
    _optimizers = OptimizerNumbers()

    @property
    def parts(self) -> Parts:
        """What is trained."""
        return self._parts

    @property
    def follower(self) -> Follower:
        """Follows which module runs."""
        return self._follower

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

    def program_of(self, path: Path) -> BuiltPath | None:
        """Return the program of an observed step, None if it has none."""
        return self._open().program_of(path)

    def note_function(self, facts: Callable[[], FunctionFacts]) -> None:
        """Note how the steps of a function run. facts: returns the current facts."""
        self._open().function = facts

    def take(
        self, stand_in: StandIn, state: dict[str, Tensor], *batch: Any, is_settled: bool, era: int
    ) -> dict[str, Any]:
        """Run a step by a program, on a batch or without one, and record it; return what it logs.

        Args:
            state: the live tensors of the parts; updated to those after the step.
            is_settled: nothing has run since the last step, which a program ran.
            era: the number of the current stretch of such steps.

        Raises:
            NotProvenError: the program cannot run this step; nothing has happened yet.
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

    @contextmanager
    def rehearsed(self, *batch: Any) -> Iterator[StrictWatch]:
        """Run a step inside without recording it; restore everything afterwards."""
        writer, parts = self._open(), self._parts
        watch = StrictWatch(parts.device, self._follower, Elsewhere())
        writer.note_changes(parts.state())
        checkpoint = PartsCheckpoint(parts)
        tensors = [tensor for each in batch for tensor in tensors_of(each).values()]
        copies = [tensor.detach().clone() for tensor in tensors]
        try:
            self._begin(watch, checkpoint.state, *(batch or (None,)))
            yield watch
        finally:
            self._close()
            checkpoint.restore()
            with torch.no_grad():
                for tensor, copy in zip(tensors, copies, strict=True):
                    if not same_bits(tensor, copy):
                        copy_into(tensor, copy)
            writer.note_versions()

    def path_of(self, watch: StrictWatch) -> Path:
        """Return the path of a rehearsed step that has ended."""
        step = self._close()
        return watch.end(self._parts.state(), None if step is None else step.loss)
