"""The number that a question is about: `gradients['0.weight'][3, 5]`, `loss`, `#7[17, 3]`.

`#7` is the result of operation 7, `#7.2` its second result; `tensors['optimizer/0.weight/exp_avg']` is
any tensor before the step, by its name in the program.
"""

from __future__ import annotations

import ast
import re

import numpy as np
import torch

from everystep.answers.trace import Spot, Trace
from everystep.answers.why.answer import Number, Session
from everystep.errors import ExpressionError, did_you_mean
from everystep.expression import Expression, Reference, parse
from everystep.expression.question import error_at
from everystep.replay.opened_step import Step

__all__ = ["numbers_named"]

#: Names of tensors that are not in the language of expressions.
_HEAD = re.compile(
    r"#(?P<number>\d{1,9})(\.(?P<place>\d{1,9}))?|tensors\[(?P<quote>['\"])(?P<name>.+?)(?P=quote)\]"
)
_STAND_IN = "loss"
#: A tensor by its name, and the number of operations before it was read.
_Reading = tuple[str, int]


def numbers_named(text: str, session: Session, step: int) -> list[Number]:
    """Return the number of a step that an expression names; for an update, the ones after and before it.

    Raises:
        ExpressionError: the expression is invalid, or does not name a single number of a tensor.
    """
    text, trace = text.strip(), session.trace(step)
    half = next((place for place, end in enumerate((".real", ".imag")) if text.endswith(end)), None)
    text = text if half is None else text[:-5]
    head = _HEAD.match(text)
    # `#7[17, 3]` is read as `loss[17, 3]`: the language has no names of operations.
    expression = parse(_STAND_IN + text[head.end() :] if head else text)
    # `loss + 1` is a number, too, but no operation of the step has made it.
    if len(expression.references) != 1 or not _is_element(expression.text):
        example = f"; for example: {_example(trace.step)}"
        raise error_at(text, f"why follows one number of a tensor, not a computation{example}")
    (reference,) = expression.references
    if reference.kind == "rows":
        raise error_at(
            text, f"{reference} is not a number that the step made; everystep rows explains it"
        )
    if head:
        readings = [_headed(text, head, trace)]
    elif reference.is_previous:
        own = text.replace("previous.", "", 1) + ("", ".real", ".imag")[0 if half is None else half + 1]
        return numbers_named(own, session, step - 1)
    else:
        readings = _referred(text, reference, trace.step)
    numbers = []
    for name, after in readings:
        spec = trace.spec(name)
        index = _index(text, expression, spec.shape)
        if half is not None and not spec.torch_dtype.is_complex:
            raise error_at(text, "it is not complex: it has no real and imaginary part")
        numbers.append(session.number(step, Spot(name, index, after, half)))
    return numbers


def _example(step: Step) -> str:
    for name, tensor in step.gradients.items():
        return f"gradients[{name!r}]" + (str([0] * tensor.dim()) if tensor.dim() else "")
    return "loss"


def _is_element(text: str) -> bool:
    """Return whether an expression is a tensor with indices, or one without."""
    node = ast.parse(text, mode="eval").body
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _headed(text: str, head: re.Match[str], trace: Trace) -> _Reading:
    """Return the result of an operation, or the tensor before the step, that is named at the head."""
    step, count = trace.step, len(trace.step.operations)
    if head["number"] is None:
        known = [*step.places.tensors, *step.state]
        if head["name"] not in known:
            cure = did_you_mean(head["name"], known) or "#0 is the result of operation 0"
            raise error_at(text, f"step {step.number} has no tensor {head['name']!r}; {cure}")
        return head["name"], 0
    number, place = int(head["number"]), int(head["place"] or 1) - 1
    name, problem = None, f"step {step.number} has no operation #{number}: it has #0 to #{count - 1}"
    if number < count:
        made, operator = trace.outputs(number), step.operations[number].operation.operator
        name = made[place] if 0 <= place < len(made) else None
        known_places = " ".join(f"#{number}.{i}" for i, each in enumerate(made, start=1) if each)
        problem = f"operation #{number}, {operator}, has no such result; it has {known_places}"
        if (number, "results", name) in step.unset:
            name = None
            problem = (
                f"result {place + 1} of operation #{number} is memory of the kernel, without numbers"
            )
    if name is None:
        raise error_at(text, problem, 0, head.end())
    return name, number + 1


def _referred(text: str, reference: Reference, step: Step) -> list[_Reading]:
    kind, name, end = reference.kind, reference.name, len(step.operations)
    if kind == "loss":
        loss = step.places.loss
        # It was logged as a number, or computed while the recording was paused.
        if loss is None or not any(loss in each.made or loss in each.inputs for each in step.operations):
            cure = "log the tensor that the step computes: recording.log(loss=loss)"
            raise error_at(text, f"no operation of step {step.number} makes its loss; {cure}")
        return [(loss, end)]
    if kind in ("step", "measurements"):
        cure = (
            "gradients, activations, parameters, updates, buffers, the batch and the loss have a cause"
        )
        raise error_at(text, f"no operation of step {step.number} makes {reference}; {cure}")
    if kind == "batch":
        names = [each for each in (name, f"batch/{name}") if each in step.places.tensors]
        if not names:
            raise error_at(text, f"no operation of step {step.number} reads {reference}")
        return [(names[0], 0)]
    known = [*getattr(step, kind)]
    if kind == "gradients" and not known:
        cure = "#N is the result of operation N, of the backward pass too"
        raise error_at(text, f"step {step.number} has no gradients; {cure}")
    if name not in known:
        cure = did_you_mean(name, known) or f"this step has {len(known)} {kind}"
        raise error_at(text, f"unknown name {name!r} of {kind}; {cure}")
    if kind in ("gradients", "activations"):
        place = getattr(step.places, kind)[name]
        if len(place.names) != 1:
            cure = "#N is the result of operation N"
            raise error_at(text, f"module {name} returned {len(place.names)} tensors; {cure}")
        return [(place.names[0], place.after)]
    if kind == "updates":
        before = f"parameter/{name}"
        after = step.places.ends.get(before, before)
        both = {"after": (after, end), "before": (before, 0)}
        return [both[reference.part]] if reference.part else [*both.values()]
    return [(f"{kind.removesuffix('s')}/{name}", 0)]


def _index(text: str, expression: Expression, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of the one element that an expression picks from a tensor of a shape."""
    whole = torch.empty(shape, device="meta")  # only their geometry is known
    sizes = f"shape {tuple(shape)}" if shape else "a single number, without a shape"
    try:
        found = expression.evaluate(lambda _: whole)
    except ExpressionError as error:
        problem = str(error).partition("\n")[0]
        raise error_at(text, f"{problem}: the tensor has {sizes}") from None
    if found.numel() != 1:
        problem = (
            f"the expression is {found.numel():,} numbers (the tensor has {sizes}); name one of them"
        )
        raise error_at(text, f"{problem}: add an index such as {[0] * len(shape)}")
    # A view of a contiguous tensor: its offset is the place of the element that was picked.
    return tuple(map(int, np.unravel_index(int(found.storage_offset()), shape)))
