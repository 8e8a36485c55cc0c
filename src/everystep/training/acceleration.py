"""Acceleration: programs run steps in place of Python, and are compared with it.

A program may run a step if all of its Python is torch's own, known by identity, or if the user vouches
for it. What a watched step in Python has done becomes a program, for later steps with such a batch. At
step 2, then at intervals that cost less than a hundredth of the time, Python runs the step and the
program is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from everystep import clock
from everystep.errors import TrainingError
from everystep.program.number_slots import Number
from everystep.step.check_plan import CheckPlan
from everystep.step.cursor import Cursor
from everystep.step.replaceable import CreatesTensorsError, NotReplaceableError
from everystep.step.stand_in import PartsCopy, StandIn
from everystep.step.surroundings import Surroundings
from everystep.training.watched_steps import WatchedSteps

__all__ = ["Acceleration"]

#: How often guards may change, without a step by a program between, until programs are given up.
MOST_RENEWALS = 3
#: Consecutive steps with a kind of batch that may differ from earlier ones before programs are given up.
MOST_UNLIKE = 4
#: Kinds of batches that programs are kept for, and bytes that these hold together, if they are several.
MOST_KINDS = 64
MOST_BYTES = 512_000_000


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


class Acceleration:
    """Runs steps by programs where they may, else in Python, and compares the two.

    Args:
        watched: the steps of the training.
        surroundings: what programs depend on except the code.
        start: the state that the training begins with.
        steps: the last step, None if unknown.
        is_known: whether one step shows what all with such a batch do; else two must do the same.
        is_quiet: whether only torch's code runs between two steps.

    by_program: how many steps programs have run.
    """

    def __init__(
        self,
        watched: WatchedSteps,
        surroundings: Surroundings,
        start: int,
        steps: int | None,
        *,
        is_known: bool,
        is_quiet: bool,
    ) -> None:
        self.watched = watched
        self.by_program = 0
        self._surroundings = surroundings
        self._steps = steps
        self._is_known = is_known
        self._is_quiet = is_quiet
        self._plan = CheckPlan(start, is_vouched=not is_known)
        #: The step before the first that may show what later ones do.
        self._since = start
        self._kinds: dict[Any, _Kind] = {}
        #: Whether only steps by programs have run since the guards were compared, and the number of this
        #: stretch of steps, which the subclass counts.
        self._is_settled = False
        self._era = 0
        self._renewals = 0
        self._used: list[StandIn] = []

    @property
    def checked(self) -> list[int]:
        """The steps at which a program was compared with Python, and passed."""
        return self._plan.checked

    # What a kind of training defines.

    def _by_python(self, number: int) -> dict[str, Any]:
        """Run a step in Python, watched; return what it logs."""
        raise NotImplementedError

    def _by_program(
        self, number: int, last: int, stand_in: StandIn, numbers: list[Number], state: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Run a step, and others up to `last`, by a program; return what the step logs."""
        raise NotImplementedError

    def _tensors_of(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of the batch of a step, by name."""
        raise NotImplementedError

    def _advanced(self) -> tuple[Sequence[torch.optim.Optimizer], Sequence[LRScheduler]]:
        """Return the optimizers and schedulers that the last step in Python has advanced."""
        around = self.watched.around
        assert around is not None
        return around.optimizers, around.schedulers()

    def _reason_against(self) -> str | None:
        """Return why no program may run the steps, or None."""
        return next(self._surroundings.reasons(), None)

    def _give_up(self, reason: str, first: int | None = None) -> None:
        """Leave all steps to Python from `first` on (or the next); here, that is not allowed."""
        raise TrainingError(
            f'no program can run these steps: {reason}; engine="auto" runs them in Python'
        )

    def _fail(self, number: int, reason: str) -> None:
        """Handle a failed check of a program that has run steps."""
        raise TrainingError(
            f"step {number} cannot be trusted: {reason}. Steps up to {self.checked[-1]} are verified, "
            'later ones are not; engine="eager" trains without programs'
        )

    # What runs a step.

    def _take(self, number: int, last: int, key: Any) -> dict[str, Any]:
        """Run a step by its program, or in Python; return what it logs.

        last: a program may run further steps up to this one; key: of the kind of batch.
        """
        # e.g. (32, (False, False)) of a model: the rows of the batch, and how pending gradients lie.
        if key not in self._kinds and len(self._kinds) < MOST_KINDS:
            self._kinds[key] = _Kind()
        kind = self._kinds.get(key)
        if kind is None or kind.is_left:
            return self._by_python(number)
        stand_in, state = kind.stand_in, self._state()
        if stand_in is not None and not stand_in.is_ready(state, self._era):
            # Of known code, the step shows at once what those with such a state do.
            if not self._is_known:
                return self._by_python(number)
            stand_in = None
        try:
            numbers = None if stand_in is None else stand_in.numbers()
        except NotReplaceableError:
            numbers = None
        if stand_in is None or numbers is None:
            return self._make(number, kind)
        next_check = self._plan.until(self._steps)
        if not kind.is_checked or number >= next_check:
            return self._check(number, kind, stand_in, numbers)
        self._make_room(stand_in)
        return self._by_program(number, min(last, next_check - 1), stand_in, numbers, state)

    def _state(self) -> dict[str, Tensor]:
        known = self.watched.state if self._is_settled else None
        return self.watched.parts.state() if known is None else known

    @property
    def _has_programs(self) -> bool:
        return any(kind.stand_in is not None for kind in self._kinds.values())

    def _make(self, number: int, kind: _Kind) -> dict[str, Any]:
        """Run a step in Python; make a program for later ones if it did what such steps do."""
        # The first step may begin without gradients, and make what later ones find.
        is_first = self._is_known and number == self._since + 1
        kind.stand_in, kind.is_checked = None, False
        tensors = self._tensors_of(number)
        compares = self._is_known and not is_first
        before = PartsCopy.of(self.watched.parts, tensors) if compares else None
        logged = self._by_python(number)
        # Python takes the step in any case; only what the program adds counts as its cost.
        started, (_, seen) = clock.now(), self.watched.last
        # Of unknown code, only a step that does what an earlier one did shows what later ones do.
        if not self._is_known and not (isinstance(seen, Cursor) and seen.is_followed):
            kind.unlike += 1
            if kind.unlike == MOST_UNLIKE:
                self._leave(kind, "the same calls of torch functions do not recur at each step", number)
            return logged
        if not self._has_programs:
            self._surroundings.begin()
        reason = None
        try:
            stand_in = self._stand_in(tensors, logged)
            if before is not None:
                reason = self._difference(stand_in, seen.numbers, before, logged)
        except NotReplaceableError as error:
            # The first step creates the state of the optimizer; the second shows what later ones do.
            if is_first and isinstance(error, CreatesTensorsError):
                return logged
            reason = str(error)
        if reason is not None:
            self._leave(kind, f"{reason} at step {number}" if self._is_known else reason, number)
        elif not is_first:
            kind.stand_in, kind.is_checked = stand_in, compares
            if compares:
                self._plan.captured(number, clock.now() - started)
        return logged

    def _stand_in(self, batch: Mapping[str, Tensor], logged: Mapping[str, Any]) -> StandIn:
        """Return a program that runs steps like the last one, which Python ran."""
        path, seen = self.watched.last
        built = self.watched.last_program()
        if isinstance(built, str):
            raise NotReplaceableError(built)
        tensors = {name for name, value in logged.items() if isinstance(value, Tensor)}
        unknown = tensors - {"loss", *dict(path.logged)}
        kind = path.loss is not None and path.storages[path.tensors[path.loss].storage].kind
        # That of a model is read before the update, which may write into the memory of a view.
        if "loss" in tensors and (not kind or (self._is_known and kind != "temporary")):
            unknown.add("loss")
        if unknown:
            raise NotReplaceableError(f"{min(unknown)} is not the result of an operation of the step")
        assert isinstance(seen, Cursor)
        plain = {name: value for name, value in logged.items() if name not in tensors}
        known = self.watched.parts, built, path, seen, *self._advanced(), batch, plain
        return StandIn(*known, is_quiet=self._is_quiet)

    def _check(
        self, number: int, kind: _Kind, stand_in: StandIn, numbers: Sequence[Number]
    ) -> dict[str, Any]:
        """Run a step in Python, and compare its program with it; Python's step counts."""
        started = clock.now()
        before = PartsCopy.of(self.watched.parts, self._tensors_of(number))
        logged = self._by_python(number)
        reason = self._difference(stand_in, numbers, before, logged)
        if reason is None:
            kind.is_checked = True
            self._plan.passed(number, clock.now() - started)
        # The program has run steps since the last check, and they may be wrong, too.
        elif kind.is_checked:
            self._fail(number, reason)
        else:
            kind.stand_in = None
            self._leave(kind, f"{reason} at step {number}", number)
        return logged

    def _leave(self, kind: _Kind, reason: str, number: int) -> None:
        """Leave steps of a kind to Python, from `number` on; all, if no program runs others."""
        kind.is_left = True
        if self._is_known or not self._has_programs:
            self._give_up(reason, number)

    def _difference(
        self, stand_in: StandIn, numbers: Sequence[Number], before: PartsCopy, logged: Mapping[str, Any]
    ) -> str | None:
        """Compare a program with the last step, which Python ran; describe the difference.

        numbers: predicted for the step; before: the state before it, and its batch; logged: by it.
        """
        if before.has_python_drawn():
            return "it draws random numbers from Python or NumPy, not from torch"
        path, seen = self.watched.last
        if path != stand_in.path or not isinstance(seen, Cursor):
            return "Python runs different operations than before"
        try:
            _, schedulers = self._advanced()
        except NotReplaceableError as error:
            return str(error)
        if schedulers != stand_in.schedulers:
            return "not every step advances the same schedulers; advance them between steps"
        return stand_in.difference(numbers, seen, before, logged)

    def _ran(self, count: int, started: float) -> None:
        """Note that a program has run steps. started: when, on the clock."""
        self.by_program += count
        self._renewals = 0
        self._plan.timed(count, clock.now() - started)

    def _make_room(self, stand_in: StandIn) -> None:
        """Let other programs go if all together hold too much memory, those used longest ago first."""
        if self._used and self._used[-1] is stand_in:
            return
        current = {id(kind.stand_in) for kind in self._kinds.values()} - {id(stand_in)}
        self._used = [each for each in self._used if id(each) in current] + [stand_in]
        while len(self._used) > 1 and sum(each.bytes for each in self._used) > MOST_BYTES:
            self._used.pop(0).let_go()

    # Other code between steps.

    def _release(self) -> None:
        """Give the parts copies of the gradients that programs write into: other code may keep them."""
        self._is_settled, state = False, self.watched.state
        for kind in self._kinds.values():
            if kind.stand_in is not None and state is not None and kind.stand_in.release(state):
                # The gradients are other tensors now, but with the same values: nothing has changed.
                self.watched.note_versions()

    def _compare_guards(self, step: int, when: str = "") -> None:
        """Compare what programs depend on after other code has run; make them again if it changed.

        step: the last one; when: the other code has run, for messages.
        """
        changed = self._surroundings.difference() if self._has_programs else None
        if changed is not None:
            self._kinds, self._since = {}, step
            # Each costs steps in Python, and copies of the state to compare programs again.
            self._renewals += 1
        reason = None if self._has_programs else self._reason_against()
        if reason is None and self._renewals > MOST_RENEWALS:
            reason = f"{changed}{when} repeatedly"
        if reason is not None:
            self._give_up(reason)
