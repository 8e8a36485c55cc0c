"""Answers as text and as JSON: the results of verify, measure and when."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from everystep.views.terminal import engine_text, number, shortest

if TYPE_CHECKING:
    from everystep.recording.facts import Facts
    from everystep.replay.columns import Found
    from everystep.replay.nonfinite import NonFinite
    from everystep.replay.query import Measured
    from everystep.replay.verify import Verification
    from everystep.step.check import StateDifference

__all__ = [
    "NAMED",
    "as_json",
    "found_text",
    "labelled",
    "measured_text",
    "nonfinite_data",
    "nonfinite_text",
    "plain",
    "skipped_text",
    "tensors_text",
    "verify_data",
    "verify_text",
    "when_text",
]

#: States, tensors and rows that are named before the rest is counted.
NAMED = 6

_WIDTH = 12


def as_json(data: Any) -> str:
    """Return data as JSON; nan and infinities become strings."""
    return json.dumps(plain(data), indent=1, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Return data that JSON can hold: nan and infinities become strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def verify_text(name: str, facts: Facts, found: Verification) -> str:
    """Return what matches and what does not, in lines, and the conclusion.

    facts: of the run; they show what backs the recorded steps themselves.
    """
    lines = [labelled("recorded", engine_text(facts))]
    if found.numerics:
        pairs = (f"{key} {one}, now {two}" for key, (one, two) in found.numerics.items())
        lines.append(labelled("numerics", "recorded with " + "; ".join(pairs)))
    lines.append(labelled("replayed", _replayed_text(found)))
    if not facts.has_loss:
        lines.append(labelled("losses", "not logged; only the states are compared"))
    elif found.first_loss is None:
        is_all = found.steps == found.all_steps
        count = f"all {found.steps:,}" if is_all else f"{found.steps:,} of {found.all_steps:,}"
        lines.append(labelled("losses", f"{count} bit-identical"))
    else:
        step, recorded, replayed = found.first_loss
        far = _apart(recorded, replayed, found.loss_distance)
        lines.append(
            labelled(
                "losses",
                f"{found.different_steps:,} of {found.steps:,} differ, first at step "
                f"{step:,}:\nrecorded {shortest(recorded)}, replayed {shortest(replayed)}{far}",
            )
        )
    lines.append(labelled("snapshots", _snapshots_text(found)))
    lines += [labelled("problem", problem) for problem in found.problems]
    verdict = "replays bit for bit" if found.is_exact else "does not replay bit for bit"
    return "\n".join([*lines, "", f"{name} {verdict}"])


def _replayed_text(found: Verification) -> str:
    if not found.all_steps:
        return "nothing: the run has no steps"
    threads = ", ".join(
        f"{steps:,} step{'s' * (steps != 1)} with {count} thread{'s' * (count > 1)}"
        for count, steps in sorted(found.threads.items())
    )
    missing = found.all_steps - found.steps
    return (threads or "nothing") + (
        f"; {missing:,} of {found.all_steps:,} could not be" if missing else ""
    )


def _apart(recorded: float, replayed: float, units: int | None) -> str:
    from everystep.step.check import READABLE

    if not units:
        return ""
    if units > READABLE:
        return f", {abs(recorded - replayed):.4g} apart" if math.isfinite(recorded - replayed) else ""
    return f", {units:,} units in the last place apart"


def verify_data(name: str, found: Verification) -> dict[str, Any]:
    """Return the same as plain data."""
    loss = found.first_loss
    return {
        "run": name,
        "exact": found.is_exact,
        "steps": found.steps,
        "all_steps": found.all_steps,
        "different_steps": found.different_steps,
        "first_different_loss": None
        if loss is None
        else loss._asdict() | {"units_in_the_last_place": found.loss_distance},
        "snapshots": {"compared": found.snapshots, "of": found.all_snapshots},
        "different_tensors": [each._asdict() for each in found.states],
        "numerics": {key: list(pair) for key, pair in found.numerics.items()},
        "threads": {str(count): steps for count, steps in found.threads.items()},
        "problems": list(found.problems),
    }


def measured_text(found: Measured) -> str:
    """Return the result of measuring, in a line or two."""
    values = list(found.values.items())
    if not values:
        return f"{found.name}: no values"
    (first, begin), (last, end) = values[0], values[-1]
    finite = [value for value in found.values.values() if math.isfinite(value)]
    span = f", from {number(min(finite))} to {number(max(finite))}" if finite else ""
    text = (
        f"{found.name}: {len(values):,} values{span}; "
        f"{number(begin)} at step {first:,}, {number(end)} at step {last:,}"
    )
    if found.left_out:
        text += f"\n{skipped_text(found.left_out)}"
    return text


def skipped_text(steps: Sequence[int]) -> str:
    """Return from which steps on a question was not asked, in each span that was replayed, and why."""
    named = ", ".join(f"{step:,}" for step in steps[:NAMED])
    return (
        f"steps from {named} on are skipped, because they cannot be replayed, or a replayed loss "
        "differs from the recorded one"
    )


def when_text(found: Found, losses: dict[int, float]) -> str:
    """Return the steps, one per line, with their losses."""
    return "".join(f"{step}\t{shortest(losses[step])}\n" for step in found.steps)


def found_text(found: Found, losses: dict[int, float]) -> str:
    """Return the steps as `when_text` does, or that there is none, and which were skipped."""
    text = when_text(found, losses).rstrip("\n") or "no step matches"
    if found.inexact:
        text += f"\n{skipped_text(found.inexact)}"
    return text


def nonfinite_text(found: NonFinite | None) -> str:
    """Return what made the first NaN or infinity."""
    from everystep.replay.given import name_in_words

    if found is None:
        return "all results of all operations are finite"
    parts = [f"{found.nans:,} NaN"] * bool(found.nans) + [f"{found.infinities:,} infinite"] * bool(
        found.infinities
    )
    what = " and ".join(parts)
    step, how = found.step.number, _by_own_code(found)
    how = f"; {how}" if how else ""
    if found.operation is None:
        is_of_batch = found.origin == "batch"
        name = f"{found.name} of the batch" if is_of_batch else name_in_words(found.name)
        lines = [f"step {step:,}: {name} has {what}{'' if is_of_batch else ' from the start'}{how}"]
    else:
        operation = found.operation.operation
        module = f" of module {operation.module}" if operation.module else ""
        lines = [
            f"step {step:,}, {found.phase}, operation #{found.index}: {operation.operator}{module} "
            + (
                f"made {found.name} {what}"
                if not how
                else f"put {what} into {name_in_words(found.name.partition('~')[0])}{how}"
            ),
            *(f"  from {name}: {_range(tensor)}" for name, tensor in found.operation.inputs.items()),
        ]
    if found.rows:
        more = f" and {len(found.rows) - NAMED:,} more" if len(found.rows) > NAMED else ""
        numbers = ", ".join(map(str, found.rows[:NAMED])) + more
        lines.append(f"  row{'s' * (len(found.rows) > 1)} {numbers} of {found.step.batch.whole}")
    if found.why is not None:
        from everystep.views.why import why_text

        lines.append(why_text(found.why, has_title=False))
    return "\n".join(lines)


def _by_own_code(found: NonFinite) -> str:
    """Return when your own code brought it in, empty if it did not."""
    if found.origin == "between":
        return f"changed after step {found.step.number - 1:,}, outside of a step"
    if found.origin != "outside":
        return ""
    when = f"between operations #{found.index - 1} and" if found.index else "before operation"
    return f"your own code gave it to the step {when} #{found.index}"


def nonfinite_data(found: NonFinite | None) -> dict[str, Any] | None:
    """Return the same as plain data."""
    if found is None:
        return None
    from everystep.views.mathematics import mathematics
    from everystep.views.why import why_data

    seen = found.operation
    operation = seen and seen.operation
    return {
        "step": found.step.number,
        "origin": found.origin,
        "operation": found.index,
        "operator": operation and operation.operator,
        "module": operation and operation.module,
        "phase": found.phase,
        "tensor": found.name,
        "by_own_code": _by_own_code(found),
        "nans": found.nans,
        "infinities": found.infinities,
        "rows": list(found.rows),
        "rows_of": found.step.batch.whole,
        "mathematics": None
        if found.index is None
        else str(mathematics(found.step.operations)[found.index]),
        "inputs": [_input(name, tensor) for name, tensor in seen.inputs.items()] if seen else [],
        "why": found.why and why_data(found.why),
    }


def _input(name: str, tensor: Any) -> dict[str, Any]:
    """Return what an operation was given, with the range of its finite numbers."""
    from everystep.replay.step import statistics

    found = statistics(tensor)
    return {
        "name": name,
        "shape": list(tensor.shape),
        "minimum": found.minimum,
        "maximum": found.maximum,
        "not_finite": found.nonfinite,
    }


def _snapshots_text(found: Verification) -> str:
    if not found.states:
        count = f"all {found.snapshots:,}"
        if found.snapshots < found.all_snapshots:
            count = f"{found.snapshots:,} of {found.all_snapshots:,}"
        if found.snapshots == found.all_snapshots == 1:
            count = "the only one"
        return f"{count} after state 0 bit-identical"
    states = sorted({each.state for each in found.states})
    first = [each for each in found.states if each.state == states[0]]
    text = f"{len(states):,} of {found.snapshots:,} differ, first state {states[0]:,}:\n"
    return text + tensors_text(first)


def tensors_text(differences: Sequence[StateDifference]) -> str:
    """Return which tensors of a state differ, in lines."""
    lines = []
    for each in differences[:NAMED]:
        if not each.elements:
            lines.append(f"{each.tensor}: different shape, or missing on one side")
            continue
        far = f", {size}" if (size := str(each.size)) else ""
        lines.append(f"{each.tensor}: {each.elements:,} elements differ{far}")
    if len(differences) > NAMED:
        more = len(differences) - NAMED
        lines.append(f"and {more:,} more tensor{'s' * (more > 1)}")
    return "\n".join(lines)


def _range(tensor: Any) -> str:
    from everystep.replay.step import statistics
    from everystep.views.lines import TIMES

    found = statistics(tensor)
    if not tensor.dim():
        return shortest(tensor.item()) if tensor.is_floating_point() else str(tensor.item())
    shape = TIMES.join(f"{size:,}" for size in tensor.shape) or "number"
    bad = f", {found.nonfinite:,} not finite" if found.nonfinite else ""
    return f"{shape}, {number(found.minimum)} to {number(found.maximum)}{bad}"


def labelled(label: str, text: str) -> str:
    """Return lines with a label before the first."""
    first, *rest = text.splitlines() or [""]
    return "\n".join([f"{label:<{_WIDTH}}{first}", *(" " * _WIDTH + line for line in rest)])
