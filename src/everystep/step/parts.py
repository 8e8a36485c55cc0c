"""Parts: named objects that a loop carries from step to step: models, optimizers, tensors, ..."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from operator import is_
from types import FunctionType, MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from everystep.errors import Fault, UsageError
from everystep.program.operation import path_faults
from everystep.step.follow import is_compiled, module_fault
from everystep.step.kept_values import GENERATORS, HELD, has_graph, is_aside, is_code, is_dense
from everystep.step.own_state import entries_of, keeps_own_state, registered

__all__ = ["Parts", "check_parts", "is_of_module", "with_inner"]

#: Maximum depth of the search for tensors in attributes, dicts and lists of a part.
_DEPTH = 6
#: Attributes of torch's optimizers that steps do not depend on, or that have other names.
_OF_OPTIMIZER = {"param_groups", "state", "defaults"}
#: In the names of parameters that only an optimizer has; no attribute has a bracket in its name.
_ONLY_OPTIMIZED = "params["
_WITH_TENSORS = (Tensor, nn.Module, dict)
#: Parts with ways of their own to be kept.
_WHOLE = (nn.Module, torch.optim.Optimizer)
#: What Accelerate wraps a part in, by module, and the attribute that has the part. What else a wrapper
#: holds belongs to the accelerator and its loaders, and is made again with them.
_WRAPPED = {"accelerate.optimizer": "optimizer", "accelerate.scheduler": "scheduler"}


# The names of a state's tensors, by what has them:
#   parameter/0.weight                   of a module
#   parameter/params[1]                  the second of an optimizer, where no module has it
#   buffer/1.running_mean
#   optimizer/0.weight/exp_avg           of several optimizers: optimizer/opt_g.0.weight/exp_avg
#   group/0/lr                           a setting of a param group that is a tensor
#   gradient/0.weight                    a pending gradient
#   part/state.best                      in any other part, by its path


def is_of_module(name: str) -> bool:
    """Return whether a parameter is of a module, by its name; others are of an optimizer alone."""
    return _ONLY_OPTIMIZED not in name


class Parts:
    """The parts of a training.

    The part called `model`, or the only module with tensors, gives its tensors their own names
    (`0.weight`); the names of other modules begin with that of the part (`generator.0.weight`).

    Args:
        named: the parts by name: modules, optimizers, schedulers, scalers, averaged copies, tensors,
            random generators, or dicts, lists and objects that hold such.
        apart: modules that are not models, such as a loss with weights: in a snapshot, their tensors are
            not among the parameters.
    """

    def __init__(self, named: Mapping[str, Any], apart: Collection[str] = ()) -> None:
        self.named = named = {name: _unwrapped(part) for name, part in named.items()}
        self.apart = apart
        self.modules = {n: part for n, part in named.items() if isinstance(part, nn.Module)}
        self.optimizers = {
            name: part for name, part in named.items() if isinstance(part, torch.optim.Optimizer)
        }
        self._optimizer_names = {id(part): name for name, part in self.optimizers.items()}
        modules_and_optimizers = self.modules.keys() | self.optimizers.keys()
        self._others = {n: part for n, part in named.items() if n not in modules_and_optimizers}
        models, seen = set[str](), set[int]()
        # A loss without tensors is not a second model, nor is a wrapper of the model.
        for name, module in self.modules.items():
            both = (registered(module, kind) for kind in ("_parameters", "_buffers"))
            own = {id(tensor) for _, tensor in chain(*both)} - seen
            models |= {name} if own and name not in apart else set()
            seen |= own
        self.main = next((n for n in self.modules if n == "model" or models == {n}), None)
        self.device = self._device()
        self._layout: _Layout | None = None
        #: The tensors that may have pending gradients, as they were last looked up, and these names.
        self._leaves: list[tuple[Tensor, str]] = []

    def check(self) -> None:
        """Check that a run can hold the current parts.

        Raises:
            UsageError: names each tensor that it cannot hold, with a fix.
        """
        faults = [
            Fault(
                name, "is compiled (torch.compile); pass the uncompiled module, and use it in the loop"
            )
            for name, module in self.modules.items()
            if any(map(is_compiled, module.modules()))
        ]
        paths = dict.fromkeys((*self.named, *self.module_paths().values()))
        faults += path_faults(dict.fromkeys((*paths, *(n.partition("/")[2] for n in self.state()))))
        for name, tensor in self.state().items():
            if (problem := _problem(tensor, self.device)) is not None:
                faults.append(Fault(name.partition("/")[2], problem))
        if faults:
            raise UsageError(faults, "the parts of the training")

    def only(self, names: Collection[str]) -> Parts:
        """Return some of the parts, with the names that their tensors have here."""
        return Parts({name: part for name, part in self.named.items() if name in names}, self.apart)

    def prefix(self, name: str) -> str:
        """Return the prefix of the names of a module's tensors."""
        if name == self.main:
            return ""
        # A loss and a module of the model may have the same name.
        taken = vars(self.named[self.main])["_modules"] if name in self.apart and self.main else ()
        while name in taken:
            name += "_"
        return f"{name}."

    def module_paths(self) -> Mapping[int, str]:
        """Return the path of each module of a model, by its id, as the parts were last looked up."""
        return (self._layout or self._known_layout()).paths

    def _inner_modules(self) -> tuple[list[nn.Module], dict[int, str]]:
        """Return all modules, and the paths of those of models, by their ids."""
        inner, paths = list[nn.Module](), dict[int, str]()
        for name, module in self.modules.items():
            prefix = self.prefix(name)
            for path, each in module.named_modules():
                inner.append(each)
                if name not in self.apart:
                    paths.setdefault(id(each), f"{prefix}{path}".rstrip("."))
        return inner, paths

    def owner_of(self, optimizer: torch.optim.Optimizer) -> str | None:
        """Return the part that an optimizer is, or that lets it take its steps; None: there is none."""
        if (name := self._optimizer_names.get(id(optimizer))) is not None:
            return name
        groups = {*map(id, optimizer.param_groups)}  # which both have
        others = ((n, map(id, part.param_groups)) for n, part in self.optimizers.items())
        return next((name for name, own in others if not groups.isdisjoint(own)), None)

    def name_of(self, optimizer: torch.optim.Optimizer) -> str | None:
        """Return the name that the operations of an optimizer have; None where only one is a part."""
        return None if len(self.optimizers) == 1 else self.owner_of(optimizer)

    def parameter_names(self) -> dict[Tensor, str]:
        """Return each parameter of modules and optimizers with its name."""
        return self._known_layout().names

    def _known_layout(self) -> _Layout:
        """Return the layout of the tensors of modules and optimizers; look it up again if it changed."""
        if self._layout is None or not self._layout.holds():
            names = self._names_of_parameters()
            tensors = self._of_modules_and_optimizers(names)
            self._layout = _Layout(names, tensors, *self._inner_modules(), self.optimizers)
        return self._layout

    def _names_of_parameters(self) -> dict[Tensor, str]:
        found: dict[Tensor, str] = {}
        for name, module in self.modules.items():
            # A parameter that several modules have (tied weights) has the first of its names.
            for path, parameter in registered(module, "_parameters"):
                found.setdefault(parameter, f"{self.prefix(name)}{path}")
        for name, optimizer in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            own = "" if len(self.optimizers) == 1 else f"{name}."
            for place, parameter in enumerate(parameters):
                found.setdefault(parameter, f"{own}{_ONLY_OPTIMIZED}{place}]")
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors that the training carries, by name; pending gradients among them."""
        return self._state_and_leaves()[0]

    def _state_and_leaves(self) -> tuple[dict[str, Tensor], list[tuple[Tensor, str]]]:
        layout = self._known_layout()
        found = dict(layout.tensors)
        known = {id(tensor) for tensor in found.values()} if self._others else set()
        gradient_names = [*layout.gradient_names]
        for part, other in self._others.items():
            for path, tensor in _tensors_in(other, part, known, layout.ids):
                found[f"part/{path}"] = tensor
                if path not in layout.taken and _is_leaf(tensor):
                    gradient_names.append((tensor, f"gradient/{path}"))
        for leaf, name in gradient_names:
            gradient = leaf.grad
            # A sparse gradient is not a tensor of the state: snapshots keep its indices and values.
            if gradient is not None and gradient.layout is torch.strided:
                found[name] = gradient
        self._leaves = gradient_names
        return found, gradient_names

    def objects(self) -> set[int]:
        """Return the ids of all objects within the parts, themselves included."""
        found = {id(inner) for module in self.modules.values() for inner in module.modules()}
        for part in (*self._others.values(), *map(vars, self.optimizers.values())):
            for _ in _within(part, "", found, ()):
                pass
        return found | {id(part) for part in self.named.values()}

    def functions(self) -> Iterator[tuple[str, Any]]:
        """Yield the functions within the parts, such as those of a `LambdaLR`, each with its path."""
        for name, part in self._others.items():
            yield from _within(part, name, set(), (FunctionType,))

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors that may have pending gradients, by the names of these."""
        return {name.removeprefix("gradient/"): leaf for leaf, name in self._state_and_leaves()[1]}

    def pending(self) -> dict[str, Tensor]:
        """Return the pending gradients of what the state had when it was last looked up, by name."""
        # At each backward pass: to look through the parts again would take longer than the rest of it.
        given = ((name.removeprefix("gradient/"), leaf.grad) for leaf, name in self._leaves)
        return {name: gradient for name, gradient in given if gradient is not None}

    def gradients(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the pending gradients of an optimizer by the names of their parameters."""
        names = self.parameter_names()
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        return {names[p]: p.grad for p in parameters if p.grad is not None and p in names}

    def _of_modules_and_optimizers(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            prefix = self.prefix(name)
            found |= {f"parameter/{prefix}{n}": t for n, t in registered(module, "_parameters")}
            found |= {f"buffer/{prefix}{n}": t for n, t in registered(module, "_buffers")}
        for parameter, name in names.items():  # those that only an optimizer has
            found.setdefault(f"parameter/{name}", parameter)
        for part, optimizer in self.optimizers.items():
            found |= self._of_optimizer(part, optimizer, names, found)
        return found

    def rates(self, only: torch.optim.Optimizer | None = None) -> dict[str, float]:
        """Return the current learning rates: `lr`, `lr[1]`, or `optimizer_g.lr`.

        only: those of this optimizer.
        """
        found = {}
        for name, optimizer in self.optimizers.items():
            if only is not None and optimizer is not only:
                continue
            prefix = "" if len(self.optimizers) == 1 else f"{name}."
            for place, group in enumerate(optimizer.param_groups):
                rate = group.get("lr")
                if isinstance(rate, Tensor | int | float | np.number):
                    found[f"{prefix}lr{f'[{place}]' if place else ''}"] = float(rate)
        return found

    def _of_optimizer(
        self,
        part: str,
        optimizer: torch.optim.Optimizer,
        names: Mapping[Tensor, str],
        known: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        own = "" if len(self.optimizers) == 1 else f"{part}."
        found: dict[str, Tensor] = {}
        for parameter, entries in entries_of(optimizer):
            for key, value in entries.items():
                if isinstance(value, Tensor) and is_dense(value):
                    found[f"optimizer/{own}{names.get(parameter, '#')}/{key}"] = value
        for index, group in enumerate(optimizer.param_groups):
            found |= {f"group/{own}{index}/{k}": v for k, v in group.items() if isinstance(v, Tensor)}
        if keeps_own_state(optimizer):
            more = {k: v for k, v in vars(optimizer).items() if k not in _OF_OPTIMIZER}
            # The search stops at optimizers, and one may wrap another, as Lookahead does.
            more |= {k: vars(v) for k, v in more.items() if isinstance(v, torch.optim.Optimizer)}
            # Also by keys that are not parameters, or in lists that torch's own do not have.
            for parameter, each in optimizer.state.items():
                name = names.get(parameter, "#") if isinstance(parameter, Tensor) else str(parameter)
                more[f"state.{name}"] = each
            seen = {id(tensor) for tensor in (*known.values(), *found.values())}
            own_tensors = _tensors_in(more, part, seen, _ids_of(names))
            found |= {f"part/{path}": tensor for path, tensor in own_tensors if is_dense(tensor)}
        return found

    def _device(self) -> torch.device:
        modules = self.modules.values()
        parameters = (p for module in modules for _, p in registered(module, "_parameters"))
        others = (tensor for _, tensor in _tensors_in(self._others, "", set()))
        # Some may stay on the CPU, such as a large embedding.
        devices = [*dict.fromkeys(tensor.device for tensor in (*parameters, *others))]
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


class _Layout:
    """Where the tensors of modules and optimizers are.

    names: of all parameters; ids: the same, by their ids; taken: the names alone; tensors: by name,
    gradients left out; gradient_names: of each parameter; paths: of modules, by their ids.
    """

    def __init__(
        self,
        names: dict[Tensor, str],
        tensors: dict[str, Tensor],
        modules: list[nn.Module],
        paths: Mapping[int, str],
        optimizers: Mapping[str, torch.optim.Optimizer],
    ) -> None:
        self.names = names
        self.ids = _ids_of(names)
        self.taken = frozenset(names.values())
        self.paths = paths
        self.tensors = tensors
        self.gradient_names = [(parameter, f"gradient/{name}") for parameter, name in names.items()]
        # Compared by identity: to look up all names again at each step would take ten times as long.
        #: They are held, since a new module may get the id of one that is gone.
        self._modules = modules
        tables = [vars(m)[kind] for m in modules for kind in ("_parameters", "_buffers", "_modules")]
        #: They show what is in the tables now.
        self._views = [view for table in tables for view in (table.keys(), table.values())]
        self._optimizers = [*optimizers.values()]
        self._entries = [entries for o in self._optimizers for _, entries in entries_of(o)]
        # Such an optimizer may keep tensors in any attribute, which these tables do not show.
        self._is_sure = not any(map(keeps_own_state, self._optimizers))
        self._known = self._objects()

    def holds(self) -> bool:
        """Return whether they are still in the same places."""
        if not self._is_sure:
            return False
        (now, sizes), (then, sizes_then) = self._objects(), self._known
        return sizes == sizes_then and len(now) == len(then) and all(map(is_, now, then))

    def _objects(self) -> tuple[list[Any], list[int]]:
        """Return all objects that are or may hold tensors, their keys, and the sizes of their tables."""
        found: list[Any] = [*chain.from_iterable(self._views)]
        tables: list[Mapping[Any, Any]] = [*self._entries]
        for optimizer in self._optimizers:
            groups = optimizer.param_groups
            tables += [optimizer.state, *groups]
            found += (optimizer.state, groups, *groups, *chain(*[group["params"] for group in groups]))
        found += chain.from_iterable(tables)
        values = chain.from_iterable([table.values() for table in tables])
        # Not numbers, such as rates: where one changes, the tensors are still in the same places.
        found += [value for value in values if isinstance(value, _WITH_TENSORS)]
        return found, [*map(len, tables)]


def _problem(tensor: Tensor, device: torch.device) -> str | None:
    """Return why a run on a device cannot hold a tensor, with a fix, or None."""
    if nn.parameter.is_lazy(tensor):
        return "has no shape yet (a lazy module); call the model once before"
    if tensor.device.type == "meta":
        return "is on the meta device and has no values; call to_empty(...) before"
    if tensor.device not in (device, torch.device("cpu")):  # a program names no device of its memory
        return f"is on {tensor.device}, others on {device}; a run has one device, and the CPU"
    # By name: to import torch.distributed.tensor takes half a second.
    if "DTensor" in [each.__name__ for each in type(tensor).__mro__]:
        return (
            "is a part of a tensor that several processes share (fully_shard); everystep records "
            "models that each process has all of (DistributedDataParallel)"
        )
    if not is_dense(tensor):
        return "is sparse, nested or made of other tensors, and a run holds dense ones; use to_dense()"
    kind = str(tensor.dtype).removeprefix("torch.")
    return None if tensor.dtype in HELD else f"is {kind}, which a run cannot hold"


def _ids_of(names: Mapping[Tensor, str]) -> dict[int, str]:
    return {id(parameter): name for parameter, name in names.items()}


def _unwrapped(part: Any) -> Any:
    attribute = _WRAPPED.get(type(part).__module__)
    return part if attribute is None else getattr(part, attribute)


def _is_leaf(tensor: Tensor) -> bool:
    return tensor.requires_grad and not has_graph(tensor)


def with_inner(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return parts with the modules and optimizers that lie within them as parts of their own.

    They are in attributes, dicts and lists of other parts: `agent_actor`, `optimizers_0`. A module may
    have its optimizer.
    """
    found = {name: _unwrapped(part) for name, part in named.items()}
    known: set[int] = set()
    for part in found.values():
        known |= {id(each) for each in (part.modules() if isinstance(part, nn.Module) else [part])}
    for name, part in [*found.items()]:  # a copy, since the loop adds to it
        if not isinstance(part, _WHOLE):
            # The search stops at what is known, so it would not look into this part.
            known.discard(id(part))
            _add(found, _within(part, name, known, _WHOLE))
    for name, part in [*found.items()]:
        for path, inner in part.named_modules() if isinstance(part, nn.Module) else ():
            # torch's own modules have no optimizer in their attributes.
            if type(inner).__module__.startswith("torch."):
                continue
            place = f"{name}.{path}".rstrip(".")
            _add(found, _within(vars(inner), place, known, (torch.optim.Optimizer,), depth=2))
    return found


def _add(named: dict[str, Any], more: Iterator[tuple[str, Any]]) -> None:
    """Add parts, each with a name from its path that no other has."""
    for path, part in more:
        name = re.sub(r"\W", "_", path)
        while name in named:
            name += "_"
        named[name] = part


def check_parts(named: Mapping[str, Any]) -> None:
    """Check parts as a user has named them.

    Raises:
        UsageError: one cannot be carried from step to step, or two have the same names.
    """
    faults = []
    if not named:
        faults.append(Fault("parts", "pass at least the model: everystep.record(model=model)"))
    for name, part in named.items():
        if not name.isidentifier():
            faults.append(Fault(name, "the name of a part must be a Python identifier"))
        if isinstance(part, nn.Module) and (fault := module_fault(name, part)):
            faults.append(fault)
        known = nn.Module, torch.optim.Optimizer, Tensor, dict, list, tuple, deque, *GENERATORS
        holds = isinstance(part, known)
        if isinstance(part, type) or part is None or not (holds or hasattr(part, "__dict__")):
            kind = part.__name__ if isinstance(part, type) else type(part).__name__
            faults.append(
                Fault(
                    name,
                    f"is not a part of a training: {kind}; parts are modules, optimizers, tensors, "
                    "random generators, and dicts, lists, deques or objects that hold values",
                )
            )
    main = named.get("model")
    if isinstance(main, nn.Module):
        faults += [
            Fault(name, f"model has a module of that name; rename the part: {name}_part=...")
            for name in named
            if name != "model" and name in main._modules
        ]
    if faults:
        raise UsageError(faults, "the parts of the training")


def _tensors_in(
    value: Any, path: str, known: set[int], ids: Mapping[Any, str] = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors within a part that have no name yet, each with its path."""
    if not isinstance(value, _WHOLE):
        yield from _within(value, path, known, (Tensor,), ids=ids)


def _within(
    value: Any,
    path: str,
    known: set[int],
    wanted: tuple[type, ...],
    depth: int = _DEPTH,
    ids: Mapping[Any, str] = MappingProxyType({}),
) -> Iterator[tuple[str, Any]]:
    """Yield the objects of some kinds within a part that are not known, each with its path.

    ids: names of parameters by their ids.
    """
    is_wanted = isinstance(value, wanted)
    value = _unwrapped(value) if is_wanted else value
    if id(value) in known or isinstance(value, type):
        return
    if is_wanted:
        known |= {id(each) for each in (value.modules() if isinstance(value, nn.Module) else [value])}
        yield path, value
        return
    # A data set within a part may have many rows, and would be looked through at every step.
    is_data = isinstance(value, Dataset) and depth < _DEPTH
    if depth == 0 or is_data or isinstance(value, (Tensor, *_WHOLE)) or is_aside(value):
        return
    inner: Iterator[tuple[Any, Any]]
    if isinstance(value, dict):
        inner = iter(value.items())
    elif isinstance(value, list | tuple):
        kind: Any = list if isinstance(value, list) else tuple
        inner = iter(enumerate(kind.__iter__(value)))  # whatever a derived class does
    elif hasattr(value, "__dict__") and not is_code(value):
        inner = iter(vars(value).items())
    else:
        return
    # Before its items, which may lead back to it.
    known.add(id(value))
    for key, item in list(inner):
        if isinstance(item, Tensor | dict | list | tuple) or hasattr(item, "__dict__"):
            # A key may be a parameter, or its id, which differs in each process: its name stands for it.
            is_plain = isinstance(key, str | int)
            name = ids.get(key if is_plain else id(key), key if is_plain else type(key).__name__)
            yield from _within(item, f"{path}.{name}".lstrip("."), known, wanted, depth - 1, ids)
