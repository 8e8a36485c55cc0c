"""Where a number on the page comes from, as plain data."""

from __future__ import annotations

import re
from typing import Any

from everystep.errors import UsageError
from everystep.page.tensors import tensor_of
from everystep.recording.facts import Facts
from everystep.replay.step import Step
from everystep.replay.why import Group, Number, Spot, Why, why
from everystep.views.terminal import shortest
from everystep.views.why import check_text, digits_text, made_text, rows_text, value_text

__all__ = ["reason"]

_INDEX = re.compile(r"\d{1,18}(,\d{1,18})*", re.ASCII)
#: Numbers of each kind that are shown.
TERMS = 8


def reason(step: Step, facts: Facts, id: str | None, index: str, name: str | None) -> dict[str, Any]:
    """Return where a number comes from; one of the state before the step is followed into that before.

    Args:
        step: the opened step.
        facts: of the run.
        id: of the tensor, as the page names it; None if `name` names the number.
        index: of the number in it: `3,5`.
        name: as an answer names a number.

    Raises:
        UsageError: there is no such number, or nothing is known of it.
    """
    wanted = name if name else _place(step, facts, id or "", index)
    found = why(step, wanted, back=1, terms=TERMS)
    if found.origin == "state" and found.causes and found.began is None:
        found = found.causes[0]
    return _data(found) | {
        "left_out": found.left_out,
        "through": [_data(each) for each in found.causes[:-1]] if found.began else [],
        "began": _data(found.began) if found.began else None,
    }


def _place(step: Step, facts: Facts, id: str, index: str) -> str | Spot:
    """Return where a number of a tensor of the page is."""
    shape = tuple(tensor_of(step, id, facts).shape)
    if index and not _INDEX.fullmatch(index):
        raise UsageError(f"index is {index!r:.80}; write 3,5")
    place = tuple(map(int, index.split(","))) if index else ()
    at = str([*place]) if place else ""
    kind, _, name = id.partition("/")
    if id in ("batch.x", "batch.y"):
        return f"{id}{at}"
    if kind in ("parameters", "gradients", "activations"):
        return f"{kind}[{name!r}]{at}"
    if kind == "updates":
        parameter, _, part = name.rpartition("/")
        return f"updates[{parameter!r}]{'' if part == 'change' else f'.{part}'}{at}"
    if kind == "batch":
        return f"tensors[{f'batch/{name}'!r}]{at}"
    if kind == "operations":
        number, role, tensor = name.split("/", 2)
        if len(place) != len(shape) or any(i >= n for i, n in zip(place, shape, strict=True)):
            raise UsageError(f"{id!r:.200} has shape {shape}, and no number at {place}")
        return Spot(tensor, place, int(number) + (role == "results"))
    raise UsageError(f"no operation of step {step.number} makes the numbers of {id!r:.200}")


def _data(found: Why) -> dict[str, Any]:
    return {
        "number": _number(found.number),
        "made": made_text(found) if found.operation is not None else None,
        "operation": found.operation,
        "formula": found.formula,
        "groups": [_group(group) for group in found.groups],
        "check": "".join(text for text, _ in check_text(found))
        if found.formula and found.groups
        else "",
        "is_equal": found.is_equal,
        "unknown": list(found.unknown),
        "note": found.note,
        "rows": rows_text(found),
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "text": group.text,
        "left_out": group.count - len(group.terms),
        "rest": None if group.rest is None else digits_text(group.rest),
        "terms": [
            {
                "value": None if term.value is None else digits_text(term.value),
                "numbers": [_number(number) for number in term.numbers.values()]
                + [_weight(name, weight) for name, weight in term.weights.items()],
            }
            for term in group.terms
        ],
    }


def _number(number: Number) -> dict[str, Any]:
    return {
        "name": number.name,
        "step": number.step,
        "text": value_text(number),
        "row": number.row,
        "goes_on": not number.name.endswith(".bits")
        and (number.is_made or number.name.startswith(("parameters", "buffers", "tensors"))),
    }


def _weight(name: str, weight: float) -> dict[str, Any]:
    return {"name": name, "text": shortest(weight), "row": None, "goes_on": False}
