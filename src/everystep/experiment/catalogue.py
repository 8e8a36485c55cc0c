"""torch's layers, losses, optimizers and schedulers by name, with checked arguments; and metrics.

Names come from experiment files, so nothing here evaluates them: `ast` parses a layer, its arguments
must be literals, and the class must be one that torch exports.
"""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import lr_scheduler

from everystep.errors import Fault, did_you_mean
from everystep.experiment.metrics import METRICS, Metric
from everystep.gradient_descent import GradientDescent

__all__ = [
    "LayerCall",
    "keyword_parameters",
    "layer_class",
    "loss_class",
    "metric_by_name",
    "names_faults",
    "optimizer_class",
    "parse_layer",
    "scheduler_class",
    "without_compiler",
]

_CONTAINERS = {"Module", "Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"}
_NEEDS_FUNCTIONS = {"LambdaLR", "MultiplicativeLR"}
#: The attribute in which `torch._compile` keeps the replacement of a function.
_LEFT_OUT = "__dynamo_disable"
_NEEDS_SCHEDULERS = {"SequentialLR", "ChainedScheduler"}


class LayerCall(NamedTuple):
    """A parsed layer of an experiment: `Linear(1000, 100, bias=False)`."""

    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def parse_layer(text: str) -> LayerCall:
    """Parse the text of a layer; raises ValueError with the problem and a fix."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f'{text!r} cannot be read; write a layer as "Linear(1000, 100)"') from None
    if isinstance(call, ast.Name):
        raise ValueError(f'{text!r}: parentheses are missing; write "{call.id}()"')
    if not isinstance(call, ast.Call):
        raise ValueError(f'{text!r} is not a layer; write one as "Linear(1000, 100)"')
    if not isinstance(call.func, ast.Name):
        written = ast.unparse(call.func)
        raise ValueError(f'{written!r}: write only the name of a torch.nn class, as in "ReLU()"')
    try:
        arguments = tuple(ast.literal_eval(argument) for argument in call.args)
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(
            f"{text!r}: arguments must be literal values (numbers, strings, True, None, tuples)"
        ) from None
    if len(keywords) != len(call.keywords):
        raise ValueError(f"{text!r}: ** is not supported; write out each argument")
    return LayerCall(call.func.id, arguments, keywords)


def layer_class(name: str) -> type[nn.Module]:
    """Return the `torch.nn` module class of that name; raises ValueError with the nearest names."""
    found: type[nn.Module] = _look_up(name, _LAYERS, "torch.nn layer")
    return found


def loss_class(name: str) -> type[nn.Module]:
    """Return the `torch.nn` loss class of that name; raises ValueError if it is unsuitable."""
    found: type[nn.Module] = _look_up(name, _LOSSES, "torch.nn loss")
    wanted = [
        parameter.name
        for parameter in list(inspect.signature(found.forward).parameters.values())[1:]
        if parameter.default is parameter.empty
    ]
    if len(wanted) != 2:
        raise ValueError(f"{name} takes {', '.join(wanted)}; use a loss of (prediction, target)")
    if name in ("AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss"):
        raise ValueError(f"{name} has parameters of its own; add a last layer to the model instead")
    return found


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the optimizer of that name; raises ValueError if it needs a closure."""
    found: type[torch.optim.Optimizer] = _look_up(name, _OPTIMIZERS, "optimizer")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{name} needs a closure that evaluates the loss several times per step, but everystep "
            "runs one forward and one backward pass per step; use Adam, or SGD with momentum"
        )
    return found


def scheduler_class(name: str) -> type[lr_scheduler.LRScheduler]:
    """Return the scheduler of that name; raises ValueError if a file cannot express it."""
    found: type[lr_scheduler.LRScheduler] = _look_up(name, _SCHEDULERS, "scheduler")
    if name in _NEEDS_FUNCTIONS:
        raise ValueError(f"{name} needs a function, which a TOML file cannot hold; use it from Python")
    if name in _NEEDS_SCHEDULERS:
        raise ValueError(f"{name} combines other schedulers; use it from Python")
    return found


def metric_by_name(name: str) -> Metric:
    """Return the metric of that name; raises ValueError with the nearest names."""
    found: Metric = _look_up(name, {name: each for name, each in METRICS.items() if each.of}, "metric")
    return found


def names_faults(experiment: Mapping[str, Any]) -> list[Fault]:
    """Find every unknown name and wrong argument in an experiment as read from TOML.

    Parts that are not of the expected type are passed over: the specification reports those.
    """
    faults: list[Fault] = []
    layers = _table(experiment, "model").get("layers")
    for index, text in enumerate(layers if isinstance(layers, list) else []):
        if isinstance(text, str):
            faults += _faults_of(f"model.layers[{index}]", partial(_check_layer, text))
    metrics = experiment.get("metrics")
    for index, name in enumerate(metrics if isinstance(metrics, list) else []):
        if isinstance(name, str):
            faults += _faults_of(f"metrics[{index}]", partial(metric_by_name, name))
    for section, find in (
        ("loss", loss_class),
        ("optimizer", optimizer_class),
        ("scheduler", scheduler_class),
    ):
        table = _table(experiment, section)
        if isinstance(table.get("name"), str):
            faults += _section_faults(section, table, find)
    return faults


def _section_faults(section: str, table: Mapping[str, Any], find: Callable[[str], type]) -> list[Fault]:
    unknown_name = _faults_of(f"{section}.name", lambda: find(table["name"]))
    if unknown_name:
        return unknown_name
    parameters = keyword_parameters(find(table["name"]))
    own = {"name", "every"} if section == "scheduler" else {"name"}
    given = {key for key in table if key not in own}
    listed = f"known arguments: {', '.join(parameters)}"
    faults = [
        Fault(
            f"{section}.{key}",
            f"{table['name']} has no such argument; {did_you_mean(key, list(parameters)) or listed}",
        )
        for key in sorted(given - set(parameters))
    ]
    if isinstance(table.get("lr", 0.0), bool | str):
        faults.append(Fault(f"{section}.lr", f"must be a number, not {table['lr']!r}"))
    missing = [name for name, needed in parameters.items() if needed and name not in given]
    faults += [
        Fault(f"{section}.{name}", f"is missing; {table['name']} requires it") for name in missing
    ]
    if faults:
        return faults
    return _faults_of(section, lambda: _try_section(section, table, find(table["name"])))


def keyword_parameters(cls: type) -> dict[str, bool]:
    """Return the keyword arguments of `cls`, each with whether it is required."""
    parameters = list(inspect.signature(cls).parameters.values())
    return {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ("params", "optimizer")
    }


def _check_layer(text: str) -> None:
    call = parse_layer(text)
    cls = layer_class(call.name)
    try:
        inspect.signature(cls).bind(*call.arguments, **call.keywords)
    except TypeError as error:
        known = [name for name in inspect.signature(cls).parameters if name not in ("device",)]
        raise ValueError(
            f"{text}: {error}; the arguments of {call.name} are ({', '.join(known)})"
        ) from None
    _construct(text, lambda: cls(*call.arguments, **call.keywords))


def _try_section(section: str, table: Mapping[str, Any], cls: type) -> None:
    keywords = {key: value for key, value in table.items() if key not in ("name", "every")}
    if section == "loss":
        _check_reduction(keywords.get("reduction", "mean"))
        weights = {k: torch.ones(1) for k in ("weight", "pos_weight") if k in keywords}
        _construct(table["name"], lambda: cls(**keywords | weights))
    elif section == "optimizer":
        parameter = nn.Parameter(torch.zeros(2, 2))
        with without_compiler():
            tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in keywords.items()}
            _construct(table["name"], lambda: cls([parameter], **tuples))


@contextmanager
def without_compiler() -> Iterator[None]:
    """Create optimizers without importing torch's compiler, which takes a second.

    `add_param_group` imports it only to keep it away from itself; nothing is compiled within.
    """
    function = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", None)
    if function is None or "torch._dynamo" in sys.modules or _LEFT_OUT in vars(function):
        yield
        return
    setattr(function, _LEFT_OUT, function)
    try:
        yield
    finally:
        delattr(function, _LEFT_OUT)


def _check_reduction(reduction: Any) -> None:
    """Check a setting that torch checks only when the loss is computed."""
    if reduction == "none":
        raise ValueError(
            "reduction 'none' gives one loss per row, but a step needs a single number; use mean or sum"
        )
    if reduction not in ("mean", "sum", "batchmean"):
        raise ValueError(f"{reduction!r} is not a reduction; use 'mean' or 'sum'")


def _construct(what: str, make: Callable[[], Any]) -> None:
    """Make the thing on torch's meta device: arguments are checked, nothing is drawn or stored."""
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            make()
    except Exception as error:  # any error that torch raises for the user's arguments
        raise ValueError(f"{what}: {error}") from None


def _table(experiment: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    table = experiment.get(section)
    return table if isinstance(table, Mapping) else {}


def _faults_of(path: str, check: Callable[[], Any]) -> list[Fault]:
    try:
        check()
    except ValueError as error:
        return [Fault(path, str(error))]
    return []


def _look_up(name: str, known: Mapping[str, Any], what: str) -> Any:
    if name not in known:
        cure = did_you_mean(name, list(known))
        raise ValueError(f"unknown {what} {name!r}" + (f"; {cure}" if cure else ""))
    return known[name]


def _classes(namespace: Any, base: type) -> dict[str, Any]:
    members = inspect.getmembers(namespace, inspect.isclass)
    return {name: cls for name, cls in members if issubclass(cls, base) and cls is not base}


_MODULES = _classes(nn, nn.Module)
_LOSSES = {name: cls for name, cls in _MODULES.items() if name.endswith("Loss")}
_LAYERS = {
    name: cls for name, cls in _MODULES.items() if name not in _LOSSES and name not in _CONTAINERS
}
_OPTIMIZERS = {"GradientDescent": GradientDescent} | _classes(torch.optim, torch.optim.Optimizer)
_SCHEDULERS = {
    name: cls
    for name, cls in _classes(lr_scheduler, lr_scheduler.LRScheduler).items()
    if not name.startswith("_")
}
