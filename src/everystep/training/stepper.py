"""The stepper: runs the steps of a training of a model, by programs where they may, else in Python.

Python of torch's own, known by identity, or vouched for, may be replaced by programs; else Python runs
all steps. After a scheduler or a metric of the user's has run, everystep compares what programs rely on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from everystep import clock
from everystep.errors import DatasetChangedError, size_text
from everystep.experiment.batches import RowsOf
from everystep.ops.operators import without_autograd
from everystep.program.number_slots import Number
from everystep.step.generators import Generators
from everystep.step.optimizer_call import is_torchs_optimizer
from everystep.step.replaceable import NotReplaceableError
from everystep.step.stand_in import StandIn
from everystep.step.state import State, copy_of, same_bits
from everystep.step.surroundings import Surroundings, reason_against_functions
from everystep.step.torchs_own import is_torchs_scheduler, reason_against_loss, reason_against_module
from everystep.training.acceleration import Acceleration
from everystep.training.batch import unnested
from everystep.training.dataset import DatasetBatches
from everystep.training.model_step import Training
from everystep.training.watched_steps import WatchedSteps
from everystep.training.writer import Unwritten

__all__ = ["Engine", "Stepper"]

Engine = Literal["auto", "program", "eager"]
#: Bytes of parameters and buffers from which on Python runs the steps, unless programs are asked for:
#: its steps take so long that a watch costs nothing, and to compare a program takes three more copies.
MOST_STATE = 200_000_000


class Stepper(Acceleration):
    """Runs the steps of a training.

    Args:
        training: the training; modified in place.
        new: gets the steps; begins with the step that the training has.
        steps: the last step.
        engine: `eager`; `program`, which trusts code that is not torch's, and raises if no program can
            run a step; or `auto`.

    reason: why Python runs steps, or None; eager_from: the first of these; is_vouchable: whether the
    only objection to a program is code that the user may vouch for; stands_behind: what justifies the
    programs: the code is `known`, or `vouched` for.

    Raises:
        TrainingError: `engine="program"`, and no program can run a step.
    """

    def __init__(self, training: Training, new: Unwritten, steps: int, engine: Engine = "auto") -> None:
        surroundings, start = Surroundings(training.parts, training.loss), new.step
        watched = WatchedSteps(training.parts, new.recorder)
        # The step is everystep's own, written once, so one step shows what all with such a batch do.
        super().__init__(watched, surroundings, start, steps, is_known=True, is_quiet=True)
        self.training, self.new = training, new
        self.reason: str | None = None
        self.eager_from: int | None = None
        self.is_vouchable = False
        self.stands_behind: Literal["known", "vouched"] = "known"
        #: How often the rows of the data had been changed when the rule was last known to hold.
        self._data_versions: list[int | None] | None = None
        self._engine = engine
        #: How the batch of the last step that Python took was nested.
        self._nesting: Any = None
        self._has_other_code_run = False
        #: The last verified step, its state, None where unknown code has run since, and its rates.
        self._way_back: tuple[int, State | None, dict[str, float]] = start, None, {}
        self._compare_guards(start)
        if self.reason is None:
            self._keep_way_back()

    @property
    def step(self) -> int:
        """The last step that ran."""
        return self.new.step

    @property
    def has_rule(self) -> bool:
        """Whether a rule still finds the rows of each step: not if the data was changed."""
        batch = self.training.batch
        return isinstance(batch, RowsOf) and self._data_versions in (None, batch.versions())

    def advance(self, last: int) -> None:
        """Run steps up to `last`.

        A failed check may move `step` back to the last checked step.

        Raises:
            TrainingError: `engine="program"`, and no program can run a step; or a check failed, and
                training cannot go back.
            DatasetChangedError: a Dataset read once would no longer return the same rows.
        """
        while self.step < last:
            number = self.step + 1
            if self.step in self.checked[-1:] and self._way_back[0] != self.step:
                # Not before now: what follows a step (an evaluation, say) belongs to its state.
                self._keep_way_back()
            changes = self.training.scheduler is not None or self.reason is not None
            if changes or self._has_other_code_run:
                # Not before now: the training may end before there is such a step.
                self._has_other_code_run = False
                self.new.note_rates(number, self.training.hyperparameters())
            if self.reason is not None:
                self._by_python(number)
            else:
                self._era += not self._is_settled
                # Pending gradients are dropped by a step, or added to, and belong to its path.
                pending = tuple([_layout(p.grad) for p in self.watched.parts.parameter_names()])
                self._take(number, last, (self._rows.batches.rows_of(number), pending))
            self._check_dataset()
            # A failed check went back: the caller must drop what it has of the steps since.
            if self.step < number:
                return

    def restart(self, step: int) -> None:
        """Continue after another state, which somebody has brought the training to."""
        self.new.clear()
        self._go_back(step)
        self._is_settled = False
        if self.reason is None:
            self._keep_way_back()

    @contextmanager
    def foreign_code(self) -> Iterator[None]:
        """Run code that may change the training; note its changes, which stay.

        Programs continue with changed values of tensors. If something else changes that they depend on,
        they are made again.
        """
        self._release()
        # By value: torch does not count every change.
        before = {name: tensor.detach().clone() for name, tensor in self._carried().items()}
        yield
        now = self._carried()
        changed = [n for n, each in now.items() if n not in before or not same_bits(each, before[n])]
        drawn = {name: copy_of(now[name]) for name in changed if name.startswith("generator/")}
        self.watched.note_changes(self.step, self.watched.parts.state(), changed, drawn)
        self._way_back = self._way_back[0], None, {}  # it cannot be undone
        self._has_other_code_run = True
        self._check_dataset()
        if self.reason is None and not self.has_rule:
            self._give_up("your code changes the data")
        elif self.reason is None:
            self._compare_guards(self.step, " during an evaluation")

    def _carried(self) -> dict[str, Tensor]:
        generators = Generators.capture(self.training.device).tensors()
        return self.training.named_state() | {f"generator/{name}": t for name, t in generators.items()}

    def _check_dataset(self) -> None:
        """Check that a Dataset read once would still return the same rows, as far as that is fast."""
        guards = self.training.guards
        changed = None if guards is None else guards.difference(is_thorough=False)
        if changed is not None:
            raise DatasetChangedError(changed, self.step)

    def collect(self) -> Tensor:
        """Return the losses since the last call, or the last write."""
        # One loss may be wider than others, or have a dimension.
        losses = [loss.reshape(1) for loss in self.new.losses]
        self.new.losses = []
        return torch.cat(losses) if losses else torch.empty(0)

    def finish(self) -> None:
        """Note the settings that the last state has."""
        is_changed = self.training.scheduler is not None or self._has_other_code_run
        if is_changed and self.training.has_tensor_settings:
            # Such settings are state, and the last state has them as the next step would.
            self.new.note_rates(self.step + 1, self.training.hyperparameters())

    # What runs the steps.

    def _reason_against(self) -> str | None:
        training, optimizer, scheduler = self.training, self.training.optimizer, self.training.scheduler
        against = reason_against_module(training.model) or reason_against_loss(training.loss)
        against = against or reason_against_functions()
        if not is_torchs_optimizer(optimizer):
            other: str | None = f"{type(optimizer).__qualname__} is not one of torch's optimizers"
        elif "zero_grad" in vars(optimizer):
            other = "the optimizer has a custom zero_grad"
        elif not is_torchs_scheduler(scheduler, but_functions=True):
            other = f"{type(scheduler).__qualname__} is not one of torch's schedulers"
        elif scheduler is not None and training.has_tensor_settings:
            other = "a scheduler sets a learning rate that is a tensor"
        elif training.shares is not None:
            other = "several processes train"
        elif isinstance(training.batch, DatasetBatches):
            other = "the Dataset is read at every step"
        elif self._engine == "auto" and _size(training) > MOST_STATE:
            size = size_text(_size(training))
            other = f"the steps of a model of {size} are long, and programs would need copies of it"
        else:
            other = super()._reason_against()
        calls_functions = is_torchs_scheduler(scheduler, but_functions=True)
        if against is None and calls_functions and not is_torchs_scheduler(scheduler):
            against = f"{type(scheduler).__qualname__} calls a function of yours"
        # `against`: code that a user may vouch for; `other`: what no program can do.
        vouches = self._engine == "program"
        self.stands_behind = "vouched" if vouches and against is not None else "known"
        self._plan.is_vouched = self.stands_behind == "vouched"
        self.is_vouchable = against is not None and other is None
        if self._engine == "eager":
            return 'engine="eager" is set'
        return other if vouches else against or other

    def _give_up(self, reason: str, first: int | None = None) -> None:
        """Run all steps from `first` on (or the next) in Python."""
        if self._engine == "program":
            super()._give_up(reason)
        self._kinds, self._used = {}, []
        self.reason = reason
        self.eager_from = self.step + 1 if first is None else first

    def _fail(self, number: int, reason: str) -> None:
        """Go back to the last verified state, unless other code has run since, and cannot be undone.

        No program runs steps from there on.
        """
        verified, state, rates = self._way_back
        # Python took this step, and no program has taken one since the last check.
        if verified >= number - 1:
            self._give_up(f"{reason} at step {number}", number)
            return
        if state is None:
            since = f"Your code has run since the last check, at step {verified}"
            super()._fail(number, f"{reason}. {since}, so training cannot go back")
            return
        self.training.restore(state)
        self.new.rates = rates
        self._go_back(verified)
        self._give_up(f"{reason} at step {number}", verified + 1)

    def _keep_way_back(self) -> None:
        self._way_back = self.step, self.training.snapshot(self.step), self.new.rates

    def _go_back(self, step: int) -> None:
        """Discard later steps: the training is in the state after this one."""
        self.new.go_back(step)
        self.watched.forget_generator()
        self.watched.note_versions()

    # Steps.

    @property
    def _rows(self) -> RowsOf:
        assert isinstance(self.training.batch, RowsOf)
        return self.training.batch

    def _by_python(self, number: int) -> dict[str, Any]:
        self._release()
        loss = self.watch(number, *self.training.batch(number))
        # Still on the device: to read it would wait for the step.
        self.new.losses.append(loss.detach())
        self.new.step = number
        return {"loss": loss}

    def _tensors_of(self, number: int) -> dict[str, Tensor]:
        return dict(zip("xy", self.training.batch(number), strict=True))

    def _advanced(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        return [self.training.optimizer], []  # it advances its scheduler itself

    def _by_program(
        self, number: int, last: int, stand_in: StandIn, numbers: list[Number], state: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Run steps up to one that needs another program."""
        started, first = clock.now(), number
        size = self._rows.batches.rows_of(number)
        # A scheduler changes the numbers of each step, and other gradients need another program.
        is_alone = self.training.scheduler is not None or not stand_in.is_steady
        # Each round is one stretch of steps, and one row of the run, or two where it draws.
        while True:
            self._run_alike(stand_in, numbers, last if not is_alone else number, state)
            self.training.advance(number)
            number = self.step + 1
            if number > last or not stand_in.is_steady or self._rows.batches.rows_of(number) != size:
                break
            if self.training.scheduler is not None:
                self.new.note_rates(number, self.training.hyperparameters())
            try:
                numbers = stand_in.numbers()
            except NotReplaceableError:  # it needs another program
                break
        self._ran(self.step - first + 1, started)
        return {}

    def _run_alike(
        self, stand_in: StandIn, numbers: list[Number], last: int, state: dict[str, Tensor]
    ) -> None:
        """Run steps with the same program and the same numbers, up to one with another batch."""
        live, places, batches, new = stand_in.live, stand_in.places, self._rows, self.new
        first = new.step + 1
        assert live is not None
        size = batches.batches.rows_of(first)
        # Until the end: an error may leave the state in the middle of a step.
        is_settled, self._is_settled = self._is_settled, False
        taken = stand_in.begin(numbers)
        if batches.is_fixed:
            stand_in.load(self._tensors_of(first))
        try:
            with without_autograd():
                for number in range(first, last + 1):
                    if not batches.is_fixed:
                        if number > first and batches.batches.rows_of(number) != size:
                            break
                        batches.into(number, *places)
                    live.run()
                    # The next step overwrites the memory of the loss.
                    new.losses.append(live.loss.clone())
                    new.step = number
        finally:
            # Ctrl-C may end the stretch: the steps before it are complete, and count.
            if (count := self.step - first + 1) > 0:
                stand_in.end(taken, state, is_settled=is_settled)
                new.taken += self.watched.ran(first, count, taken, state, self._nesting)
        self._is_settled = True

    def watch(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        """Run a whole step in Python on a batch, watched, and advance the scheduler; return the loss."""
        watched, training = self.watched, self.training
        watched.follow()
        state = watched.parts.state()
        watched.note_changes(number - 1, state)
        inputs, tensors = self._inputs(x, y), {"x": x, "y": y}
        step, enter = watched.begin(state), watched.follower.enter
        try:
            step.watch.add_batch(tensors)
            step.nesting.append(unnested((x, y))[1])
            loss = training.step(number, x, y, step.has_loss, enter)
            enter("other")
            training.advance(number)
        finally:
            watched.close()
        self.new.taken.append(watched.end(number, step, watched.parts.state(), inputs))
        self._nesting = step.nested
        return loss

    def _inputs(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the batch as a row has it: nothing where a rule finds it."""
        if self.has_rule:
            self._data_versions = self._rows.versions()
            return {}
        # A step, or other code, has written into the data itself: from then on a rule finds other rows.
        copies = self.watched.copies.of({"x": x, "y": y})
        return {f"batch/{name}": copy for name, copy in copies.items()}


def _size(training: Training) -> int:
    """Return the bytes of parameters and buffers."""
    return sum(each.nbytes for each in (*training.model.parameters(), *training.model.buffers()))


def _layout(gradient: Tensor | None) -> Any:
    """Return how a gradient lies in memory, False if there is none."""
    if gradient is None or gradient.layout is not torch.strided:
        return gradient is not None
    return gradient.dtype, gradient.stride()
