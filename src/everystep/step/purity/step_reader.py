"""Step reader: reads a whole user step, with its backward passes and updates.

In addition to a forward pass, a step may run backward passes, run torch's optimizers and schedules, and
set or drop the gradients of trained parameters.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everystep.step.follow import Follower
from everystep.step.purity.arithmetic import is_arithmetic
from everystep.step.purity.attributes import (
    NotProvenError,
    class_attribute,
    class_of,
    name_of,
    own_attribute,
)
from everystep.step.purity.calls import Calls
from everystep.step.purity.guards import Guards, held, is_a, is_plain, kind_of
from everystep.step.purity.reader import Reader
from everystep.step.purity.torchs_own import (
    is_torchs_function,
    is_torchs_optimizer,
    is_torchs_schedule,
    own_modules,
)
from everystep.step.purity.values import Bound, Method, Read
from everystep.step.watch import Watch

__all__ = ["Event", "StepReader", "StrictWatch"]

_CLIPPING = (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_)
_BACKWARD = (torch.autograd.backward, torch.autograd.grad)


class Event(NamedTuple):
    """Something in a step besides its operations."""

    kind: Literal["optimizer", "schedule"]
    what: Any


class StepReader(Reader):
    """Reads a step.

    Args:
        guards: collects what was read.
        is_state: tells whether a tensor uses memory of the parts.
        is_batch: tells whether it uses memory of the batch.
        parameters: of the parts.
        optimizers: among the parts, with their names in messages.
        follower: follows which module runs.
        guard_optimizer: notes what makes an optimizer torch's own, by its name in messages.

    events: what happened besides operations, in order; reads: the places of the numbers that the step
    read, among those of the step.
    """

    def __init__(
        self,
        guards: Guards,
        is_state: Callable[[Tensor], bool],
        is_batch: Callable[[Tensor], bool],
        parameters: Iterable[Tensor],
        optimizers: Mapping[str, torch.optim.Optimizer],
        follower: Follower,
        guard_optimizer: Callable[[str], None],
    ) -> None:
        super().__init__(guards, is_state)
        known = {id(parameter) for parameter in parameters}
        self.values = self._calls = _StepCalls(
            guards, is_state, self._call_function, known, optimizers, follower, guard_optimizer
        )
        self._calls.free_value = self.free_value
        self._calls.is_batch = is_batch
        self.events = self._calls.events
        self.reads = self._calls.reads

    def step(self, step: Any, numbers: list[Any], *batch: Any) -> Any:
        """Run a step from its source, on a batch or without one; return its result.

        numbers: of the step, as they appear.

        Raises:
            NotProvenError: it does something that is not known to be an operation; says where and what.
        """
        self._calls.numbers = numbers
        for given in batch:
            self._calls.given(given)
        with self._calls.flags_restored():
            return self.call(step, *batch)


class _StepCalls(Calls):
    """What a step may do with values, besides what a forward pass may."""

    contexts = (*Calls.contexts, torch.autocast, torch.amp.autocast)

    def __init__(
        self,
        guards: Guards,
        is_state: Callable[[Tensor], bool],
        interpret: Callable[..., Any],
        parameters: set[int],
        optimizers: Mapping[str, torch.optim.Optimizer],
        follower: Follower,
        guard_optimizer: Callable[[str], None],
    ) -> None:
        super().__init__(guards, is_state, interpret)
        self.events: list[Event] = []
        self.reads: set[int] = set()
        self.numbers: list[Any] = []
        self.is_batch: Callable[[Tensor], bool] = lambda tensor: False
        self.free_value: Callable[[types.FunctionType, str], Any]
        self._new: dict[int, Tensor] = {}
        self._flags: dict[int, tuple[Tensor, bool]] = {}
        self._parameters = parameters
        self._names = {id(optimizer): name for name, optimizer in optimizers.items()}
        self._follower = follower
        self._guard_optimizer = guard_optimizer

    def given(self, batch: Any) -> None:
        """Note the batch: the next one is of the same kind, so its containers are not guards.

        Raises:
            NotProvenError: it holds more than tensors and plain values in dicts, lists and tuples.
        """
        if kind_of(batch) in (list, tuple, dict):
            self._of_batch[id(batch)] = batch
            for item in batch.values() if type(batch) is dict else batch:
                self.given(item)
        elif is_a(batch, Tensor):
            if batch.requires_grad:
                raise NotProvenError("gets a batch that requires gradients")
        elif not is_plain(batch):
            raise NotProvenError(f"gets {name_of(batch)} as a batch, or as a part of one")

    def outside(self, value: Any) -> Any:
        """Note a value that was there before the step."""
        if is_a(value, Tensor) and value.requires_grad and id(value) not in self._parameters:
            raise NotProvenError(
                "uses gradients of a tensor that is not a parameter of a model or optimizer"
            )
        if is_a(value, Tensor) and self.is_batch(value):
            raise NotProvenError("reads an outside tensor that shares memory with the batch")
        return super().outside(value)

    def call(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        """Call something."""
        if any(function is each for each in _CLIPPING):
            return self._clip(function, args, keywords)
        if any(function is each for each in _BACKWARD):
            return self._run(function, args, keywords)
        if function is float and len(args) == 1 and is_a(args[0], Tensor):
            return self._read(float(args[0]))
        return super().call(function, args, keywords)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set the gradient of a parameter, or a tensor's data to its own memory."""
        if kind_of(owner) not in (Tensor, nn.Parameter) or name not in ("grad", "data"):
            super().set_attribute(owner, name, value)
        elif name == "grad" and id(owner) in self._parameters and (value is None or is_a(value, Tensor)):
            owner.grad = value
        elif name == "data" and is_a(value, Tensor) and _lies_as(value, owner):
            owner.data = value
        else:
            super().set_attribute(owner, name, value)

    def truth(self, value: Any) -> bool:
        """Tell whether a value is true."""
        if is_a(value, Read):
            raise NotProvenError("branches on a number in a tensor")
        return super().truth(value)

    def _call_method(self, method: Method, args: list[Any], keywords: dict[str, Any]) -> Any:
        if method.name == "item" and is_a(method.owner, Tensor) and not args and not keywords:
            return self._read(method.owner.item())
        return super()._call_method(method, args, keywords)

    def _read(self, value: Any) -> Read:
        place = len(self.numbers) - 1
        self.reads.add(place)
        return Read(value, place)

    def _attribute(self, value: Any, name: str) -> Any:
        if is_a(value, torch.optim.Optimizer) and name in ("step", "zero_grad"):
            return Bound(getattr(type(value), name), value)  # a schedule wraps the step
        return super()._attribute(value, name)

    def _of_tensor(self, tensor: Tensor, name: str) -> Any:
        is_own = id(tensor) in self._parameters or id(tensor) in self._new
        if name == "grad" and (is_own or not tensor.is_leaf):
            return tensor.grad
        if name == "data":
            return tensor.data
        if name == "requires_grad_" and id(tensor) not in self._new:
            if id(tensor) not in self._parameters:
                raise NotProvenError(
                    "calls requires_grad_ of a tensor that is not a parameter of a model or optimizer"
                )
            self._flags.setdefault(id(tensor), (tensor, tensor.requires_grad))
        if name in ("backward", "item", "requires_grad_"):
            owner = Tensor if name == "backward" else torch._C.TensorBase
            found = self.guards.read((id(owner), name), f"Tensor.{name}", held, owner, name)
            if is_torchs_function(found) or is_a(found, types.MethodDescriptorType):
                return Method(name, tensor)
        return super()._of_tensor(tensor, name)

    def _given(self, value: Any, passed: set[int]) -> Any:
        if kind_of(value) is Tensor and id(value) not in passed:
            self._new[id(value)] = value
        return super()._given(value, passed)

    @contextmanager
    def flags_restored(self) -> Iterator[None]:
        """Let a step freeze parameters while it runs: they must be as before when it ends.

        Raises:
            NotProvenError: they are not.
        """
        try:
            yield
            if any(tensor.requires_grad is not before for tensor, before in self._flags.values()):
                raise NotProvenError("the step changes requires_grad of a parameter")
        finally:
            for tensor, before in self._flags.values():
                tensor.requires_grad_(before)

    def _call_bound(self, bound: Bound, args: list[Any], keywords: dict[str, Any]) -> Any:
        owner, name = bound.owner, bound.function.__name__
        if is_a(owner, torch.optim.Optimizer):
            return self._call_optimizer(owner, name, args, keywords)
        if is_a(owner, LRScheduler) and name == "step":
            return self._step_schedule(owner, args, keywords)
        if is_a(owner, nn.Module) and name in ("train", "eval"):
            return self._set_mode(bound, args, keywords)
        if is_a(owner, nn.Module) and name == "zero_grad":
            cls = class_of(owner, self.guards)
            if class_attribute(cls, name, self.guards) is nn.Module.zero_grad:
                return self._zero_grad(owner, args, keywords)
        return super()._call_bound(bound, args, keywords)

    def _call_optimizer(
        self, optimizer: torch.optim.Optimizer, name: str, args: list[Any], keywords: dict[str, Any]
    ) -> Any:
        place = self._names.get(id(optimizer))
        if place is None:
            raise NotProvenError(f"uses {name_of(optimizer)} that is not in any part")
        if not is_torchs_optimizer(optimizer):
            raise NotProvenError(f"uses {place}, which is not a torch optimizer")
        self._guard_optimizer(place)
        if name == "zero_grad" and all(map(is_plain, (*args, *keywords.values()))):
            return optimizer.zero_grad(*args, **keywords)
        if name != "step" or args or keywords:
            raise NotProvenError(f"calls {name} of {place} with unsupported arguments")
        if any(event.what is optimizer for event in self.events):
            raise NotProvenError(f"steps {place} twice")
        self.events.append(Event("optimizer", optimizer))
        return optimizer.step()

    def _step_schedule(self, schedule: LRScheduler, args: list[Any], keywords: dict[str, Any]) -> None:
        if args or keywords or is_a(schedule, ReduceLROnPlateau):
            raise NotProvenError(f"calls the step of {name_of(schedule)} with arguments")
        if not is_torchs_schedule(schedule, lambda each: is_arithmetic(each, self.free_value)):
            raise NotProvenError(
                f"uses {name_of(schedule)}, which is not a torch schedule, or calls a function that "
                "does more than arithmetic"
            )
        groups = schedule.optimizer.param_groups
        if id(schedule.optimizer) not in self._names:
            raise NotProvenError(f"uses {name_of(schedule)} of an optimizer that is not in any part")
        if any(is_a(value, Tensor) for group in groups for value in group.values()):
            raise NotProvenError(f"uses {name_of(schedule)} with a learning rate that is a tensor")
        for each in (schedule, *getattr(schedule, "_schedulers", ())):
            if kind_of(functions := getattr(each, "lr_lambdas", None)) is list:
                self.guards.contents(functions, f"the functions of {name_of(each)}")
        self.events.append(Event("schedule", schedule))
        schedule.step()

    def _set_mode(self, bound: Bound, args: list[Any], keywords: dict[str, Any]) -> Any:
        """Set the mode of a module, which all within it are in already."""
        module, name = bound.owner, bound.function.__name__
        given = [*args, *keywords.values()]
        mode = name == "train" and (given[0] if given else True)
        for _, each in own_modules(module):
            cls = class_of(each, self.guards)
            for method in ("train", "eval", "__setattr__"):
                if class_attribute(cls, method, self.guards) is not vars(nn.Module)[method]:
                    raise NotProvenError(
                        f"sets the mode of {name_of(each)}, which has a custom {method}"
                    )
            if own_attribute(each, "training", self.guards) is not mode:
                raise NotProvenError(f"changes the mode of {name_of(each)}")
            for kind in ("_modules",):
                self._look_into(own_attribute(each, kind, self.guards))
        return module

    def _zero_grad(self, module: nn.Module, args: list[Any], keywords: dict[str, Any]) -> None:
        parameters = [*self.iterate(self._call_bound(Bound(nn.Module.parameters, module), [], {}))]  # type: ignore[arg-type]
        self._check_trained(parameters)
        module.zero_grad(*args, **keywords)

    def _clip(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        if not args or not all(map(is_plain, (*args[1:], *keywords.values()))):
            raise NotProvenError("clips gradients with unsupported arguments")
        first = args[0]
        parameters = [first] if is_a(first, Tensor) else [*self.iterate(first)]
        self._check_trained(parameters)
        return function(parameters, *args[1:], **keywords)

    def _check_trained(self, parameters: list[Any]) -> None:
        for parameter in parameters:
            if id(parameter) not in self._parameters:
                raise NotProvenError(
                    "changes the gradient of a tensor that is not a parameter of a model or optimizer"
                )

    def _forward(self, module: nn.Module, args: list[Any], keywords: dict[str, Any]) -> Any:
        self._follower.opened(module, args)
        result = super()._forward(module, args, keywords)
        self._follower.closed(module, args, result)
        return result


class StrictWatch(Watch):  # type: ignore[no-untyped-call]
    """Watches a step that is read: it may change only state and batch.

    Raises (where operations run):
        NotProvenError: an operation changes something else, or a program cannot hold it.
    """

    changed_unseen: tuple[str, ...] = ()

    def optimizer_begins(
        self,
        optimizer: torch.optim.Optimizer,
        name: str | None,
        has_arguments: bool,
        gradients: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """An optimizer starts a step."""
        self.optimizer_uses(gradients())

    def optimizer_ends(self, name: str | None, gradients: Callable[[], Mapping[str, Tensor]]) -> None:
        """An optimizer ended a step."""
        self.optimizer_uses(gradients())

    def _written(self, known: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[int, ...]:
        found = super()._written(known, args, keywords)
        if self._written_elsewhere:
            what = next(iter(self._written_elsewhere.values()))
            raise NotProvenError(f"changes {what} that is not in any part")
        return found

    def _run_unseen(
        self, func: Any, known: Any, args: tuple[Any, ...], keywords: dict[str, Any], reason: str
    ) -> Any:
        raise NotProvenError(f"runs {func}, which {reason}")


def _lies_as(one: Tensor, two: Tensor) -> bool:
    """Tell whether two tensors are the same elements of the same memory."""
    return (
        one.untyped_storage()._cdata == two.untyped_storage()._cdata
        and one.shape == two.shape
        and one.stride() == two.stride()
        and one.storage_offset() == two.storage_offset()
        and one.dtype == two.dtype
    )
