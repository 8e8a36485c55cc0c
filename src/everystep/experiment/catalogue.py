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
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from everystep.errors import ExperimentError, Fault, did_you_mean
from everystep.experiment.metrics import METRICS, Metric
from everystep.gradient_descent import GradientDescent

__all__ = ["build", "keyword_parameters", "make_layer", "metric_by_name", "names_faults", "parse_layer"]

#: They hold other modules or parameters, which a line of a file cannot write.
_CONTAINERS = {"Module", "Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"}
#: The attribute in which `torch._compile` keeps the replacement of a function.
_LEFT_OUT = "__dynamo_disable"
#: Classes that an experiment cannot use, with the reason.
_UNFIT = {
    **dict.fromkeys(
        ("AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss"),
        "has parameters of its own; add a last layer to the model instead",
    ),
    **dict.fromkeys(
        ("LambdaLR", "MultiplicativeLR"),
        "needs a function, which a TOML file cannot hold; use it from Python",
    ),
    **dict.fromkeys(
        ("SequentialLR", "ChainedScheduler"), "combines other schedulers; use it from Python"
    ),
}


def parse_layer(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Return the name, the arguments and the keywords of `Linear(1000, 100, bias=False)`.

    Raises:
        ValueError: it is not a layer; reports the problem and a fix.
    """
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
        arguments = [ast.literal_eval(argument) for argument in call.args]
        # Literals only: nothing of a stranger's text is executed.
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(
            f"{text!r}: arguments must be literal values (numbers, strings, True, None, tuples)"
        ) from None
    if len(keywords) != len(call.keywords):
        raise ValueError(f"{text!r}: ** is not supported; write out each argument")
    return call.func.id, arguments, keywords


def make_layer(text: str) -> nn.Module:
    """Make the layer of a text, as torch does; raises ValueError if that names none."""
    name, arguments, keywords = parse_layer(text)
    layer: nn.Module = make("layer", name, keywords, *arguments)
    return layer


def make(section: str, name: str, keywords: Mapping[str, Any], *given: Any) -> Any:
    """Make a layer, a loss, an optimizer of the given parameters, or a scheduler of the given optimizer.

    Lists of a file are tensors for a loss (weights of classes), and tuples for an optimizer.
    """
    values = dict(keywords)
    for key, value in keywords.items():
        if section == "loss" and key in ("weight", "pos_weight"):
            values[key] = torch.tensor(value, dtype=torch.float32)
        elif section == "optimizer" and isinstance(value, list):
            values[key] = tuple(value)
    with _without_compiler():
        return _class_of(section, name)(*given, **values)


def build(section: str, name: str, keywords: Mapping[str, Any], *given: Any) -> Any:
    """Make the same, of a checked experiment.

    Raises:
        ExperimentError: torch rejects an argument, or there are no parameters.
    """
    try:
        return make(section, name, keywords, *given)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ExperimentError([Fault(section, f"{name}: {error}")]) from None


def metric_by_name(name: str) -> Metric:
    """Return the metric of that name; raises ValueError with the nearest names."""
    found: Metric = _look_up(name, {name: each for name, each in METRICS.items() if each.of}, "metric")
    return found


def _check_layer(text: str) -> None:
    """Check a layer and its arguments; raises ValueError with the problem and a fix."""
    name, arguments, keywords = parse_layer(text)
    signature = inspect.signature(_class_of("layer", name))
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        known = ", ".join(each for each in signature.parameters if each != "device")
        raise ValueError(f"{text}: {error}; the arguments of {name} are ({known})") from None
    _try(text, lambda: make_layer(text))


def names_faults(experiment: Mapping[str, Any]) -> list[Fault]:
    """Find every unknown name and wrong argument in an experiment as read from TOML.

    Values of an unexpected type are skipped: the specification reports those.
    """
    faults: list[Fault] = []
    model = experiment.get("model")
    layers = model.get("layers") if isinstance(model, Mapping) else None
    checks: tuple[tuple[str, Any, Callable[[str], Any]], ...] = (
        ("model.layers", layers, _check_layer),
        ("metrics", experiment.get("metrics"), metric_by_name),
    )
    for path, names, check in checks:
        for index, name in enumerate(names if isinstance(names, list) else []):
            if isinstance(name, str):
                with _noted(faults, f"{path}[{index}]"):
                    check(name)
    for section in ("loss", "optimizer", "scheduler"):
        table = experiment.get(section)
        if isinstance(table, Mapping) and isinstance(table.get("name"), str):
            own = {"name", "every"} if section == "scheduler" else {"name"}
            keywords = {key: value for key, value in table.items() if key not in own}
            faults += _section_faults(section, table["name"], keywords)
    return faults


def _section_faults(section: str, name: str, keywords: Mapping[str, Any]) -> list[Fault]:
    faults: list[Fault] = []
    with _noted(faults, f"{section}.name"):
        parameters = keyword_parameters(section, name)
    if faults:
        return faults
    listed = f"known arguments: {', '.join(parameters)}"
    for key in sorted({*keywords} - {*parameters}):
        cure = did_you_mean(key, list(parameters)) or listed
        faults.append(Fault(f"{section}.{key}", f"{name} has no such argument; {cure}"))
    # torch would take True for 1.
    if type(lr := keywords.get("lr", 0)) not in (int, float):
        faults.append(Fault(f"{section}.lr", f"must be a number, not {lr!r}"))
    faults += [
        Fault(f"{section}.{key}", f"is missing; {name} requires it")
        for key, is_needed in parameters.items()
        if is_needed and key not in keywords
    ]
    if section == "scheduler" or faults:
        return faults
    with _noted(faults, section):
        if section == "loss":
            _check_reduction(keywords.get("reduction", "mean"))
        # A matrix, since Muon takes nothing else.
        given = [] if section == "loss" else [[nn.Parameter(torch.zeros(2, 2))]]
        _try(name, lambda: make(section, name, keywords, *given))
    return faults


@contextmanager
def _noted(faults: list[Fault], path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        faults.append(Fault(path, str(error)))


def keyword_parameters(section: str, name: str) -> dict[str, bool]:
    """Return the keyword arguments of a loss, optimizer or scheduler, each with whether it is required.

    Raises:
        ValueError: there is none of that name, or a file cannot express it; names those to use.
    """
    parameters = inspect.signature(_class_of(section, name)).parameters.values()
    return {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ("params", "optimizer")
    }


def _class_of(section: str, name: str) -> Any:
    """Return the class of a name; raises ValueError with the nearest names, or with what to use."""
    what, known = _CLASSES[section]
    found = _look_up(name, known, what)
    if name in _UNFIT:
        raise ValueError(f"{name} {_UNFIT[name]}")
    if section == "loss":
        wanted = [
            parameter.name
            # Without `self`. A loss of three tensors, such as TripletMarginLoss, does not fit the
            # chapter's loop.
            for parameter in list(inspect.signature(found.forward).parameters.values())[1:]
            if parameter.default is parameter.empty
        ]
        if len(wanted) != 2:
            raise ValueError(f"{name} takes {', '.join(wanted)}; use a loss of (prediction, target)")
    if section == "optimizer":
        # LBFGS is the one: others take a closure, and need none.
        closure = inspect.signature(found.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"{name} needs a closure that evaluates the loss several times per step, but everystep "
                "runs one forward and one backward pass per step; use Adam, or SGD with momentum"
            )
    return found


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Create optimizers without importing torch's compiler, which takes a second."""
    # `add_param_group` imports it only to keep it away from itself; nothing is compiled within.
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
    if reduction == "elementwise_mean":
        raise ValueError("reduction 'elementwise_mean' is torch's old name; write 'mean'")
    if reduction == "none":
        raise ValueError(
            "reduction 'none' gives one loss per row, but a step needs a single number; use mean or sum"
        )
    if reduction not in ("mean", "sum", "batchmean"):
        raise ValueError(f"{reduction!r} is not a reduction; use 'mean' or 'sum'")


def _try(what: str, make: Callable[[], Any]) -> None:
    """Make the thing on torch's meta device: arguments are checked, nothing is drawn or stored."""
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            make()
    except Exception as error:  # any error that torch raises for the user's arguments
        raise ValueError(f"{what}: {error}") from None


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
_NOT_LAYERS = {*_LOSSES, *_CONTAINERS}
_SCHEDULERS = _classes(lr_scheduler, lr_scheduler.LRScheduler)
#: What the classes of a section are called, and which there are.
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "layer": ("torch.nn layer", {n: c for n, c in _MODULES.items() if n not in _NOT_LAYERS}),
    "loss": ("torch.nn loss", _LOSSES),
    "optimizer": (
        "optimizer",
        {"GradientDescent": GradientDescent} | _classes(torch.optim, torch.optim.Optimizer),
    ),
    "scheduler": ("scheduler", {n: c for n, c in _SCHEDULERS.items() if not n.startswith("_")}),
}
