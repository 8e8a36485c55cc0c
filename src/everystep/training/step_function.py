"""Step function: a user's step, called for each batch or run by a program, and recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from everystep import clock
from everystep.errors import TrainingError, UsageError
from everystep.recording.facts import FunctionFacts
from everystep.step.checkpoint import PartsCheckpoint
from everystep.step.cursor import Cursor
from everystep.step.path import Path
from everystep.step.purity.attributes import NotProvenError
from everystep.step.purity.step_reader import Event, StepReader
from everystep.step.purity.surroundings import Surroundings
from everystep.step.purity.values import Read
from everystep.step.stand_in import StandIn
from everystep.step.verified import CheckPlan
from everystep.training.batch import key_of, tensors_of
from everystep.training.function_recording import FunctionRecording
from everystep.training.rows import called

__all__ = ["Engine", "StepFunction"]

Step = Callable[..., Any]
Engine = Literal["auto", "program", "eager"]

#: How often steps with a kind of batch are read, and guards renewed, before Python runs all of them.
MOST_READINGS = 3
#: Steps in a row with a kind of batch that may differ from those before, until Python runs all.
MOST_UNLIKE = 4
#: A program saves about so many seconds of each operation, and reading a step takes about so many steps.
OPERATION_SECONDS = 2e-5
READING_STEPS = 3
TOO_SHORT = "in a training this short, a program would not save time"
#: Kinds of batches that programs are kept for, and bytes that these hold together, if they are several.
MOST_KINDS = 64
MOST_BYTES = 512_000_000


class _Reading(NamedTuple):
    """The result of reading a step.

    events: besides operations, in order; plain: logged values that are not tensors; reads: the places of
    the numbers that it reads, and only logs.
    """

    path: Path
    numbers: list[int | float]
    events: list[Event]
    plain: dict[str, Any]
    reads: set[int]


@dataclass
class _Kind:
    """What is known of steps with one kind of batch.

    is_followed: whether Python's last was like one before; seconds: the shortest time that one took;
    operations: its number of them; unlike: how many in a row were not; readings: how often such a step
    was read; is_left: to Python, for good.
    """

    stand_in: StandIn | None = None
    is_followed: bool = False
    seconds: float = math.inf
    operations: int = 0
    unlike: int = 0
    readings: int = 0
    is_left: bool = False


class StepFunction:
    """A user's step function, and the recording of its calls.

    Args:
        step: returns the loss, or numbers by name including `loss`, or None.
        recording: open.
        engine: `eager`: Python runs each step; `auto`: programs run those that they may; `program`:
            raise an error if no program may.
        steps: the last step, None if unknown.
        is_quiet: whether only torch's code runs between two steps.
    """

    def __init__(
        self,
        step: Step,
        recording: FunctionRecording[Any],
        engine: Engine,
        steps: int | None,
        is_quiet: bool,
    ) -> None:
        self._step = step
        self._recording = recording
        self._engine = engine
        self._steps = steps
        self._is_quiet = is_quiet
        parts = self._parts = recording.parts
        alone = len(parts.optimizers) == 1
        self._optimizers = {
            "the optimizer" if alone else name: each for name, each in parts.optimizers.items()
        }
        modules = {("the model" if n == parts.main else n): m for n, m in parts.modules.items()}
        self._surroundings = Surroundings(modules, self._optimizers, self._carried, parts.device)
        self._kinds: dict[Any, _Kind] = {}
        self._renewals = 0
        self._last_batch = self._last_key = None
        self._parameters: list[Tensor] = []
        #: Whether nothing but steps by programs has happened since the guards were compared, and in
        #: which stretch of such steps this one is.
        self._is_settled = False
        self._era = 0
        self._after = recording.step_count
        self._plan = CheckPlan(self._after)
        self._used: list[StandIn] = []
        self._by_program = 0
        self._checked: list[int] = []
        self._is_too_short = False
        self._reason: str | None = None
        if engine == "eager":
            self._reason = 'engine="eager" is set'
        else:
            self._give_up(next(self._surroundings.reasons(), None))

    @property
    def facts(self) -> FunctionFacts:
        """How the steps ran."""
        return FunctionFacts(
            after=self._after,
            by_program=self._by_program,
            checks=len(self._checked),
            verified_to=max(self._checked, default=0),
            reason=self._reason or self._unmet,
        )

    @property
    def _unmet(self) -> str | None:
        """Why programs have run no step although they might, None if they have."""
        if self._by_program:
            return None
        if self._is_too_short:
            return TOO_SHORT
        if len(self._kinds) > 1:
            return f"there are {len(self._kinds)} kinds of batches, and none came often enough"
        return None

    def take(self, *batch: Any) -> dict[str, Any]:
        """Run a step; return what it logs.

        Args:
            batch: one, or none.

        Raises:
            UsageError: the step returns something that cannot be logged.
            TrainingError: `engine="program"`, and no program can run a step; or a check failed.
        """
        number = self._recording.step_count + 1
        is_settled, self._is_settled = self._is_settled and self._is_quiet, False
        self._era += not is_settled
        if self._reason is None and not is_settled and self._has_programs:
            self._compare_guards()
        kind = None if self._reason is not None else self._kind_of(batch, is_settled)
        if kind is None:
            return self._by_python(batch)
        if kind.stand_in is not None:
            state = self._recording.state_now(is_settled=is_settled)
            is_ready = kind.stand_in.is_ready(state, self._era)
            if is_ready and self._plan.is_due(number, self._steps):
                return self._check(number, kind, kind.stand_in, batch)
            if is_ready:
                self._make_room(kind.stand_in)
                return self._take(kind, kind.stand_in, state, batch, is_settled)
        elif self._may_read(number, kind):
            return self._read(number, kind, batch)
        return self._by_python_noted(number, kind, batch)

    @property
    def _has_programs(self) -> bool:
        return any(kind.stand_in is not None for kind in self._kinds.values())

    def _kind_of(self, batch: tuple[Any, ...], is_settled: bool) -> _Kind | None:
        """Return what is known of such steps, None if Python runs them.

        They are alike if their batches are, and the same gradients are pending.
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
            state = self._recording.state_now(is_settled=is_settled)
            places = {tensor.untyped_storage()._cdata for tensor in state.values()}
            self._last_key = key_of(batch, places)
            self._last_batch = batch[0] if batch else None
        return self._last_key

    def _may_read(self, number: int, kind: _Kind) -> bool:
        """Tell whether to read a step: its calls are known, and a program may save time."""
        if kind.is_followed:
            self._is_too_short = not self._saves_time(number, kind)
            return not self._is_too_short
        return kind.unlike == MOST_UNLIKE

    def _saves_time(self, number: int, kind: _Kind) -> bool:
        """Tell whether a program may save more time in the rest of the training than reading takes."""
        if self._engine == "program" or self._plan.is_light(kind.seconds):
            return True
        rest = number if self._steps is None else self._steps - number
        return rest * kind.operations * OPERATION_SECONDS > READING_STEPS * kind.seconds

    def _make_room(self, stand_in: StandIn) -> None:
        """Let other programs go if all together hold too much memory, those used longest ago first."""
        if self._used and self._used[-1] is stand_in:
            return
        current = {id(kind.stand_in) for kind in self._kinds.values()} - {id(stand_in)}
        self._used = [each for each in self._used if id(each) in current] + [stand_in]
        while len(self._used) > 1 and sum(each.bytes for each in self._used) > MOST_BYTES:
            self._used.pop(0).let_go()

    def _release(self) -> None:
        """Give the parts gradients that no program writes into, before Python runs a step."""
        for kind in self._kinds.values():
            if kind.stand_in is not None:
                self._recording.release(kind.stand_in)

    # What runs the step.

    def _by_python(self, batch: tuple[Any, ...]) -> dict[str, Any]:
        self._release()
        with self._recording.step(*batch):
            logged = _logged(self._step(*batch))
            self._recording.log(**logged)
        return logged

    def _by_python_noted(self, number: int, kind: _Kind, batch: tuple[Any, ...]) -> dict[str, Any]:
        """Run a step in Python, and note whether it is like those before."""
        started = clock.now()
        logged = self._by_python(batch)
        seconds = clock.now() - started
        path, watch = self._recording.last
        kind.is_followed = isinstance(watch, Cursor) and watch.is_followed
        kind.unlike = 0 if kind.is_followed else kind.unlike + 1
        if kind.is_followed:
            kind.seconds, kind.operations = min(seconds, kind.seconds), len(path.operations)
        return logged

    def _take(
        self,
        kind: _Kind,
        stand_in: StandIn,
        state: dict[str, Tensor],
        batch: tuple[Any, ...],
        is_settled: bool,
    ) -> dict[str, Any]:
        started = clock.now()
        try:
            logged = self._recording.take(stand_in, state, *batch, is_settled=is_settled, era=self._era)
        except NotProvenError:
            kind.stand_in, kind.is_followed = None, False
            return self._by_python(batch)
        self._by_program += 1
        self._renewals = 0
        self._is_settled = not stand_in.has_schedules
        self._plan.timed(1, clock.now() - started)
        return logged

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
        except NotProvenError:
            kind.stand_in, kind.is_followed = None, False
            return self._by_python(batch)
        before, copies = PartsCheckpoint(self._parts), _copies(batch)
        logged = self._by_python(batch)
        path, watch = self._recording.last
        if path != stand_in.path or not stand_in.foresees(numbers, watch.numbers):
            reason = f"Python runs other operations at step {number} than before"
        else:
            reason = stand_in.difference(before, copies, watch.numbers, logged) or ""
        if reason:
            verified = max(self._checked)
            self._give_up(reason)
            raise TrainingError(
                f"step {number} cannot be trusted: {reason}. Steps up to {verified} are verified, "
                'later ones are not; engine="eager" trains without programs'
            )
        self._checked.append(number)
        self._plan.passed(number, clock.now() - started)
        return logged

    def _give_up(self, reason: str | None) -> None:
        """Run all steps in Python from here on, if there is a reason.

        Raises:
            TrainingError: `engine="program"`.
        """
        if reason is None:
            return
        self._reason = reason
        self._kinds = {}
        if self._engine == "program":
            raise TrainingError(
                f'no program can run these steps: {reason}; engine="auto" runs them in Python'
            )

    def _leave(self, kind: _Kind, reason: str) -> None:
        """Run steps with batches of a kind in Python; if programs run no others, all steps."""
        kind.is_left = True
        if not self._has_programs:
            self._give_up(reason)

    def _compare_guards(self) -> None:
        changed = self._surroundings.difference(self._carried())
        if changed is None:
            return
        self._kinds = {}
        self._renewals += 1
        if self._renewals > MOST_READINGS:
            self._give_up(f"{changed} repeatedly")

    # A step that is read.

    def _read(self, number: int, kind: _Kind, batch: tuple[Any, ...]) -> dict[str, Any]:
        """Read a step, undo it, and run it in Python; from then on a program may stand in."""
        self._release()
        started = clock.now()
        kind.readings += 1
        if not self._has_programs:
            self._surroundings.begin()
        try:
            reading = self._reading(batch)
        except NotProvenError as error:
            self._leave(kind, str(error))
            return self._by_python(batch)
        before, copies = PartsCheckpoint(self._parts), _copies(batch)
        logged = self._by_python(batch)
        path, watch = self._recording.last
        seen = watch if isinstance(watch, Cursor) and watch.is_followed else None
        if seen is None:  # it was another step than those before
            kind.is_followed = False
            if kind.readings == MOST_READINGS or kind.unlike == MOST_UNLIKE:
                self._leave(kind, "the same calls of torch functions do not recur at each step")
            return logged
        if path != reading.path or not _are_same(seen.numbers, reading.numbers):
            self._leave(kind, "Python runs other operations than its source says")
            return logged
        built = self._recording.program_of(path)
        try:
            if built is None:
                raise NotProvenError("a program cannot hold the step")
            names = [*_tensors_of(batch)]
            known = reading.events, names, reading.plain, reading.reads
            stand_in = StandIn(self._parts, built, path, seen, *known, is_quiet=self._is_quiet)
            reason = stand_in.difference(before, copies, seen.numbers, logged)
        except NotProvenError as error:
            reason = str(error)
        if reason is not None:
            self._leave(kind, f"{reason} at step {number}")
            return logged
        kind.stand_in = stand_in
        self._checked.append(number)
        self._plan.passed(number, clock.now() - started)
        return logged

    def _reading(self, batch: tuple[Any, ...]) -> _Reading:
        """Run a step from its source, and restore everything.

        Raises:
            NotProvenError: it does something that is not known to be an operation.
        """
        surroundings, recording = self._surroundings, self._recording
        tensors = _tensors_of(batch)
        places = {tensor.untyped_storage()._cdata for tensor in self._carried().values()}
        of_batch = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
        reader = StepReader(
            surroundings.guards,
            lambda tensor: tensor.untyped_storage()._cdata in places,
            lambda tensor: tensor.untyped_storage()._cdata in of_batch,
            self._parts.parameter_names(),
            self._optimizers,
            recording.follower,
            surroundings.guard_optimizer,
        )
        with recording.rehearsed(*batch) as watch:
            logged = _logged(reader.step(self._step, watch.numbers, *batch))
            recording.log(**{n: v.value if isinstance(v, Read) else v for n, v in logged.items()})
            path = recording.path_of(watch)
        surroundings.guard_shared(tuple(surroundings.guards.state_tensors))
        plain = {name: value for name, value in logged.items() if not isinstance(value, Tensor)}
        unknown = logged.keys() - plain.keys() - {"loss", *dict(path.logged)}
        if unknown or ("loss" in logged and "loss" not in plain and path.loss is None):
            raise NotProvenError(
                f"returns {min(unknown, default='loss')}, which is not the result of an operation"
            )
        return _Reading(path, watch.numbers, reader.events, plain, reader.reads)

    def _carried(self) -> dict[str, Tensor]:
        """Return what the parts carry, except gradients."""
        state = self._parts.state()
        return {name: tensor for name, tensor in state.items() if not name.startswith("gradient/")}


def _tensors_of(batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the tensors of a batch, or of none."""
    return tensors_of(batch[0]) if batch else {}


def _copies(batch: tuple[Any, ...]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors_of(batch).items()}


def _are_same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Tell whether numbers are equal; NaN equals NaN."""
    return list(map(repr, one)) == list(map(repr, two))


def _logged(result: Any) -> dict[str, Any]:
    """Return the values that a step logs, by name.

    Raises:
        UsageError: it returned neither a number nor numbers by name.
    """
    if result is None:
        return {}
    if isinstance(result, Tensor | int | float | Read):
        return {"loss": result}
    if isinstance(result, Mapping) and all(isinstance(name, str) for name in result):
        return dict(result)
    raise UsageError(
        f'the step returns {called(result)}; return the loss, or numbers by name: {{"loss": loss, '
        '"accuracy": accuracy}'
    )
