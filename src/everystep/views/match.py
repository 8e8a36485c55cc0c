"""How a step of two trainings matches by values: as text and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from everystep.views.answers import labelled
from everystep.views.terminal import shortest

if TYPE_CHECKING:
    from everystep.replay.match import Match, Suspect

__all__ = ["match_data", "match_text"]

#: Tensors that are named before the rest is counted.
_NAMED = 6


def match_text(found: Match) -> str:
    """Return what of the first run's step the second does not have, and where that begins, in lines."""
    one, other = found.names
    losses = " | ".join(map(shortest, found.losses))
    lines = [labelled("runs", f"{one}\n{other}"), labelled("step", f"{found.step:,}, loss {losses}")]
    if found.precisions is not None:
        text = " and ".join(map("{} computes in {}".format, found.names, found.precisions))
        lines.append(labelled("compared", f"in double precision, from the same state: {text}"))
    if found.begin:
        lines.append(labelled("before", f"{other} does not have {_names(found.begin)}"))
    lines.append(
        labelled(
            "after",
            f"{other} has {found.found} of the {found.of} gradients, parameters and buffers of {one}, "
            f"within {found.rounding:g} of their largest number",
        )
    )
    if found.end:
        lines.append(labelled("missing", _names(found.end)))
        for name, against, suspect in zip(
            found.names, reversed(found.names), found.suspects, strict=True
        ):
            if suspect is not None:
                lines.append(labelled("first", _suspect_text(suspect, name, against)))
    verdict = f"step {found.step:,} matches" if found.is_match else f"step {found.step:,} does not match"
    return "\n".join([*lines, "", verdict])


def match_data(found: Match) -> dict[str, Any]:
    """Return the same as plain data."""
    return {
        "runs": list(found.names),
        "step": found.step,
        "match": found.is_match,
        "losses": list(found.losses),
        "precisions": found.precisions and list(found.precisions),
        "rounding": found.rounding,
        "missing_before": list(found.begin),
        "missing_after": list(found.end),
        "found": found.found,
        "of": found.of,
        "suspects": [
            None
            if each is None
            else {
                "operation": each.operation,
                "operator": each.observed.operation.operator,
                "phase": each.observed.operation.phase,
                "module": each.observed.operation.module,
                "result": each.name,
                "inputs_in_both": each.has_known_inputs,
                "nearest": each.nearest,
                "distance": each.distance,
            }
            for each in found.suspects
        ],
    }


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _suspect_text(found: Suspect, name: str, other: str) -> str:
    operation = found.observed.operation
    module = f" of module {operation.module}" if operation.module else ""
    given = "from what both have" if found.has_known_inputs else "from results in between"
    lines = [
        f"result of {name} that {other} does not have, {given}:",
        f"#{found.operation} {operation.operator}{module}, {operation.phase}",
    ]
    if math.isfinite(found.distance) and found.nearest is not None:
        lines.append(
            f"nearest in {other}: #{found.nearest}, off by {found.distance:.2g} of the largest number"
        )
    return "\n".join(lines)
