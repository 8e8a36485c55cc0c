"""Capture: runs one eager step, and records its operations."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from everystep.step.eager import EagerStep, Training, check_loss_value
from everystep.step.graph import OTHER_WHEN_WATCHED, leaves_if_other
from everystep.step.recorder import (
    CapturedOperation,
    CapturedStorage,
    CapturedTensor,
    Refusal,
    StepRecorder,
)

__all__ = ["Capture", "begin_watching", "take_watched"]


@dataclass
class Capture:
    """The observations of one eager step.

    loss: its value; refusals: what cannot be in a program; update_from: the number of operations before
    the optimizer's; named: the tensors with a name (state, inputs) before the step; appeared: state that
    it created; replaced: state with a tensor that it replaced by another.
    """

    loss: Tensor
    tensors: list[CapturedTensor]
    storages: list[CapturedStorage]
    operations: list[CapturedOperation]
    refusals: list[Refusal]
    update_from: int
    named: dict[str, int] = field(default_factory=dict)
    appeared: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    loss_tensor: int | None = None
    gradients: dict[str, int] = field(default_factory=dict)
    activations: dict[str, tuple[int, ...]] = field(default_factory=dict)


def begin_watching(training: Training, x: Tensor, y: Tensor, recorder: StepRecorder) -> dict[str, int]:
    """Pass the named tensors before a step to a recorder; return their numbers by name."""
    named = {name: recorder.know(tensor, "state") for name, tensor in training.named_state().items()}
    return named | {name: recorder.know(t, "input") for name, t in (("x", x), ("y", y))}


def take_watched(step: EagerStep, number: int, recorder: StepRecorder) -> Capture:
    """Run step `number` eagerly, observed by a recorder, and return the observations.

    Raises:
        whatever the step raises.
    """
    training = step.training
    x, y = training.batch(number)
    before = training.named_state()
    named = begin_watching(training, x, y, recorder)
    with recorder.numbers_seen(), recorder, recorder.modules(training.model):
        prediction = training.model(x)
        recorder.enter("loss")
        loss = training.loss(prediction, y)
        check_loss_value(loss)
        with recorder.paused():
            value = loss.detach().clone()
        recorder.enter("zero_grad")
        step.zero_grad()
        recorder.enter("backward")
        with recorder.hooks_seen():
            if leaves_if_other([loss]) is not None:
                recorder.refusals.append(Refusal("backward", OTHER_WHEN_WATCHED))
                with recorder.left():
                    loss.backward()  # type: ignore[no-untyped-call]
            else:
                loss.backward()  # type: ignore[no-untyped-call]
            with recorder.paused():
                gradients = recorder.gradients(training.gradients())
        recorder.enter("update")
        step.clip()
        update_from = len(recorder.operations)
        recorder.in_optimizer = True
        step.update()
    found = Capture(
        loss=value,
        tensors=recorder.tensors,
        storages=recorder.storages,
        operations=recorder.operations,
        refusals=recorder.refusals,
        update_from=update_from,
        named=named,
        loss_tensor=recorder.number(loss),
        gradients=gradients,
        activations=recorder.activations,
    )
    _compare_state(found, recorder, before, training.named_state())
    _note_changed_constants(found)
    _note_changed_inputs(found, training.batch.is_fixed)
    return found


def _compare_state(
    found: Capture, recorder: StepRecorder, before: dict[str, Tensor], after: dict[str, Tensor]
) -> None:
    """Note the state that the step created, and the state tensors that it replaced."""
    for name, tensor in after.items():
        number = recorder.number(tensor)
        if name not in before:
            found.appeared[name] = number
        elif found.tensors[number].storage != found.tensors[found.named[name]].storage:
            found.replaced[name] = number


def _note_changed_constants(found: Capture) -> None:
    """Refuse a step that changes a tensor from elsewhere: it has unknown state."""
    appeared = {found.tensors[number].storage for number in found.appeared.values()}
    written = {storage for operation in found.operations for storage in operation.writes}
    for storage in written - appeared:
        if found.storages[storage].kind == "constant":
            problem = "the step changes a tensor that does not belong to model, loss or optimizer"
            found.refusals.append(Refusal("forward", problem))
            return


def _note_changed_inputs(found: Capture, is_fixed: bool) -> None:
    """Refuse a step that changes its batch in place, or with a loss that is a view of another tensor."""
    for operation in found.operations:
        if is_fixed and any(found.storages[s].kind == "input" for s in operation.writes):
            found.refusals.append(Refusal(operation.phase, "the step changes its batch in place"))
            return
    assert found.loss_tensor is not None
    kind = found.storages[found.tensors[found.loss_tensor].storage].kind
    if kind != "temporary":
        found.refusals.append(Refusal("loss", f"the loss is a view of the step's {kind}"))
