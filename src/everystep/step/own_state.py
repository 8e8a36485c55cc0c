"""The state of optimizers and other objects, as named tensors and plain data, to write and to restore.

torch's optimizers keep tensors by parameter, and settings by param group. Others keep lists of tensors,
counters, generators or another optimizer in their attributes. Everything is stored by its path, so that
a state can be restored into an optimizer of the same class.
"""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "PREFIX",
    "decoded",
    "encoded",
    "entries_of",
    "is_plain_value",
    "keeps_own_state",
    "optimizer_settings",
    "registered",
    "restore_optimizer",
    "state_dict_of",
]


def registered(
    module: nn.Module, kind: str, prefix: str = "", around: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters or buffers of a module and all within it, each under every name.

    As torch's `named_parameters` does, which a user may have overridden.
    """
    for name, tensor in vars(module)[kind].items():
        if tensor is not None:
            yield f"{prefix}{name}", tensor
    for name, inner in vars(module)["_modules"].items():
        if inner is not None and id(inner) not in around:
            yield from registered(inner, kind, f"{prefix}{name}.", (*around, id(module)))


def state_dict_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return what torch's `state_dict` does, in its order, without the hooks of the user's."""
    own = vars(module)
    left_out = own["_non_persistent_buffers_set"]
    found = {f"{prefix}{n}": t for n, t in own["_parameters"].items() if t is not None}
    found |= {
        f"{prefix}{name}": tensor
        for name, tensor in own["_buffers"].items()
        if tensor is not None and name not in left_out
    }
    for name, inner in own["_modules"].items():
        if inner is not None:
            found |= state_dict_of(inner, f"{prefix}{name}.")
    return found


def entries_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Yield what the optimizer keeps by parameter; some keep other things in the same place."""
    for parameter, entries in optimizer.state.items():
        if isinstance(parameter, Tensor) and isinstance(entries, Mapping):
            yield parameter, entries


#: Prefix of the names of tensors that only this module knows.
PREFIX = "own/"
_DICTS = (dict, OrderedDict, defaultdict)
_LISTS: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple}
#: Attributes of torch's base class and its schedulers; no step depends on them.
_OF_TORCH = {
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_zero_grad_profile_name"),
    *("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks", "_patch_step_function"),
    *("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks", "step"),
    *("_warned_capturable_if_run_uncaptured", "_opt_called"),
}
#: Objects that are left unchanged: code, modules, and objects that cannot be copied.
_LEFT_ALONE = (type, nn.Module, torch.device, torch.dtype)
#: Where the classes of functions, methods and operators are defined.
_WITH_CODE = ("builtins", "functools", "torch", "types")


def keeps_own_state(optimizer: torch.optim.Optimizer | None) -> bool:
    """Return whether an optimizer may keep more than torch's own do."""
    return optimizer is not None and not type(optimizer).__module__.startswith(
        ("torch.optim", "everystep.")
    )


def encoded(
    value: Any,
    place: str,
    known: Mapping[str, Tensor],
    names: Mapping[Tensor, str] = MappingProxyType({}),
    left_alone: Container[int] = (),
) -> tuple[dict[str, Tensor], Any]:
    """Return the state of an object: live tensors by name, and the rest as JSON can hold it.

    Args:
        value: the object.
        place: the prefix of the names of its tensors.
        known: tensors that already have a name.
        names: of parameters, which are not among its tensors.
        left_alone: ids of objects inside it that are written separately.
    """
    walk = _Capturing(names, known, left_alone)
    data = walk.encoded(value, place)
    return walk.tensors, data


def decoded(
    value: Any,
    place: str,
    tensors: Mapping[str, Tensor],
    data: Any,
    names: Mapping[Tensor, str] = MappingProxyType({}),
) -> Any:
    """Restore in an object what `encoded` returned, as far as possible in place; return the object."""
    parameters = {name: parameter for parameter, name in names.items()}
    return _Restoring(parameters, tensors).decoded(data, value, place)


class _Capturing:
    def __init__(
        self,
        names: Mapping[Tensor, str],
        known: Mapping[str, Tensor],
        left_alone: Container[int],
    ) -> None:
        self._left_alone = left_alone
        self.tensors: dict[str, Tensor] = {}
        self._names = names
        self._known = {id(tensor): name for name, tensor in known.items()}
        self._ids = {id(parameter): name for parameter, name in names.items()}
        self._places: dict[int, tuple[str, Any]] = {}

    def encoded(self, value: Any, place: str) -> Any:
        """Return a value as JSON can hold it; other values are `left` unchanged."""
        if is_plain_value(value):
            return value
        if id(value) in self._places:
            return {"same": self._places[id(value)][0]}
        if id(value) in self._left_alone:
            return {"left": type(value).__name__}
        self._places[id(value)] = place, value
        if isinstance(value, Tensor) and value.layout != torch.strided:
            return {"left": "sparse tensor"}
        if isinstance(value, Tensor):
            if value in self._names:
                return {"parameter": self._names[value]}
            if id(value) in self._known:
                return {"tensor": self._known[id(value)]}
            return {"tensor": self._kept(value, place)}
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value, place)
        if type(value) in (set, frozenset) and all(map(is_plain_value, value)):
            return {type(value).__name__: sorted(value, key=repr)}
        if isinstance(value, torch.Generator):
            return {"generator": self._kept(value.get_state(), place)}
        if (state := _numbers_of_generator(value)) is not None:
            return {"random": self.encoded(state, place)}
        if type(value) in _DICTS and all(map(self._is_key, value)):
            items = enumerate(value.items())
            return {"dict": [[self._key(k), self.encoded(v, f"{place}.{i}")] for i, (k, v) in items]}
        if type(value) in (list, tuple, deque):
            kind = type(value).__name__
            return {kind: [self.encoded(item, f"{place}.{i}") for i, item in enumerate(value)]}
        if _is_code(value) or isinstance(value, _LEFT_ALONE) or not hasattr(value, "__dict__"):
            return {"left": type(value).__name__}
        return {"object": self.attributes(value, f"{place}.")}

    def attributes(self, value: Any, prefix: str) -> dict[str, Any]:
        """Return the attributes of an object. prefix: of the names of its tensors."""
        skipped = _OF_TORCH if isinstance(value, torch.optim.Optimizer) else ()
        own = vars(value).items()
        return {n: self.encoded(each, f"{prefix}{n}") for n, each in own if n not in skipped}

    def _kept(self, tensor: Tensor, place: str) -> str:
        self.tensors[f"{PREFIX}{place}"] = tensor
        return f"{PREFIX}{place}"

    def _array(self, value: Any, place: str) -> Any:
        kind = "scalar" if isinstance(value, np.generic) else "array"
        try:
            tensor = torch.from_numpy(np.array(value, order="C"))
        except (TypeError, ValueError):  # texts, dates, structures: torch has no such numbers
            return {"left": f"array of {value.dtype}"}
        return {kind: self._kept(tensor, place)}

    def _is_key(self, key: Any) -> bool:
        is_known = isinstance(key, Tensor) and key in self._names
        return is_known or is_plain_value(key) or (type(key) is tuple and all(map(is_plain_value, key)))

    def _key(self, key: Any) -> Any:
        if isinstance(key, Tensor):
            return {"parameter": self._names[key]}
        if type(key) is tuple:
            return {"tuple": list(key)}
        return {"id": self._ids[key]} if type(key) is int and key in self._ids else key


def _numbers_of_generator(value: Any) -> Any:
    """Return the state of a generator of NumPy or of Python; None of all else."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    return value.getstate() if type(value) is random.Random else None


def _is_code(value: Any) -> bool:
    """Return whether a value is like a function; an object of another class may count its calls."""
    return callable(value) and type(value).__module__.partition(".")[0] in _WITH_CODE


def is_plain_value(value: Any) -> bool:
    """Return whether a value is itself in JSON."""
    return value is None or type(value) in (bool, int, float, str)


class _Restoring:
    def __init__(self, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._tensors = tensors
        self._made: dict[str, Any] = {}

    def decoded(self, node: Any, there: Any, place: str) -> Any:
        """Return the value of a node; `there`: the current value in its place."""
        if not isinstance(node, dict):
            return node
        found = self._decoded(*next(iter(node.items())), there, place)
        self._made[place] = found
        return found

    def _decoded(self, kind: str, content: Any, there: Any, place: str) -> Any:
        if kind == "same":
            return self._made.get(content, there)
        if kind == "parameter":
            return self._parameters.get(content, there)
        if kind == "tensor":
            return self._tensor(self._tensors[content], there)
        if kind in ("array", "scalar"):
            array = self._tensors[content].numpy()
            return self._array(array, there) if kind == "array" else array[()]
        if kind in ("set", "frozenset"):
            return set(content) if kind == "set" else frozenset(content)
        if kind == "generator":
            if isinstance(there, torch.Generator):
                there.set_state(self._tensors[content])
            return there
        if kind == "random":
            self._set_generator(there, self.decoded(content, None, place))
            return there
        if kind == "dict":
            return self._dict(content, there, place)
        if kind in ("list", "tuple", "deque"):
            return self._list(kind, content, there, place)
        if kind == "object" and hasattr(there, "__dict__"):
            self.set_attributes(there, content, f"{place}.")
        return there

    def set_attributes(self, value: Any, nodes: Mapping[str, Any], prefix: str) -> None:
        """Set the attributes of an object to the values of nodes."""
        own = vars(value)
        if isinstance(value, torch.optim.Optimizer):
            for name in own.keys() - nodes.keys() - _OF_TORCH:
                del own[name]  # it came later; its class may have a default
        for name, node in nodes.items():
            own[name] = self.decoded(node, own.get(name), f"{prefix}{name}")

    def _tensor(self, saved: Tensor, there: Any) -> Tensor:
        fits = isinstance(there, Tensor) and (there.shape, there.dtype) == (saved.shape, saved.dtype)
        if fits:
            with torch.no_grad():
                return there.copy_(saved)  # type: ignore[no-any-return]
        # Tensors with the shape of a parameter are on its device; a count of steps stays on the CPU.
        like = next((p for p in self._parameters.values() if p.shape == saved.shape), None)
        if like is None or saved.ndim == 0:
            return saved.clone()
        return torch.empty_like(like, dtype=saved.dtype, requires_grad=False).copy_(saved)

    def _array(self, saved: Any, there: Any) -> Any:
        fits = type(there) is np.ndarray and (there.shape, there.dtype) == (saved.shape, saved.dtype)
        if not fits or not there.flags.writeable:
            return saved.copy()
        np.copyto(there, saved)
        return there

    def _set_generator(self, there: Any, state: Any) -> None:
        if isinstance(there, np.random.Generator):
            there.bit_generator.state = state
        elif isinstance(there, np.random.RandomState):
            there.set_state(state)
        elif type(there) is random.Random:
            there.setstate(state)

    def _dict(self, items: list[list[Any]], there: Any, place: str) -> Any:
        found = there if type(there) in _DICTS else {}
        before = dict(found)
        found.clear()
        for index, (key, node) in enumerate(items):
            name = self._key(key)
            found[name] = self.decoded(node, before.get(name), f"{place}.{index}")
        return found

    def _key(self, key: Any) -> Any:
        if not isinstance(key, dict):
            return key
        if "tuple" in key:
            return tuple(key["tuple"])
        parameter = self._parameters[next(iter(key.values()))]
        return id(parameter) if "id" in key else parameter

    def _list(self, kind: str, nodes: list[Any], there: Any, place: str) -> Any:
        before = list(there) if isinstance(there, list | tuple | deque) else []
        before += [None] * (len(nodes) - len(before))
        items = [
            self.decoded(node, old, f"{place}.{i}")
            for i, (node, old) in enumerate(zip(nodes, before, strict=False))
        ]
        if type(there) in (list, deque) and type(there).__name__ == kind:
            there.clear()
            there.extend(items)
            return there
        return deque(items) if kind == "deque" else _LISTS[kind](items)


def optimizer_settings(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return the state of an optimizer other than tensors. names: of its parameters."""
    values = {
        f"{names.get(parameter, '#')}/{key}": _plain(value)
        for parameter, entries in entries_of(optimizer)
        for key, value in entries.items()
        if not isinstance(value, Tensor)
    }
    groups = [
        {k: _plain(v) for k, v in group.items() if k != "params" and not isinstance(v, Tensor)}
        | {"params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__qualname__, "groups": groups, "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    settings: Mapping[str, Any],
    saved: Mapping[str, Tensor],
    prefix: str = "optimizer/",
) -> None:
    """Restore the settings and the entries of an optimizer; tensors that it has are filled in later.

    Args:
        optimizer: of the same class as the written one.
        names: of its parameters.
        settings: as `optimizer_settings` returned them.
        saved: tensors by name.
        prefix: of the names of its tensors.

    Raises:
        ValueError: it is the state of another optimizer.
    """
    if [len(g["params"]) for g in settings["groups"]] != [
        len(g["params"]) for g in optimizer.param_groups
    ]:
        raise ValueError("the optimizer has different param groups")
    for group, known in zip(optimizer.param_groups, settings["groups"], strict=True):
        _update_plain(group, {key: value for key, value in known.items() if key != "params"})
    for parameter, name in names.items():
        begins = f"{prefix}{name}/"
        tensors = {n.removeprefix(begins): t for n, t in saved.items() if n.startswith(begins)}
        values = {
            key.removeprefix(f"{name}/"): value
            for key, value in settings["values"].items()
            if key.rpartition("/")[0] == name
        }
        if not tensors and not values:
            optimizer.state.pop(parameter, None)
            continue
        entries = optimizer.state[parameter]
        for key in entries.keys() - tensors.keys() - values.keys():
            del entries[key]
        entries.update(values)
        for key, tensor in tensors.items():
            there = entries.get(key)
            if not isinstance(there, Tensor) or there.shape != tensor.shape:
                entries[key] = _made(optimizer, parameter, tensor)


def _made(optimizer: torch.optim.Optimizer, parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a new tensor of an optimizer, on the device where torch would have it."""
    if tensor.shape == parameter.shape:  # kernels go through both in the same order
        like = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
        return like.copy_(tensor)
    # A count of steps stays on the CPU, where torch's optimizers look for it.
    on_cpu = tensor.ndim == 0 and not any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    return tensor.clone() if on_cpu else tensor.to(parameter.device, copy=True)


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it; the class of other values."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return type(value).__name__  # a user's object may count how often it is printed


def _update_plain(target: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Set numbers, strings and lists of these; everything else was written only as text."""
    for key, value in saved.items():
        there = target.get(key)
        if isinstance(there, Mapping | Tensor) or callable(there):
            continue
        if isinstance(value, list):
            items = [*value, *there] if isinstance(there, list | tuple) else value
            if all(isinstance(item, bool | int | float | None) for item in items):
                target[key] = tuple(value) if isinstance(there, tuple) else value
        elif not isinstance(value, Mapping) and not (isinstance(value, str) and there != value):
            target[key] = value
