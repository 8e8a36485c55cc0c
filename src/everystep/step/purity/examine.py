"""Examine: whether programs or Python run the steps of a training, and until when."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from everystep.step.capture import Capture, begin_watching
from everystep.step.eager import Training
from everystep.step.purity.effects import ReadingRecorder
from everystep.step.purity.guards import is_a
from everystep.step.purity.reader import Reader
from everystep.step.purity.surroundings import Surroundings
from everystep.step.purity.torchs_own import (
    guard_module,
    is_torchs_optimizer,
    is_torchs_schedule,
    reason_against_loss,
    reason_against_module,
)
from everystep.step.recorder import CapturedOperation, CapturedTensor

__all__ = ["Purity", "Shown", "forward_of"]

_OPTIMIZER = "the optimizer"


class Purity:
    """Whether programs may run the steps of a training, and what must hold for that.

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
        parts = {"the model": training.model, "the loss": training.loss}
        self._surroundings = Surroundings(
            {name: part for name, part in parts.items() if isinstance(part, nn.Module)},
            {_OPTIMIZER: training.optimizer},
            lambda: _but_optimizer(training.named_state()),
            training.device,
        )
        self.reason = next(self._surroundings.reasons(), None) or _fast_path(training.model)
        self._readings: dict[Hashable, list[Shown]] = {}

    def begin(self) -> None:
        """Note all settings again: a program is about to be captured that holds for these."""
        training = self._training
        self._readings = {}
        self._surroundings.begin()
        for part in (training.model, training.loss):
            if isinstance(part, nn.Module) and not self.is_read and self.stands_behind == "proven":
                guard_module(part, self._surroundings.guards)
        if self.has_known_optimizer:
            self._surroundings.guard_optimizer(_OPTIMIZER)
        self._guard_loss()

    def read(self, x: Tensor, y: Tensor) -> list[Shown]:
        """Read the forward pass and the loss on a batch; return their operations.

        The state changes as in a step, or not at all: a batch of the same kind is read once, as long as
        everything that was read stays the same. The batch and all other tensors do not change.

        Raises:
            NotProvenError: a program may not stand in for them; gives the reason.
        """
        kind = _kind_of(x), _kind_of(y), x.untyped_storage()._cdata == y.untyped_storage()._cdata
        if kind not in self._readings or self.difference() is not None:
            self._readings[kind] = self._read(x, y)
        return self._readings[kind]

    def _read(self, x: Tensor, y: Tensor) -> list[Shown]:
        training, recorder = self._training, ReadingRecorder(self._training.device)
        guards = self._surroundings.guards
        x, y = _copies(x, y)
        state = {t.untyped_storage()._cdata for t in (*training.named_state().values(), x, y)}
        reader = Reader(guards, lambda tensor: tensor.untyped_storage()._cdata in state)
        begin_watching(training, x, y, recorder)
        with recorder:
            prediction = reader.call(training.model, x)
            recorder.enter("loss")
            reader.call(training.loss, prediction, y)
        # A tensor from outside that shares memory with the state must continue to do so.
        self._surroundings.guard_shared(tuple(guards.state_tensors))
        return _shown(recorder.tensors, recorder.operations)

    def difference(self, state: Mapping[str, Tensor] | None = None) -> str | None:
        """Return in words what changed since programs were captured, or None.

        state: of the training now, if already known.
        """
        return self._surroundings.difference(None if state is None else _but_optimizer(state))

    def guard_update(self, *, but_lr: bool) -> None:
        """Note the settings of the optimizer, which are among the operations of its update.

        but_lr: except for the learning rate, which they read at every step.
        """
        self._surroundings.guard_settings(_OPTIMIZER, but_lr=but_lr)

    def _guard_loss(self) -> None:
        """Note what a loss holds that is a function of torch with some of its arguments."""
        loss, guards = self._training.loss, self._surroundings.guards
        if type(loss) is not functools.partial:
            return
        guards.read("loss", "the loss", getattr, loss, "func")
        guards.read("arguments", "the arguments of the loss", getattr, loss, "args")
        guards.contents(loss.keywords, "the loss")
        for value in (*loss.args, *loss.keywords.values()):
            if is_a(value, Tensor):
                guards.tensor(value, "a tensor of the loss", is_state=False)


def _fast_path(model: Any) -> str | None:
    """Return in words which layer of a model computes in another way where it is watched, or None.

    In `eval()`, torch's attention takes a fast path, but not while a function mode is on the stack.
    """
    layers = nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, layers) and not module.training:
            return f"{path} ({type(module).__name__}) is in eval(), where torch has a fast path for it"
    return None


def _but_optimizer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a step carries, without what the optimizer creates and replaces itself."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("optimizer/")}


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copy: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call]
    return copy


def _kind_of(tensor: Tensor) -> Hashable:
    """Return all of a tensor but its numbers and its place."""
    geometry = tensor.shape, tensor.stride(), tensor.storage_offset()
    return type(tensor), tensor.dtype, tensor.device, geometry, tensor.requires_grad


def _copies(x: Tensor, y: Tensor) -> list[Tensor]:
    """Return copies of a batch with the same layout: two tensors that share memory still do."""
    memory: dict[int, torch.UntypedStorage] = {}
    found = []
    for tensor in (x, y):
        storage = tensor.untyped_storage()
        copy = memory.setdefault(storage._cdata, _clone(storage))
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        found.append(empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride()))
    return found


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
