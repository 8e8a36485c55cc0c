"""Shares: how several processes train a model together on the batches of one.

Each rank takes a share of the rows of every batch. After its backward pass, the gradients of all ranks
are added, as `DistributedDataParallel` does it, so that each rank updates the model by the gradient of
the loss of the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from everystep.errors import ExperimentError, Fault
from everystep.experiment.batches import Batches, RowsOf
from everystep.experiment.specification import Iteration
from everystep.step.optimizer_call import has_own_zero_grad
from everystep.step.torchs_own import reason_against_loss
from everystep.training.agreement import check_stops_together
from everystep.training.dataset import DatasetBatches
from everystep.training.objects import Objects

__all__ = ["Shares", "shares_of"]

_OWN_STEP = "or train with a step of your own: everystep.train(step, loader, parts=...)"


@dataclass(frozen=True)
class Shares:
    """How the gradients of all ranks become that of a whole batch.

    batches: of this rank; is_mean: whether the loss is a mean over the rows, not a sum.
    """

    batches: Batches
    is_mean: bool

    def exchange(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Replace the gradients of parameters by those of the whole batch.

        A parameter without a gradient counts as zero, unless no rank has one.
        """
        # The last batch of an epoch may be smaller, and its shares of different sizes.
        own, whole = (b.rows_of(step) for b in (self.batches, replace(self.batches, share=None)))
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # One collective for each dtype, in the order of the parameters, which is the same on all ranks.
        for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
            alike = [parameter for parameter in trained if parameter.dtype == dtype]
            _exchange(alike, own / whole if self.is_mean else 1.0)


def _exchange(parameters: list[Tensor], weight: float) -> None:
    """Replace gradients of one dtype by the sum of those of all ranks. weight: of this one."""
    grown = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # All ranks exchange as many numbers, whichever parameters a step of theirs has used.
    used = [
        grown[0].new_full((len([*alike]),), float(is_used))
        for is_used, alike in groupby(p.grad is not None for p in parameters)
    ]
    # In one tensor: all gradients, then for each parameter 1 if this rank has used it.
    flat = torch.cat([gradient.reshape(-1) for gradient in grown]) * weight
    exchanged = torch.cat([flat, *used])
    torch.distributed.all_reduce(exchanged)
    sizes = [*(parameter.numel() for parameter in parameters), len(parameters)]
    *sums, users = torch.split(exchanged, sizes)
    for place, (parameter, gradient, whole) in enumerate(zip(parameters, grown, sums, strict=True)):
        # torch's optimizers skip a parameter without a gradient; with zeros, momentum would move it.
        if parameter.grad is None and not users[place].item():
            continue
        gradient.copy_(whole.view(parameter.shape))
        parameter.grad = gradient


def shares_of(objects: Objects, batch: RowsOf | DatasetBatches, iteration: Iteration) -> Shares:
    """Return how several processes train live objects together. batch: of this rank.

    Raises:
        ExperimentError: lists what does not work with several processes, with a fix.
        UsageError: `stop_on_nan` is set.
    """
    if iteration.stop_on_nan:
        check_stops_together("stop_on_nan", "omit it")
    faults = []
    if any(isinstance(module, DistributedDataParallel) for module in objects.model.modules()):
        problem = "is a DistributedDataParallel; pass the model within, and everystep adds the gradients"
        faults.append(Fault("model", problem))
    if objects.optimizer is not None and has_own_zero_grad(objects.optimizer):
        faults.append(Fault("optimizer", f"has a custom zero_grad; use one of torch's, {_OWN_STEP}"))
    if isinstance(batch, DatasetBatches):
        problem = f"is a Dataset that is read at every step; pass (x, y), {_OWN_STEP}"
        faults.append(Fault("data", problem))
    if any(getattr(module, "sparse", False) for module in objects.model.modules()):
        problem = "has a layer with sparse gradients; make it with sparse=False"
        faults.append(Fault("model", f"{problem}, {_OWN_STEP}"))
    if isinstance(batch, RowsOf) and (fault := _loss_fault(objects.loss, batch.y)):
        faults.append(Fault("loss", fault))
    if faults or isinstance(batch, DatasetBatches):
        raise ExperimentError(faults, "a training by several processes")
    return Shares(batch.batches, _options(objects.loss)["reduction"] != "sum")


def _loss_fault(loss: Any, y: Tensor) -> str | None:
    """Return why the losses of shares do not make that of a batch, or None. y: all targets."""
    options = {} if reason_against_loss(loss) else _options(loss)
    # Older names, which torch's losses still take in place of `reduction`.
    is_old = any(options.get(name) is not None for name in ("reduce", "size_average"))
    if "reduction" not in options or is_old:
        return (
            "must be one of torch's, with a reduction, since nothing else shows whether it is a mean or "
            f"a sum over the rows; {_OWN_STEP}"
        )
    if options["reduction"] not in ("mean", "batchmean", "sum"):
        return f"has reduction={options['reduction']!r}; use a mean or a sum"
    if options["reduction"] != "mean" or "ignore_index" not in options:
        return None
    # It divides by the weights of the targets, not by their number.
    is_ignored = not y.is_floating_point() and bool((y == options["ignore_index"]).any())
    if options["weight"] is not None or is_ignored:
        kind = "ignores some" if is_ignored else "weighs classes"
        return f'{kind}, so that its mean over a share is not that of a batch; use reduction="sum"'
    return None


def _options(loss: Any) -> Mapping[str, Any]:
    """Return the settings of one of torch's losses, by name, as far as they show."""
    if isinstance(loss, nn.Module):
        return vars(loss) | loss._buffers
    if isinstance(loss, partial):
        return {} if loss.args else {**_options(loss.func), **loss.keywords}
    try:
        named = inspect.signature(loss).parameters.items()
    except ValueError:  # it is not written in Python
        return {}
    return {name: parameter.default for name, parameter in named}
