"""A job from the user's own live model, loss and optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from everystep import numerics
from everystep.errors import DataError, DeviceError, ExperimentError, Fault, ModelError
from everystep.experiment.batches import Batches
from everystep.experiment.data import Data, split_rows
from everystep.experiment.device import select
from everystep.experiment.specification import Iteration
from everystep.step.eager import BatchSource, Trainee
from everystep.step.evaluate import Evaluation
from everystep.step.state import named_state
from everystep.training.dataset import collate_rows, gives_same_rows, read_dataset
from everystep.training.facts import describe
from everystep.training.from_experiment import default_evaluate_every, total_steps
from everystep.training.job import Job, Outcome, Progress
from everystep.training.loop import run_job
from everystep.training.measurements import RESERVED_NAMES, standard_measurements

__all__ = ["Objects", "objects_job", "train_objects"]

Pair = tuple[Any, Any]


class Objects:
    """What the user hands to `train`: live objects, with the checks that need them.

    Raises:
        ExperimentError: lists everything that is of the wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Pair | Dataset[Any],
        loss: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler | None,
        schedule_every: str,
        validation: Pair | float | None,
        metrics: Mapping[str, Callable[[Tensor, Tensor], Any]],
        dataset_limit: int,
    ) -> None:
        self.model = model
        self.data = data
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        self.schedule_every = cast(Literal["step", "epoch"], schedule_every)
        self.validation = validation
        self.metrics = metrics
        self.dataset_limit = dataset_limit
        faults = [Fault(path, problem) for path, problem, wrong in self._checks() if wrong]
        if faults:
            raise ExperimentError(faults, "the arguments of train")

    def _optimizes_model(self) -> bool:
        own = set(self.model.parameters())
        return any(p in own for group in self.optimizer.param_groups for p in group["params"])

    def _checks(self) -> list[tuple[str, str, bool]]:
        is_pair = isinstance(self.data, tuple | list) and len(self.data) == 2
        is_fraction = isinstance(self.validation, float) and 0 < self.validation < 1
        is_validation_pair = isinstance(self.validation, tuple | list) and len(self.validation) == 2
        taken = RESERVED_NAMES & set(self.metrics)
        is_model = isinstance(self.model, nn.Module)
        is_optimizer = isinstance(self.optimizer, torch.optim.Optimizer)
        needs_closure = isinstance(self.optimizer, torch.optim.LBFGS)
        plateau = isinstance(self.schedule, ReduceLROnPlateau) and self.validation is None
        return [
            ("model", _must_be("an nn.Module", self.model), not isinstance(self.model, nn.Module)),
            (
                "data",
                _must_be("a pair of tensors (x, y) or a Dataset", self.data),
                not (is_pair or _is_dataset(self.data)),
            ),
            (
                "loss",
                _must_be("a callable of (prediction, target)", self.loss),
                not callable(self.loss),
            ),
            (
                "optimizer",
                _must_be(
                    "an optimizer over the model's parameters, such as "
                    "everystep.GradientDescent(model.parameters(), lr=1e-4)",
                    self.optimizer,
                ),
                not isinstance(self.optimizer, torch.optim.Optimizer),
            ),
            (
                "optimizer",
                "LBFGS evaluates the loss several times in one step (it needs a closure), and a step "
                "here has one forward and one backward pass; Adam or SGD with momentum do without",
                needs_closure,
            ),
            (
                "schedule",
                _must_be("a torch.optim.lr_scheduler of the optimizer", self.schedule),
                not isinstance(self.schedule, LRScheduler | None),
            ),
            (
                "schedule",
                "ReduceLROnPlateau follows the validation loss; pass validation=(x, y)",
                plateau,
            ),
            (
                "schedule_every",
                f"must be 'step' or 'epoch', not {self.schedule_every!r}",
                self.schedule_every not in ("step", "epoch"),
            ),
            (
                "validation",
                _must_be("a pair of tensors (x, y) or a share of the rows such as 0.2", self.validation),
                not (self.validation is None or is_fraction or is_validation_pair),
            ),
            (
                "optimizer",
                "has none of the model's parameters, so the model would never change",
                is_model and is_optimizer and not self._optimizes_model(),
            ),
            (
                "loss",
                f"is the class {getattr(self.loss, '__name__', '')}; write it with parentheses",
                inspect.isclass(self.loss),
            ),
            (
                "metrics",
                "must map names to callables of (prediction, target)",
                not (
                    isinstance(self.metrics, Mapping)
                    and all(isinstance(n, str) and callable(f) for n, f in self.metrics.items())
                ),
            ),
            (
                "metrics",
                f"{', '.join(sorted(taken))}: the table of losses has columns of that name; "
                "choose another",
                bool(taken),
            ),
        ]


def train_objects(
    objects: Objects,
    iteration: Iteration,
    directory: Path | None,
    runs: Path,
    budget: int,
    progress: Progress,
) -> Outcome:
    """Train the live model in place, recording every step.

    Raises:
        UsageError: the data, the device or the settings do not serve; says why and the cure.
        RecordingError: writing the run failed; the model holds the last state.
    """
    numerics.prepare()
    with numerics.in_force(iteration.threads):
        if iteration.seed is not None:
            torch.manual_seed(iteration.seed)
        device = _device(objects, iteration.device)
        job = objects_job(objects, iteration, device, progress)
        return run_job(job, directory, runs, budget, progress)


def objects_job(objects: Objects, iteration: Iteration, device: torch.device, progress: Progress) -> Job:
    """Make everything else that a training of live objects needs.

    Raises:
        UsageError: the data or the settings do not serve; says why and the cure.
    """
    # Without a seed, the order of the batches follows the one that torch was last seeded with.
    seed = torch.initial_seed() if iteration.seed is None else iteration.seed
    notices = [message] if (message := numerics.warning()) else []
    if not objects.model.training:
        notices.append(
            "the model is in evaluation mode, so dropout and batch norm train as they evaluate; "
            "call model.train() first if that is not meant"
        )
    _check_dense(objects)
    data, rows = _read(objects, seed, progress)
    batches = Batches(rows, iteration.batch_size, seed, iteration.drop_last)
    steps = total_steps(iteration.steps, iteration.epochs, batches)
    if data is None:
        notices.append(
            "the Dataset gives other rows when read again (random augmentation?), so it is read "
            "at every step, and replaying this run will need the Dataset"
        )
        batch: BatchSource = _LazyBatches(cast("Dataset[Any]", objects.data), batches, device)
    else:
        on_device = data.to(device)
        batch = batches.of(on_device.x, on_device.y)
    trainee = Trainee(
        model=objects.model,
        loss=objects.loss,
        optimizer=objects.optimizer,
        batch=batch,
        device=device,
        schedule=objects.schedule,
        schedule_every=objects.schedule_every,
        steps_per_epoch=batches.steps_per_epoch,
        clip_norm=iteration.clip_norm,
    )
    every = iteration.evaluate_every or default_evaluate_every(steps, batches)
    source = {"source": "dataset" if _is_dataset(objects.data) else "tensors", "lazy": data is None}
    return Job(
        name=_snake(type(objects.model).__name__),
        trainee=trainee,
        steps=steps,
        facts=describe(trainee, data, batches, source, iteration.seed, every),
        data=data.to(torch.device("cpu")) if data else None,
        evaluation=_evaluation(objects, data, device),
        evaluate_every=every,
        stop_on_nan=iteration.stop_on_nan,
        engine=iteration.engine,
        fold=iteration.fold,
        notices=notices,
    )


def _check_dense(objects: Objects) -> None:
    state = named_state(objects.model, objects.loss, objects.optimizer)
    sparse = [name for name, tensor in state.items() if tensor.layout != torch.strided]
    if sparse:
        raise ModelError(
            f"{', '.join(sparse)}: snapshots hold no sparse tensors; keep it as a plain attribute of "
            "the module instead of a buffer, or dense (to_dense())"
        )


def _read(objects: Objects, seed: int, progress: Progress) -> tuple[Data | None, int]:
    """Return the data and its rows to train on; no data where it must be read at every step."""
    if _is_dataset(objects.data):
        if not gives_same_rows(objects.data):
            if objects.validation is not None or objects.metrics:
                raise DataError(
                    "validation and metrics need data that stays the same, but the Dataset gives "
                    "other rows when read again; evaluate such a model outside everystep"
                )
            return None, len(objects.data)  # type: ignore[arg-type]  # checked just now
        pair: Pair = read_dataset(objects.data, objects.dataset_limit, progress.reading)
    else:
        pair = cast(Pair, objects.data)
    x, y = _tensors("data", pair)
    if isinstance(objects.validation, float):
        training, kept_out = split_rows(len(x), objects.validation, seed)
        return Data(x[training], y[training], (x[kept_out], y[kept_out])), len(training)
    validation = objects.validation and _tensors("validation", objects.validation)
    if validation and validation[0].shape[1:] != x.shape[1:]:
        shapes = f"{tuple(validation[0].shape)}, where the data's x is {tuple(x.shape)}"
        raise DataError(f"validation: x is {shapes}; rows must have the same shape")
    return Data(x, y, validation or None), len(x)


def _tensors(name: str, pair: Pair) -> tuple[Tensor, Tensor]:
    tensors = [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in pair]
    for letter, tensor in zip("xy", tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            got = type(tensor).__name__
            raise DataError(f"{name}: {letter} must be a tensor with rows first, not a {got}")
        if tensor.layout != torch.strided:
            raise DataError(f"{name}: {letter} is sparse; pass {letter}.to_dense()")
    x, y = (tensor.detach() for tensor in tensors)
    if len(x) != len(y):
        raise DataError(f"{name}: x has {len(x)} rows and y has {len(y)}; they must have the same")
    if len(x) == 0:
        raise DataError(f"{name} has no rows")
    return x, y


class _LazyBatches:
    """The batches of a Dataset that is read at every step, since it gives other rows each time."""

    is_fixed = False
    runs_python = True

    def __init__(self, dataset: Dataset[Any], batches: Batches, device: torch.device) -> None:
        self._dataset = dataset
        self._batches = batches
        self._device = device
        self._step = 0
        self._pair: tuple[Tensor, Tensor] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of a step; asked for the same step again, the same."""
        if self._pair is None or step != self._step:
            indices = self._batches.indices(step)
            rows = range(self._batches.rows) if indices is None else indices.tolist()
            x, y = collate_rows(self._dataset, rows)
            self._step, self._pair = step, (x.to(self._device), y.to(self._device))
        return self._pair

    def shape(self, step: int) -> Hashable:
        """Return shapes and dtypes of a step's batch."""
        return tuple((tensor.shape, tensor.dtype) for tensor in self(step))

    def into(self, step: int, x: Tensor, y: Tensor) -> None:
        """Write x and y of a step into tensors of their shape."""
        for target, source in zip((x, y), self(step), strict=True):
            target.copy_(source)


def _evaluation(objects: Objects, data: Data | None, device: torch.device) -> Evaluation | None:
    """Measure the validation part; metrics alone are measured on the data itself."""
    if data is None or (data.validation is None and not objects.metrics):
        return None
    measurements = dict(objects.metrics)
    pair = (data.x, data.y)
    if data.validation is not None:
        pair = data.validation
        measurements = {**standard_measurements(objects.loss, pair[1]), **measurements}
    x, y = (part.to(device) for part in pair)
    return Evaluation(objects.model, measurements, x, y, device)


def _device(objects: Objects, name: str | None) -> torch.device:
    """Return the device to train on, the model moved there if it was asked for."""
    parameter = next(objects.model.parameters(), None)
    here = parameter.device if parameter is not None else torch.device("cpu")
    if here.type == "meta":
        raise DeviceError(
            "the model is on the meta device and has no numbers; model.to_empty(...) first"
        )
    if name is None:
        return here
    device = select(name)
    if device != here and objects.optimizer.state:
        raise DeviceError(
            f"the model is on {here} and its optimizer has already taken steps there; move both to "
            f"{device} before training, or leave device out"
        )
    objects.model.to(device)
    return device


def _is_dataset(data: Any) -> TypeGuard[Dataset[Any]]:
    return isinstance(data, Dataset) or (
        not isinstance(data, tuple | list | Tensor | np.ndarray | Mapping)
        and hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
    )


def _must_be(what: str, value: Any) -> str:
    return f"must be {what}, not {type(value).__name__}"


def _snake(name: str) -> str:
    words = "".join(f"-{c.lower()}" if c.isupper() else c for c in name)
    return words.strip("-").replace("_", "-") or "run"
