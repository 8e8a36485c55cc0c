"""Step functions: a user's step, called for each batch and recorded, or run by programs where the user
vouches for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from everystep import clock, numerics
from everystep.bounded import check_steps
from everystep.errors import ExperimentError, Fault, UsageError
from everystep.experiment.specification import Iteration
from everystep.program.number_slots import Number
from everystep.recording.facts import EngineFacts
from everystep.step.replaceable import Around
from everystep.step.stand_in import StandIn
from everystep.step.surroundings import Surroundings
from everystep.training.acceleration import Acceleration
from everystep.training.agreement import check_stops_together
from everystep.training.batch import key_of, unnested
from everystep.training.dataset import called
from everystep.training.interrupt import Interrupt
from everystep.training.job import Outcome, Progress
from everystep.training.loader_position import is_quiet, known_length
from everystep.training.record import Recording
from everystep.training.step_under_way import StepUnderWay

__all__ = ["check_step", "train_step"]

Step = Callable[..., Any]


def check_step(step: Any, batches: Any, parts: Any, others: Mapping[str, Any]) -> None:
    """Check the arguments of `train` for a user's step function.

    Args:
        others: those for a training of a model and a loss only; each must be None or False.

    Raises:
        ExperimentError: lists every invalid argument, with a fix.
    """
    faults = []
    if isinstance(step, nn.Module) or inspect.isclass(step) or not callable(step):
        faults.append(Fault("step", f"must be a function of the batch, not {called(step)}"))
    if not isinstance(parts, Mapping) or not parts:
        example = 'parts={"model": model, "optimizer": optimizer}'
        faults.append(Fault("parts", f"must name what the step carries from call to call: {example}"))
    if batches is not None and not isinstance(batches, Iterable):
        problem = f"must be a DataLoader or another iterable, not {called(batches)}"
        faults.append(Fault("batches", problem))
    problem = "does not apply to a step of your own; do it in the step, or pass what it needs in parts"
    given = (name for name, value in others.items() if value is not None and value is not False)
    faults += [Fault(name, problem) for name in given]
    if faults:
        raise ExperimentError(faults, "the arguments of train")


def train_step(
    step: Step,
    batches: Iterable[Any] | None,
    iteration: Iteration,
    recording: Recording[Any],
    progress: Progress,
) -> Outcome:
    """Call a step for each batch, and record each call.

    Args:
        step: returns the loss, or numbers by name including `loss`, or None.
        batches: iterated again for each epoch; None: call the step without a batch.
        iteration: steps or epochs, seed, threads and stop_on_nan.
        recording: not started yet.

    Raises:
        UsageError: the step returns another type.
        TrainingError: `engine="program"`, and no program can run a step; or a check failed.
        RecordingError: writing the run failed; everything recorded before is kept.
    """
    # For the progress bar, and for the last check of programs.
    total = iteration.steps
    if total is None:  # 0 if unknown
        total = (iteration.epochs or 0) * (known_length(batches) or 0)
    check_steps(total)
    if iteration.stop_on_nan:
        check_stops_together("stop_on_nan", "omit it")
    numerics.prepare()
    # This one catches signals, not that of the recording: a step function returns to this loop.
    with numerics.in_force(iteration.threads), Interrupt() as interrupt:
        if iteration.seed is not None:
            torch.manual_seed(iteration.seed)
        try:
            with recording:
                run = recording.run
                progress.begin(run.directory, run.facts.model_copy(update={"steps": total}))
                known = run.newest_step()
                if iteration.steps is not None and iteration.steps < known:
                    steps = f"set more steps than {iteration.steps:,}"
                    raise UsageError(f"the run has {known:,} steps already; {steps}")
                take: Callable[..., dict[str, Any]] = partial(_run_step, step, recording)
                if iteration.engine == "program":
                    what = 'run your step by programs (engine="program") with several processes'
                    run.check_alone(what)
                    vouched = _VouchedStep(step, recording, total or None, is_quiet(batches))
                    recording.writer.function = lambda: vouched.facts
                    take = vouched.take
                for batch in _batches(batches, iteration, recording, progress):
                    logged = take(*([] if batches is None else [batch]))
                    if iteration.stop_on_nan and not math.isfinite(loss := _loss_of(logged)):
                        recording.stop(f"the loss is {loss} (stop_on_nan)")
                        break
                    if interrupt.reason is not None:
                        recording.stop(interrupt.reason)
                        break
        finally:
            progress.end()
    return Outcome(run.directory, recording.run.facts.reason, interrupt.is_by_user)


def _batches(
    batches: Iterable[Any] | None, iteration: Iteration, recording: Recording[Any], progress: Progress
) -> Iterator[Any]:
    """Yield the batches of as many steps or epochs as asked for, except those of recorded steps."""
    count, epoch = recording.step_count, 0
    if batches is None:
        total = iteration.steps if iteration.steps is not None else iteration.epochs or 0
        yield from [None] * (total - count)
        return
    last, epochs = (math.inf if n is None else n for n in (iteration.steps, iteration.epochs))
    # In a resumed training, `drawn` yields nothing for epochs that are past: they count as epochs.
    while count < last and epoch < epochs:
        before, is_skipping = count, recording.is_resuming
        for batch in recording.drawn(batches):
            count += 1
            yield batch
            if count == last:
                return
        epoch += 1
        if count == before and not is_skipping:
            what = "no batch" if epoch == 1 else f"no more batches after step {count}"
            progress.notice(f"the loader yields {what}; a generator can be iterated only once")
            return


def _loss_of(logged: Mapping[str, Any]) -> float:
    loss = logged.get("loss", 0.0)  # for none
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _run_step(step: Step, recording: Recording[Any], *batch: Any) -> dict[str, Any]:
    """Run a step in Python, on a batch or without one, and record it; return what it logs."""
    with recording.step(*batch):
        logged = _logged(step(*batch))
        recording.log(**logged)
    return logged


class _SeenBatch(NamedTuple):
    """A batch. era: in which nothing changes it; key: of its kind."""

    batch: tuple[Any, ...]
    era: int
    key: Any
    tensors: dict[str, Tensor]
    nesting: list[Any]


class _VouchedStep(Acceleration):
    """A vouched step function: programs run its steps, and are compared with Python."""

    def __init__(self, step: Step, recording: Recording[Any], steps: int | None, is_quiet: bool) -> None:
        self._step = step
        self._recording = recording
        self._writer = writer = recording.writer
        given = writer.watched, Surroundings(writer.parts), writer.step, steps
        super().__init__(*given, is_known=False, is_quiet=is_quiet)
        self._seen = _SeenBatch((), -1, None, {}, [])
        self._leaves: list[Tensor] = []
        self._compare_guards(writer.step)

    @property
    def facts(self) -> EngineFacts:
        """How the steps ran."""
        kinds, checked = len(self._kinds), self.checked
        unmet = f"there are {kinds} kinds of batches, and none came often enough"
        return EngineFacts(
            asked="program",
            stands_behind="vouched",
            after=self._plan.start,
            by_program=self.by_program,
            checks=len(checked),
            verified_to=checked[-1] if checked else 0,
            reason=unmet if not self.by_program and kinds > 1 else None,
        )

    def take(self, *batch: Any) -> dict[str, Any]:
        """Run a step on a batch, or without one; return what it logs.

        Raises:
            UsageError: the step returns something that cannot be logged.
            TrainingError: no program can run such steps, or a check failed.
        """
        number = self._writer.step + 1
        if not self._is_settled:
            self._era += 1
            self._compare_guards(number - 1)
            self._leaves = [*self.watched.parts.leaves().values()]
        # Steps are of one kind if their batches are, and the same gradients are pending.
        pending = tuple([leaf.grad is None for leaf in self._leaves])
        self._look_at(batch)
        return self._take(number, number, (self._seen.key, pending))

    def _look_at(self, batch: tuple[Any, ...]) -> None:
        """Note what is known of a batch, unless it is the last one again, in the same era."""
        seen, era = self._seen, self._era
        # Within an era, no other code runs, so the same objects are as they were.
        if seen.era != era or [*map(id, seen.batch)] != [*map(id, batch)]:
            # On memory of a part, a batch changes as the part does: it is of no kind.
            places = {tensor.untyped_storage()._cdata for tensor in self._state().values()}
            tensors, nesting = unnested(batch[0]) if batch else ({}, None)
            about = key_of(batch, places), tensors, [nesting] if batch else []
            self._seen = _SeenBatch(batch, era, *about)

    def _tensors_of(self, number: int) -> dict[str, Tensor]:
        return self._seen.tensors

    def _by_python(self, number: int) -> dict[str, Any]:
        self._release()
        self.watched.around = Around(self.watched.parts)
        return _run_step(self._step, self._recording, *self._seen.batch)

    def _by_program(
        self, number: int, last: int, stand_in: StandIn, numbers: list[Number], state: dict[str, Tensor]
    ) -> dict[str, Any]:
        started, writer, batch = clock.now(), self._writer, self._seen
        # Until the end: an error in between leaves unknown what has run.
        is_settled, self._is_settled = self._is_settled, False
        writer.recorder.wait()
        if not is_settled:
            writer.note_changes(state)
        rates, copies = self.watched.parts.rates(), self.watched.copies.of(batch.tensors, self._era)
        try:
            watch, logged = stand_in.take(state, numbers, batch.tensors, is_settled=is_settled)
        except (RuntimeError, IndexError, ValueError, TypeError):  # the step was not taken to its end
            self.watched.forget_versions()
            raise
        step = StepUnderWay(watch, rates)
        step.batch, step.nesting = copies, batch.nesting
        step.logged = dict(logged)
        step.has_loss(logged.get("loss"))
        writer.add(step, state)
        self._ran(1, started)
        # A loader of the user's runs code between two steps, and so does a scheduler within them.
        self._is_settled = self._is_quiet and not stand_in.schedulers
        return logged


def _logged(result: Any) -> dict[str, Any]:
    """Return the values that a step logs, by name, of what it has returned."""
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
