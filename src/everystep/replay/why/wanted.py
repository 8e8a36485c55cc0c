"""The number that a question is about: `gradients['0.weight'][3, 5]`, `loss`, `#7[17, 3]`.

`#7` is the result of operation 7, `#7.2` its second result; `tensors['optimizer/0.weight/exp_avg']` is
any tensor before the step, by its name in the program.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from everystep.errors import ExpressionError, did_you_mean
from everystep.replay.expression import Expression, Reference, parse
from everystep.replay.expression.question import error_at
from everystep.replay.step import Step
from everystep.replay.why.trace import Spot, Trace

__all__ = ["Wanted", "wanted"]

#: What is not in the language of expressions, and stands for a tensor all the same.
_HEAD = re.compile(
    r"#(?P<number>\d{1,9})(\.(?P<place>\d{1,9}))?|tensors\[(?P<quote>['\"])(?P<name>.+?)(?P=quote)\]"
)
_STAND_IN = "loss"


class Wanted(NamedTuple):
    """Where the number is. spots: of it; of an update, where it is after and before."""

    is_previous: bool
    spots: tuple[Spot, ...]


def wanted(text: str, step: Step, trace: Trace) -> Wanted:
    """Return where the number is that an expression names.

    Raises:
        ExpressionError: the expression is invalid, or names something else than one number of a tensor.
    """
    text = text.strip()
    half = next((place for place, end in enumerate((".real", ".imag")) if text.endswith(end)), None)
    text = text if half is None else text[:-5]
    head = _HEAD.match(text)
    expression = parse(_STAND_IN + text[head.end() :] if head else text)
    if len(expression.references) != 1 or not _is_element(expression.text):
        example = f"; for example: {_example(step)}"
        raise error_at(text, f"why follows one number of a tensor, not a computation{example}")
    (reference,) = expression.references
    if reference.kind == "rows":
        raise error_at(
            text, f"{reference} is not a number that the step made; everystep rows explains it"
        )
    if head:
        names, after = _named(text, head, step, trace), _after(head)
    elif reference.is_previous:
        return Wanted(True, ())
    else:
        names, after = _referred(text, reference, step)
    spots = []
    for name, reading in zip(names, after, strict=True):
        shape = trace.spec(name).shape
        index = _index(text, expression, shape)
        if half is not None and not trace.spec(name).torch_dtype.is_complex:
            raise error_at(text, "it is not complex: it has no real and imaginary part")
        spots.append(Spot(name, index, reading, half))
    return Wanted(False, tuple(spots))


def _example(step: Step) -> str:
    named = next(iter(step.gradients.items()), None)
    if named is None:
        return "loss"
    name, tensor = named
    return f"gradients[{name!r}]" + (str([0] * tensor.dim()) if tensor.dim() else "")


def _is_element(text: str) -> bool:
    """Tell whether an expression is a tensor with indices, or one without."""
    node = ast.parse(text, mode="eval").body
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _after(head: re.Match[str]) -> list[int]:
    return [int(head["number"]) + 1 if head["number"] else 0]


def _named(text: str, head: re.Match[str], step: Step, trace: Trace) -> list[str]:
    count = len(step.operations)
    if head["number"] is None:
        known = [*step.places.tensors, *step.state]
        if head["name"] not in known:
            cure = did_you_mean(head["name"], known) or "#0 is the result of operation 0"
            raise error_at(text, f"step {step.number} has no tensor {head['name']!r}; {cure}")
        return [head["name"]]
    number, place = int(head["number"]), int(head["place"] or 1) - 1
    if number >= count:
        raise error_at(
            text,
            f"step {step.number} has no operation #{number}: it has #0 to #{count - 1}",
            0,
            head.end(),
        )
    made = trace.outputs(number)
    given = made[place] if 0 <= place < len(made) else None
    if given is None:
        operator = step.operations[number].operation.operator
        known_places = [f"#{number}.{i + 1}" for i, name in enumerate(made) if name]
        raise error_at(
            text,
            f"operation #{number}, {operator}, has no such result; it has {' '.join(known_places)}",
            0,
            head.end(),
        )
    if (number, "results", given) in step.unset:
        problem = f"result {place + 1} of operation #{number} is memory of the kernel, without numbers"
        raise error_at(text, problem, 0, head.end())
    return [given]


def _referred(text: str, reference: Reference, step: Step) -> tuple[list[str], list[int]]:
    """Return the tensors that a reference names, and after how many operations each is read."""
    kind, name, end = reference.kind, reference.name, len(step.operations)
    if kind == "loss":
        if step.places.loss is None:
            raise error_at(text, f"no operation of step {step.number} makes its loss")
        return [step.places.loss], [end]
    if kind in ("step", "measurements"):
        cure = (
            "gradients, activations, parameters, updates, buffers, the batch and the loss have a cause"
        )
        raise error_at(text, f"no operation of step {step.number} makes {reference}; {cure}")
    if kind == "batch":
        names = [each for each in (name, f"batch/{name}") if each in step.places.tensors]
        if not names:
            raise error_at(text, f"no operation of step {step.number} reads {reference}")
        return names[:1], [0]
    known: Sequence[str] = [*getattr(step, kind)]
    if kind == "gradients" and not known:
        cure = "#N is the result of operation N, of the backward pass too"
        raise error_at(text, f"step {step.number} has no gradients; {cure}")
    if name not in known:
        cure = did_you_mean(name, known) or f"this step has {len(known)} {kind}"
        raise error_at(text, f"unknown name {name!r} of {kind}; {cure}")
    if kind == "gradients":
        place = step.places.gradients[name]
        return [*place.names], [place.after]
    if kind == "activations":
        place = step.places.activations[name]
        if len(place.names) != 1:
            cure = "#N is the result of operation N"
            raise error_at(text, f"module {name} returned {len(place.names)} tensors; {cure}")
        return [*place.names], [place.after]
    if kind == "updates":
        own = f"parameter/{name}"
        last = step.places.ends.get(own, own)
        parts = {"before": [own], "after": [last], "": [last, own]}[reference.part]
        return parts, {"before": [0], "after": [end], "": [end, 0]}[reference.part]
    return [f"{kind.removesuffix('s')}/{name}"], [0]


def _index(text: str, expression: Expression, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of the one element that an expression picks from a tensor of a shape."""
    whole = torch.empty(shape, device="meta")  # of which only the geometry is there
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
    flat = int(found.storage_offset())
    index: list[int] = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.insert(0, place)
    return tuple(index)
