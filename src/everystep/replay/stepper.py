"""Stepper: replays the steps of a recorded training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from everystep.errors import EverystepError, ProgramError, RunError
from everystep.experiment.batches import Batches, RowsOf
from everystep.program.execute import BoundProgram
from everystep.program.memory import copy_into, copy_on_cpu
from everystep.replay.columns import Setting
from everystep.replay.step import Batch, ReplayStepper
from everystep.step.advance import Hook, Losses, advance
from everystep.step.check import bytes_of
from everystep.step.checkpoint import Checkpoint
from everystep.step.eager import EagerStep, Training
from everystep.step.generators import Generators
from everystep.step.hyperparameters import set_hyperparameter
from everystep.step.observe import Observation, observe_eager, observe_program
from everystep.step.programs import Programs
from everystep.step.skeleton import Skeleton, load_into_skeleton
from everystep.step.state import State
from everystep.training.dataset_batches import DatasetBatches

__all__ = ["TrainingStepper"]

_CURE = (
    "; open the run with objects as they were before training: everystep.open(run, model=..., "
    "loss=..., optimizer=...)"
)


class TrainingStepper(ReplayStepper):
    """Replays the steps of a training, in any order of loading and running.

    Args:
        training: the training.
        programs: the programs that run its steps.
        eager_from: the first step that Python runs, None if there is none.
        batches: which rows each step sees.
        settings: the numbers of the optimizer that changed, by name.
        between: reads the tensors that other code changed after a step, by that step.

    state: the step after which its current state is, None before one is loaded.
    """

    has_gradients_in_state = False

    def __init__(
        self,
        training: Training,
        programs: Programs,
        eager_from: int | None,
        batches: Batches,
        settings: dict[str, Setting],
        between: Mapping[int, Callable[[], dict[str, Tensor]]],
    ) -> None:
        self._training = training
        self._batches = batches
        self._programs = programs
        self._eager_from = eager_from
        self.state: int | None = None
        self._loaded: int | None = None
        self._settings = settings
        self._between = between
        self._settled: int | None = None
        self._batch_digest: bytes | None = None
        self._eager = EagerStep(training)
        self._losses = Losses()

    def load(self, state: State) -> None:
        """Bring everything to a state from disk.

        Raises:
            RunError: it does not belong to this training.
        """
        training = self._training
        try:
            if isinstance(training.model, Skeleton):
                load_into_skeleton(training, state, has_step=self._programs.has_optimizer_step)
            else:
                state.restore(
                    training.model, training.loss, training.optimizer, training.schedule, training.device
                )
        except ValueError as error:
            cure = "" if isinstance(training.model, Skeleton) else _CURE
            raise RunError(f"state {state.step} does not fit the training: {error}{cure}") from None
        self._moved(state.step)

    def save(self) -> Checkpoint:
        """Return a copy of the current state."""
        self.settle()
        return Checkpoint(self._training)

    def restore(self, step: int, saved: Checkpoint) -> None:
        """Bring everything back to what `save` returned after `step`."""
        saved.restore(self._training, forget_new=True)
        self._moved(step)

    def capture(self) -> State:
        """Return the current state in the form that is written to disk."""
        assert self.state is not None
        self.settle()
        if self._training.has_tensor_settings:
            self._set_hyperparameters(self.state + 1)
        return self._training.state(self.state)

    def run(self, last: int) -> Tensor:
        """Run the steps up to `last`; return their losses (steps), on the CPU.

        Raises:
            RunError: there is neither a program nor a model to run a step.
        """
        assert self.state is not None
        losses: list[Tensor] = []
        while self.state < last:
            number = self.state + 1
            if self.is_by_program(number):
                losses.append(self._run_by_program(last))
                continue
            self._begin_eagerly(number)
            with _named(number):
                losses.append(self._eager.take(*self._training.batch(number)).reshape(1))
            self.state = number
        return torch.cat(losses).cpu() if losses else torch.empty(0)

    def watch(self, last: int, hook: Hook) -> Tensor:
        """Run the steps up to `last`, observed by a hook; return their losses (steps), on the CPU.

        A program must run the next step. `watch` ends at the first step that no program runs, or when
        the hook says so.
        """
        return self._run_by_program(last, hook).cpu()

    def _run_by_program(self, last: int, hook: Hook | None = None) -> Tensor:
        """Run steps by programs up to `last`; return their losses, on the device."""
        assert self.state is not None
        first = self.state + 1
        self._losses.drop(self._losses.count)  # of steps that were interrupted
        ends = [last, first + self._losses.room - 1, self._programs.until(first) or last]
        ends += [] if self._eager_from is None else [self._eager_from - 1]
        is_steady = self._is_steady(first)
        advance(
            first,
            min(ends),
            self._begin_by_program,
            self._keep,
            is_steady=is_steady,
            hook=hook,
            failed=_refused,
        )
        return self._losses.collect()

    def _begin_by_program(self, number: int) -> BoundProgram | None:
        bound = self._begin(number) if self.is_by_program(number) else None
        if bound is not None:
            self._losses.make_room(bound.loss)
        return bound

    def _keep(self, number: int, bound: BoundProgram) -> None:
        self._losses.keep(bound.loss)
        self.state = number

    def _is_steady(self, first: int) -> bool:
        """Tell whether one program runs the steps from `first` on without preparation in between."""
        is_alike = self._training.batch.is_fixed and not self._settings and not self._between
        return is_alike and first > self._programs.since(first)

    def observe(self) -> Observation:
        """Run the next step, and return everything in it.

        Raises:
            RunError: there is neither a program nor a model to run it.
        """
        assert self.state is not None
        number = self.state + 1
        if self.is_by_program(number):
            observation = observe_program(self._begin(number))
        else:
            self._begin_eagerly(number)
            with _named(number):
                observation = observe_eager(self._eager, number)
        self.state = number
        return observation

    def _begin(self, number: int) -> BoundProgram:
        """Prepare a step; return the program that runs it."""
        self.settle()
        self._set_hyperparameters(number)
        bound = self._programs.bound(number)
        self._programs.load_batch(number, bound)
        return bound

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients of the last step are available: not right after loading a state."""
        return self.state is not None and self._loaded != self.state

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of each param group, from the next step on."""
        for group in self._training.optimizer.param_groups:
            group["lr"] = lr
        self._settings.pop("lr", None)
        self._programs.load_rates()

    def use(self, batches: Batches) -> None:
        """From the next step on, let steps see these batches of the same rows."""
        assert isinstance(self._training.batch, RowsOf)
        self._training.batch.use(batches)
        self._batches = batches
        self._batch_digest = None

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by name."""
        return self._training.named_state()

    def generators(self, number: int) -> dict[str, Tensor]:
        """Return the states of the random generators that the next step draws from, by name."""
        return Generators.capture(self._training.device).tensors()

    def batch(self, number: int) -> Batch:
        """Return a copy of the batch of a step, on the CPU."""
        given = zip("xy", self._training.batch(number), strict=True)
        tensors = {name: copy_on_cpu(part) for name, part in given}
        numbers, source = self._batches.numbers_of(number), self._batches.source
        return Batch(tensors, numbers, tuple(tensors.values()), source)

    def given(self, number: int) -> bytes:
        """Return a fingerprint of the next step's inputs besides its state: settings and batch."""
        self.settle()
        self._set_hyperparameters(number)
        settings = json.dumps(self._training.hyperparameters()).encode()
        if self._batch_digest is None or not self._training.batch.is_fixed:
            parts = self._training.batch(number)
            digests = (hashlib.sha256(bytes_of(part)).digest() for part in parts)
            self._batch_digest = b"".join(digests)
        return settings + self._batch_digest

    def module_paths(self) -> list[str]:
        """Return the paths of modules, of which not each need run at each step."""
        return [path for path, _ in self._training.model.named_modules() if path]

    def epoch(self, number: int) -> int:
        """Return the epoch of a step, from 0."""
        return self._batches.epoch(number)

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of the gradients that the last step has left, by parameter."""
        if not self.has_gradients:
            return {}
        assert self.state is not None
        found = self._training.gradients()
        if self.is_by_program(self.state):
            found = self._programs.bound(self.state).gradients
        return {name: copy_on_cpu(gradient) for name, gradient in found.items()}

    def hyperparameters(self) -> dict[str, float]:
        """Return the current learning rates, and the other numbers that ever changed."""
        now = self._training.hyperparameters()
        return {n: value for n, value in now.items() if n.startswith("lr") or n in self._settings}

    def is_by_program(self, number: int) -> bool:
        """Tell whether a program runs a step."""
        if self._eager_from is not None and number >= self._eager_from:
            return False
        # The first program may make state that only the optimizer itself knows where to keep.
        makes_state = number == self._programs.since(number) and not isinstance(
            self._training.model, Skeleton
        )
        return not makes_state and self._programs.has(number)

    def _begin_eagerly(self, number: int) -> None:
        """Prepare for a step that Python runs.

        Raises:
            RunError: there is no model to run it.
        """
        self.settle()
        self._set_hyperparameters(number)
        if isinstance(self._training.model, Skeleton):
            raise RunError(
                f"Python ran step {number}, and no program can repeat it; open the run with the "
                "objects that trained it: everystep.open(run, model=..., loss=..., optimizer=...)"
            )

    def settle(self) -> None:
        """Apply what other code changed after the last step, before anything else runs."""
        assert self.state is not None
        if self.state not in self._between or self._settled == self.state:
            return
        self._settled = self.state
        tensors = self._between[self.state]()
        training = self._training
        live = training.named_state()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in live and live[name].shape == tensor.shape:
                    copy_into(live[name], tensor)
        generators = {n.removeprefix("generator/"): t for n, t in tensors.items() if n not in live}
        if any(name in generators for name in ("torch", "python", "numpy")):
            known = Generators.capture(training.device).tensors() | generators
            Generators.from_tensors(known).restore(training.device)

    def _moved(self, step: int) -> None:
        self.state = self._loaded = self._settled = step
        if isinstance(self._training.batch, DatasetBatches):
            self._training.batch.forget()
        self._programs.refresh()
        self._programs.load_rates()

    def _set_hyperparameters(self, step: int) -> None:
        if not self._settings:
            return
        for name, setting in self._settings.items():
            value = setting.at(step)
            if value is not None:
                set_hyperparameter(self._training.optimizer, name, value)
        self._programs.load_rates()


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Name the step in which user code or torch raised."""
    try:
        yield
    except EverystepError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(f"step {number} fails during the replay: {reason}") from error


def _refused(number: int, error: Exception) -> Exception:
    """Return the error that a program of a run does not fit its values."""
    if isinstance(error, EverystepError):
        return error
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ProgramError(f"the program of step {number:,} cannot run: {reason:.300}")
