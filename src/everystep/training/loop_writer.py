"""Writes the recording of a loop: programs, rows of steps, snapshots, facts."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from everystep import clock, numerics
from everystep.recording.continuation import shortened
from everystep.recording.facts import (
    Facts,
    FunctionFacts,
    LoopFacts,
)
from everystep.recording.notice import say
from everystep.recording.recorder import Recorder
from everystep.recording.repeats import Taken
from everystep.step.build import BuiltPath
from everystep.step.check import state_differences
from everystep.step.elsewhere import versions_by_name
from everystep.step.parts_state import PartsState
from everystep.step.path import Path as StepPath
from everystep.step.state import State, copy_of
from everystep.step.taken import TakenByProgram
from everystep.training.facts import facts_of_loop
from everystep.training.loop import now
from everystep.training.loop_resume import ResumedLoop
from everystep.training.notices import Notices
from everystep.training.place import Place
from everystep.training.step_rows import AnyWatch, StepRows, WrittenProgram

__all__ = ["LoopWriter", "StepUnderWay", "changes_of"]

#: Seconds from one time that the recording is passed to the writing thread to the next.
FLUSH_SECONDS = 0.1
#: Steps that are timed before the snapshots' interval is chosen.
TIMED_STEPS = 8

W = TypeVar("W", bound=AnyWatch, covariant=True)


def changes_of(value: Any) -> int:
    """Return how often a tensor was changed in place; 0 of all else, or if torch does not count."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class StepUnderWay(Generic[W]):
    """A step in progress: its watch, its batch, and logged values.

    rates: the learning rates that it uses: as it began, or as an optimizer found them.
    """

    def __init__(self, watch: W, rates: dict[str, float]) -> None:
        self.watch = watch
        self.rates = rates
        self.batch: dict[str, Tensor] = {}
        self.nesting: list[Any] = []
        self.logged: dict[str, Any] = {}
        self.loss: Any = None
        self.loss_version = 0
        self.started = clock.now()
        self._compiled = _compiled()

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile compiled a function in it."""
        return _compiled() > self._compiled

    @property
    def nested(self) -> Any:
        """How the batch was nested; of several, a list."""
        if len(self.nesting) > 1:
            return {"list": self.nesting}
        return self.nesting[0] if self.nesting else None

    @property
    def is_untouched(self) -> bool:
        """Whether the loop has done nothing with it yet."""
        return self.watch.is_empty and not self.logged


class LoopWriter:
    """Turns watched steps into what a run stores, and passes it to the recorder.

    Args:
        directory: of the run; empty unless it is resumed.
        parts: what the loop carries.
        place: where it is in its batches.
        snapshot_budget, batch_budget: bytes that the run may keep.
        advanced: called with a step that was written, and the losses from it on.
        resumed: where a run goes on, None for a new one.

    step: the last step that was added; last_path: what it did; state: the
    live tensors after it; function: returns how the steps of a function ran.
    """

    def __init__(
        self,
        directory: Path,
        parts: PartsState,
        place: Place,
        snapshot_budget: int,
        batch_budget: float,
        advanced: Callable[[int, Sequence[float]], None] | None,
        resumed: ResumedLoop | None = None,
    ) -> None:
        self.step = 0 if resumed is None else resumed.state.step
        self._advanced = advanced
        self._whole = parts
        self._parts = parts.parts
        self._place = place
        self._later = None if resumed is None else resumed.later
        self._seconds_before = 0.0 if resumed is None else resumed.facts.resumed[-1].seconds
        self.last_path: StepPath | None = None
        self.state: dict[str, Tensor] | None = None
        self.function: Callable[[], FunctionFacts] | None = None
        self._taken: list[Taken] = []
        self._losses: list[Any] = []
        self._measured: list[tuple[str, int, Any]] = []
        self._rates: dict[str, float] = {}
        self._pending: State | None = None
        self._lost_to = 0
        self._notices = Notices()
        self._is_still = False
        self._is_finite = resumed is None or resumed.is_finite
        self._has_loss = False
        self._loss_dtype = "float64"
        self._flush_at = 0.0
        self._step_seconds = math.inf
        self._started, self._began = time.perf_counter(), clock.now()
        if resumed is None:
            beginning = parts.snapshot(0)
            trained = facts_of_loop(self._parts, LoopFacts.of(self._parts.named))
            facts = Facts(name=directory.name, started=now(), steps=0, trained=trained)
            self._recorder = Recorder(directory, facts, snapshot_budget, batch_budget=batch_budget)
            self._recorder.snapshot(beginning)
        else:
            self._has_loss, self._rates = resumed.has_loss, resumed.rates
            self._loss_dtype = resumed.loss_dtype
            at, budget = self.step, snapshot_budget
            self._recorder = Recorder(
                directory, resumed.facts, budget, at=at, batch_budget=batch_budget, is_resumed=True
            )
        self._rows = StepRows(self._recorder)
        self._versions = versions_by_name(self._parts.state())
        if message := numerics.warning():
            say(message)

    @property
    def directory(self) -> Path:
        """The run's directory; it may be moved while it is written."""
        return self._recorder.directory

    def wait(self) -> None:
        """Wait for the disk if too much is queued.

        Raises:
            RecordingError: writing the run failed.
        """
        self._recorder.wait()

    def note_changes(self, state: dict[str, Tensor]) -> None:
        """Store what the loop changed since the last step, outside of any. state: the current one."""
        now = versions_by_name(state)
        if now == self._versions:
            return
        changed = {n: state[n] for n in now if self._versions.get(n) != now[n]}
        gone = [name for name in self._versions.keys() - now.keys() if not name.startswith("gradient/")]
        if not changed and not gone:
            return
        copies = {name: copy_of(tensor) for name, tensor in changed.items()}
        self._recorder.change(self.step, copies, gone)
        if self._versions:
            name = next(iter((*changed, *gone))).partition("/")[2]
            self._notices.changed_between(self.step, name)

    def add(self, step: StepUnderWay[AnyWatch], copied: int, after: dict[str, Tensor]) -> None:
        """Add a step that is over.

        Args:
            copied: bytes from elsewhere that were copied since the beginning.
            after: the live tensors of the parts.
        """
        self.step += 1
        # Of a tensor that was changed since it was logged, no operation made the loss.
        is_as_logged = changes_of(step.loss) == step.loss_version
        path = step.watch.end(after, step.loss if is_as_logged else None)
        self.last_path, self.state = path, after
        self._keep_what_is_unknown(step, after)
        inputs = {f"batch/{name}": tensor for name, tensor in step.batch.items()}
        inputs |= self._place.generators
        given = after, inputs, step.nested, copied
        self._taken.append(self._rows.row(self.step, step.watch, path, *given))
        self._note_logged(step, path)
        self._notices.of_step(self.step, step.watch, is_compiled=step.is_compiled)
        self._step_seconds = min(self._step_seconds, clock.now() - step.started)
        self._keep_pending(self._rows.program_of(path))
        self._compare_with_later()
        self._snapshot_if_due()
        self._is_still = isinstance(step.watch, TakenByProgram) and step.watch.is_still
        if not self._is_still:
            self._versions = versions_by_name(after)
        if time.perf_counter() >= self._flush_at:
            self.flush()
            self._flush_at = time.perf_counter() + FLUSH_SECONDS

    def program_of(self, path: StepPath) -> BuiltPath | str:
        """Return the program of a path, or why it has none."""
        known = self._rows.program_of(path)
        return known if isinstance(known, str) else known.built

    def note_versions(self) -> None:
        """Note that the state equals that after the last step, although tensors were written since."""
        self._versions = versions_by_name(self._parts.state())

    def forget_versions(self) -> None:
        """Discard an incomplete step: no snapshot may hold the current state."""
        self._versions, self._is_still = {}, False

    def take_back(self) -> None:
        """Discard the last step, which an exception left."""
        self.step -= 1
        self._recorder.forget_after(self.step)
        self._taken = [row for row in self._taken if row.step <= self.step]
        self._losses = self._losses[: max(0, len(self._losses) - 1)]
        self._measured = [row for row in self._measured if row[1] <= self.step]
        if self._pending is not None and self._pending.step > self.step:
            self._pending = None
        self.forget_versions()

    def finish(self, status: str, reason: str | None) -> None:
        """Take the last snapshot, if the state is still that of the last step, and close the run.

        Raises:
            RecordingError: writing failed; what was written before is kept.
        """
        is_pending = self._pending is not None and self._pending.step == self.step
        self._keep_pending()
        self.flush()
        # A program writes gradients as Python does, and nothing has run since.
        is_last = self._is_still or self._versions == versions_by_name(self._parts.state())
        if self.step and not is_pending and is_last:
            last = self._snapshot()
            # A draw that found no more batches may have used the generators, and no step did.
            rest = last.rest | self._place.at_end
            self._recorder.snapshot(State(last.step, last.parameters, rest, last.settings))
        seconds = time.perf_counter() - self._started
        in_all = None if self._seconds_before is None else self._seconds_before + seconds
        self._recorder.finish(
            self._loop_facts()
            | {"status": status, "reason": reason, "finished": now(), "seconds": in_all}
        )
        self._show_written()

    def _snapshot(self) -> State:
        """Return the current state, with the place in the batches."""
        tensors, settings = self._place.settings()
        state = self._whole.snapshot(self.step)
        return State(state.step, state.parameters, state.rest | tensors, state.settings | settings)

    def _note_logged(self, step: StepUnderWay[AnyWatch], path: StepPath) -> None:
        self._losses.append(step.logged.pop("loss", None))
        if step.loss is not None:
            is_wide = path.loss is None or path.tensors[path.loss].dtype == torch.float64
            if is_wide or not self._has_loss:  # one that float32 would round widens all of them
                self._loss_dtype = "float64" if is_wide else "float32"
            self._has_loss = True
        for name, value in step.logged.items():
            # What the loop logs as a rate may be the one after the step; the name is of the one used.
            title = f"{name} (logged)" if name in step.rates else name
            self._measured.append((title, self.step, value))
        rates = step.rates.items()
        self._measured += [(name, self.step, v) for name, v in rates if self._rates.get(name) != v]
        self._rates = step.rates

    def _keep_what_is_unknown(self, step: StepUnderWay[AnyWatch], state: dict[str, Tensor]) -> None:
        """Store what the step changed unseen."""
        if step.watch.changed_unseen:
            changed = {name: copy_of(state[name]) for name in step.watch.changed_unseen}
            self._recorder.change(self.step, changed)

    def _compare_with_later(self) -> None:
        """Compare the state of a resumed loop with a snapshot that it reaches again.

        Raises:
            RunError: it differs.
        """
        later = self._later
        if later is None or later.step != self.step:
            return
        self._later = None
        now = self._snapshot()
        different = [each.tensor for each in state_differences(later, now, only_seen=True)]
        held = [state.settings.get("held", {}) for state in (later, now)]
        texts = [{n: json.dumps(each, sort_keys=True) for n, each in of.items()} for of in held]
        different += [f"part/{name}" for name in texts[0] if texts[0][name] != texts[1].get(name)]
        if different:
            problem = f"the state is not the recorded one ({shortened(different)})"
            raise self._recorder.differs(self.step, problem)

    def _snapshot_if_due(self) -> None:
        recorder = self._recorder
        if self.step >= TIMED_STEPS and not recorder.has_interval:
            size = sum(tensor.nbytes for tensor in self._parts.state().values())
            recorder.choose_interval(self._step_seconds, size)
        if recorder.lost_to > self._lost_to:
            # Old batches were dropped: everything from here on must open without them.
            self._lost_to = recorder.lost_to
            recorder.plan.pinned = {0, self.step}
            self._keep_pending()
            self._pending = self._snapshot()
        is_due = recorder.plan.is_due(self.step) and not recorder.is_behind
        if (is_due or self.step == recorder.recorded) and self._pending is None:
            self._pending = self._snapshot()

    def _keep_pending(self, following: WrittenProgram | str | None = None) -> None:
        """Write the snapshot that waits: with its gradients only if the step after it has used them."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        if isinstance(following, WrittenProgram):
            used = following.built.program.state_names
            rest = {
                name: tensor
                for name, tensor in state.rest.items()
                if not name.startswith("gradient/") or name in used
            }
            state = State(state.step, state.parameters, rest, state.settings)
        self.flush()  # a state on disk means that its steps are there
        self._recorder.snapshot(state)

    def flush(self) -> None:
        """Pass what was recorded so far to the writer; this also happens several times a second."""
        recorder = self._recorder
        if not self._taken:
            return
        first = self._taken[0].step
        losses = [math.nan if loss is None else float(loss) for loss in self._losses]
        measured = [(name, step, float(value)) for name, step, value in self._measured]
        logged = [
            (first + place, losses[place]) for place, loss in enumerate(self._losses) if loss is not None
        ]
        found = {"loss_dtype": self._loss_dtype} | self._nonfinite_in(logged)
        # Ctrl-C may end this anywhere: one call passes everything on, or nothing.
        recorder.losses(first, losses, measured, self._loop_facts() | found, self._taken)
        self._taken, self._losses, self._measured = [], [], []
        self._show_written()

    def _show_written(self) -> None:
        for first, losses in self._recorder.written():
            if self._advanced is not None:
                self._advanced(first, losses)

    def _nonfinite_in(self, losses: list[tuple[int, float]]) -> dict[str, Any]:
        """Return the fact about the first loss that is not finite, and print it; {} if there is none.

        losses: of the steps that have logged one.
        """
        if not self._has_loss or not self._is_finite:
            return {}
        for step, loss in losses:
            if not math.isfinite(loss):
                self._is_finite = False
                name = self._recorder.directory.name
                say(
                    f"the loss is {loss} at step {step}; everystep when {name} nonfinite finds where it "
                    "came from"
                )
                return {"nonfinite_step": step}
        return {}

    def _loop_facts(self) -> dict[str, Any]:
        loop = LoopFacts(
            parts=LoopFacts.of(self._parts.named).parts,
            programs=self._recorder.program_count,
            unseen=tuple(sorted(self._notices.unseen)),
            has_loss=self._has_loss,
            function=None if self.function is None else self.function(),
        )
        return {"loop": loop, "steps": max(self.step, self._recorder.recorded)}


def _compiled() -> int:
    """Return the number of functions that torch.compile has processed in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["frames"]["total"]) if dynamo is not None else 0
