"""Capture: watch one eager step, and write down its operations."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from everystep.step.eager import EagerStep, check_loss_value
from everystep.step.recorder import CapturedStorage, CapturedTensor, Recorded, Refusal, StepRecorder

__all__ = ["Capture", "capture", "take_watched"]


@dataclass
class Capture:
    """What was seen of one eager step.

    loss: its value; refusals: what cannot be in a program; update_from: how many operations come
    before the optimizer's; named: the tensors that have a name (state, inputs) before the step;
    appeared: state that it made; replaced: state whose tensor it exchanged for another.
    """

    loss: Tensor
    tensors: list[CapturedTensor]
    storages: list[CapturedStorage]
    operations: list[Recorded]
    refusals: list[Refusal]
    update_from: int
    named: dict[str, int] = field(default_factory=dict)
    appeared: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    loss_tensor: int = 0
    gradients: dict[str, int] = field(default_factory=dict)
    activations: dict[str, tuple[int, ...]] = field(default_factory=dict)


def capture(step: EagerStep, number: int) -> Capture:
    """Take step `number` eagerly, and return what was seen of it.

    Raises:
        whatever the step raises.
    """
    return take_watched(step, number, StepRecorder(step.trainee.device))


def take_watched(step: EagerStep, number: int, recorder: StepRecorder) -> Capture:
    """Take step `number` eagerly while a recorder looks on, and return what it has seen.

    Raises:
        whatever the step raises.
    """
    trainee = step.trainee
    x, y = trainee.batch(number)
    before = trainee.named_state()
    named = {name: recorder.know(tensor, "state") for name, tensor in before.items()}
    named |= {name: recorder.know(t, "input") for name, t in (("x", x), ("y", y))}
    with recorder.numbers_seen(), recorder, recorder.modules(trainee.model):
        prediction = trainee.model(x)
        recorder.enter("loss")
        loss = trainee.loss(prediction, y)
        check_loss_value(loss)
        with recorder.paused():
            value = loss.detach().clone()
        recorder.enter("zero_grad")
        step.zero_grad()
        recorder.enter("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        with recorder.paused():
            gradients = recorder.gradients(trainee.gradients())
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
    _compare_state(found, recorder, before, trainee.named_state())
    _note_changed_constants(found)
    _note_changed_inputs(found, trainee.batch.is_fixed)
    return found


def _compare_state(
    found: Capture, recorder: StepRecorder, before: dict[str, Tensor], after: dict[str, Tensor]
) -> None:
    """Note which state the step made, and which it put another tensor in the place of."""
    for name, tensor in after.items():
        number = recorder.number(tensor)
        if name not in before:
            found.appeared[name] = number
        elif found.tensors[number].storage != found.tensors[found.named[name]].storage:
            found.replaced[name] = number


def _note_changed_constants(found: Capture) -> None:
    """A step that changes a tensor from elsewhere has a state that nobody knows of."""
    appeared = {found.tensors[number].storage for number in found.appeared.values()}
    written = {storage for operation in found.operations for storage in operation.writes}
    for storage in written - appeared:
        if found.storages[storage].kind == "constant":
            problem = "the step changes a tensor that belongs to neither model, loss nor optimizer"
            found.refusals.append(Refusal("forward", problem))
            return


def _note_changed_inputs(found: Capture, is_fixed: bool) -> None:
    """A batch that is changed in place is another one at the next step; so may be a loss within it."""
    for operation in found.operations:
        if is_fixed and any(found.storages[s].kind == "input" for s in operation.writes):
            found.refusals.append(Refusal(operation.phase, "the step changes its batch in place"))
            return
    kind = found.storages[found.tensors[found.loss_tensor].storage].kind
    if kind != "temporary":
        found.refusals.append(Refusal("loss", f"the loss is a view of the step's {kind}"))
