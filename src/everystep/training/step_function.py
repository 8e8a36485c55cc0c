"""Step functions: a user's step, called for each batch and recorded, or run by programs where the user
vouches for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from everystep import clock
from everystep.errors import TrainingError, UsageError
from everystep.recording.facts import FunctionFacts
from everystep.step.acceleration import CheckPlan
from everystep.step.comparison import PartsCopy
from everystep.step.cursor import Cursor
from everystep.step.stand_in import Around, NotReplaceableError, StandIn
from everystep.step.surroundings import Surroundings
from everystep.training.batch import key_of, tensors_of, text_of
from everystep.training.dataset import called
from everystep.training.record import Recording
from everystep.training.watched_steps import StepUnderWay

__all__ = ["VouchedStep", "run_step"]


Step = Callable[..., Any]

#: How often guards may change, without a step by a program between, until training ends.
MOST_RENEWALS = 3
#: Consecutive steps with a kind of batch that may differ from earlier ones before programs are given up.
MOST_UNLIKE = 4
#: Kinds of batches that programs are kept for, and bytes that these hold together, if they are several.
MOST_KINDS = 64
MOST_BYTES = 512_000_000


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
    """A copy of a batch. era: in which nothing changes it."""

    batch: tuple[Any, ...]
    era: int
    tensors: dict[str, Tensor]
    copies: dict[str, Tensor]
    nesting: list[Any]


@dataclass
class _Kind:
    """The state of steps with one kind of batch.

    is_checked: whether the stand-in was compared with Python; unlike: how many consecutive steps
    differed from earlier ones; is_left: permanently to Python.
    """

    stand_in: StandIn | None = None
    is_checked: bool = False
    unlike: int = 0
    is_left: bool = False


class VouchedStep:
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
        self._writer = recording.writer
        self._watched = recording.writer.watched
        self._steps = steps
        self._is_quiet = is_quiet
        parts = self._parts = self._writer.parts
        alone = len(parts.optimizers) == 1
        optimizers = {
            "the optimizer" if alone else name: each for name, each in parts.optimizers.items()
        }
        modules = {("the model" if n == parts.main else n): m for n, m in parts.modules.items()}
        self._surroundings = Surroundings(
            modules, optimizers, self._carried, parts.device, is_vouched=True
        )
        self._kinds: dict[Any, _Kind] = {}
        self._renewals = 0
        self._last_batch = self._last_key = None
        self._seen: _SeenBatch | None = None
        self._parameters: list[Tensor] = []
        #: Whether only steps by programs have run since the guards were compared, and the number of this
        #: stretch of steps.
        self._is_settled = False
        self._era = 0
        self._after = self._writer.step
        self._plan = CheckPlan(self._after)
        self._used: list[StandIn] = []
        self._by_program = 0
        self._checked: list[int] = []
        self._refuse(next(self._surroundings.reasons(), None))

    @property
    def facts(self) -> FunctionFacts:
        """How the steps ran."""
        kinds = len(self._kinds)
        is_unmet = not self._by_program and kinds > 1
        return FunctionFacts(
            after=self._after,
            by_program=self._by_program,
            checks=len(self._checked),
            verified_to=max(self._checked, default=0),
            reason=f"there are {kinds} kinds of batches, and none came often enough"
            if is_unmet
            else None,
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
        is_settled, self._is_settled = self._is_settled and self._is_quiet, False
        self._era += not is_settled
        if not is_settled and self._has_programs:
            self._compare_guards()
        kind = self._kind_of(batch, is_settled)
        if kind is None:
            return self._by_python(batch)[0]
        stand_in = kind.stand_in
        if stand_in is None:
            return self._watch(kind, batch)
        state = self._state(is_settled)
        if not stand_in.is_ready(state, self._era):
            return self._by_python(batch)[0]
        if not kind.is_checked or self._plan.is_due(number, self._steps):
            return self._check(number, kind, stand_in, batch)
        self._make_room(stand_in)
        return self._take(kind, stand_in, state, batch, is_settled)

    @property
    def _has_programs(self) -> bool:
        return any(kind.stand_in is not None for kind in self._kinds.values())

    def _kind_of(self, batch: tuple[Any, ...], is_settled: bool) -> _Kind | None:
        """Return the kind of such steps, None if Python runs them.

        They are of one kind if their batches are, and the same gradients are pending.
        """
        if not is_settled:
            self._parameters = [*self._parts.parameter_names()]
        pending = tuple([parameter.grad is None for parameter in self._parameters])
        key = self._key_of(batch, is_settled), pending
        if key not in self._kinds and len(self._kinds) < MOST_KINDS:
            self._kinds[key] = _Kind()
        kind = self._kinds.get(key)
        return None if kind is None or kind.is_left else kind

    def _key_of(self, batch: tuple[Any, ...], is_settled: bool) -> Any:
        if not is_settled or not batch or batch[0] is not self._last_batch:
            state = self._state(is_settled)
            places = {tensor.untyped_storage()._cdata for tensor in state.values()}
            self._last_key = key_of(batch, places)
            self._last_batch = batch[0] if batch else None
        return self._last_key

    def _make_room(self, stand_in: StandIn) -> None:
        """Let other programs go if all together hold too much memory, those used longest ago first."""
        if self._used and self._used[-1] is stand_in:
            return
        current = {id(kind.stand_in) for kind in self._kinds.values()} - {id(stand_in)}
        self._used = [each for each in self._used if id(each) in current] + [stand_in]
        while len(self._used) > 1 and sum(each.bytes for each in self._used) > MOST_BYTES:
            self._used.pop(0).let_go()

    # What runs the step.

    def _by_python(self, batch: tuple[Any, ...]) -> tuple[dict[str, Any], Around]:
        """Run a step in Python; return what it logs, and its effects other than operations."""
        state = self._watched.state
        for kind in self._kinds.values():
            # A program writes into gradients that Python may still hold, so the parts get new ones.
            if kind.stand_in is not None and state is not None and kind.stand_in.release(state):
                self._watched.note_versions()
        around = self._watched.around = Around(self._parts)
        return run_step(self._step, self._recording, *batch), around

    def _watch(self, kind: _Kind, batch: tuple[Any, ...]) -> dict[str, Any]:
        """Run a step in Python; if it equals an earlier one, a program may run later ones."""
        logged, around = self._by_python(batch)
        path, seen = self._watched.last
        if not isinstance(seen, Cursor) or not seen.is_followed:
            kind.unlike += 1
            if kind.unlike == MOST_UNLIKE:
                self._leave(kind, "the same calls of torch functions do not recur at each step")
            return logged
        if not self._has_programs:
            self._surroundings.begin()
        tensors = {name: value for name, value in logged.items() if isinstance(value, Tensor)}
        unknown = tensors.keys() - {"loss", *dict(path.logged)}
        if "loss" in tensors and path.loss is None:
            unknown.add("loss")
        plain = {name: value for name, value in logged.items() if name not in tensors}
        built = self._watched.program_of(path)
        try:
            if unknown:
                raise NotReplaceableError(f"{min(unknown)} is not the result of an operation")
            if isinstance(built, str):
                raise NotReplaceableError(built)
            did = around.optimizers, around.schedulers()
            known = self._parts, built, path, seen, *did, _tensors_of(batch), plain
            kind.stand_in = StandIn(*known, is_quiet=self._is_quiet)
        except NotReplaceableError as error:
            self._leave(kind, str(error))
        return logged

    def _take(
        self,
        kind: _Kind,
        stand_in: StandIn,
        state: dict[str, Tensor],
        batch: tuple[Any, ...],
        is_settled: bool,
    ) -> dict[str, Any]:
        """Run a step by a program, and record it; return what it logs.

        Args:
            kind: of the batch.
            stand_in: the program.
            state: the live tensors of the parts; updated to those after the step.
            batch: one, or none.
            is_settled: nothing has run since the last step, which a program ran.
        """
        started, writer = clock.now(), self._writer
        writer.recorder.wait()
        if not is_settled:
            writer.note_changes(state)
        seen, rates = self._batch_of(batch), self._parts.rates()
        try:
            watch, logged = stand_in.take(state, seen.tensors, is_settled=is_settled)
        except NotReplaceableError:  # nothing has happened yet
            kind.stand_in, kind.is_checked = None, False
            return self._by_python(batch)[0]
        except (RuntimeError, IndexError, ValueError, TypeError):  # the step was not taken to its end
            self._watched.forget_versions()
            raise
        step = StepUnderWay(watch, rates)
        step.batch, step.nesting = seen.copies, seen.nesting
        step.logged = dict(logged)
        step.has_loss(logged.get("loss"))
        writer.add(step, state)
        self._by_program += 1
        self._renewals = 0
        self._is_settled = not stand_in.schedulers
        self._plan.timed(1, clock.now() - started)
        return logged

    def _batch_of(self, batch: tuple[Any, ...]) -> _SeenBatch:
        """Return the copy of a batch; the last one if it is the same, in the same era."""
        seen, era = self._seen, self._era
        if seen is None or seen.era != era or [*map(id, seen.batch)] != [*map(id, batch)]:
            tensors = {name: t for each in batch for name, t in tensors_of(each).items()}
            copies = self._watched.copies.of(tensors, era)
            seen = self._seen = _SeenBatch(batch, era, tensors, copies, [*map(text_of, batch)])
        return seen

    def _check(
        self, number: int, kind: _Kind, stand_in: StandIn, batch: tuple[Any, ...]
    ) -> dict[str, Any]:
        """Run a step in Python, and compare the program with it.

        Raises:
            TrainingError: they differ.
        """
        started = clock.now()
        try:
            numbers = stand_in.numbers()
        except NotReplaceableError:
            kind.stand_in, kind.is_checked = None, False
            return self._by_python(batch)[0]
        before = PartsCopy.of(self._parts)
        copies = {name: tensor.detach().clone() for name, tensor in _tensors_of(batch).items()}
        logged, around = self._by_python(batch)
        path, seen = self._watched.last
        reason = "Python runs different operations than before"
        if path == stand_in.path and isinstance(seen, Cursor) and seen.is_followed:
            reason = _other_schedulers(around, stand_in) or (
                stand_in.difference(numbers, seen, before, copies, logged) or ""
            )
        if not reason:
            kind.is_checked = True
            self._checked.append(number)
            self._plan.passed(number, clock.now() - started)
        elif kind.is_checked:
            raise TrainingError(
                f"step {number} cannot be trusted: {reason}. Steps up to {max(self._checked)} are "
                'verified, later ones are not; engine="eager" trains without programs'
            )
        else:
            kind.stand_in = None
            self._leave(kind, f"{reason} at step {number}")
        return logged

    def _refuse(self, reason: str | None) -> None:
        """End the training if there is a reason why no program can run its steps.

        Raises:
            TrainingError: there is.
        """
        if reason is not None:
            raise TrainingError(
                f'no program can run these steps: {reason}; engine="auto" runs them in Python'
            )

    def _leave(self, kind: _Kind, reason: str) -> None:
        """Leave steps with this kind of batch to Python; programs must run some other kind."""
        kind.is_left = True
        if not self._has_programs:
            self._refuse(reason)

    def _compare_guards(self) -> None:
        changed = self._surroundings.difference(self._carried())
        if changed is None:
            return
        self._kinds = {}
        self._renewals += 1
        self._refuse(next(self._surroundings.reasons(), None))
        if self._renewals > MOST_RENEWALS:
            self._refuse(f"{changed} repeatedly")

    def _state(self, is_settled: bool) -> dict[str, Tensor]:
        """Return the live tensors of the parts. is_settled: nothing has run since the last step."""
        known = self._watched.state if is_settled else None
        return self._parts.state() if known is None else known

    def _carried(self) -> dict[str, Tensor]:
        """Return the state of the parts, except gradients."""
        state = self._parts.state()
        return {name: tensor for name, tensor in state.items() if not name.startswith("gradient/")}


def _other_schedulers(around: Around, stand_in: StandIn) -> str | None:
    """Return why a program cannot advance schedulers as Python did, or None."""
    try:
        schedulers = around.schedulers()
    except NotReplaceableError as error:
        return str(error)
    if schedulers != stand_in.schedulers:
        return "not every step advances the same schedulers; advance them between steps"
    return None


def _tensors_of(batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the tensors of a batch; none without one."""
    return tensors_of(batch[0]) if batch else {}


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
