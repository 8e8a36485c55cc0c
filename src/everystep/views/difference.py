"""Where two runs differ: as text, as a sentence, and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everystep.views.answers import NAMED, labelled, tensors_text
from everystep.views.listed import listed
from everystep.views.terminal import shortest

if TYPE_CHECKING:
    from everystep.program.observed import Observed
    from everystep.replay.data import DataDifference
    from everystep.replay.diff import Difference
    from everystep.replay.operations import OperationDifference, TensorDifference
    from everystep.step.check import StateDifference

__all__ = ["diff_data", "diff_sentence", "diff_text"]

#: Causes that a sentence names.
MOST_CAUSES = 2


def diff_text(found: Difference) -> str:
    """Return where two runs differ, in lines."""
    one, other = found.names
    lines = [labelled("runs", f"{one}\n{other}")]
    asked = "\n".join(map(str, listed(found)))
    numerics = "\n".join(f"{name}  {one} | {two}" for name, (one, two) in found.numerics.items())
    lines += [labelled(k, text) for k, text in (("experiments", asked), ("numerics", numerics)) if text]
    if found.steps[0] != found.steps[1]:
        lines.append(labelled("steps", f"{found.steps[0]:,} and {found.steps[1]:,}"))
    common = min(found.steps)
    if found.loss is None:
        lines.append(labelled("losses", f"identical in all {common:,} common steps"))
    else:
        lines.append(
            labelled(
                "losses",
                f"differ from step {found.loss.step:,} on: {shortest(found.loss.recorded)} and "
                f"{shortest(found.loss.replayed)}",
            )
        )
    for name, each in found.measured:
        pair = f"{shortest(each.recorded)} and {shortest(each.replayed)}"
        lines.append(labelled("measured", f"{name} differs from step {each.step:,} on: {pair}"))
    lines.append(labelled("states", _states_text(found)))
    lines += [labelled("batch", f"{each} differs; no operation reads it") for each in found.unread]
    if found.operation is not None:
        lines += ["", *_operation_lines(found.operation, found.names)]
        lines += [labelled("state", text) for text in _first_state_texts(found)]
    lines += [labelled("problem", problem) for problem in found.problems]
    return "\n".join([*lines, "", _verdict(found) + _hint(found)])


def diff_sentence(found: Difference) -> str:
    """Return the same in one sentence: where they differ, at which operation, and why."""
    if found.loss is not None:
        parts = [f"The losses first differ at step {found.loss.step:,}"]
    elif found.operation is not None or found.states:
        parts = [f"The losses of all {min(found.steps):,} common steps are identical"]
    else:
        verdict = _verdict(found)
        return f"{verdict[0].upper()}{verdict[1:]}."
    operation = found.operation
    if operation is not None:
        at = "" if found.loss and found.loss.step == operation.step else f" of step {operation.step:,}"
        parts.append(
            f"the first operation that differs is #{operation.index}{at}" + _what(found, operation)
        )
        parts += _first_state_texts(found)
    elif found.states and found.loss is None:
        first = found.states[0]
        parts.append(f"{first.tensor} of state {first.state:,} differs")
    return "; ".join(parts) + "."


def diff_data(found: Difference) -> dict[str, Any]:
    """Return the same as plain data."""
    operation = found.operation
    loss = found.loss
    return {
        "runs": list(found.names),
        "same": found.is_same,
        "complete": found.is_complete,
        "asked": [{"name": each.name, "values": list(each.values)} for each in listed(found)],
        "experiments": {key: list(pair) for key, pair in found.experiments.items()},
        "renamed": list(found.renamed),
        "numerics": {key: list(pair) for key, pair in found.numerics.items()},
        "steps": list(found.steps),
        "loss": None if loss is None else {"step": loss.step, "values": [loss.recorded, loss.replayed]},
        "common_state": found.common_state,
        "thorough": found.is_thorough,
        "measured": {n: [e.step, e.recorded, e.replayed] for n, e in found.measured},
        "unread": list(found.unread),
        "data": [_data(each) for each in found.data],
        "states": [_sized(each) for each in found.states],
        "operation": None if operation is None else _operation_data(operation),
        "first_state": None if found.first_state is None else found.first_state._asdict(),
        "problems": list(found.problems),
    }


def _states_text(found: Difference) -> str:
    common = found.common_state
    same = "no snapshot is identical" if common is None else f"identical up to state {common:,}"
    if not found.states:
        return same if common is not None else "the runs have no snapshot of the same state"
    return f"{same}; state {found.states[0].state:,} differs:\n" + tensors_text(list(found.states))


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
    lines = [labelled("operation", f"#{found.index} of step {found.step:,}\n{where}")]
    lines += [labelled("result", _tensor_text(each)) for each in found.results]
    lines += [labelled("input", _tensor_text(each)) for each in found.inputs]
    if found.rows:
        rows = ", ".join(
            (f"{a}" if a == b else f"{a} and {b}") + f" at position {place}" * (not place == a == b)
            for place, a, b in found.rows[:NAMED]
        )
        rows += ", ..." if len(found.rows) > NAMED else ""
        counted = "" if found.rows_of == "the batch" else f"; in {found.rows_of}, counted from 0"
        lines.append(labelled("rows", rows + counted))
    lines += [labelled("cause", cause) for cause in found.causes]
    return lines


def _first_state_texts(found: Difference) -> list[str]:
    """Return when the difference of an operation reaches the model, unless that is in its own step."""
    first, operation = found.first_state, found.operation
    if first is None or operation is None or first.state == operation.step:
        return []
    if first.state is None:
        return [f"no parameter and no buffer differs up to state {first.last:,}"]
    return [
        f"no parameter and no buffer differs before state {first.state:,}, in which {first.name} does"
    ]


def _what(found: Difference, operation: OperationDifference) -> str:
    """Return the operation, of both runs if it differs, and why the result differs."""
    one, other = operation.one, operation.other
    names = [None if each is None else _operation_name(each) for each in (one, other)]
    reason = _reason(found, operation)
    if None in names:
        return f", {names[0] or names[1]}, which only {found.names[one is None]} has{reason}"
    if names[0] != names[1]:
        sides = ", ".join(f"{name} in {run}" for name, run in zip(names, found.names, strict=True))
        return f": {sides}{reason}"
    return f", {names[0]}{reason or ('' if operation.causes else ', with identical inputs')}"


def _operation_name(observed: Observed) -> str:
    """Return the operator without its overload, and its location: `aten.addmm (forward, 0)`."""
    operation = observed.operation
    name = operation.operator
    if name.startswith("aten."):
        name = ".".join(name.split(".")[:2])
    return f"{name} ({', '.join(filter(None, (operation.phase, operation.module)))})"


def _reason(found: Difference, operation: OperationDifference) -> str:
    """Return why an operation differs, as the end of a sentence."""
    from everystep.replay.causes import ANOTHER_OPERATION, COMPUTED_OTHERWISE

    causes = operation.causes
    if causes and causes[0].startswith(ANOTHER_OPERATION):
        return causes[0].removeprefix(ANOTHER_OPERATION)
    if causes and causes[0].startswith(COMPUTED_OTHERWISE):
        pairs = [f"{key} {one} and {other}" for key, (one, other) in found.numerics.items()]
        numerics = ", ".join(pairs) or "all recorded numerics are, too"
        return f", although its inputs are identical: {numerics}"
    if causes:
        return f", because of {'; '.join(causes[:MOST_CAUSES])}"
    names = list(dict.fromkeys(_input_name(each.name) for each in operation.inputs))
    verb = "differs" if len(names) == 1 else "differ"
    return f", because {' and '.join(names[:2])} already {verb}" if names else ""


def _input_name(name: str) -> str:
    """Return what an operation receives, in words."""
    kind, _, rest = name.partition("~")[0].partition("/")
    if kind in ("x", "y"):
        return f"{kind} of the batch"
    if kind == "gradient":
        return f"the gradient of {rest}"
    return rest if kind in ("parameter", "buffer") else name


def _tensor_text(found: TensorDifference) -> str:
    if not found.positions:
        return f"{found.name}: different shape or dtype"
    far = f", {size}" if (size := str(found.size)) else ""
    lines = [f"{found.name}: {found.elements:,} of {found.of:,} elements differ{far}"]
    for position, (one, two) in zip(found.positions[:3], found.values, strict=False):
        place = "[" + ", ".join(map(str, position)) + "]" if position else ""
        texts = " and ".join(shortest(v) if isinstance(v, float) else str(v) for v in (one, two))
        lines.append(f"  {place}  {texts}" if place else f"  {texts}")
    if found.elements > 3:
        lines.append("  ...")
    return "\n".join(lines)


def _sized(found: TensorDifference | StateDifference) -> dict[str, Any]:
    return found._asdict() | {"size": str(found.size)}


def _data(found: DataDifference) -> dict[str, Any]:
    return _sized(found.tensor) | {"rows": found.rows, "columns": found.columns, "names": found.names}


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
        "results": [_sized(each) for each in found.results],
        "inputs": [_sized(each) for each in found.inputs],
        "rows": [list(row) for row in found.rows],
        "rows_of": found.rows_of,
        "causes": found.causes,
    }


def _verdict(found: Difference) -> str:
    if any((found.loss, found.states, found.operation)):
        return "the runs differ"
    if found.unread:
        return f"the batches differ: {found.unread[0]}, which no operation reads"
    if found.measured:
        names = ", ".join(name for name, _ in found.measured[:NAMED])
        return f"the runs differ in what was measured: {names}"
    if not found.is_complete:
        return "no loss and no state that could be compared differs; not everything could be compared"
    if found.is_same and found.problems:
        return "nothing that could be compared differs"
    names = "; only names differ" if found.renamed and found.is_same else ""
    if found.is_same and not found.numerics and found.is_thorough:
        return f"the runs are bit-identical{names}"
    what = "result of every operation" if found.is_thorough else "loss and every common snapshot"
    same = f"every {what} of the first {min(found.steps):,} steps is identical"
    if found.steps[0] != found.steps[1] and not found.experiments:
        return f"{same}; one run is longer"
    return f"{same}, bit for bit{names}" if found.is_same or found.is_thorough else same


def _hint(found: Difference) -> str:
    """Return how more is compared, where nothing differs in what was."""
    differs = (found.loss, found.states, found.operation, found.measured, found.problems)
    return "" if found.is_thorough or any(differs) else "; --thorough compares every operation"
