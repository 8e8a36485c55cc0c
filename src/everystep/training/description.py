"""The facts of a training before it starts: what its objects show, and what the user gives.

Runs no user code.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from everystep.errors import Fault, UsageError, kind_text
from everystep.experiment.data import Data
from everystep.experiment.source_files import SourceFile
from everystep.experiment.specification import Iteration
from everystep.numerics import Numerics
from everystep.recording.facts import (
    LARGEST_CONFIG,
    LONGEST_TAG,
    MOST_TAGS,
    BatchFacts,
    DataFacts,
    DataFileFacts,
    LoopFacts,
    LossFacts,
    ModuleFacts,
    OptimizerFacts,
    SchedulerFacts,
    TrainingFacts,
)
from everystep.step.guards import is_plain
from everystep.step.optimizer_call import is_torchs_optimizer
from everystep.step.parts import Parts, is_of_module
from everystep.step.torchs_own import (
    hooks_of,
    is_torchs_module,
    is_torchs_scheduler,
    names_of,
    reason_against_loss,
)
from everystep.training.agreement import ranks_here
from everystep.training.model_step import Training

__all__ = ["describe", "facts_from", "facts_of_loop", "modules_of", "optimizer_facts"]

#: Maximum number of items of a list that is a setting; a longer one is data.
_MOST_ITEMS = 100
#: Collections within each other that are a setting.
_DEEPEST = 10
_HOOKS_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
#: What a scheduler counts, or holds besides its settings.
_COUNTED = {
    *("base_lrs", "best", "cooldown_counter", "last_epoch", "mode_worse", "num_bad_epochs"),
    *("T_cur", "T_i"),
}


def describe(
    training: Training,
    data: Data | None,
    source: dict[str, Any],
    iteration: Iteration,
    evaluate_every: int | None,
) -> TrainingFacts:
    """Return the facts of a training before it starts.

    evaluate_every: steps between measurements, None if nothing is measured.
    """
    batches = training.batch.batches
    about_data: dict[str, Any] = source | {"rows": batches.rows}
    preparation, files = None, dict[str, Any]()
    if data is not None:
        about_data |= {"x": tuple(data.x.shape), "y": tuple(data.y.shape)} | data.numbering._asdict()
        if data.validation is not None:
            about_data["validation_rows"] = len(data.validation[0])
        preparation = data.preparation
        if data.sources:
            files["data_file"] = _in_files(data.sources)
    return TrainingFacts(
        seed=iteration.seed,
        data=DataFacts(**about_data),
        batches=BatchFacts(
            batch_size=batches.batch_size,
            drop_last=batches.drop_last,
            seed=batches.seed,
            steps_per_epoch=batches.steps_per_epoch,
        ),
        modules=modules_of(training.model),
        parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        loss=_loss_facts(training.loss),
        max_grad_norm=training.max_grad_norm,
        evaluate_every=evaluate_every,
        stop_on_nan=iteration.stop_on_nan,
        preparation=preparation.model_dump() if preparation else None,
        ranks=ranks_here(),
        **_shared(training.parts, training.device, training.scheduler_every),
        **files,
    )


def _in_files(sources: tuple[SourceFile, ...]) -> DataFileFacts:
    return DataFileFacts(
        file=sources[0].path,
        stored=False,
        bytes=sum(each.bytes for each in sources),
        digest=hashlib.sha256("".join(each.digest for each in sources).encode()).hexdigest(),
        sources=tuple(each.digest for each in sources),
    )


def _shared(parts: Parts, device: torch.device, every: str | None = None) -> dict[str, Any]:
    """Return the facts that trainings of all kinds have. every: see `SchedulerFacts`."""
    schedulers = {n: part for n, part in parts.named.items() if isinstance(part, LRScheduler)}
    return {
        "device": str(device),
        "optimizers": {name: optimizer_facts(each) for name, each in parts.optimizers.items()},
        "schedulers": {name: _scheduler_facts(each, every) for name, each in schedulers.items()},
        "numerics": Numerics.read(device),
        "versions": {"python": platform.python_version()} | _versions(),
    }


# Once, since each is read from a file.
@cache
def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("everystep", "torch", "numpy", "safetensors")}


def modules_of(
    module: nn.Module, path: str = "", around: frozenset[int] = frozenset()
) -> dict[str, ModuleFacts]:
    """Return a module and all within it, by path, each before those within it.

    path: of the module itself; around: the ids of modules that it is within.
    """
    settings = {"training": module.training} | _settings(module) | _own_tensors(module)
    own = ModuleFacts(
        class_name=type(module).__name__,
        arguments=module.extra_repr() if is_torchs_module(module, but_hooks=True) else "",
        settings=settings | hooks_of(module),
        is_torchs=is_torchs_module(module),
    )
    # Not those that it is within, which would have no end; one that is in two places is shown twice.
    found, around = {path: own}, around | {id(module)}
    for name, inner in module._modules.items():
        if inner is not None and id(inner) not in around:
            found |= modules_of(inner, f"{path}.{name}" if path else name, around)
    return found


def facts_of_loop(parts: Parts) -> TrainingFacts:
    """Return the facts of a user's loop before it begins."""
    # Of several models, none is the whole: their names begin with those of the parts.
    modules = {} if parts.main else {"": ModuleFacts(class_name="ModuleDict")}
    for name in sorted(parts.modules, key=lambda name: name != parts.main):  # the model first
        modules |= modules_of(parts.modules[name], parts.prefix(name).rstrip("."))
    parameters = {p for p, name in parts.parameter_names().items() if is_of_module(name)}
    return TrainingFacts(
        seed=None,
        data=DataFacts(rows=0, source="loop"),
        batches=BatchFacts(batch_size=None, drop_last=False, seed=0, steps_per_epoch=1),
        modules=modules,
        parameters=sum(parameter.numel() for parameter in parameters),
        loss=None,
        max_grad_norm=None,
        evaluate_every=None,
        loop=LoopFacts.of(parts.named),
        ranks=ranks_here(),
        **_shared(parts, parts.device),
    )


def _own_tensors(module: nn.Module) -> dict[str, str | None]:
    """Return the dtypes of a module's own parameters and buffers, which are frozen, and their hooks."""
    found: dict[str, str | None] = {}
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        dtype = None if tensor is None else str(tensor.dtype).removeprefix("torch.")
        tables = (getattr(tensor, name, None) for name in _HOOKS_OF_TENSORS)
        hook = "".join(f", hook {names_of(hooks)}" for hooks in tables if hooks)
        found[name] = f"{dtype}{', frozen' * is_frozen}{hook}" if dtype else None
    return found


def optimizer_facts(optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    """Return the facts of an optimizer, without what a scheduler does to its lr."""
    # A scheduler sets `lr` as it is made, and keeps what the user gave as `initial_lr`.
    groups = [
        {k: _plain(v) for k, v in group.items() if k not in ("params", "initial_lr")}
        | ({"lr": _plain(group["initial_lr"])} if "initial_lr" in group else {})
        for group in optimizer.param_groups
    ]
    return OptimizerFacts(
        class_name=type(optimizer).__name__,
        is_torchs=is_torchs_optimizer(optimizer),
        groups=tuple(groups),
    )


def _scheduler_facts(scheduler: LRScheduler, every: str | None) -> SchedulerFacts:
    settings = {k: v for k, v in _settings(scheduler).items() if k not in _COUNTED}
    return SchedulerFacts(
        class_name=type(scheduler).__name__,
        is_torchs=is_torchs_scheduler(scheduler),
        settings=settings,
        every=every,
    )


def _loss_facts(loss: Any) -> LossFacts:
    own = getattr(loss, "__qualname__", None) if inspect.isroutine(loss) else None
    return LossFacts(
        class_name=str(own or type(loss).__name__),
        is_torchs=reason_against_loss(loss) is None,
        settings={} if inspect.isroutine(loss) else _settings(loss),
        modules=modules_of(loss) if isinstance(loss, nn.Module) else {},
    )


def _settings(thing: Any) -> dict[str, Any]:
    """Return the public attributes of an object that are numbers, strings or the like."""
    # Without the class of the object, which may answer anything.
    try:
        held = thing.keywords if type(thing) is partial else object.__getattribute__(thing, "__dict__")
    except AttributeError:  # it has slots
        held = {}
    return {
        str(name): _plain(value)
        for name, value in held.items()
        if name != "training" and not str(name).startswith("_") and _is_simple(value)
    }


def _is_simple(value: Any, depth: int = _DEEPEST) -> bool:
    """Return whether a value is a number, a string or None, or a short collection of these."""
    if type(value) in (list, tuple, dict, Counter):
        within = (*value, *value.values()) if isinstance(value, dict) else value
        is_short = len(value) <= _MOST_ITEMS and depth > 0  # a list may be within itself
        return is_short and all(_is_simple(item, depth - 1) for item in within)
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, np.generic)


def _plain(value: Any) -> Any:
    """Return a setting as JSON can hold it; other values as text."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, Tensor):
        number = value.item()
        # 0.1 of float32 is 0.1 to a reader, and not 0.10000000149011612.
        return float(str(np.float32(number))) if value.dtype == torch.float32 else number
    if isinstance(value, np.generic | np.ndarray):
        item = value.item()
        # Not long floats, complex numbers and dates.
        return item if isinstance(item, bool | int | float | str) else str(item)
    if type(value) in (list, tuple) and len(value) <= _MOST_ITEMS:
        return [_plain(item) for item in value]
    if type(value) in (dict, Counter) and len(value) <= _MOST_ITEMS:
        return {str(key): _plain(item) for key, item in value.items()}
    if _is_simple(value):
        return value
    # Other objects may count how often they are printed.
    return str(value) if is_plain(value) else type(value).__name__


def facts_from(config: Any, tags: Iterable[str]) -> dict[str, Any]:
    """Return the facts of a run that the user gives: `config` and `tags`, without empty ones.

    Raises:
        UsageError: one cannot be kept; gives the reason.
    """
    found = {"config": _checked_config(config), "tags": _checked_tags(tags)}
    return {name: value for name, value in found.items() if value}


def _checked_config(config: Any) -> dict[str, Any]:
    """Return a mapping, a dataclass, an `argparse.Namespace` or None as JSON can hold it."""
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    plain = _as_json({} if config is None else config)
    if not isinstance(plain, dict):
        kind = kind_text(config)
        raise UsageError(f"config is {kind}; pass a dict, a dataclass or an argparse.Namespace")
    # A reader refuses a larger one.
    if (size := len(json.dumps(plain))) > LARGEST_CONFIG:
        raise UsageError(f"config has {size:,} bytes as JSON; a run holds at most {LARGEST_CONFIG:,}")
    return plain


def _checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return tags, each once and in one line."""
    given = [*tags]
    faults = [
        Fault(f"tags[{place}]", f"must be a text of 1 to {LONGEST_TAG} characters, not {tag!r:.100}")
        for place, tag in enumerate(given)
        if not isinstance(tag, str) or not 0 < len(" ".join(tag.split())) <= LONGEST_TAG
    ]
    if faults:
        raise UsageError(faults, "the tags of the run")
    found = tuple(dict.fromkeys(" ".join(tag.split()) for tag in given))
    if len(found) > MOST_TAGS:
        raise UsageError(f"{len(found)} tags are too many; a run has at most {MOST_TAGS}")
    return found


def _as_json(value: Any) -> Any:
    """Return a value as JSON can hold it. Numbers that are not finite become texts."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_json(item) for item in value]
    return str(value)
