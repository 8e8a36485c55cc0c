"""Surroundings: everything that the operations of a step depend on except its code."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from everystep import numerics
from everystep.step.follow import OF_WATCHES
from everystep.step.guards import Guards, of_constant
from everystep.step.optimizer_call import HOOKS_OF_ALL, OptimizerCalls, is_ours, is_written_by_torch
from everystep.step.parts import Parts
from everystep.step.torchs_own import (
    HOOKS,
    code_of_class,
    has_hooks_on_node,
    held_by_module,
    hook_on,
    is_torchs_function,
    is_torchs_module,
    own_modules,
)

__all__ = ["Surroundings", "reason_against_functions"]

_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_PLACES = (torch, torch.nn.functional, torch.nn.utils, torch.autograd, torch.Tensor)
#: Where the classes of the objects come from that are there by themselves.
_OWN_KINDS = ("builtins", "torch", "typing", "functools")


class Surroundings:
    """The modules, optimizers and tensors of a training, and the settings of the process.

    Args:
        parts: of the training; a loss that is a module is among them.
        loss: of a training of a model.
    """

    def __init__(self, parts: Parts, loss: Any = None) -> None:
        self._parts = parts
        self._loss = loss
        alone = len(parts.optimizers) == 1
        self._optimizers = {
            "the optimizer" if alone else name: each for name, each in parts.optimizers.items()
        }

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield each module of the training, and its name in messages."""
        for name, part in self._parts.modules.items():
            title = f"the {name}" if name in self._parts.apart else name
            for path, module in own_modules(part):
                if name == self._parts.main:
                    title = f"module {path}" if path else "the model"
                yield title, module

    def reasons(self) -> Iterator[str]:
        """Yield reasons why Python must run at every step, independent of its code."""
        against = _reason_against_process()
        if against is not None:
            yield against
        for where, module in self._modules():
            kind = hook_on(module)
            if kind is not None:
                yield f"{where} has {kind}"
            if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
                yield f"{where} is a {type(module).__name__}"
        for name, tensor in _state_of(self._parts).items():
            path = name.partition("/")[2]
            if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
                yield f"{path} has a hook on its gradient"
        for name, optimizer in self._optimizers.items():
            if any(getattr(optimizer, hooks, None) for hooks in _OPTIMIZER_HOOKS):
                yield f"{name} has a hook on its step"

    def begin(self) -> None:
        """Note everything again, before capturing a program that depends on it."""
        self._guards = Guards(self._depends_on())

    def _depends_on(self) -> Iterator[tuple[str, Any]]:
        """Yield what programs depend on, for guards."""
        yield "a function of torch", partial(_functions_of_torch)
        yield "this process", partial(_process_settings, self._parts.device)
        classes: dict[type[nn.Module], None] = {}
        for where, module in self._modules():
            # The contents of the user's own modules, who vouches for them, may change.
            is_torchs = is_torchs_module(module)
            yield from (held_by_module if is_torchs else _registered)(module, where)
            classes |= {type(module): None} if is_torchs else {}
        for cls in classes:
            yield from code_of_class(cls)
        for name, tensor in _state_of(self._parts).items():
            yield name.partition("/")[2], tensor
        # A program writes into memory, and so into all tensors that share it.
        yield "the sharing of memory between tensors", partial(_shared, self._parts)
        runs_torchs = OptimizerCalls().is_torchs
        for name, optimizer in self._optimizers.items():
            yield f"the code of {name}", partial(runs_torchs, optimizer)
            yield f"step of {name}", partial(vars(optimizer).get, "step")
            yield f"the parameters of {name}", partial(_parameters_of, optimizer)
        if type(self._loss) is partial:  # a loss that is a module is among the parts
            yield "the loss", partial(getattr, self._loss, "func")
            yield "the arguments of the loss", partial(getattr, self._loss, "args")
            yield "the loss", self._loss.keywords
            for value in (*self._loss.args, *self._loss.keywords.values()):
                if isinstance(value, Tensor):
                    yield from of_constant(value, "a tensor of the loss")

    def difference(self) -> str | None:
        """Describe what changed since programs were captured, or return None."""
        return self._guards.difference() or self._hooked_node()

    def _hooked_node(self) -> str | None:
        """Describe a parameter that has a hook on its node in the graph, or return None."""
        # Only a backward pass shows such a hook. It lasts while other code keeps a graph.
        with torch._C.DisableTorchFunctionSubclass():
            hooked = (
                name.partition("/")[2]
                for name, tensor in _state_of(self._parts).items()
                if name.startswith("parameter/") and has_hooks_on_node(tensor)
            )
            found = next(hooked, None)
        return None if found is None else f"other code has a hook on the graph node of {found}"


def _state_of(parts: Parts) -> dict[str, Tensor]:
    """Return the state of the parts, except gradients."""
    return {name: each for name, each in parts.state().items() if not name.startswith("gradient/")}


def _shared(parts: Parts) -> list[int]:
    """Return, for each tensor of the state, the first that uses the same memory."""
    first: dict[int, int] = {}
    places = (tensor.untyped_storage()._cdata for tensor in _state_of(parts).values())
    return [first.setdefault(place, index) for index, place in enumerate(places)]


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return which parameters are in which group, and None after each group."""
    return [each for group in optimizer.param_groups for each in (*group["params"], None)]


def _registered(module: nn.Module, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors, modules and hooks of a module, its mode, and the functions of its call."""
    own = vars(module)
    for name in ("_parameters", "_buffers", "_modules", *HOOKS):
        if name in own:
            yield f"{name} of {where}", own[name]
    for name in ("training", "forward"):
        yield f"{name} of {where}", partial(own.get, name)
    for name in ("forward", "__call__"):
        yield f"{name} of {where}", partial(getattr, type(module), name)


# Settings of the process.


def _process_settings(device: torch.device) -> dict[str, Any]:
    """Return what belongs to the process, by name."""
    found = {
        "the default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "the fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "the number of active function modes": torch._C._len_torch_function_stack(),
        "the number of active dispatch modes": torch._C._len_torch_dispatch_stack(),
        "hooks on all modules": _hooks_on_all(),
        "hooks on saved tensors": _has_tensor_hooks(),
        "the number of methods of Tensor": len(vars(torch.Tensor).keys() - OF_WATCHES),
    }
    for kind in {"cpu", device.type}:
        dtype = torch.get_autocast_dtype(kind)
        found[f"autocast on {kind}"] = torch.is_autocast_enabled(kind), dtype
    return found | {name: read() for name, read in numerics.readers().items()}


def _functions_of_torch() -> list[Any]:
    """Return the functions in torch's own modules, which user code may replace."""
    return [
        value
        for place, names in zip(_PLACES, _names_of_functions(), strict=True)
        for value in map(vars(place).get, names)
    ]


# Once: a function that somebody replaces by another kind of object must still be looked for.
@cache
def _names_of_functions() -> tuple[tuple[str, ...], ...]:
    kinds = (types.FunctionType, types.BuiltinFunctionType)
    return tuple(
        tuple(
            name
            for name, value in vars(place).copy().items()
            if name not in OF_WATCHES
            and (isinstance(value, kinds) or (place is torch.Tensor and callable(value)))
        )
        for place in _PLACES
    )


def reason_against_functions() -> str | None:
    """Return which function in torch's own modules was replaced, or None."""
    # torch's functions call each other by name: that of attention calls `linear` and `dropout`.
    for place in _PLACES:
        for name, value in vars(place).copy().items():  # other threads may import what adds to it
            # Others of torch are not called by layers; Lightning replaces `torch.compile`.
            if place is torch and not hasattr(torch._C._VariableFunctions, name):
                continue
            kind = type(value)
            if kind is types.FunctionType:
                is_own = is_written_by_torch(value)
            else:  # e.g. a function in C, or an object that is called like one
                is_own = kind is not partial and kind.__module__.partition(".")[0] in _OWN_KINDS
            if not is_own and callable(value) and not isinstance(value, type):
                return f"{place.__name__}.{name} was replaced"
    return None


def _reason_against_process() -> str | None:
    """Return why Python must run at every step of any model, or None."""
    if _hooks_on_all():
        return "the process has a hook on all modules or optimizers"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if _has_tensor_hooks():
        return "torch.autograd.graph.saved_tensors_hooks are active"
    return None


def _has_tensor_hooks() -> bool:
    """Return whether hooks on saved tensors are active."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _hooks_on_all() -> bool:
    """Return whether there is a hook on all modules or all optimizers; torch's own do not count."""
    tables = [*(vars(nn.modules.module)[f"_global{name}"] for name in HOOKS), *HOOKS_OF_ALL]
    found = [hook for table in tables for hook in [*table.values()]]  # other threads may change them
    # Torch's own, or that of a capture in another thread, is harmless.
    return not all(is_torchs_function(getattr(h, "__func__", h)) or is_ours(h) for h in found)
