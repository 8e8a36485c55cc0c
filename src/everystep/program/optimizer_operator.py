"""Optimizers: the step of one of torch's own optimizers, as one operation of a program.

Its operations depend on the class, on the settings, and on the number of steps taken; torch's own code
computes them. An `OptimizerOperator` has as much of the form of an operator of `torch.ops` as programs
need.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from everystep.gradient_descent import GradientDescent

__all__ = ["ARGUMENTS", "OPTIMIZERS", "BoundOptimizer", "OptimizerOperator"]

#: The positional arguments: lists by param group of tensors. `kept`: for each parameter, the optimizer's
#: state, as alternating keys and tensors; `made`: the group, the parameter and the key of what the step
#: creates, which are its results.
ARGUMENTS = ("parameters", "gradients", "kept", "made")
#: Classes with a `step` that runs only torch's code, unless it gets a closure.
_KINDS = (
    *(GradientDescent, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam),
    *(torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adagrad, torch.optim.Adadelta),
    *(torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adafactor, torch.optim.Muon),
)


class OptimizerOperator:
    """The step of an optimizer of one class.

    settings: the keys of its param groups that a step depends on.
    """

    tags: tuple[torch.Tag, ...] = ()

    def __init__(self, kind: type[torch.optim.Optimizer]) -> None:
        self.kind = kind
        bases = kind.__mro__[: kind.__mro__.index(torch.optim.Optimizer)]
        # Of the base classes, too: AdamW sets `decoupled_weight_decay` of Adam.
        known = dict.fromkeys(n for base in bases for n in inspect.signature(base).parameters)
        self.settings = tuple(name for name in known if name not in ("self", "params"))
        self.overloadpacket = SimpleNamespace(__name__=kind.__name__)
        # Each setting is a list of numbers of the step, flags among them.
        settings = ", ".join(f"float[] {name}" for name in self.settings)
        self._schema = torch._C.parse_schema(
            f"optim::{kind.__name__}(Tensor(a!)[][] parameters, Tensor[][] gradients, "
            f"Tensor(b!)[][][] kept, int[][] made, *, {settings}) -> Tensor[]"
        )

    def __repr__(self) -> str:
        return f"optim.{self.kind.__name__}.step"

    def _op(
        self,
        parameters: Sequence[Sequence[Tensor]],
        gradients: Sequence[Sequence[Tensor]],
        kept: Sequence[Sequence[Sequence[Any]]],
        made: Sequence[Sequence[Any]],
        **settings: Sequence[Any],
    ) -> list[Tensor]:
        return BoundOptimizer(self, parameters, gradients, kept, made).step(settings)

    def check(
        self, given: Mapping[str, Any], results: Sequence[Any], tensors: Mapping[str, Any]
    ) -> None:
        """Check the arguments of such an operation, by name, as a program holds them.

        results: names; tensors: the specs of the tensors of the program, by name.

        Raises:
            ValueError: they are invalid.
        """
        names = *ARGUMENTS, *self.settings
        if set(given) != {*names}:
            raise ValueError(f"{self} takes {', '.join(names)}")
        lists = [given[name] for name in names]
        if not all(isinstance(each, list | tuple) for each in lists):
            raise ValueError(f"{self} takes lists")
        parameters, gradients, kept, made, *settings = lists
        if not all(len(each) == len(parameters) for each in (gradients, kept, *settings)):
            raise ValueError(f"{self} takes as many items in each list as there are param groups")
        for group in zip(parameters, gradients, kept, strict=True):
            if not all(isinstance(each, list | tuple) and len(each) == len(group[0]) for each in group):
                raise ValueError(f"{self} takes a gradient for each parameter, and its state")
            for parameter, gradient, own in zip(*group, strict=True):
                self._check_one(parameter, gradient, own, tensors)
                if any(given.get("fused", ())):
                    self._check_fused(parameter, gradient, own, tensors)
        if len(results) != len(made) or None in results:
            raise ValueError(f"{self} returns {len(made)} results, not {len(results)}")
        places = {(n, k) for n, group in enumerate(parameters) for k in range(len(group))}
        for each in made:
            match each:
                case [int(n), int(k), key] if (n, k) in places:
                    if _key(key) is None:
                        raise ValueError(f"{self} returns something without a key")
                case _:
                    raise ValueError(f"{self} returns something of no parameter")

    def _check_one(self, parameter: Any, gradient: Any, kept: Any, tensors: Mapping[str, Any]) -> None:
        is_list = isinstance(kept, list | tuple) and len(kept) % 2 == 0
        names = (parameter, gradient, *(kept[1::2] if is_list else (None,)))
        if not all(isinstance(name, str) for name in names) or None in map(_key, kept[::2]):
            raise ValueError(f"{self} takes tensors, and state by key")
        own = tensors[parameter]
        if (tensors[gradient].shape, tensors[gradient].dtype) != (own.shape, own.dtype):
            raise ValueError(f"{self}: {gradient} does not have the shape and dtype of {parameter}")

    def _check_fused(
        self, parameter: str, gradient: str, kept: Sequence[Any], tensors: Mapping[str, Any]
    ) -> None:
        """Check what a fused kernel assumes: equal shapes, and no elements that share memory."""
        own = tensors[parameter]
        for key, name in ((None, parameter), (None, gradient), *zip(kept[::2], kept[1::2], strict=True)):
            spec = tensors[name]
            is_step = _key(key) == "step" and not spec.shape and spec.dtype == "float32"
            if not is_step and (spec.shape, spec.dtype) != (own.shape, own.dtype):
                raise ValueError(f"{self}: {name} does not fit {parameter}, and the step is fused")
            if spec.end < (spec.offset + math.prod(spec.shape)) * spec.torch_dtype.itemsize:
                raise ValueError(f"{self}: the numbers of {name} share memory, and the step is fused")


def _key(value: Any) -> str | None:
    """Return an argument of a program if it is a string, else None."""
    if isinstance(value, dict) and [*value] == ["text"] and isinstance(value["text"], str):
        return value["text"]
    return None


class BoundOptimizer:
    """A torch optimizer on given tensors, which are as in `ARGUMENTS`; strings are passed unchanged."""

    def __init__(
        self,
        operator: OptimizerOperator,
        parameters: Sequence[Sequence[Tensor]],
        gradients: Sequence[Sequence[Tensor]],
        kept: Sequence[Sequence[Sequence[Any]]],
        made: Sequence[Sequence[Any]],
    ) -> None:
        # Its constructor would import torch's compiler, which takes a second.
        self._optimizer = object.__new__(operator.kind)
        self._optimizer.defaults = {}
        self._optimizer.state = defaultdict(dict)
        self._optimizer.param_groups = [{"params": [*group]} for group in parameters]
        # So that torch does not warn again, at a replay, of `capturable` without a CUDA graph.
        self._optimizer._warned_capturable_if_run_uncaptured = True
        flat = [*chain.from_iterable(parameters)]
        self._given = [*zip(flat, chain.from_iterable(gradients), strict=True)]
        for parameter, items in zip(flat, chain.from_iterable(kept), strict=True):
            if items:
                pairs = zip(items[::2], items[1::2], strict=True)
                self._optimizer.state[parameter] = dict(pairs)
        self._made = [(parameters[group][place], key) for group, place, key in made]
        # Without what torch wraps around it: hooks, marks for a profiler, a call of the compiler.
        self._step = inspect.unwrap(operator.kind.step)

    def given(self) -> list[Tensor]:
        """Return the parameters and the gradients."""
        return [tensor for pair in self._given for tensor in pair]

    def kept(self) -> list[Tensor]:
        """Return its state by parameter."""
        kept = (value for own in self._optimizer.state.values() for value in own.values())
        return [value for value in kept if isinstance(value, Tensor)]

    def step(self, settings: Mapping[str, Sequence[Any]]) -> list[Tensor]:
        """Take a step with settings, by key and param group; return what `made` names.

        Raises:
            ValueError, RuntimeError: they do not fit the tensors.
        """
        # Adagrad reads one of its settings there, and not in its param groups.
        self._optimizer.defaults = {key: values[0] for key, values in settings.items() if values}
        for place, group in enumerate(self._optimizer.param_groups):
            for key, values in settings.items():
                value = values[place]
                # A program is JSON, which has lists in place of tuples.
                group[key] = tuple(value) if isinstance(value, list) else value
        for parameter, gradient in self._given:
            parameter.grad = gradient
        try:
            with torch.no_grad():
                self._step(self._optimizer)
            return [self._optimizer.state[parameter][key] for parameter, key in self._made]
        except KeyError as error:
            raise ValueError(f"the optimizer keeps no {error}") from None
        except AssertionError as error:  # torch's, of settings that do not fit each other
            raise ValueError(str(error)) from None
        finally:
            for parameter, _ in self._given:
                parameter.grad = None


#: The operators by their names.
OPTIMIZERS = {str(each): each for each in map(OptimizerOperator, _KINDS)}
