"""Watched steps: those that Python runs, each watched as a step of a user's own loop is."""

from __future__ import annotations

import torch
from torch import Tensor, optim

from everystep.recording.recorder import Recorder
from everystep.recording.repeats import Taken
from everystep.step.cursor import Cursor
from everystep.step.eager import EagerStep, Training
from everystep.step.elsewhere import Elsewhere, version_of, versions_by_name
from everystep.step.follow import Follower
from everystep.step.known_paths import KnownPaths
from everystep.step.named_state import first_names, parameter_names
from everystep.step.own_state import live_tensors
from everystep.step.state import copy_of
from everystep.training.batch import BatchCopies, text_of
from everystep.training.notices import Notices
from everystep.training.step_rows import StepRows

__all__ = ["WatchedSteps"]


class WatchedSteps:
    """Takes steps in Python while a cursor watches them, and keeps what repeats each of them.

    Args:
        training: what is trained.
        recorder: of the run.
        is_by_rule: whether the run has the rows of the batches, so that a rule finds those of each step.

    programs: the numbers of the programs written so far; unseen: what no program holds, in words.
    """

    def __init__(self, training: Training, recorder: Recorder, *, is_by_rule: bool) -> None:
        self._training = training
        self._recorder = recorder
        self._eager = EagerStep(training)
        self._rows = StepRows(recorder)
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
        #: The loss of the step under way, and how often it had been changed.
        self._logged: tuple[Tensor | None, int | None] = None, 0
        self._follower: Follower | None = None

    @property
    def programs(self) -> tuple[int, ...]:
        """The numbers of the programs written so far."""
        return tuple(self._rows.written)

    @property
    def unseen(self) -> tuple[str, ...]:
        """What no program holds, in words."""
        return tuple(sorted(self._notices.unseen))

    def take(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        """Take a whole step on a batch, and advance the schedule; return the loss.

        Raises:
            as `EagerStep.take`.
        """
        follower = self._follower or self._begin()
        state = self._state()
        self._note_changes(number - 1, state)
        watch = Cursor(self._paths, self._training.device, follower, self._elsewhere)
        watch.begin(state)
        follower.step_begins()
        inputs = self._inputs(x, y)
        with watch:
            watch.add_batch({"x": x, "y": y})
            self._under_way = watch
            try:
                loss = self._eager.take(x, y, self._log)
                if self._eager.advance is not None:
                    self._eager.advance(number)
            finally:
                self._under_way = None
        after = self._state()
        (logged, version), self._logged = self._logged, (None, 0)
        # Of a tensor that was changed since then, no operation made the loss.
        is_as_logged = logged is not None and version_of(logged) == version
        path = watch.end(after, logged if is_as_logged else None)
        if watch.changed_unseen:
            changed = {name: copy_of(after[name]) for name in watch.changed_unseen}
            self._recorder.change(number, changed)
        copied = self._elsewhere.copied
        self._taken.append(self._rows.row(number, watch, path, after, inputs, text_of((x, y)), copied))
        self._elsewhere.clean()
        self._notices.of_step(number, watch, is_compiled=False)
        self._versions = versions_by_name(after)
        return loss

    def collect(self) -> list[Taken]:
        """Return the rows of the steps taken since the last call."""
        taken, self._taken = self._taken, []
        return taken

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
        if self._is_by_rule:
            versions = [version_of(x), version_of(y)]
            is_fixed = self._training.batch.is_fixed
            if not is_fixed or self._data_versions is None or versions == self._data_versions:
                self._data_versions = versions
                return {}
            # A step has written into the data itself: from then on the rule finds other rows.
        copies = self._copies.of({"x": x, "y": y})
        return {f"batch/{name}": copy for name, copy in copies.items()}

    def _state(self) -> dict[str, Tensor]:
        """Return the live tensors that the training carries, pending gradients included."""
        training = self._training
        found = training.named_state()
        found |= live_tensors(training.optimizer, self._names(), found)
        for parameter, name in self._names().items():
            gradient = parameter.grad
            if gradient is not None and gradient.layout is torch.strided:
                found[f"gradient/{name}"] = gradient
        return found

    def _names(self) -> dict[Tensor, str]:
        model, optimizer = self._training.model, self._training.optimizer
        return first_names(model) | parameter_names(model, optimizer)

    def _note_changes(self, step: int, state: dict[str, Tensor]) -> None:
        """Store what code between two steps has changed: a metric, a schedule, a Dataset."""
        before, now = self._versions, versions_by_name(state)
        if before is None or before == now:
            return
        changed = {name: copy_of(state[name]) for name in now if before.get(name) != now[name]}
        gone = [name for name in before.keys() - now.keys() if not name.startswith("gradient/")]
        if changed or gone:
            self._recorder.change(step, changed, gone)

    def _log(self, loss: Tensor) -> None:
        self._logged = loss, version_of(loss)

    def _module_done(self, path: str, outputs: list[Tensor]) -> None:
        if self._under_way is not None:
            self._under_way.module_done(path, outputs)

    def _optimizer_begins(self, optimizer: optim.Optimizer, has_arguments: bool) -> None:
        if self._under_way is not None:
            self._under_way.optimizers.begins(optimizer, None, has_arguments, self._gradients)

    def _optimizer_ends(self, optimizer: optim.Optimizer) -> None:
        if self._under_way is not None:
            self._under_way.optimizers.ends(None, self._gradients)

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for p, name in self._names().items() if p.grad is not None}
