"""Step function: a step of the user's own, called for each batch or taken by a program, and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from everystep.errors import TrainingError, UsageError
from everystep.recording.facts import FunctionFacts
from everystep.step.checkpoint import PartsCheckpoint
from everystep.step.path import Path
from everystep.step.purity.attributes import NotProvenError
from everystep.step.purity.step_reader import Event, StepReader
from everystep.step.purity.surroundings import Surroundings
from everystep.step.purity.values import Read
from everystep.step.stand_in import StandIn
from everystep.step.step_watch import StepWatch
from everystep.step.verified import CheckPlan
from everystep.training.batch import key_of, tensors_of
from everystep.training.function_recording import FunctionRecording
from everystep.training.rows import called

__all__ = ["Engine", "StepFunction"]

Step = Callable[..., Any]
Engine = Literal["auto", "program", "eager"]

#: So often a step is read before it is left to Python: for a kind of batch, and after guards failed.
MOST_READINGS = 3
#: Kinds of batches that programs are kept for.
MOST_KINDS = 64


class _Reading(NamedTuple):
    """What a step that was read has done.

    events: besides operations, in order; plain: what it logs that is no tensor.
    """

    path: Path
    numbers: list[int | float]
    events: list[Event]
    plain: dict[str, Any]


class StepFunction:
    """A step of the user's own, and the recording of its calls.

    Args:
        step: returns the loss, or numbers by name with `loss` among them, or None.
        recording: is open.
        engine: `eager`: Python takes each step; `auto`: programs take those that they may; `program`:
            it is an error where none may.
        steps: the last step that there will be, None where nobody knows.
        is_quiet: whether no code but torch's runs between two steps.
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
        self._stand_ins: dict[Any, StandIn] = {}
        self._readings: dict[Any, int] = {}
        self._renewals = 0
        self._last_batch = self._last_key = None
        self._plan = CheckPlan(0)
        self._by_program = 0
        self._checked: list[int] = []
        self._reason: str | None = None
        if engine == "eager":
            self._reason = "it was asked for"
        else:
            self._give_up(next(self._surroundings.reasons(), None))

    @property
    def facts(self) -> FunctionFacts:
        """How the steps were taken."""
        return FunctionFacts(
            by_program=self._by_program,
            checks=len(self._checked),
            verified_to=max(self._checked, default=0),
            reason=self._reason,
        )

    def take(self, *batch: Any) -> dict[str, Any]:
        """Take a step; return what it logs.

        Args:
            batch: one, or none.

        Raises:
            UsageError: the step returns something that cannot be logged.
            TrainingError: a program was demanded, and there is none; or a check has failed.
        """
        number = self._recording.step_count + 1
        key = self._key_of(batch) if self._reason is None else None
        if key is None:
            return self._by_python(batch)
        if self._stand_ins and not self._is_quiet:
            self._compare_guards()
        stand_in = self._stand_ins.get(key)
        if stand_in is not None:
            if number >= self._plan.next or number == self._steps:
                return self._check(number, key, stand_in, batch)
            state = self._recording.state_now(is_quiet=self._is_quiet)
            if stand_in.is_ready(state):
                return self._take(key, stand_in, state, batch)
        if self._reason is None and self._may_be_read(number, key):
            return self._read(number, key, batch)
        return self._by_python(batch)

    def _key_of(self, batch: tuple[Any, ...]) -> Any:
        if not self._is_quiet or not batch or batch[0] is not self._last_batch:
            self._last_key = key_of(batch)
            self._last_batch = batch[0] if batch else None
        return self._last_key

    # Who takes the step.

    def _by_python(self, batch: tuple[Any, ...]) -> dict[str, Any]:
        with self._recording.step(*batch):
            logged = _logged(self._step(*batch))
            self._recording.log(**logged)
        return logged

    def _take(
        self, key: Any, stand_in: StandIn, state: dict[str, Tensor], batch: tuple[Any, ...]
    ) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            logged = self._recording.take(stand_in, state, *batch, is_quiet=self._is_quiet)
        except NotProvenError:
            del self._stand_ins[key]
            return self._by_python(batch)
        self._by_program += 1
        self._plan.timed(1, time.perf_counter() - started)
        return logged

    def _check(self, number: int, key: Any, stand_in: StandIn, batch: tuple[Any, ...]) -> dict[str, Any]:
        """Let Python take a step, and compare the program's with it.

        Raises:
            TrainingError: they differ.
        """
        started = time.perf_counter()
        try:
            numbers = stand_in.numbers()
        except NotProvenError:
            del self._stand_ins[key]
            return self._by_python(batch)
        before, copies = PartsCheckpoint(self._parts), _copies(batch)
        logged = self._by_python(batch)
        path, watch = self._recording.last
        if path != stand_in.path or not stand_in.foresees(numbers, watch.numbers):
            reason = f"Python takes other operations at step {number} than before"
        else:
            reason = stand_in.difference(before, copies, watch.numbers, logged) or ""
        if reason:
            verified = max(self._checked)
            self._give_up(reason)
            raise TrainingError(
                f"step {number} cannot be trusted: {reason}. Steps up to {verified} are verified, later "
                'ones are not; engine="eager" trains without programs'
            )
        self._checked.append(number)
        self._plan.passed(number, time.perf_counter() - started)
        return logged

    def _give_up(self, reason: str | None) -> None:
        """Leave the steps to Python from here on, if there is a reason.

        Raises:
            TrainingError: a program was demanded.
        """
        if reason is None:
            return
        self._reason = reason
        self._stand_ins = {}
        if self._engine == "program":
            raise TrainingError(
                f'no program can take these steps: {reason}; engine="auto" lets Python take them'
            )

    def _refuse(self, key: Any, reason: str) -> None:
        """Leave steps with batches of a kind to Python; if no other kind is known, all steps."""
        self._readings[key] = MOST_READINGS
        if not self._stand_ins:
            self._give_up(reason)

    def _compare_guards(self) -> None:
        changed = self._surroundings.difference(self._carried())
        if changed is None:
            return
        self._stand_ins, self._readings = {}, {}
        self._renewals += 1
        if self._renewals > MOST_READINGS:
            self._give_up(f"{changed} again and again")

    # A step that is read.

    def _may_be_read(self, number: int, key: Any) -> bool:
        is_watched = number & (number - 1) == 0  # in full: nobody recognises it
        has_room = key in self._readings or len(self._readings) < MOST_KINDS
        is_known = key in self._stand_ins
        return (
            not is_watched and not is_known and has_room and self._readings.get(key, 0) < MOST_READINGS
        )

    def _read(self, number: int, key: Any, batch: tuple[Any, ...]) -> dict[str, Any]:
        """Read a step, take it back, and let Python take it; from then on a program may stand in."""
        started = time.perf_counter()
        self._readings[key] = self._readings.get(key, 0) + 1
        if not self._stand_ins:
            self._surroundings.begin()
        try:
            reading = self._reading(batch)
        except NotProvenError as error:
            self._refuse(key, str(error))
            return self._by_python(batch)
        before, copies = PartsCheckpoint(self._parts), _copies(batch)
        logged = self._by_python(batch)
        path, watch = self._recording.last
        seen = watch.recognized if isinstance(watch, StepWatch) else None
        if seen is None:  # it was another step than those before
            if self._readings[key] == MOST_READINGS:
                self._refuse(key, "the same calls of torch's functions do not come again at each step")
            return logged
        if path != reading.path or not _are_same(seen.numbers, reading.numbers):
            self._refuse(key, "Python takes other operations than its source says")
            return logged
        built = self._recording.program_of(path)
        try:
            if built is None:
                raise NotProvenError("no program can hold the step")
            names = [*tensors_of_all(batch)]
            stand_in = StandIn(self._parts, built, path, seen, reading.events, names, reading.plain)
            reason = stand_in.difference(before, copies, seen.numbers, logged)
        except NotProvenError as error:
            reason = str(error)
        if reason is not None:
            self._refuse(key, f"{reason} at step {number}")
            return logged
        self._stand_ins[key] = stand_in
        self._checked.append(number)
        self._plan.passed(number, time.perf_counter() - started)
        return logged

    def _reading(self, batch: tuple[Any, ...]) -> _Reading:
        """Take a step by its source, and bring everything back.

        Raises:
            NotProvenError: it does something that is not known to be an operation.
        """
        surroundings, recording = self._surroundings, self._recording
        tensors = tensors_of_all(batch)
        carried = (*self._carried().values(), *tensors.values())
        places = {tensor.untyped_storage()._cdata for tensor in carried}
        reader = StepReader(
            surroundings.guards,
            lambda tensor: tensor.untyped_storage()._cdata in places,
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
            raise NotProvenError(f"returns {min(unknown, default='loss')}, which no operation gives")
        return _Reading(path, watch.numbers, reader.events, plain)

    def _carried(self) -> dict[str, Tensor]:
        """Return what the parts carry, but for gradients, which come and go."""
        state = self._parts.state()
        return {name: tensor for name, tensor in state.items() if not name.startswith("gradient/")}


def tensors_of_all(batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the tensors of a batch, or of none."""
    return tensors_of(batch[0]) if batch else {}


def _copies(batch: tuple[Any, ...]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of_all(batch).items()}


def _are_same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Tell whether numbers are the same, NaN among them."""
    return list(map(repr, one)) == list(map(repr, two))


def _logged(result: Any) -> dict[str, Any]:
    """Return what a step gives to be recorded, by name.

    Raises:
        UsageError: it is neither a number, nor numbers by name.
    """
    if result is None:
        return {}
    if isinstance(result, Tensor | int | float | Read):
        return {"loss": result}
    if isinstance(result, Mapping) and all(isinstance(name, str) for name in result):
        return dict(result)
    raise UsageError(
        f"the step returns {called(result)}; return the loss, or numbers by name: "
        '{"loss": loss, "accuracy": accuracy}'
    )
