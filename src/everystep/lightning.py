"""PyTorch Lightning: `Trainer(callbacks=[everystep.lightning.RecordFit()])`; a batch is a step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from everystep.api import record
from everystep.errors import UsageError
from everystep.run import Run
from everystep.training.record import Recording

try:
    import lightning.pytorch as pl
except ModuleNotFoundError:  # by its former name, which packages for forecasting install
    import pytorch_lightning as pl

__all__ = ["RecordFit"]


class RecordFit(pl.Callback):  # type: ignore[misc]  # no types come with it
    """Record a fit: each training batch is a step, from its forward pass to the optimizer's update.

    With `accumulate_grad_batches`, several steps share one update. Validation runs between two steps and
    is not recorded. Precision plugins, clipping and `automatic_optimization = False` work as usual.

    Args:
        run: the new run: a name in runs/, or a path, which must not exist; default: the next free
            `runs/loop-1`, ...
        options: options of `everystep.record`, such as `stop_when`, `keep` and `snapshot_budget`.

    A fit that continues from a checkpoint (`ckpt_path`) is recorded as a new run, which begins there.

    Raises:
        UsageError: the fit uses more than one process, or `resume` is given.
    """

    def __init__(self, run: str | Path | None = None, **options: Any) -> None:
        if "resume" in options:
            raise UsageError(
                "RecordFit cannot resume a run, since the trainer chooses the batches; continue "
                "from the trainer's checkpoint, trainer.fit(..., ckpt_path=...), in a new run"
            )
        self._run, self._options = run, options
        self._recording: Recording[Run] | None = None
        self._output: Any = None

    def __deepcopy__(self, memo: Any) -> Self:
        # Packages copy the settings of a trainer, and the user asks the original for the run.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # They save these settings with a model, too; a recording cannot be pickled.
        return vars(self) | {"_recording": None, "_output": None}

    @property
    def run(self) -> Run:
        """The run, during the fit and afterwards.

        Raises:
            UsageError: no fit has started.
        """
        if self._recording is None:
            raise UsageError("nothing is recorded yet; `run` is available once trainer.fit has started")
        return self._recording.run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the run."""
        several = len(trainer.optimizers) > 1
        optimizers = {
            f"optimizer_{place}" if several else "optimizer": each
            for place, each in enumerate(trainer.optimizers)
        }
        self._recording = record(run=self._run, model=pl_module, **optimizers, **self._options)
        # Not `with`: the fit calls back at its beginning and at its end.
        self._recording.__enter__()
        self._watch_training_step(trainer.strategy)

    def _watch_training_step(self, strategy: Any) -> None:
        """Keep what `training_step` returns; callbacks get a fraction of it for an accumulated batch."""
        training_step = strategy.training_step

        @wraps(training_step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._output = training_step(*args, **kwargs)
            return self._output

        # On the object, so that the method of its class is in force again once this is deleted.
        strategy.training_step = watched

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step."""
        if self._recording is not None and not self._recording.is_stopping:
            self._output = None
            self._recording.begin_step(batch)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the loss that `training_step` returned, and end the step."""
        if self._recording is None or self._recording.is_stopping:
            return
        # Not kept: the loss would hold the graph of its step.
        output, self._output = self._output, None
        # `training_step` may return a dict with the loss in it, or None to skip the batch.
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._recording.log(loss=loss)
        self._recording.end_step()
        trainer.should_stop |= self._recording.is_stopping

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the step of a batch that the module refused, which ends the epoch."""
        if self._recording is not None:
            self._recording.drop_step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the run."""
        if self._recording is not None:
            del trainer.strategy.training_step  # that of its class is in force again
            self._recording.__exit__(*sys.exc_info())

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the run of a fit that failed or was interrupted."""
        if self._recording is not None and self._recording.is_open:
            del trainer.strategy.training_step
            self._recording.__exit__(type(exception), exception, exception.__traceback__)
