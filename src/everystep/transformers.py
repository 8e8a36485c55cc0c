"""Hugging Face: `Trainer(callbacks=[everystep.transformers.RecordTraining()])`; an update is a step."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn

from everystep.api import record
from everystep.errors import UsageError
from everystep.run import Run
from everystep.training.record import Recording

__all__ = ["RecordTraining"]


class RecordTraining(transformers.TrainerCallback):  # type: ignore[misc]  # untyped there
    """Record a training: each update is a step, with all forward passes that it accumulates.

    The batch of a step is the input of the model. Its loss is the one that Trainer logs: the sum of what
    its backward passes begin with, whoever computes it (`compute_loss`). Evaluation runs between two
    steps and is not recorded. Use `everystep.record` for a loop with Accelerate.

    Args:
        run: the new run: a name in runs/, or a path, which must not exist; default: the next free
            `runs/loop-1`, ...
        options: options of `everystep.record`, such as `stop_when`, `keep` and `snapshot_budget`.

    A training that continues from a checkpoint is recorded as a new run, which begins there.

    Raises:
        UsageError: the training uses more than one process, or `resume` is given.
    """

    #: Of the training in progress, or of one that ended with an error, for which Trainer calls nothing.
    _begun: RecordTraining | None = None

    def __init__(self, run: str | Path | None = None, **options: Any) -> None:
        if "resume" in options:
            raise UsageError(
                "RecordTraining cannot resume a run, since the trainer chooses the batches; continue "
                "from the trainer's checkpoint, trainer.train(resume_from_checkpoint=True), in a new run"
            )
        self._run, self._options = run, options
        self._recording: Recording[Run] | None = None
        self._is_in_step = False
        self._losses: list[Tensor] = []
        self._hook: Any = None
        self._backward: Any = None

    @property
    def run(self) -> Run:
        """The run, during the training and afterwards.

        Raises:
            UsageError: no training has started.
        """
        if self._recording is None:
            raise UsageError(
                "nothing is recorded yet; `run` is available once trainer.train has started"
            )
        return self._recording.run

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin the run; one that Trainer left with an error is closed."""
        # It still listens to the model and to the accelerator, and would record this training, too.
        if RecordTraining._begun is not None:
            RecordTraining._begun._close(RuntimeError("the training ended with an error"))
        optimizer = given["optimizer"]
        # A trainer around this one may give callbacks an object of its own as the model.
        model = next((each for each in given.values() if isinstance(each, nn.Module)), None)
        if model is None:
            raise UsageError("the trainer gives its callbacks no module; use everystep.record")
        self._recording = record(run=self._run, model=model, optimizer=optimizer, **self._options)
        self._recording.__enter__()
        self._hook = model.register_forward_pre_hook(self._is_called, with_kwargs=True)
        self._watch_losses()
        RecordTraining._begun = self

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin a step."""
        if self._recording is not None and not self._recording.is_stopping:
            self._recording.begin_step()
            self._is_in_step, self._losses = True, []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Log the loss, and end the step."""
        if self._recording is None or not self._is_in_step:
            return
        # In the step, so that the run knows which operations made the loss.
        if self._losses:
            one, *others = self._losses
            self._recording.log(loss=torch.stack(self._losses).float().sum() if others else one)
        self._is_in_step = False
        self._recording.end_step()
        control.should_training_stop |= self._recording.is_stopping

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Close the run."""
        self._close()

    def _close(self, error: Exception | None = None) -> None:
        RecordTraining._begun, self._is_in_step = None, False
        self._hook.remove()
        accelerate.Accelerator.backward = self._backward
        if self._recording is not None:
            self._recording.__exit__(None if error is None else type(error), error, None)

    def _is_called(self, model: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
        if self._recording is not None and self._is_in_step:
            self._recording.add_batch(keywords if keywords else args)

    def _watch_losses(self) -> None:
        """Keep the losses that Trainer starts backward passes with; no callback gets them."""
        self._backward = accelerate.Accelerator.backward

        @wraps(self._backward)
        def backward(accelerator: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self._is_in_step:
                self._losses.append(loss.detach())
            self._backward(accelerator, loss, *args, **kwargs)

        # On the class, since callbacks are not given the accelerator.
        accelerate.Accelerator.backward = backward
