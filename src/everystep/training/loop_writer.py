"""Writes the recording of a loop: programs, rows of steps, snapshots, facts."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep import numerics
from everystep.errors import named, say
from everystep.recording.facts import EngineFacts, Facts, LoopFacts
from everystep.recording.keep import RECENT
from everystep.recording.recorder import Recorder
from everystep.step.parts_state import PartsState, Rest
from everystep.step.path import Path as StepPath
from everystep.step.state import State, state_differences
from everystep.training.agreement import ranks_here
from everystep.training.loader_position import LoaderPosition
from everystep.training.step_under_way import AnyWatch, StepUnderWay
from everystep.training.watched_steps import WatchedSteps
from everystep.training.writer import RunWriter

__all__ = ["LoopWriter"]


class _Here(NamedTuple):
    """What a loop carries after a step besides tensors. place: in the batches."""

    rest: Rest
    place: dict[str, Any]


class LoopWriter(RunWriter):
    """Turns watched steps of a loop into stored data.

    Args:
        whole: what the loop carries.
        place: where it is in its batches.
        others: as `RunWriter` has them.

    parts: what the loop carries; watched: its steps; function: returns how the steps of a function ran;
    has_loss: whether a step has logged a loss; has_computed_batches: see `LoopFacts`; of a resumed loop,
    beginning: the state that it continues from, and later: one that it must reach again, if any.
    """

    def __init__(
        self,
        recorder: Recorder,
        start: int,
        facts: Facts,
        whole: PartsState,
        place: LoaderPosition,
        advanced: Callable[[int, Sequence[float]], None] | None,
        earlier: Facts | None = None,
    ) -> None:
        super().__init__(recorder, start, facts, say, advanced, earlier)
        self.whole = whole
        self.parts = whole.parts
        self._place = place
        self.function: Callable[[], EngineFacts] | None = None
        self.beginning: State | None = None
        self.later: State | None = None
        before = () if earlier is None else (*(e.training for e in earlier.earlier), earlier.training)
        self.has_computed_batches = False
        self.has_loss = any(each.loop is not None and each.loop.has_loss for each in before)
        self._loss_dtype = earlier.loss_dtype if earlier is not None and self.has_loss else "float64"
        self._pending: State | None = None
        #: Whether code between the last two steps has changed the state.
        self._is_changed = False
        #: The last step, if it lacks a loss: an exception that left it may take it back.
        self._lacking = 0
        #: As code after the last step began, if it has.
        self._at_rest: _Here | None = None
        self._in_effect = numerics.in_effect()
        self._numerics = numerics.Numerics.read(self.parts.device)
        self.watched = WatchedSteps(self.parts, recorder)
        if not self.watched.notices.is_quiet and (message := numerics.warning()):
            say(message)
        self._note_unkept()

    def settle(self) -> None:
        """Bring the parts of a resumed loop to the state that it continues from again."""
        assert self.beginning is not None
        self.whole.restore(self.beginning)
        self.watched.note_versions()

    def note_changes(self, state: dict[str, Tensor]) -> None:
        """Store changes of the loop since the last step, outside of any. state: the current one."""
        changed = self.watched.note_changes(self.step, state)
        self._is_changed = changed is not None
        if changed is not None:
            kind, _, name = changed.partition("/")
            what = f"the gradient of {name}" if kind == "gradient" else name
            self.watched.notices.changed_between(self.step, what)

    def add(self, step: StepUnderWay[AnyWatch], after: dict[str, Tensor]) -> None:
        """Add a step that is over. after: the live tensors of the parts."""
        self.step += 1
        self._at_rest, self._place.before = None, {}
        if self._place.goal is None:
            self.beginning = None  # that of a large model takes much memory
        inputs = {f"batch/{name}": tensor for name, tensor in step.batch.items()}
        inputs |= self._place.generators
        self.taken.append(self.watched.end(self.step, step, after, inputs))
        path, _ = self.watched.last
        self._note_logged(step, path)
        self._note_numerics()
        self.timed(step.started, self.parts.state)
        # Only this step shows which pending gradients the snapshot before it does not need. Code before
        # the first batch of a call of `steps`, or that changes the state, may have used them.
        taken = self._place.taken
        is_next = taken > 1 or not (taken or self._is_changed)
        self._keep_pending(self.watched.dropped_gradients() if is_next else ())
        self._compare_with_later(None)
        if self.is_snapshot_due():
            self._pending = self.waiting_for(self._snapshot)
        self.flush_if_due()
        # After 8, 16, 32, ... steps, until the recorder knows enough to make one.
        count = self.step - self.start
        if count >= RECENT and not count & (count - 1) and not self.recorder.is_estimated:
            self.flush()
            # After the flush, since it is made from what has been written.
            self.recorder.estimate(self._place.ahead(self.step))

    def keep(self) -> None:
        """Keep the state after the last step."""
        self._pending = self._snapshot()

    def take_back(self) -> None:
        """Discard the last step, which an exception left."""
        self.go_back(self.step - 1)
        self._lacking, self._at_rest = 0, None
        if self._pending is not None and self._pending.step > self.step:
            self._pending = None
        # The parts still have what the discarded step did to them.
        self.watched.forget_versions()

    def finish(self, status: str, reason: str | None) -> None:
        """Take the last snapshot, if the state is still that of the last step, and close the run.

        Raises:
            RecordingError: writing failed; earlier data is kept.
        """
        is_whole = bool(self.step) and not self._place.is_torn
        is_whole = is_whole and self.watched.is_as_after(self.parts.state())
        # One that waits is kept only if code after the step has changed its state: whether one was due
        # depends on how fast the machine is, and the last state should not.
        if is_whole and self._pending is not None and self._pending.step == self.step:
            self._pending = None
        self._note_lacking()
        self._keep_pending()
        self.flush()
        if is_whole:
            self.recorder.snapshot(self._snapshot(self._at_rest))
        self.close(status, reason, self._loop_facts())

    def rests(self, *, is_untouched: bool = False) -> None:
        """Note where the loop is, and what it carries besides tensors, as code between steps begins.

        Should the recording end in that code, a resumed loop runs it again, from its beginning.

        is_untouched: a batch was drawn since that is of no step.
        """
        is_known = is_untouched and self._at_rest is not None
        if self._place.goal is None and not is_known:  # else a resumed loop is not there yet
            self._at_rest = self._here()
            self._compare_with_later(self._at_rest)

    def _here(self) -> _Here:
        tensors, place = self._place.settings()
        rest = self.whole.rest()
        self._note_unkept()
        # A batch that no step has may have been drawn, and is drawn again.
        drawn = self._place.generators_before()
        return _Here(rest._replace(tensors=rest.tensors | drawn | tensors), place)

    def _note_unkept(self) -> None:
        for part, lost in self.whole.lost.items():
            if lost:
                self.watched.notices.unkept(part, sorted(lost))

    def _snapshot(self, at_rest: _Here | None = None) -> State:
        """Return the current state, with the place in the batches. at_rest: of the same step."""
        here = self._here() if at_rest is None else at_rest
        state = self.whole.snapshot(self.step, rest=here.rest)
        return replace(state, settings=state.settings | here.place)

    def _note_numerics(self) -> None:
        """Note the settings that bits depend on; report one that changed since earlier steps."""
        # A few numbers at each step; what they mean is read only where one has changed.
        now = numerics.in_effect()
        if now == self._in_effect:
            return
        self._in_effect = now
        values = numerics.Numerics.read(self.parts.device)
        # What the loop sets before or in its first step holds for the run: it is not a change.
        if self.step == self.start + 1:
            self._numerics = values
            self.recorder.facts({"numerics": values})
        for name, (then, here) in self._numerics.differences(values).items():
            self.watched.notices.set_within(self.step, name, then, here)

    def _note_lacking(self) -> None:
        if self._lacking:
            self.watched.notices.without_loss(self._lacking, is_first=False)

    def _note_logged(self, step: StepUnderWay[AnyWatch], path: StepPath) -> None:
        self._note_lacking()
        self.losses.append(step.logged.pop("loss", None))
        lacks = self.losses[-1] is None
        if not lacks and not self.has_loss and self.step > 1:
            self.watched.notices.without_loss(self.step, is_first=True)
        self._lacking = self.step if lacks and self.has_loss else 0
        if step.loss is not None:
            dtype = None if path.loss is None else path.tensors[path.loss].dtype
            # One that float32 may round (a number of Python's, an integer) widens all of them.
            is_wide = dtype is None or not dtype.is_floating_point or dtype == torch.float64
            if is_wide or not self.has_loss:
                self._loss_dtype = "float64" if is_wide else "float32"
            self.has_loss = True
        self.note_rates(self.step, step.rates)
        self.log_after(step.logged)

    def log_after(self, values: Mapping[str, Any]) -> None:
        """Add numbers of the last step, logged in it or after it."""
        for name, value in values.items():
            # A logged rate may be the one after the step; this name is for the one that was used.
            title = f"{name} (logged)" if name in self.rates else name
            self.measured.append((title, self.step, value))

    def _compare_with_later(self, at_rest: _Here | None) -> None:
        """Compare the state of a resumed loop with a snapshot that it reaches again.

        at_rest: where the loop is between two steps; None: at the end of one.
        """
        later, place = self.later, {} if at_rest is None else at_rest.place.get("place", {})
        if later is None or later.step != self.step:
            return
        there = later.settings.get("place", {})
        # A snapshot from between two epochs has what that code did, which the end of a step has not, and
        # one from after all batches what the search for another one did.
        is_between = there.get("is_between", False) != place.get("is_between", False)
        if is_between or (there.get("is_over", False) and at_rest is None):
            return
        self.later = None
        now = self._snapshot(at_rest)
        different = [each.tensor for each in state_differences(later, now, only_seen=True)]
        held = [state.settings.get("held", {}) for state in (later, now)]
        texts = [{n: json.dumps(each, sort_keys=True) for n, each in of.items()} for of in held]
        different += [f"part/{name}" for name in texts[0] if texts[0][name] != texts[1].get(name)]
        orders = [state.settings.get("layouts", [None]) for state in (later, now)]
        # Of two numbers, the order in which they are added makes no difference.
        if (ranks := ranks_here()) is not None and ranks.count > 2 and None not in chain(*orders):
            different += [] if orders[0] == orders[1] else ["order/the order of gradients"]
        if different:
            names = named([each.partition("/")[2] for each in different])
            problem = f"the state is not the recorded one ({names})"
            raise self.recorder.differs(self.step, problem)

    def _keep_pending(self, dropped: Collection[str] = ()) -> None:
        """Write the snapshot that waits, without the gradients that no step after it can use."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        place = state.settings.get("place", {})
        # With the next step, it is known that the loop takes no more of these batches.
        if self._place.left >= 0 and place.get("call") == self._place.left and state.step < self.step:
            settings = state.settings | {"place": place | {"is_over": True}}
            state = replace(state, settings=settings)
        if dropped:
            rest = {name: tensor for name, tensor in state.rest.items() if name not in dropped}
            state = replace(state, rest=rest)
        self.flush()  # a state on disk means that its steps are there
        self.recorder.snapshot(state)

    def _collected(self) -> tuple[Sequence[float | None], dict[str, Any]]:
        # Here, not at each step: reading a number from a device waits for the device.
        losses = [None if loss is None else float(loss) for loss in self.losses]
        self.measured = [(name, step, float(value)) for name, step, value in self.measured]
        return losses, {"loss_dtype": self._loss_dtype} | self._loop_facts()

    def _loop_facts(self) -> dict[str, Any]:
        loop = LoopFacts(
            parts=LoopFacts.of(self.parts.named).parts,
            programs=self.recorder.program_count,
            unseen=self.watched.unseen,
            has_loss=self.has_loss,
            has_computed_batches=self.has_computed_batches,
            function=None if self.function is None else self.function(),
        )
        return {"loop": loop, "steps": max(self.step, self.recorder.recorded)}
