"""torch's own modules, functions, losses, optimizers and schedulers, by identity; and hooks on them."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import get_overridable_functions
from torch.utils.hooks import RemovableHandle

from everystep.step.guards import is_plain, of_constant

__all__ = [
    "HOOKS",
    "TENSOR_TYPES",
    "code_of_class",
    "handles",
    "has_hooks_on_node",
    "held_by_module",
    "hook_on",
    "hooks_of",
    "is_torchs_function",
    "is_torchs_module",
    "is_torchs_scheduler",
    "names_of",
    "own_modules",
    "reason_against_loss",
    "reason_against_module",
    "replaces_method",
]

#: Exact types of tensors; a subclass may have methods of its own.
TENSOR_TYPES: frozenset[type] = frozenset({Tensor, nn.Parameter})
#: The attributes in which a module keeps its hooks, and their names.
HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward hook",
}
_TORCH = str(Path(torch.__file__).parent)
_LOOKED_UP = ("forward", "__call__", "_call_impl", "__getattr__", "__setattr__")


def reason_against_module(module: nn.Module, name: str = "the model") -> str | None:
    """Return why a module or a submodule is not torch's own and unmodified, or None."""
    for path, each in own_modules(module):
        problem = _problem(each)
        if problem is not None:
            return f"{f'module {path}' if path else name} {problem}"
    return None


def reason_against_loss(loss: Any) -> str | None:
    """Return why a loss is not torch's own, or None."""
    if isinstance(loss, nn.Module):
        return reason_against_module(loss, "the loss")
    if _is_overridable(loss):
        return None
    # Such as `partial(cross_entropy, label_smoothing=0.1)`.
    if type(loss) is functools.partial and _is_overridable(loss.func):
        given = (*loss.args, *loss.keywords.values())
        if all(is_plain(value) or type(value) in TENSOR_TYPES for value in given):
            return None
    return f"the loss is {_name_of_function(loss)}, which is not a function of torch"


def hook_on(module: nn.Module) -> str | None:
    """Return the kind of hook that a module has, or None."""
    own = vars(module)
    return next((kind for name, kind in HOOKS.items() if own.get(name)), None)


def held_by_module(module: nn.Module, where: str) -> Iterator[tuple[str, Any]]:
    """Yield everything that one of torch's own modules holds, for guards.

    where: its name in messages.
    """
    own = vars(module)
    for container in _containers(own):
        yield where, container
    for value in own.values():
        if isinstance(value, Tensor):
            yield from of_constant(value, f"a tensor of {where}")
    yield f"the class of {where}", functools.partial(type, module)


def code_of_class(cls: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the methods of a class of torch's modules, for guards."""
    for name in _LOOKED_UP:
        yield f"{name} of the class {cls.__name__}", functools.partial(getattr, cls, name)
    yield f"a method of the class {cls.__name__}", functools.partial(_methods_of, cls)


def _methods_of(cls: type) -> list[Any]:
    """Return what a class and its bases define, those of all modules left out."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    return [each for base in bases for each in vars(base).values()]


def own_modules(
    module: nn.Module, path: str = "", known: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all within it, with their paths, as `named_modules` of torch does."""
    known = set() if known is None else known
    if id(module) not in known:
        known.add(id(module))
        yield path, module
        # A class may override `named_modules`, and so hide a module that is not torch's.
        for name, inner in vars(module)["_modules"].items():
            if inner is not None:
                yield from own_modules(inner, f"{path}.{name}" if path else name, known)


def is_torchs_module(module: nn.Module, *, but_hooks: bool = False) -> bool:
    """Return whether a module is torch's own and unmodified, apart from its submodules.

    but_hooks: it may have hooks.
    """
    return _problem(module, but_hooks) is None


def hooks_of(module: nn.Module) -> dict[str, str]:
    """Return the hooks of a module: the names of the functions, by torch's name of the hook."""
    own = vars(module)
    return {
        name.strip("_").removesuffix("s").replace("_", " "): names_of(own[name])
        for name in HOOKS
        if own.get(name)
    }


def names_of(hooks: dict[int, Any]) -> str:
    """Return the names of hooks, each with its line if its function has no name."""
    return ", ".join(map(_name_of_function, hooks.values()))


def _name_of_function(function: Any) -> str:
    if type(function) is functools.partial:
        return _name_of_function(function.func)
    function = function.__func__ if type(function) is types.MethodType else function
    if type(function) is not types.FunctionType:
        return type(function).__name__
    code = function.__code__
    place = f" in line {code.co_firstlineno} of {Path(code.co_filename).name}"
    return code.co_qualname.rpartition("<locals>.")[2] + place * (code.co_name == "<lambda>")


def is_torchs_scheduler(scheduler: LRScheduler | None, *, but_functions: bool = False) -> bool:
    """Return whether a scheduler and its inner schedulers are torch's, and call no user function.

    but_functions: they may call functions of the user's.
    """
    if scheduler is None:
        return True
    cls = type(scheduler)
    functions = [*getattr(scheduler, "lr_lambdas", ()), getattr(scheduler, "_scale_fn_custom", None)]
    return (
        getattr(torch.optim.lr_scheduler, cls.__name__, None) is cls
        and (but_functions or all(function is None for function in functions))
        and not replaces_method(scheduler)
        and all(
            is_torchs_scheduler(each, but_functions=but_functions)
            for each in getattr(scheduler, "_schedulers", ())
        )
    )


def replaces_method(value: Any, but: str = "") -> bool:
    """Return whether an object replaces a method of its class."""
    own = vars(value).items()
    return any(callable(each) and name != but and hasattr(type(value), name) for name, each in own)


def is_torchs_function(function: Any) -> bool:
    """Return whether a function of Python was written by torch."""
    return type(function) is types.FunctionType and function.__code__.co_filename.startswith(_TORCH)


def _is_overridable(function: Any) -> bool:
    """Return whether a function is one of torch's that take tensors, by identity."""
    return id(function) in _overridable_functions()


@functools.cache
def _overridable_functions() -> dict[int, Any]:
    """Return torch's functions of tensors by their identity; holding them keeps it theirs."""
    places = get_overridable_functions().items()
    found = [f for place, functions in places if type(place) is types.ModuleType for f in functions]
    return {id(function): function for function in found}


def _problem(module: nn.Module, but_hooks: bool = False) -> str | None:
    cls, own = type(module), vars(module)
    if not _is_from(cls, "torch.nn.modules."):
        return f"is a {cls.__name__}, which is not a torch module"
    if not but_hooks and (kind := hook_on(module)) is not None:
        return f"has {kind}"
    for name, value in own.items():
        if name == "forward" or (callable(value) and hasattr(cls, name)):
            return f"has a {name} that differs from its class"
        if not _is_known(value) and not isinstance(value, nn.Module):
            return f"has {name}, a {type(value).__name__} that is not torch's"
    for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
        if tensor is not None and type(tensor) not in TENSOR_TYPES:
            return f"has a {type(tensor).__name__}, a tensor subclass"
    exchanged = [name for name in _LOOKED_UP if not is_torchs_function(getattr(cls, name))]
    return f"has a {exchanged[0]} that differs from torch's" if exchanged else None


def _is_from(cls: type, package: str) -> bool:
    """Return whether a class is the one that a module of a package has under its name."""
    own = cls.__module__
    if type(own) is not str or not own.startswith(package):
        return False
    return getattr(sys.modules.get(own), cls.__qualname__, None) is cls


def _is_known(value: Any, depth: int = 8) -> bool:
    """Return whether a module's attribute is plain, a tensor, a torch function, or made of these.

    depth: of what it is made of; a list may be within itself.
    """
    if not depth:
        return False
    kind = type(value)
    if is_plain(value) or kind in TENSOR_TYPES:
        return True
    if kind in (list, set, tuple):
        return all(_is_known(each, depth - 1) for each in value)
    if kind in (dict, OrderedDict):
        return all(_is_known(each, depth - 1) or isinstance(each, nn.Module) for each in value.values())
    if _is_from(kind, "torch.nn."):  # options of a loss
        return hasattr(value, "__dict__") and all(map(is_plain, vars(value).values()))
    # Recurrent layers refer to their weights.
    return kind is weakref.ReferenceType or _is_overridable(value) or is_torchs_function(value)


def _containers(own: dict[str, Any]) -> Iterator[Any]:
    """Yield a dict and all dicts and lists within it."""
    seen: set[int] = set()
    waiting: list[Any] = [own]
    while waiting:
        container = waiting.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        yield container
        for value in container.values() if isinstance(container, dict) else container:
            if type(value) is list or isinstance(value, dict):
                waiting.append(value)
            elif not isinstance(value, (Tensor, nn.Module)) and _is_from(type(value), "torch.nn."):
                waiting.append(vars(value))


def handles() -> int:
    """Return the number of hooks registered on tensors, nodes and modules in this process."""
    return RemovableHandle.next_id


def has_hooks_on_node(tensor: Tensor) -> bool:
    """Return whether Python runs when autograd accumulates a parameter's gradient."""
    if not tensor.requires_grad or not tensor.is_leaf or tensor.is_inference():
        return False
    # The node that does so lives as long as other code keeps a graph with it; else this makes another.
    with torch.inference_mode(False), torch.enable_grad():
        node: Any = tensor.view_as(tensor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    # torch has no list of a node's hooks, but a handle has the table that it was put into.
    ours = [register(lambda *_: None) for register in (node.register_hook, node.register_prehook)]
    has_others = any(len(handle.hooks_dict_ref()) > 1 for handle in ours)
    for handle in ours:
        handle.remove()
    return has_others
