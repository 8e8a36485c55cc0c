"""Answers as text and as JSON: what verifying, comparing and measuring runs has shown."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from everystep.views.terminal import number, shortest

if TYPE_CHECKING:
    from everystep.program.execute import Observed
    from everystep.replay.columns import Found
    from everystep.replay.diff import Difference
    from everystep.replay.measure import Measured
    from everystep.replay.nonfinite import NonFinite
    from everystep.replay.operations import OperationDifference, TensorDifference
    from everystep.replay.verify import Verification
    from everystep.replay.walk import StateDifference

__all__ = [
    "as_json",
    "diff_data",
    "diff_sentence",
    "diff_text",
    "measured_text",
    "nonfinite_data",
    "nonfinite_text",
    "plain",
    "verify_data",
    "verify_text",
    "when_text",
]

_WIDTH = 12
#: How the cause of a difference begins that lies in the learning rate and its like.
_OTHER_HYPERPARAMETER = "another hyperparameter: "
#: States, tensors and rows that are named before the rest is counted.
_NAMED = 6


def as_json(data: Any) -> str:
    """Return data as JSON, which has no nan and no infinity: they become texts."""
    return json.dumps(plain(data), indent=1, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Return data as JSON can hold it: nan and infinities are texts."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def verify_text(name: str, found: Verification) -> str:
    """Return what held and what did not, in lines."""
    lines = []
    if found.numerics:
        pairs = (f"{key} {one}, here {two}" for key, (one, two) in found.numerics.items())
        lines.append(_line("numerics", "recorded with " + "; ".join(pairs)))
    threads = ", ".join(
        f"{steps:,} steps with {count} thread{'s' if count > 1 else ''}"
        for count, steps in sorted(found.threads.items())
    )
    lines.append(_line("replayed", threads or "nothing: there is no step"))
    if found.first_loss is None:
        lines.append(_line("losses", f"all {found.steps:,} as recorded, bit for bit"))
    else:
        step, recorded, replayed = found.first_loss
        far = f", {found.loss_distance:,} units in the last place" if found.loss_distance else ""
        lines.append(
            _line(
                "losses",
                f"{found.different_steps:,} of {found.steps:,} are not as recorded, the first at step "
                f"{step:,}:\n{shortest(recorded)} recorded, {shortest(replayed)} replayed{far}",
            )
        )
    lines.append(_line("snapshots", _snapshots_text(found)))
    lines += [_line("problem", problem) for problem in found.problems]
    verdict = "is as it was recorded, bit for bit" if found.is_exact else "is not as it was recorded"
    return "\n".join([*lines, "", f"{name} {verdict}"])


def verify_data(name: str, found: Verification) -> dict[str, Any]:
    """Return the same as plain data."""
    loss = found.first_loss
    return {
        "run": name,
        "exact": found.is_exact,
        "steps": found.steps,
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


def diff_text(found: Difference) -> str:
    """Return where two runs part, in lines."""
    one, other = found.names
    lines = [_line("runs", f"{one}\n{other}")]
    for label, pairs in (("experiments", found.experiments), ("numerics", found.numerics)):
        if pairs:
            lines.append(_line(label, "\n".join(f"{k}: {_pair(a, b)}" for k, (a, b) in pairs.items())))
    if found.steps[0] != found.steps[1]:
        lines.append(_line("steps", f"{found.steps[0]:,} and {found.steps[1]:,}"))
    common = min(found.steps)
    if found.loss is None:
        lines.append(_line("losses", f"the same in all {common:,} steps that both have"))
    else:
        lines.append(
            _line(
                "losses",
                f"part at step {found.loss.step:,}: {shortest(found.loss.recorded)} and "
                f"{shortest(found.loss.replayed)}",
            )
        )
    lines.append(_line("states", _states_text(found)))
    if found.operation is not None:
        lines += ["", *_operation_lines(found.operation, found.names)]
    lines += [_line("problem", problem) for problem in found.problems]
    return "\n".join([*lines, "", _verdict(found)])


def diff_sentence(found: Difference) -> str:
    """Return the same in one sentence: where they part, at which operation, and why."""
    if found.loss is not None:
        parts = [f"The losses part at step {found.loss.step:,}"]
    elif found.operation is not None or found.states:
        parts = [f"The losses of all {min(found.steps):,} common steps are the same"]
    else:
        verdict = _verdict(found)
        return f"{verdict[0].upper()}{verdict[1:]}."
    operation = found.operation
    if operation is not None:
        at = "" if found.loss and found.loss.step == operation.step else f" of step {operation.step:,}"
        parts.append(
            f"the first operation to differ is #{operation.index}{at}" + _what(found, operation)
        )
    elif found.states and found.loss is None:
        first = found.states[0]
        parts.append(f"{first.tensor} of state {first.state:,} is not")
    return "; ".join(parts) + "."


def diff_data(found: Difference) -> dict[str, Any]:
    """Return the same as plain data."""
    operation = found.operation
    loss = found.loss
    return {
        "runs": list(found.names),
        "same": found.is_same,
        "experiments": {key: list(pair) for key, pair in found.experiments.items()},
        "numerics": {key: list(pair) for key, pair in found.numerics.items()},
        "steps": list(found.steps),
        "loss": None if loss is None else {"step": loss.step, "values": [loss.recorded, loss.replayed]},
        "common_state": found.common_state,
        "thorough": found.is_thorough,
        "states": [each._asdict() for each in found.states],
        "operation": None if operation is None else _operation_data(operation),
        "problems": list(found.problems),
    }


def measured_text(found: Measured) -> str:
    """Return what measuring has given, in a line or two."""
    values = list(found.values.items())
    if not values:
        return f"{found.name}: no step has a value"
    (first, begin), (last, end) = values[0], values[-1]
    finite = [value for value in found.values.values() if math.isfinite(value)]
    span = f", from {number(min(finite))} to {number(max(finite))}" if finite else ""
    text = (
        f"{found.name}: {len(values):,} values{span}; "
        f"{number(begin)} at step {first:,}, {number(end)} at step {last:,}"
    )
    if found.left_out:
        steps = ", ".join(f"{step:,}" for step in found.left_out[:_NAMED])
        text += f"\nleft out, because a replayed loss was not the recorded one, from: step {steps}"
    return text


def when_text(found: Found, losses: dict[int, float]) -> str:
    """Return the steps, a line each, with their losses."""
    return "".join(f"{step}\t{shortest(losses[step])}\n" for step in found.steps)


def nonfinite_text(found: NonFinite | None) -> str:
    """Return what made the first NaN or infinity."""
    if found is None:
        return "every result of every operation is finite"
    parts = [f"{found.nans:,} NaN"] * bool(found.nans) + [f"{found.infinities:,} infinite"] * bool(
        found.infinities
    )
    what = " and ".join(parts)
    step = found.step.number
    if found.operation is None:
        lines = [f"step {step:,}: {found.name} has {what} from the beginning"]
    else:
        operation = found.operation.operation
        module = f" of module {operation.module}" if operation.module else ""
        lines = [
            f"step {step:,}, {operation.phase}, operation #{found.index}: {operation.operator}{module} "
            f"made {found.name} {what}",
            *(f"  from {name}: {_range(tensor)}" for name, tensor in found.operation.inputs.items()),
        ]
    if found.rows:
        more = f" and {len(found.rows) - _NAMED:,} more" if len(found.rows) > _NAMED else ""
        lines.append("  rows of the data: " + ", ".join(map(str, found.rows[:_NAMED])) + more)
    return "\n".join(lines)


def nonfinite_data(found: NonFinite | None) -> dict[str, Any] | None:
    """Return the same as plain data."""
    if found is None:
        return None
    operation = found.operation and found.operation.operation
    return {
        "step": found.step.number,
        "operation": found.index,
        "operator": operation and operation.operator,
        "module": operation and operation.module,
        "phase": operation and operation.phase,
        "tensor": found.name,
        "nans": found.nans,
        "infinities": found.infinities,
        "rows": list(found.rows),
    }


def _snapshots_text(found: Verification) -> str:
    if not found.states:
        count = f"all {found.snapshots:,}"
        if found.snapshots < found.all_snapshots:
            count = f"{found.snapshots:,} of {found.all_snapshots:,}"
        return f"{count} after state 0 as recorded, bit for bit"
    states = sorted({each.state for each in found.states})
    first = [each for each in found.states if each.state == states[0]]
    return (
        f"{len(states):,} of {found.snapshots:,} are not as recorded, first state {states[0]:,}:\n"
        + _tensors_text(first)
    )


def _states_text(found: Difference) -> str:
    common = found.common_state
    same = "no snapshot is the same" if common is None else f"the same up to state {common:,}"
    if not found.states:
        return same if common is not None else "no snapshots of the same state can be compared"
    return f"{same}; state {found.states[0].state:,} is not:\n" + _tensors_text(list(found.states))


def _tensors_text(differences: list[StateDifference]) -> str:
    lines = []
    for each in differences[:_NAMED]:
        if not each.elements:
            lines.append(f"{each.tensor}: another shape, or only one has it")
            continue
        far = f", by {each.largest:,} units in the last place at most" if each.largest else ""
        lines.append(f"{each.tensor}: {each.elements:,} numbers{far}")
    if len(differences) > _NAMED:
        lines.append(f"and {len(differences) - _NAMED:,} more tensors")
    return "\n".join(lines)


def _operation_lines(found: OperationDifference, names: tuple[str, str]) -> list[str]:
    sides = [
        "no operation"
        if each is None
        else f"{each.operation.operator}"
        + (f" of module {each.operation.module}" if each.operation.module else "")
        + f", {each.operation.phase}"
        for each in (found.one, found.other)
    ]
    where = sides[0] if sides[0] == sides[1] else f"{names[0]}: {sides[0]}\n{names[1]}: {sides[1]}"
    lines = [_line("they part", f"in step {found.step:,}, at operation #{found.index}\n{where}")]
    lines += [_line("result", _tensor_text(each)) for each in found.results]
    lines += [_line("differs in", _tensor_text(each)) for each in found.inputs]
    if found.rows:
        rows = ", ".join(
            f"{a} at place {place}" if a == b else f"{a} and {b} at place {place}"
            for place, a, b in found.rows[:_NAMED]
        )
        lines.append(_line("rows", rows + (", ..." if len(found.rows) > _NAMED else "")))
    lines += [_line("because of", cause) for cause in found.causes]
    return lines


def _what(found: Difference, operation: OperationDifference) -> str:
    """Return what the operation is, of both runs if it is another one, and why it differs."""
    one, other = operation.one, operation.other
    names = [None if each is None else _operation_name(each) for each in (one, other)]
    if None not in names and names[0] != names[1]:
        return ": " + ", ".join(f"{name} in {run}" for name, run in zip(names, found.names, strict=True))
    return f", {names[0] or names[1]}, {_reason(found, operation)}"


def _operation_name(observed: Observed) -> str:
    """Return the operator without its overload, and where it is: `aten.addmm (forward, 0)`."""
    operation = observed.operation
    name = operation.operator
    if name.startswith("aten."):
        name = ".".join(name.split(".")[:2])
    return f"{name} ({', '.join(filter(None, (operation.phase, operation.module)))})"


def _reason(found: Difference, operation: OperationDifference) -> str:
    """Return why an operation differs, as the end of a sentence."""
    from everystep.replay.operations import COMPUTED_OTHERWISE

    cause = operation.causes[0] if operation.causes else ""
    if operation.one is None or operation.other is None:
        return f"which only {found.names[operation.one is None]} has"
    if cause.startswith(_OTHER_HYPERPARAMETER):
        what, _, values = cause.removeprefix(_OTHER_HYPERPARAMETER).partition(", ")[0].partition(" ")
        return f"because {what} is {values}"
    if cause == COMPUTED_OTHERWISE:
        pairs = [f"{key} {one} and {other}" for key, (one, other) in found.numerics.items()]
        return "although it is given the same" + (f": {', '.join(pairs)}" if pairs else "")
    if cause:
        return f"because of {cause}"
    names = list(dict.fromkeys(_input_name(each.name) for each in operation.inputs))
    if not names:
        return "and nothing that it is given"
    verb = "differs" if len(names) == 1 else "differ"
    return f"because {' and '.join(names[:2])} {verb} already"


def _input_name(name: str) -> str:
    """Return what an operation is given, in words."""
    kind, _, rest = name.partition("~")[0].partition("/")
    if kind in ("x", "y"):
        return f"{kind} of the batch"
    if kind == "gradient":
        return f"the gradient of {rest}"
    return rest if kind in ("parameter", "buffer") else name


def _tensor_text(found: TensorDifference) -> str:
    if not found.positions:
        return f"{found.name}: another shape or dtype"
    far = f", by {found.largest:,} units in the last place at most" if found.largest else ""
    lines = [f"{found.name}: {found.elements:,} of {found.of:,} numbers{far}"]
    for position, (one, two) in zip(found.positions[:3], found.values, strict=False):
        place = "[" + ", ".join(map(str, position)) + "]" if position else ""
        lines.append(f"  {place}  {one!r} and {two!r}" if place else f"  {one!r} and {two!r}")
    if found.elements > 3:
        lines.append("  ...")
    return "\n".join(lines)


def _operation_data(found: OperationDifference) -> dict[str, Any]:
    return {
        "step": found.step,
        "index": found.index,
        "operations": [
            None
            if each is None
            else {
                "phase": each.operation.phase,
                "module": each.operation.module,
                "operator": each.operation.operator,
            }
            for each in (found.one, found.other)
        ],
        "results": [each._asdict() for each in found.results],
        "inputs": [each._asdict() for each in found.inputs],
        "rows": [list(row) for row in found.rows],
        "causes": found.causes,
    }


def _verdict(found: Difference) -> str:
    if found.loss is not None or found.states or found.operation is not None:
        return "the runs differ"
    if found.is_same and not found.numerics:
        return "the runs are the same, bit for bit"
    if found.steps[0] != found.steps[1] and not found.experiments:
        return f"the first {min(found.steps):,} steps are the same; one run is longer"
    same = f"every loss and every common snapshot of the first {min(found.steps):,} steps is the same"
    if found.is_thorough:
        same = f"every operation of the first {min(found.steps):,} steps gives the same"
    elif found.experiments or found.numerics:
        same += "; --thorough looks at every operation"
    return f"{same}, bit for bit" if found.is_same or found.is_thorough else same


def _range(tensor: Any) -> str:
    from everystep.replay.step import statistics
    from everystep.views.lines import TIMES

    found = statistics(tensor)
    shape = TIMES.join(f"{size:,}" for size in tensor.shape) or "number"
    bad = f", {found.nonfinite:,} not finite" if found.nonfinite else ""
    return f"{shape}, {number(found.minimum)} to {number(found.maximum)}{bad}"


def _pair(one: Any, two: Any) -> str:
    texts = [str(value).replace("\n", " ") for value in (one, two)]
    short = [text if len(text) <= 60 else text[:24] + "..." for text in texts]
    return f"{short[0]} | {short[1]}" if short[0] != short[1] else f"{texts[0]} | {texts[1]}"


def _line(label: str, text: str) -> str:
    first, *rest = text.splitlines() or [""]
    return "\n".join([f"{label:<{_WIDTH}}{first}", *(" " * _WIDTH + line for line in rest)])
