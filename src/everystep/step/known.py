"""Where a program may stand in for Python: only where it is known what that Python does.

Known are torch's own modules, losses and optimizers. A class or a function of the user is taken for
known as long as it carries nothing from one step to the next that is no state: its attributes and the
variables that it holds are the same after a step as before. What cannot be seen so (global variables,
the clock) is the user's to say, by `engine="eager"`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everystep.gradient_descent import GradientDescent
from everystep.step.eager import Trainee

__all__ = ["PythonState", "reason_against"]

_MODULE_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward hook",
}
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
#: What a module holds for torch itself.
_OWN_ATTRIBUTES = {"_parameters", "_buffers", "_modules", *_MODULE_HOOKS}


def reason_against(trainee: Trainee) -> str | None:
    """Return why Python must run at every step of this training, or None."""
    return next(_reasons(trainee), None)


def _reasons(trainee: Trainee) -> Iterator[str]:
    global_hooks = vars(nn.modules.module)
    if any(global_hooks[f"_global{name}"] for name in _MODULE_HOOKS):
        yield "there is a hook on all modules (torch.nn.modules.module)"
    for path, module in trainee.model.named_modules():
        where = f"module {path}" if path else "the model"
        for attribute, kind in _MODULE_HOOKS.items():
            hooks = (getattr(module, attribute, None) or {}).values()
            if not all(map(_is_torchs, hooks)):
                yield f"{where} has {kind}"
        if type(module).__module__.startswith("torch._dynamo"):
            yield f"{where} is compiled (torch.compile)"
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            yield f"{where} is a {type(module).__name__}"
    for name, parameter in trainee.model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            yield f"{name} has no shape before the first step (a lazy module)"
        elif parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            yield f"{name} has a hook on its gradient"
    if any(getattr(trainee.optimizer, name) for name in _OPTIMIZER_HOOKS):
        yield "the optimizer has a hook on its step"


def _is_torchs(hook: Any) -> bool:
    function = getattr(hook, "__func__", hook)
    origin = getattr(function, "__module__", None) or type(hook).__module__
    return str(origin).startswith("torch.")


class PythonState:
    """What the user's Python held when this was made, to be compared with a later one."""

    def __init__(self, trainee: Trainee) -> None:
        self._held = dict(_held(trainee))
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def difference(self, later: PythonState) -> str | None:
        """Return in words what has changed since, or None."""
        if self._python != later._python:
            return "the step draws from Python's random generator"
        pairs = zip(self._numpy, later._numpy, strict=True)
        if not all(np.array_equal(one, two) for one, two in pairs):
            return "the step draws from NumPy's random generator"
        for name, value in later._held.items():
            if self._held.get(name, value) != value or name not in self._held:
                return f"{name} changes within a step"
        return None


def _held(trainee: Trainee) -> Iterator[tuple[str, Any]]:
    """Yield what each class and function of the user holds, by a name for people."""
    loss_modules = trainee.loss.named_modules() if isinstance(trainee.loss, nn.Module) else ()
    places = [(f"the model's {p}".removesuffix(" "), m) for p, m in trainee.model.named_modules()]
    places += [("the loss's", module) for _, module in loss_modules]
    for path, module in places:
        if not type(module).__module__.startswith("torch."):
            for name, value in vars(module).items():
                if name not in _OWN_ATTRIBUTES:
                    yield f"{path}.{name}".replace("'s.", "'s "), _frozen(value, 0)
    if not isinstance(trainee.loss, nn.Module):
        yield "what the loss holds", _frozen(trainee.loss, 0)
    optimizer = trainee.optimizer
    if not isinstance(optimizer, GradientDescent) and not type(optimizer).__module__.startswith(
        "torch."
    ):
        for name, value in vars(optimizer).items():
            if name not in ("state", "param_groups", *_OPTIMIZER_HOOKS):
                yield f"the optimizer's {name}", _frozen(value, 0)


def _frozen(value: Any, depth: int) -> Any:
    """Return something that is equal as long as the value is: contents, and identity below depth 4."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)  # nan is not equal to itself
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, torch.nn.Module) or depth == 4:
        return id(value)
    if isinstance(value, dict):
        return [(repr(key), _frozen(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return type(value).__name__, [_frozen(item, depth + 1) for item in value]
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    inside = [_closure(value), getattr(value, "__self__", None), getattr(value, "__dict__", None)]
    return id(value), [_frozen(item, depth + 1) for item in inside if item is not None]


def _closure(function: Any) -> list[Any]:
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # a variable that has no value yet
            found.append(cell.cell_contents)
    return found
