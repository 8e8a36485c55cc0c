"""Examine: who takes the steps of a training, programs or Python, and until when a program may."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from everystep.step.capture import Capture, begin_watching
from everystep.step.eager import Training
from everystep.step.hooks import has_hooks_on_node
from everystep.step.purity.effects import ReadingRecorder
from everystep.step.purity.guards import ABSENT, Guards, held, is_a
from everystep.step.purity.process import (
    functions_of_torch,
    process_settings,
    reason_against_process,
)
from everystep.step.purity.reader import Reader
from everystep.step.purity.torchs_own import (
    HOOKS,
    guard_module,
    hook_on,
    is_torchs_optimizer,
    is_torchs_schedule,
    own_modules,
    reason_against_loss,
    reason_against_module,
)
from everystep.step.recorder import CapturedOperation, CapturedTensor

__all__ = ["Purity", "Shown", "forward_of"]


class Purity:
    """Whether programs may take the steps of a training, and what must hold for that.

    Args:
        training: what is trained.
        is_vouched: whether the user answers for code that is neither torch's nor read.

    reason: why Python runs at every step, or None; has_known_optimizer: whether the update is torch's
    own, and so may be in a program (any other optimizer is run at every step); has_foreign_code: whether
    code that is neither torch's nor everystep's runs between two steps; stands_behind: `proven` or
    `vouched`.
    """

    def __init__(self, training: Training, is_vouched: bool = False) -> None:
        self._training = training
        against = reason_against_module(training.model) or reason_against_loss(training.loss)
        self.is_read = against is not None and not is_vouched
        self.stands_behind: Literal["proven", "vouched"] = (
            "vouched" if is_vouched and against is not None else "proven"
        )
        self.has_known_optimizer = is_torchs_optimizer(training.optimizer)
        self.has_foreign_code = (
            not self.has_known_optimizer
            or not is_torchs_schedule(training.schedule)
            or training.batch.runs_python
        )
        self.reason = next(self._reasons(), None)
        self._guards = Guards()
        self._settings: dict[str, Any] = {}
        self._functions: list[Any] = []
        self._state: Mapping[str, Tensor] | None = None

    def begin(self) -> None:
        """Note all settings again: a program is about to be captured that holds for these."""
        training = self._training
        guards = self._guards = Guards()
        for part in (training.model, training.loss):
            for _, module in own_modules(part) if isinstance(part, nn.Module) else ():
                _guard_registered(module, guards)
            if isinstance(part, nn.Module) and not self.is_read and self.stands_behind == "proven":
                guard_module(part, guards)
        for name, tensor in training.named_state().items():
            if not name.startswith("optimizer/"):
                guards.tensor(tensor, name.partition("/")[2], is_state=True)
        guards.read("storages", "which tensors share their memory", self._shared)
        self._settings = process_settings(training.device)
        self._functions = functions_of_torch()
        self._guard_optimizer()
        self._guard_loss()

    def read(self, x: Tensor, y: Tensor) -> list[Shown]:
        """Read the forward pass and the loss on a batch; return their operations.

        The state changes as in a step; the batch, and all other tensors, do not.

        Raises:
            NotProvenError: a program may not stand in for them; says why.
        """
        training, recorder = self._training, ReadingRecorder(self._training.device)
        x, y = _copies(x, y)
        state = {t.untyped_storage()._cdata for t in (*training.named_state().values(), x, y)}
        reader = Reader(self._guards, lambda tensor: tensor.untyped_storage()._cdata in state)
        begin_watching(training, x, y, recorder)
        with recorder:
            prediction = reader.call(training.model, x)
            recorder.enter("loss")
            reader.call(training.loss, prediction, y)
        # A tensor from outside that lies on the memory of the state must go on to do so.
        found = tuple(self._guards.state_tensors)
        self._guards.read(("shared", len(found)), "which tensors share memory", self._shared, found)
        return _shown(recorder.tensors, recorder.operations)

    def difference(self, state: Mapping[str, Tensor] | None = None) -> str | None:
        """Return in words what is not as it was when programs were captured, or None.

        state: of the training as it is now, if it is at hand.
        """
        self._state = state
        try:
            return self._difference()
        finally:
            self._state = None

    def _difference(self) -> str | None:
        now = process_settings(self._training.device)
        if not all(map(is_, functions_of_torch(), self._functions)):
            return "a function of torch changes"
        changed = (f"{name} changes" for name, value in self._settings.items() if now[name] != value)
        return next(changed, None) or self._guards.difference() or self._hooked_node()

    def _hooked_node(self) -> str | None:
        """Return in words which parameter has a hook on its node in the graph, or None.

        Only a backward pass shows such a hook. It stays as long as other code keeps a graph.
        """
        named = (self._state or self._training.named_state()).items()
        with torch._C.DisableTorchFunctionSubclass():
            hooked = (
                name.partition("/")[2]
                for name, tensor in named
                if name.startswith("parameter/") and has_hooks_on_node(tensor)
            )
            found = next(hooked, None)
        return None if found is None else f"a hook of other code is on the graph node of {found}"

    def guard_update(self, *, but_lr: bool) -> None:
        """Note the settings of the optimizer, which are among the operations of its update.

        but_lr: except for the learning rate, which they read at every step.
        """
        optimizer = self._training.optimizer
        for index, group in enumerate(optimizer.param_groups):
            for key in group:
                if key != "params" and not (key == "lr" and but_lr):
                    where = f"{key} of param group {index}"
                    self._guards.read(("group", index, key), where, _setting, optimizer, index, key)

    def _reasons(self) -> Iterator[str]:
        training = self._training
        against = reason_against_process()
        if against is not None:
            yield against
        for name, part in (("the model", training.model), ("the loss", training.loss)):
            for path, module in own_modules(part) if isinstance(part, nn.Module) else ():
                where = f"module {path}" if path and name == "the model" else name
                kind = hook_on(module)
                if kind is not None:
                    yield f"{where} has {kind}"
                if type(module).__module__.startswith("torch._dynamo"):
                    yield f"{where} is compiled (torch.compile)"
                if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
                    yield f"{where} is a {type(module).__name__}"
        for name, tensor in training.named_state().items():
            path = name.partition("/")[2]
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                yield f"{path} has no shape before the first step (a lazy module)"
            elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
                yield f"{path} has a hook on its gradient"
        if any(getattr(training.optimizer, name, None) for name in _OPTIMIZER_HOOKS):
            yield "the optimizer has a hook on its step"

    def _guard_optimizer(self) -> None:
        """Note what makes the optimizer torch's own, and which parameters it has."""
        optimizer, guards = self._training.optimizer, self._guards
        if not self.has_known_optimizer:
            return
        guards.read("optimizer", "the class of the optimizer", type, optimizer)
        guards.read("groups", "the parameters of the optimizer", _parameters_of, optimizer)
        for name in _OPTIMIZER_HOOKS:
            guards.contents(getattr(optimizer, name, []), f"{name} of the optimizer")
        for name in ("step", "zero_grad"):
            where = f"{name} of the optimizer"
            guards.read(("own", name), where, held, optimizer, name)
            guards.read(("class", name), where, getattr, type(optimizer), name)

    def _guard_loss(self) -> None:
        """Note what a loss holds that is a function of torch with some of its arguments."""
        loss, guards = self._training.loss, self._guards
        if type(loss) is not functools.partial:
            return
        guards.read("loss", "the loss", getattr, loss, "func")
        guards.read("arguments", "the arguments of the loss", getattr, loss, "args")
        guards.contents(loss.keywords, "the loss")
        for value in (*loss.args, *loss.keywords.values()):
            if is_a(value, Tensor):
                guards.tensor(value, "a tensor of the loss", is_state=False)

    def _shared(self, others: tuple[Tensor, ...] = ()) -> str:
        """Return, of each tensor of the state and of others, the first that lies on the same memory."""
        first: dict[int, int] = {}
        state = (self._state or self._training.named_state()).items()
        tensors = (*(t for n, t in state if not n.startswith("optimizer/")), *others)
        places = (tensor.untyped_storage()._cdata for tensor in tensors)
        return str([first.setdefault(place, index) for index, place in enumerate(places)])


def _parameters_of(optimizer: torch.optim.Optimizer) -> str:
    """Return which parameters are in which group."""
    return str([list(map(id, group["params"])) for group in optimizer.param_groups])


def _setting(optimizer: torch.optim.Optimizer, index: int, key: str) -> Any:
    """Return a setting of a param group as it is now."""
    groups = optimizer.param_groups
    found = groups[index].get(key, ABSENT) if index < len(groups) else ABSENT
    return tuple(found) if type(found) is list else found


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copy: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call]
    return copy


def _copies(x: Tensor, y: Tensor) -> list[Tensor]:
    """Return copies of a batch that lie as it does: two that share memory still do."""
    memory: dict[int, torch.UntypedStorage] = {}
    found = []
    for tensor in (x, y):
        storage = tensor.untyped_storage()
        copy = memory.setdefault(storage._cdata, _clone(storage))
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        found.append(empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride()))
    return found


_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def _guard_registered(module: nn.Module, guards: Guards) -> None:
    own = vars(module)
    where = f"a {type(module).__name__}"
    for name in ("_parameters", "_buffers", "_modules", *HOOKS):
        if name in own:
            guards.contents(own[name], f"{name} of {where}")


class Shown(NamedTuple):
    """An operation in a form that can be compared: tensors by the order in which memory appears."""

    operator: str
    arguments: str


def forward_of(captured: Capture) -> list[Shown]:
    """Return the operations of the forward pass and the loss."""
    operations = [each for each in captured.operations if each.phase in ("forward", "loss")]
    return _shown(captured.tensors, operations)


def _shown(tensors: Sequence[CapturedTensor], operations: Sequence[CapturedOperation]) -> list[Shown]:
    places: dict[int, int] = {}

    def name(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("%"):
            tensor = tensors[int(value[1:])]
            return tensor._replace(storage=places.setdefault(tensor.storage, len(places)))
        if isinstance(value, list | tuple):
            return [name(item) for item in value]
        return value

    return [
        Shown(str(o.operator), repr([name(o.arguments), name([*o.keywords.items()]), name(o.results)]))
        for o in operations
    ]
