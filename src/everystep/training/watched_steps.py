"""Watched steps: those of a training that Python or a program takes, and what repeats each of them.

Python's steps are watched as those of a user's own loop are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, optim

from everystep.recording.contents import Taken
from everystep.step.build import BuiltPath
from everystep.step.check import same_bits
from everystep.step.comparison import PartsCopy
from everystep.step.cursor import Cursor
from everystep.step.eager import EagerStep, Training
from everystep.step.elsewhere import Elsewhere, version_of, versions_by_name
from everystep.step.follow import Follower
from everystep.step.generators import Generators
from everystep.step.known_paths import KnownPaths
from everystep.step.path import Path
from everystep.step.stand_in import NotReplaceableError, StandIn
from everystep.step.state import copy_of
from everystep.step.taken import TakenByProgram
from everystep.training.batch import BatchCopies, text_of
from everystep.training.notices import Notices
from everystep.training.step_rows import StepRows, StepWriter

__all__ = ["WatchedSteps"]


class LastProgram(NamedTuple):
    """The program of a step that Python took, with the numbers of the step, and what it brought."""

    built: BuiltPath
    numbers: list[int | float]
    inputs: dict[str, Tensor]


class WatchedSteps:
    """Takes steps in Python while a cursor watches them, and keeps what repeats each step.

    Args:
        training: what is trained.
        writer: of the run.
        is_by_rule: whether the run has the rows of the batches, so that a rule finds those of each step.

    parts: what it carries from step to step.
    """

    def __init__(self, training: Training, writer: StepWriter, *, is_by_rule: bool) -> None:
        self.parts = training.parts
        self._training = training
        self._writer = writer
        self._eager = EagerStep(training)
        self._rows = StepRows(writer)
        self._taken: list[Taken] = []
        self._notices = Notices()
        self._elsewhere = Elsewhere()
        self._paths = KnownPaths()
        self._copies = BatchCopies()
        self._is_by_rule = is_by_rule
        #: How often the rows of the data had been changed when the rule was last known to hold.
        self._data_versions: list[int | None] | None = None
        self._versions: dict[str, tuple[int, int | None, int]] | None = None
        self._under_way: Cursor | None = None
        #: The last step that Python took, what it did, and its loss.
        self._last: tuple[Cursor, Path, Tensor] | None = None
        #: The loss of the step under way, and how often it had been changed.
        self._logged: tuple[Tensor | None, int | None] = None, 0
        self._follower: Follower | None = None
        self._nesting: Any = None

    @property
    def programs(self) -> tuple[int, ...]:
        """The numbers of the programs written so far."""
        return tuple(self._rows.written)

    @property
    def unseen(self) -> tuple[str, ...]:
        """What no program holds, in words."""
        return tuple(sorted(self._notices.unseen))

    @property
    def has_rule(self) -> bool:
        """Whether a rule still finds the rows of each step: not if the data was changed."""
        return self._is_by_rule and self._data_versions in (None, self._training.batch.versions())

    def take(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        """Take a whole step on a batch, and advance the schedule; return the loss.

        Raises:
            as `EagerStep.take`.
        """
        follower = self._follower or self._begin()
        state = self.parts.state()
        self._note_changes(number - 1, state)
        watch = Cursor(self._paths, self._training.device, follower, self._elsewhere)
        watch.begin(state)
        follower.step_begins()
        inputs = self._inputs(x, y)
        with watch:
            watch.add_batch({"x": x, "y": y})
            self._under_way = watch
            try:
                loss = self._eager.take(x, y, self._log, follower.enter)
                follower.enter("other")
                if self._eager.advance is not None:
                    self._eager.advance(number)
            finally:
                self._under_way = None
        after = self.parts.state()
        (logged, version), self._logged = self._logged, (None, 0)
        # Of a tensor that was changed since then, no operation made the loss.
        is_as_logged = logged is not None and version_of(logged) == version
        path = watch.end(after, logged if is_as_logged else None)
        if watch.changed_unseen:
            changed = {name: copy_of(after[name]) for name in watch.changed_unseen}
            self._writer.change(number, changed)
        copied = self._elsewhere.copied
        self._nesting = text_of((x, y))
        self._taken.append(self._rows.row(number, watch, path, after, inputs, self._nesting, copied))
        self._elsewhere.clean()
        self._notices.of_step(number, watch, is_compiled=False)
        self._versions = versions_by_name(after)
        self._last = watch, path, loss
        return loss

    def program_of_last(self) -> LastProgram | None:
        """Return the program of the last step that Python took, None if it has none."""
        assert self._last is not None
        watch, path, _ = self._last
        known = self._rows.program_of(path)
        if isinstance(known, str):
            return None
        brought = {f"input/{n}": watch.content(place) for n, place in known.built.inputs.items()}
        inputs = {name: content for name, content in brought.items() if content is not None}
        return LastProgram(known.built, known.built.numbers(watch.numbers), inputs)

    def stand_in(self, x: Tensor, y: Tensor) -> StandIn:
        """Return a program that runs steps like the last one, which Python took on such a batch.

        Raises:
            NotReplaceableError: there is none; gives the reason.
        """
        assert self._last is not None
        watch, path, _ = self._last
        known = self._rows.program_of(path)
        if isinstance(known, str):
            raise NotReplaceableError(known)
        if path.loss is None or path.storages[path.tensors[path.loss].storage].kind != "temporary":
            raise NotReplaceableError("the loss is not the result of an operation of the step")
        batch = {"x": x, "y": y}
        return StandIn(
            self.parts,
            known.built,
            path,
            watch,
            optimizers=[self._training.optimizer],
            schedules=[],
            batch=batch,
            plain={},
            is_quiet=True,
            fixed=batch if self._training.batch.is_fixed else {},
        )

    def difference(
        self,
        stand_in: StandIn,
        numbers: Sequence[int | float] | None,
        before: PartsCopy,
        x: Tensor,
        y: Tensor,
    ) -> str | None:
        """Compare a program with the last step, which Python took; return in words what differs.

        Args:
            stand_in: the program.
            numbers: that were predicted for the step, None if none were.
            before: the state before it.
            x, y: its batch.
        """
        assert self._last is not None
        watch, path, loss = self._last
        if path != stand_in.path:
            return "Python runs different operations than before"
        numbers = watch.numbers if numbers is None else numbers
        return stand_in.difference(numbers, watch, before, {"x": x, "y": y}, {"loss": loss})

    def add(self, first: int, count: int, taken: TakenByProgram, path: Path) -> None:
        """Note that a program has run `count` steps from `first` on, with the same numbers."""
        row = self._rows.row(first, taken, path, {}, {}, self._nesting)
        if count > 1 and taken.generators:  # which are those before the first step
            inputs = {n: t for n, t in row.inputs.items() if not n.startswith("generator/")}
            self._taken += [row, row._replace(step=first + 1, inputs=inputs, count=count - 1)]
        else:
            self._taken.append(row._replace(count=count))

    def collect(self) -> list[Taken]:
        """Return the rows of the steps taken since the last call."""
        taken, self._taken = self._taken, []
        return taken

    def forget_after(self, step: int) -> None:
        """Discard what was kept of later steps: the training goes back to the state after this one."""
        self._taken = [
            row._replace(count=min(row.count, step - row.step + 1))
            for row in self._taken
            if row.step <= step
        ]
        self._rows.forget_generator()
        self.note_versions()

    def note_versions(self) -> None:
        """Note that what has changed since the last step belongs to it, or was recorded."""
        if self._versions is not None:
            self._versions = versions_by_name(self.parts.state())

    @contextmanager
    def noting_changes(self, step: int) -> Iterator[None]:
        """Store what the code within changes after a step, by value: torch counts not every change."""
        before = {name: tensor.detach().clone() for name, tensor in self._carried().items()}
        yield
        changed = {
            name: tensor
            for name, tensor in self._carried().items()
            if name not in before or not same_bits(tensor, before[name])
        }
        drawn = {name: copy_of(each) for name, each in changed.items() if name.startswith("generator/")}
        if self._versions is not None:
            self._versions = {n: each for n, each in self._versions.items() if n not in changed}
        self._note_changes(step, self.parts.state(), drawn)
        self.note_versions()

    def _carried(self) -> dict[str, Tensor]:
        generators = Generators.capture(self._training.device).tensors()
        return self._training.named_state() | {f"generator/{name}": t for name, t in generators.items()}

    def finish(self) -> None:
        """Stop following modules and optimizers."""
        if self._follower is not None:
            self._follower.finish()
            self._follower = None

    def _begin(self) -> Follower:
        training = self._training
        paths = {id(module): path for path, module in training.model.named_modules()}
        names: dict[int, str | None] = {id(training.optimizer): None}
        hooks = self._module_done, self._optimizer_begins, self._optimizer_ends
        self._follower = Follower(paths, names, *hooks)
        self._follower.begin()
        return self._follower

    def _inputs(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the batch as a row has it: nothing where a rule finds it."""
        if self.has_rule:
            self._data_versions = self._training.batch.versions()
            return {}
        # A step, or other code, has written into the data itself: from then on a rule finds other rows.
        copies = self._copies.of({"x": x, "y": y})
        return {f"batch/{name}": copy for name, copy in copies.items()}

    def _note_changes(
        self, step: int, state: dict[str, Tensor], drawn: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Store what code between two steps has changed: a metric, a schedule, a Dataset.

        drawn: the states of generators from which it has drawn, by `generator/name`.
        """
        before, now = self._versions, versions_by_name(state)
        if before is None or (before == now and not drawn):
            return
        changed = {name: copy_of(state[name]) for name in now if before.get(name) != now[name]}
        changed |= drawn
        gone = [name for name in before.keys() - now.keys() if not name.startswith("gradient/")]
        if changed or gone:
            self._writer.change(step, changed, gone)

    def _log(self, loss: Tensor) -> None:
        self._logged = loss, version_of(loss)

    def _module_done(self, path: str, outputs: list[Tensor]) -> None:
        if self._under_way is not None:
            self._under_way.module_done(path, outputs)

    def _optimizer_begins(self, optimizer: optim.Optimizer, has_arguments: bool) -> None:
        if self._under_way is not None:
            gradients = self.parts.gradients
            self._under_way.optimizers.begins(optimizer, None, has_arguments, gradients)

    def _optimizer_ends(self, optimizer: optim.Optimizer) -> None:
        if self._under_way is not None:
            self._under_way.optimizers.ends(None, self.parts.gradients)
