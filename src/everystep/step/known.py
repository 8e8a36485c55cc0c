"""Where a program may stand in for Python: only where it is known what that Python does.

Known are torch's own modules, losses and optimizers. A class or a function of the user is taken for
known as long as it carries nothing from one step to the next that is no state: its attributes and the
variables that it reads are the same after a step as before. What cannot be seen so (the clock, a file,
what other libraries keep) is the user's to say, by `engine="eager"`.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from everystep.gradient_descent import GradientDescent
from everystep.step.eager import Trainee
from everystep.step.frozen import Freezer, is_torchs_class, plain_attributes
from everystep.step.state import optimizer_settings

__all__ = ["PythonState", "Settings", "reason_against"]

_MODULE_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward hook",
}
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_GLOBAL_OPTIMIZER_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def reason_against(trainee: Trainee) -> str | None:
    """Return why Python must run at every step of this training, or None."""
    return next(_reasons(trainee), None)


def _reasons(trainee: Trainee) -> Iterator[str]:
    global_hooks = vars(nn.modules.module)
    on_all = [hook for name in _MODULE_HOOKS for hook in global_hooks[f"_global{name}"].values()]
    if not all(map(_is_harmless, on_all)):
        yield "there is a hook on all modules (torch.nn.modules.module)"
    for where, module in _modules(trainee):
        for attribute, kind in _MODULE_HOOKS.items():
            hooks = (getattr(module, attribute, None) or {}).values()
            if not all(map(_is_harmless, hooks)):
                yield f"{where} has {kind}"
        if "forward" in vars(module) and not isinstance(module, torch.jit.ScriptModule):
            yield f"the forward of {where} has been exchanged"
        if type(module).__module__.startswith("torch._dynamo"):
            yield f"{where} is compiled (torch.compile)"
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            yield f"{where} is a {type(module).__name__}"
    for name, parameter in trainee.model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            yield f"{name} has no shape before the first step (a lazy module)"
        elif parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            yield f"{name} has a hook on its gradient"
    of_all = vars(inspect.getmodule(torch.optim.Optimizer))
    if any(getattr(trainee.optimizer, name) for name in _OPTIMIZER_HOOKS) or any(
        of_all.get(name) for name in _GLOBAL_OPTIMIZER_HOOKS
    ):
        yield "the optimizer has a hook on its step"


def _modules(trainee: Trainee) -> list[tuple[str, nn.Module]]:
    """Return every module of model and loss, with a name for people."""
    found = [(f"module {p}" if p else "the model", m) for p, m in trainee.model.named_modules()]
    if isinstance(trainee.loss, nn.Module):
        found += [(f"the loss's {p}" if p else "the loss", m) for p, m in trainee.loss.named_modules()]
    return found


def _is_harmless(hook: Any) -> bool:
    """Tell whether a hook is torch's own, or that of a capture in another thread."""
    function = getattr(hook, "__func__", hook)
    origin = getattr(function, "__module__", None) or type(hook).__module__
    return str(origin).startswith(("torch.", "everystep."))


class PythonState:
    """What the user's Python held when this was made, to be compared with a later one."""

    def __init__(self, trainee: Trainee) -> None:
        self._held = dict(_held(trainee))
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def difference(self, later: PythonState, generators: bool = True) -> str | None:
        """Return in words what has changed since, or None; `generators`: Python's and NumPy's too."""
        if generators and self._python != later._python:
            return "the step draws from Python's random generator"
        pairs = zip(self._numpy, later._numpy, strict=True)
        if generators and not all(np.array_equal(one, two) for one, two in pairs):
            return "the step draws from NumPy's random generator"
        for name, value in later._held.items():
            if name not in self._held or self._held[name] != value:
                return f"{name} changes"
        return None


class Settings:
    """What a program has been captured with, besides tensors: settings that Python may change."""

    def __init__(self, trainee: Trainee) -> None:
        settings = optimizer_settings(trainee.model, trainee.optimizer)
        lr_may_change = trainee.schedule is not None
        self._held: dict[str, Any] = {
            f"{key} of param group {index}": value
            for index, group in enumerate(settings["groups"])
            for key, value in group.items()
            if not (lr_may_change and key == "lr")
        }
        for name, parameter in trainee.model.named_parameters():
            self._held[f"requires_grad of {name}"] = parameter.requires_grad
        for where, module in _modules(trainee):
            for name, value in plain_attributes(module).items():
                self._held[f"{name} of {where}"] = repr(value)

    def difference(self, later: Settings) -> str | None:
        """Return in words what has changed since, or None."""
        names = self._held.keys() | later._held.keys()
        changed = (n for n in sorted(names) if self._held.get(n) != later._held.get(n))
        return next((f"{name} changes" for name in changed), None)


def _held(trainee: Trainee) -> Iterator[tuple[str, Any]]:
    """Yield what each class and function of the user holds, by a name for people."""
    usual = vars(nn.Module()).keys()
    freezer = Freezer([*trainee.named_state().values(), *trainee.gradients().values()])
    for where, module in _modules(trainee):
        if not is_torchs_class(type(module)):
            for name, value in vars(module).items():
                if name not in usual or name == "training":
                    yield f"{name} of {where}", freezer.freeze(value)
            yield f"what the class of {where} holds", freezer.freeze_class(type(module))
        else:
            for name, value in plain_attributes(module).items():
                yield f"{name} of {where}", repr(value)
    if not isinstance(trainee.loss, nn.Module):
        yield "what the loss holds", freezer.freeze(trainee.loss)
    optimizer = trainee.optimizer
    if not isinstance(optimizer, GradientDescent) and not is_torchs_class(type(optimizer)):
        # What torch itself keeps there; a schedule exchanges `step`.
        of_torch = {*vars(torch.optim.SGD([torch.zeros(1)])), "step", "_opt_called"}
        for name, value in vars(optimizer).items():
            if name not in of_torch:
                yield f"{name} of the optimizer", freezer.freeze(value)
        yield "what the class of the optimizer holds", freezer.freeze_class(type(optimizer))
