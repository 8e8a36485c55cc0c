"""The process: settings of torch that decide which operations the same Python runs."""

from __future__ import annotations

import re
import sys
import types
import warnings
from functools import cache
from typing import Any

import torch
from torch import nn

from everystep.step.purity.torchs_own import HOOKS, is_torchs_function

__all__ = [
    "functions_of_torch",
    "hooks_on_all",
    "process_settings",
    "reason_against_process",
]

_FLAG = re.compile(r"_get_\w*(enabled|deterministic|allow|tf32|benchmark|precision|uninitialized)\w*")
_PLACES = (torch, torch.nn.functional, torch.autograd, torch.Tensor)
_OPTIMIZER_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def process_settings(device: torch.device) -> dict[str, Any]:
    """Return the settings by name; equal as long as none has changed."""
    found: dict[str, Any] = {
        "the default dtype": torch.get_default_dtype(),
        "the default device": str(torch.get_default_device()),
        "the number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "the fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "the number of active function modes": torch._C._len_torch_function_stack(),
        "the number of active dispatch modes": torch._C._len_torch_dispatch_stack(),
        "hooks on all modules": hooks_on_all(),
        "hooks on saved tensors": _has_tensor_hooks(),
        "the number of methods of Tensor": len(vars(torch.Tensor)),
    }
    for kind in {"cpu", device.type}:
        found[f"autocast on {kind}"] = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return found | {name: _flag(name) for name in _flags()}


def _flag(name: str) -> Any:
    try:
        return getattr(torch._C, name)()
    except RuntimeError as error:  # a precision that was set in the new way has no name in the old one
        return str(error)


@cache
def _flags() -> tuple[str, ...]:
    """Return the names of torch's own functions that tell how kernels are chosen, of this torch."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 warns, once, of a function that it calls old
        for name in filter(_FLAG.fullmatch, dir(torch._C)):
            try:
                getattr(torch._C, name)()
            except (TypeError, RuntimeError):  # it wants arguments, or another build
                continue
            found.append(name)
    return tuple(found)


def functions_of_torch() -> list[Any]:
    """Return the functions in torch's own modules, which user code may replace."""
    return [
        value
        for place, names in zip(_PLACES, _names_of_functions(), strict=True)
        for value in map(vars(place).get, names)
    ]


@cache
def _names_of_functions() -> tuple[tuple[str, ...], ...]:
    kinds = (types.FunctionType, types.BuiltinFunctionType)
    return tuple(
        tuple(
            name
            for name, value in vars(place).items()
            if isinstance(value, kinds) or (place is torch.Tensor and callable(value))
        )
        for place in _PLACES
    )


def reason_against_process() -> str | None:
    """Return why Python must run at every step, whatever the model, or None."""
    if hooks_on_all():
        return "the process has a hook on all modules or optimizers"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if _has_tensor_hooks():
        return "torch.autograd.graph.saved_tensors_hooks are active"
    for name, value in vars(torch.nn.functional).items():
        if type(value) is types.FunctionType and not is_torchs_function(value):
            return f"torch.nn.functional.{name} was replaced"
    return None


def _has_tensor_hooks() -> bool:
    """Tell whether hooks on saved tensors are active."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is not None


def hooks_on_all() -> bool:
    """Tell whether there is a hook on all modules or all optimizers; torch's own do not count."""
    modules, optimizers = vars(nn.modules.module), vars(sys.modules[torch.optim.Optimizer.__module__])
    found = [hook for name in HOOKS for hook in modules[f"_global{name}"].values()]
    found += [hook for name in _OPTIMIZER_HOOKS for hook in optimizers.get(name, {}).values()]
    return not all(map(_is_harmless, found))


def _is_harmless(hook: Any) -> bool:
    """Tell whether a hook is torch's own, or that of a capture in another thread."""
    function = getattr(hook, "__func__", hook)
    origin = str(getattr(function, "__module__", None) or type(hook).__module__)
    return is_torchs_function(function) or origin.startswith("everystep.")
