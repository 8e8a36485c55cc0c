"""What users' Python may change in the whole process, and how that is put back."""

import builtins
import decimal
import gc
import linecache
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getmodule
from typing import Any

import torch
from tests.training.python_cases import settings
from torch import nn

__all__ = ["process_put_back"]

#: Attributes of these may be exchanged.
OWNERS = [
    settings,
    *(value for value in vars(settings).values() if isinstance(value, type)),
    builtins,
    math,
    nn.functional,
    nn.Linear,
    nn.MSELoss,
    nn.Module,
    nn.Tanh,
    nn.init,
    sys,
    torch,
    torch.Tensor,
    torch.optim.SGD,
    torch.optim.Optimizer,
]
#: Entries of these may be added.
DICTS = [
    linecache.cache,
    os.environ,
    sys.modules,
    *(hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_")),
    *(h for name, h in vars(getmodule(torch.optim.Optimizer)).items() if name.startswith("_global_")),
]
#: Pairs of what reads a setting and what sets it.
READ_AND_WRITE = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: torch.backends.mkldnn.enabled, lambda on: torch.backends.mkldnn.set_flags(on)),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (gc.get_threshold, lambda threshold: gc.set_threshold(*threshold)),
    (lambda: decimal.getcontext().prec, lambda prec: setattr(decimal.getcontext(), "prec", prec)),
    (
        lambda: vars(torch._tensor_str.PRINT_OPTS).copy(),
        lambda options: vars(torch._tensor_str.PRINT_OPTS).update(options),
    ),
]


@contextmanager
def process_put_back() -> Iterator[None]:
    """What is changed within is afterwards as it was."""
    attributes = [(owner, dict(vars(owner))) for owner in OWNERS]
    dicts = [(each, dict(each)) for each in DICTS if isinstance(each, dict | type(os.environ))]
    values = [(write, read()) for read, write in READ_AND_WRITE]
    try:
        yield
    finally:
        for owner, before in attributes:
            put_back(owner, before)
        for each, before in dicts:
            for key in [key for key in each if key not in before]:
                if each is not sys.modules or key.endswith("of_a_user"):
                    del each[key]
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
        for write, value in values:
            write(value)


def put_back(owner: Any, before: dict[str, Any]) -> None:
    """Give an object the attributes that it had; what torch has imported since may stay."""
    for name, value in before.items():
        if vars(owner).get(name) is not value and not isinstance(value, bool | int | dict):
            setattr(owner, name, value)
    for name in [name for name in vars(owner) if name not in before]:
        if isinstance(owner, type) or name.endswith("of_a_user"):
            delattr(owner, name)
