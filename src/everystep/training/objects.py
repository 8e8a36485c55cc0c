"""Objects: the user's model, loss, optimizer and data, checked and copied; every error has a fix."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)

from everystep.errors import DataError, ExperimentError, Fault, RunError, UsageError
from everystep.experiment.catalogue import metric_by_name
from everystep.experiment.metrics import RESERVED_NAMES, Metrics
from everystep.program.operation import path_faults
from everystep.recording.facts import check_measurement_names
from everystep.step.follow import is_compiled, module_fault
from everystep.training.dataset import DEFAULT_DATASET_LIMIT, called, unfit

__all__ = ["Objects", "is_dataset"]

Faults = Iterator[Fault]
_COPYING = threading.Lock()


@dataclass(frozen=True)
class Objects:
    """The user's live objects, unchecked; a replay or a fork may need only some.

    model: an nn.Module; loss: a function of prediction and target; optimizer: over the model's
    parameters; data: x (N, ...) and y (N, ...), or a Dataset; scheduler: a scheduler of torch's;
    validation: x and y to measure, or the share of rows to keep out for it; metrics: names of
    metrics, or functions of all predictions and targets, by name; dataset_limit: bytes that a Dataset
    may take as tensors.
    """

    model: Any = None
    loss: Any = None
    optimizer: Any = None
    data: Any = None
    scheduler: Any = None
    scheduler_every: Any = "step"
    validation: Any = None
    metrics: Metrics | None = None
    dataset_limit: float = DEFAULT_DATASET_LIMIT

    @property
    def names(self) -> set[str]:
        """The names of those that were given; two always have a value."""
        named = {name for name, each in vars(self).items() if each is not None}
        return named - {"scheduler_every", "dataset_limit"}

    def copied(self) -> Objects:
        """Return copies that belong to each other as the originals do.

        Raises:
            RunError: they cannot be copied.
        """
        if (hooked := self._hooked()) is not None:
            raise RunError(
                f"{hooked} has a hook, which acts on the original alone: a copy would differ; write "
                "what it does into a step function: everystep.train(step, batches, parts=...)"
            )
        own = self.model, self.loss, self.optimizer, self.scheduler
        # In one call, so that the optimizer of the copy has the parameters of the copied model.
        try:
            with _whole_optimizers():
                model, loss, optimizer, scheduler = copy.deepcopy(own, self._without_graphs())
        except Exception as error:  # copying a user's object may raise anything
            reason = str(error).partition(". ")[0].partition("\n")[0]
            raise RunError(
                f"the model, loss and optimizer cannot be copied ({reason}); pass new "
                "ones: model=..., loss=..., optimizer=..."
            ) from None
        return replace(self, model=model, loss=loss, optimizer=optimizer, scheduler=scheduler)

    def _hooked(self) -> str | None:
        """Return the first tensor, or the optimizer, with a hook; hooks of modules are copied."""
        for name, parameter in self.model.named_parameters() if self.model is not None else ():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return str(name)
        kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        if any(getattr(self.optimizer, kind, None) for kind in kinds):
            return f"the optimizer ({type(self.optimizer).__name__})"
        return None

    def _without_graphs(self) -> dict[int, Any]:
        """Return copies, by id, of tensors that the last forward pass left in modules."""
        # `copy.deepcopy` refuses a tensor that has a graph, and takes what is in its memo for copied.
        modules = self.model.modules() if self.model is not None else ()
        held = (value for module in modules for value in vars(module).values())
        tensors = (value for value in held if isinstance(value, Tensor) and value.grad_fn is not None)
        return {id(tensor): tensor.detach().clone() for tensor in tensors}

    def check(self) -> None:
        """Check that these objects can be trained.

        Raises:
            ExperimentError: lists every error.
            DataError: only the data is invalid.
        """
        faults = list(self._faults())
        if faults:
            is_data = all(fault.path in ("data", "validation") for fault in faults)
            kind = DataError if is_data else ExperimentError
            raise kind(faults, "" if is_data and len(faults) == 1 else "the arguments of train")

    def _faults(self) -> Iterator[Fault]:
        yield from _model_faults(self.model)
        yield from _data_faults(self.data)
        yield from _loss_faults(self.loss)
        yield from _optimizer_faults(self.optimizer, self.model)
        yield from _scheduler_faults(self.scheduler, self.validation is not None)
        yield from _validation_faults(self.validation)
        yield from _metrics_faults(self.metrics or ())

    def check_complete(self) -> None:
        """Check that a step can run with these objects.

        Raises:
            RunError: names what is missing.
            UsageError: names what is of the wrong kind.
        """
        missing = [n for n in ("model", "loss", "optimizer") if getattr(self, n) is None]
        if missing:
            raise RunError(
                f"pass {' and '.join(missing)} as well: a step needs a model, a loss and an optimizer"
            )
        faults = [
            *_model_faults(self.model),
            *_loss_faults(self.loss),
            *_optimizer_faults(self.optimizer, self.model),
        ]
        if faults:
            raise UsageError(faults, "the given objects")


@contextmanager
def _whole_optimizers() -> Iterator[None]:
    """Make `copy.deepcopy` copy the attributes of an optimizer, which torch drops."""

    def copied(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
        new = memo[id(optimizer)] = type(optimizer).__new__(type(optimizer))
        # A scheduler puts its own step there, which would continue to update the original.
        own = {name: value for name, value in vars(optimizer).items() if name != "step"}
        vars(new).update(copy.deepcopy(own, memo))
        return new

    # The method is set on torch's class, so for all threads.
    with _COPYING:
        torch.optim.Optimizer.__deepcopy__ = copied  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del torch.optim.Optimizer.__deepcopy__  # type: ignore[attr-defined]


def is_dataset(data: Any) -> TypeGuard[Dataset[Any]]:
    """Return whether an object has rows by number, as a Dataset does."""
    # They may have both methods, and yield batches, or numbers of rows.
    if isinstance(data, DataLoader | Sampler):
        return False
    return isinstance(data, Dataset) or (
        not isinstance(data, tuple | list | Tensor | np.ndarray | Mapping | str | bytes)
        and hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
    )


def _model_faults(model: Any) -> Faults:
    if not isinstance(model, nn.Module):
        cure = ""
        if inspect.isclass(model):
            cure = f"; create an instance: {model.__name__}(...)"
        elif isinstance(model, list | tuple):
            cure = "; wrap the layers: nn.Sequential(*layers)"
        elif callable(model):
            cure = (
                "; write the function as the forward of a module, or pass parts= to train your own step"
            )
        yield Fault("model", f"must be an nn.Module, not {called(model)}{cure}")
        return
    if fault := module_fault("model", model):
        yield fault
        return
    if any(map(is_compiled, model.modules())):
        yield Fault("model", "is compiled (torch.compile); pass the uncompiled module")
        return
    # They become the names of tensors in a state.
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    yield from path_faults(dict(model.named_modules()))
    yield from path_faults(tensors)
    if lazy := [name for name, tensor in tensors.items() if nn.parameter.is_lazy(tensor)]:
        problem = f"{', '.join(lazy)}: lazy layers infer their sizes from the first batch"
        yield Fault("model", f"{problem}; run a batch through the model first: model(x[:1])")


def _loss_faults(loss: Any) -> Faults:
    if inspect.isclass(loss):
        yield Fault("loss", f"is the class {loss.__name__}; create an instance: add parentheses")
    elif not callable(loss):
        problem = f"must be a callable of (prediction, target), not {called(loss)}"
        yield Fault("loss", f"{problem}; such as torch.nn.MSELoss()")


def _optimizer_faults(optimizer: Any, model: Any) -> Faults:
    if not isinstance(optimizer, torch.optim.Optimizer):
        yield Fault("optimizer", _no_optimizer(optimizer))
        return
    if demanded := _demanded(optimizer):
        yield Fault(
            "optimizer",
            f"the step of {type(optimizer).__name__} requires {' and '.join(demanded)}, but everystep "
            "runs one forward and one backward pass per step and then calls optimizer.step() (an "
            "optimizer that needs a closure evaluates the loss itself); use Adam, or SGD with momentum",
        )
    if not isinstance(model, nn.Module):
        return
    # By identity: `==` of two tensors compares their numbers.
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in own for parameter in model.parameters()):
        yield Fault(
            "optimizer", "has none of the model's parameters, so it would never update the model"
        )


def _scheduler_faults(scheduler: Any, has_validation: bool) -> Faults:
    if not isinstance(scheduler, LRScheduler | None):
        cure = "; combine several with SequentialLR or ChainedScheduler"
        problem = f"must be a torch.optim.lr_scheduler of the optimizer, not {called(scheduler)}"
        yield Fault("scheduler", problem + cure * isinstance(scheduler, list | tuple))
    if isinstance(scheduler, ReduceLROnPlateau) and not has_validation:
        problem = "ReduceLROnPlateau needs a validation loss; pass validation=(x, y)"
        yield Fault("scheduler", problem)


def _metrics_faults(metrics: Any) -> Faults:
    if isinstance(metrics, list | tuple) and all(isinstance(name, str) for name in metrics):
        for place, name in enumerate(metrics):
            try:
                metric_by_name(name)
            except ValueError as error:
                yield Fault(f"metrics[{place}]", str(error))
        return
    if not isinstance(metrics, Mapping) or not all(
        isinstance(name, str) and callable(each) for name, each in metrics.items()
    ):
        problem = "must map names to callables of (prediction, target), or list names of metrics"
        yield Fault("metrics", problem)
        return
    try:
        check_measurement_names({*RESERVED_NAMES, *metrics})
    except UsageError as error:
        yield Fault("metrics", str(error))
    if taken := ", ".join(sorted(RESERVED_NAMES & set(metrics))):
        problem = f"{taken}: reserved for columns of the loss table; choose other names"
        yield Fault("metrics", problem)


def _data_faults(data: Any) -> Faults:
    """Yield faults of the data, without reading rows of a Dataset."""
    if isinstance(data, tuple | list) and len(data) == 2:
        yield from _pair_faults("data", data)
    elif not is_dataset(data):
        problem = f"must be a pair of tensors (x, y) or a Dataset, not {called(data)}"
        yield Fault("data", problem + _instead_of(data, "data"))


def _validation_faults(validation: Any) -> Faults:
    if isinstance(validation, tuple | list) and len(validation) == 2:
        yield from _pair_faults("validation", validation)
    elif validation is not None and not (isinstance(validation, float) and 0 < validation < 1):
        what = str(validation) if isinstance(validation, int | float) else called(validation)
        problem = f"must be a pair of tensors (x, y) or a fraction of the rows such as 0.2, not {what}"
        yield Fault("validation", problem + _instead_of(validation, "validation"))


def _pair_faults(name: str, pair: Any) -> Faults:
    sizes = []
    for letter, part in zip("xy", pair, strict=True):
        wanted = f"{letter} must be a tensor with rows along the first dimension, not"
        if (wrong := unfit(part, letter)) is not None:
            yield Fault(name, f"{wanted} {wrong}")
        elif not isinstance(part, Tensor | np.ndarray) or part.ndim == 0:
            yield Fault(name, f"{wanted} a single number")
        else:
            sizes.append(len(part))
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        yield Fault(name, f"x has {sizes[0]} rows and y has {sizes[1]}; they must match")
    elif sizes == [0, 0]:
        yield Fault(name, "has no rows")


def _no_optimizer(given: Any) -> str:
    if inspect.isclass(given) and issubclass(given, torch.optim.Optimizer):
        return (
            f"is the class {given.__name__}; create an instance: {given.__name__}(model.parameters(), "
            "lr=1e-3)"
        )
    if isinstance(given, list | tuple | Mapping):
        return (
            f"must be one optimizer, not {called(given)}; for different settings per layer, use param "
            "groups: torch.optim.SGD([{'params': ..., 'lr': ...}, {'params': ..., 'lr': ...}])"
        )
    return (
        "must be an optimizer over the model's parameters, such as "
        f"everystep.GradientDescent(model.parameters(), lr=1e-4), not {called(given)}"
    )


def _demanded(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the required arguments of `step`, as its class has it: a scheduler wraps the object's."""
    try:
        _, *parameters = inspect.signature(type(optimizer).step).parameters.values()
    except (TypeError, ValueError):  # something that has no signature, or no `self`
        return []
    # `*args` and `**kwargs` have no default either, and may be left empty.
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    demanded = [p.name for p in parameters if p.default is p.empty and p.kind not in fixed]
    return [f"a {name}" if name == "closure" else name for name in demanded]


def _instead_of(given: Any, name: str) -> str:
    """Return the fix if something that yields batches or rows was passed as data."""
    if name == "validation" and (isinstance(given, DataLoader) or is_dataset(given)):
        return "; stack its rows: x, y = next(iter(DataLoader(dataset, batch_size=len(dataset))))"
    if isinstance(given, DataLoader):
        return _instead_of_loader(given)
    if isinstance(given, Sampler):
        size = getattr(given, "batch_size", None)
        return "; it yields row numbers, not rows: pass the Dataset" + _batch_size(size)
    if isinstance(given, Iterator):
        return "; it can be iterated only once: pass the tensors or the Dataset that it reads"
    if isinstance(given, list | tuple) and given and isinstance(given[0], list | tuple):
        return "; stack the rows: x = torch.stack([x for x, y in rows]), and likewise for y"
    if isinstance(given, Mapping):
        return "; pass its tensors as (x, y)"
    return ""


def _instead_of_loader(loader: DataLoader[Any]) -> str:
    if isinstance(loader.dataset, IterableDataset):
        return "; pass a map-style Dataset (__len__ and __getitem__), and batch_size="
    # A loader that was given a batch sampler has no size of its own.
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    cure = f"; pass its Dataset instead: data=loader.dataset{_batch_size(size)}"
    cure += ", drop_last=True" * bool(getattr(loader.batch_sampler, "drop_last", False))
    unused = []
    if loader.batch_size is None and loader.batch_sampler is not None:
        unused.append("batch sampler")
    elif not isinstance(loader.sampler, RandomSampler | SequentialSampler):
        unused.append("sampler")
    if loader.collate_fn is not default_collate and loader.batch_sampler is not None:
        unused.append("collate_fn")
    if unused:
        cure += (
            f" (without its {' and '.join(unused)}: everystep shuffles rows by the seed, and stacks "
            "them)"
        )
    return cure


def _batch_size(size: Any) -> str:
    return f", batch_size={size}" if isinstance(size, int) else ", batch_size=..."
