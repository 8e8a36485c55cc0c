"""Two runs compared, and a run under different conditions: what differs, where, and why, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from everystep.errors import NAMED, named
from everystep.recording.texts import number_text, shortest
from everystep.views.formatting import block, counted, number, several

if TYPE_CHECKING:
    from everystep.answers.diff import DataDifference, Difference
    from everystep.answers.match import Match, Suspect
    from everystep.answers.operations import OperationDifference, TensorDifference
    from everystep.answers.rerun import Rerun
    from everystep.answers.rounding import Apart
    from everystep.program.operation import Operation
    from everystep.replay.run_replay import LossDifference
    from everystep.step.state import StateDifference

__all__ = [
    "diff_sentence",
    "diff_text",
    "listed",
    "match_text",
    "rerun_sentence",
    "rerun_text",
    "tensors_text",
]

#: Causes that a sentence names.
MOST_CAUSES = 2
#: Numbers of the data that are shown with both values.
MOST_CELLS = 6
#: Rows and columns of the data that are named.
MOST_PLACES = 8
#: Characters of a value.
LONGEST = 60


def diff_text(found: Difference) -> str:
    """Return where two runs differ, in lines."""
    same = f"identical up to step {min(found.steps):,}"
    numerics = (f"{name}  {one} | {two}" for name, (one, two) in found.numerics.items())
    problems = [("problem", problem) for problem in found.problems]
    lines = [
        ("runs", "\n".join(found.names)),
        ("experiments", "\n".join(map(str, listed(found)))),
        ("numerics", "\n".join(numerics)),
        ("steps", "" if found.steps[0] == found.steps[1] else "{:,} and {:,}".format(*found.steps)),
        ("losses", same if found.loss is None else f"differ {_from_step(found.loss)}"),
        *(("measured", f"{name} differs {_from_step(each)}") for name, each in found.measured),
        ("states", _states_text(found)),
        *(("batch", f"{each} differs, but no result") for each in found.batches),
    ]
    if found.operation is not None:
        states = [("state", text) for text in _first_state_texts(found)]
        of_operation = [*_operation_lines(found.operation, found.names), *states, *problems]
        return block(lines, block(of_operation, _diff_verdict(found)))
    differs = any((found.loss, found.states, found.measured, found.problems))
    hint = "" if found.is_thorough or differs else "; --thorough compares every operation"
    return block([*lines, *problems], _diff_verdict(found) + hint)


def diff_sentence(found: Difference) -> str:
    """Return the same in one sentence: where they differ, at which operation, and why."""
    operation = found.operation
    if not any((found.loss, operation, found.states)):
        verdict = _diff_verdict(found)
        return f"{verdict[0].upper()}{verdict[1:]}."
    texts = [f"The losses are identical up to step {min(found.steps):,}"]
    if found.loss is not None:
        texts = [f"The losses first differ at step {found.loss.step:,}"]
    elif operation is None:
        texts.append(f"{found.states[0].tensor} of state {found.states[0].state:,} differs")
    if operation is not None:
        # The step was named with the losses.
        at = "" if found.loss and found.loss.step == operation.step else f" of step {operation.step:,}"
        name = " | ".join(dict.fromkeys(_sides(operation)))
        texts.append(f"the first operation that differs is #{operation.index}{at}, {name}")
        inputs = (f"its input {_input_name(each.name)} differs" for each in operation.inputs)
        causes = [f"cause: {each}" for each in operation.causes]
        # An input that differs is a consequence; it is named only where no cause is known.
        texts += (causes or [*dict.fromkeys(inputs)])[:MOST_CAUSES]
        texts += _first_state_texts(found)
    return "; ".join(texts) + "."


def _from_step(found: LossDifference) -> str:
    return f"from step {found.step:,} on: {' and '.join(map(shortest, found[1:]))}"


def _states_text(found: Difference) -> str:
    # None: no state is the same; 0 is a state.
    common = found.common_state
    same = "no snapshot is identical" if common is None else f"identical up to state {common:,}"
    if not found.states:
        return same if common is not None else "the runs have no snapshot of the same state"
    return f"{same}; state {found.states[0].state:,} differs:\n" + tensors_text(list(found.states))


def _operation_lines(found: OperationDifference, names: tuple[str, str]) -> list[tuple[str, str]]:
    code = ["" if each is None else str(each.line or "") for each in (found.one, found.other)]
    lines = [("operation", f"#{found.index} of step {found.step:,}\n{_of_runs(_sides(found), names)}")]
    lines.append(("line", _of_runs(code, names)))
    lines += [("result", _tensor_text(each)) for each in found.results]
    lines += [("input", _tensor_text(each)) for each in found.inputs]
    if found.rows:
        rows = [
            (f"{a}" if a == b else f"{a} and {b}") + f" at position {place}" * (not place == a == b)
            for place, a, b in found.rows
        ]
        numbers = "" if found.rows_of == "the batch" else f"; in {found.rows_of}, counted from 0"
        lines.append(("rows", named(rows) + numbers))
    return lines + [("cause", cause) for cause in found.causes]


def _sides(found: OperationDifference) -> list[str]:
    pair = found.one, found.other
    return ["no operation" if each is None else operation_name(each.operation) for each in pair]


def _of_runs(texts: Sequence[str], names: tuple[str, str]) -> str:
    """Return a text of each run, behind its name if they differ; empty ones are left out."""
    if texts[0] == texts[1]:
        return texts[0]
    # Both texts begin in one column, so that the eye finds where they differ.
    width = max(map(len, names)) + 1
    return "\n".join(f"{n + ':':{width}} {text}" for n, text in zip(names, texts, strict=True) if text)


def _first_state_texts(found: Difference) -> list[str]:
    """Return when the difference of an operation reaches the model, unless that is in its own step."""
    first, operation = found.first_state, found.operation
    # In its own step, the difference has reached the model at once: nothing is to be added.
    if first is None or operation is None or first.state == operation.step:
        return []
    if first.state is None:
        return [f"no parameter and no buffer differs up to state {first.last:,}"]
    return [
        f"no parameter and no buffer differs before state {first.state:,}, in which {first.name} does"
    ]


def _input_name(name: str) -> str:
    from everystep.answers.operations import name_in_words

    base = name.partition("~")[0]
    return f"{base} of the batch" if base in ("x", "y") else name_in_words(base)


def _tensor_text(found: TensorDifference) -> str:
    # Tensors of different shapes have no elements to compare.
    if not found.positions:
        return f"{found.name}: different shape or dtype"
    lines = [f"{found.name}: {found.elements:,} of {found.of:,} elements differ{_far(found)}"]
    for position, pair in zip(found.positions[:3], found.values, strict=False):
        place = f"[{', '.join(map(str, position))}]  " if position else ""
        lines.append(f"  {place}{' and '.join(map(number_text, pair))}")
    if found.elements > 3:
        lines.append("  ...")
    return "\n".join(lines)


def tensors_text(differences: Sequence[StateDifference]) -> str:
    """Return which tensors of a state differ, in lines."""
    lines = [
        f"{each.tensor}: {each.elements:,} elements differ{_far(each)}"
        if each.elements
        else f"{each.tensor}: different shape, or missing on one side"
        for each in differences[:NAMED]
    ]
    if len(differences) > NAMED:
        lines.append(f"and {counted(len(differences) - NAMED, 'more tensor')}")
    return "\n".join(lines)


def _far(found: TensorDifference | StateDifference) -> str:
    """Return how far tensors are apart, as the end of a sentence; empty where that is unknown."""
    return f", {size}" if (size := str(found.size)) else ""


def operation_name(operation: Operation | Apart) -> str:
    """Describe an operation: `aten.addmm.default of module 0, forward`."""
    module = f" of module {operation.module}" if operation.module else ""
    return f"{operation.operator}{module}, {operation.phase}"


def _diff_verdict(found: Difference) -> str:
    if any((found.loss, found.states, found.operation)):
        return "the runs differ"
    # Possible where no operation reads the tensor, or `relu` makes the same of two negative numbers.
    if found.batches:
        return f"the batches differ: {found.batches[0]}; no operation has a different result"
    if found.measured:
        names = ", ".join(name for name, _ in found.measured[:NAMED])
        return f"the runs differ in what was measured: {names}"
    if not found.is_complete:
        return "no loss and no state that could be compared differs; not everything could be compared"
    if found.is_same and found.problems:
        return "nothing that could be compared differs"
    # e.g. modules of the same shapes under other names.
    names = "; only names differ" if found.renamed and found.is_same else ""
    if found.is_same and not found.numerics and found.is_thorough:
        return f"the runs are bit-identical{names}"
    what = "result of every operation" if found.is_thorough else "loss and every common snapshot"
    same = f"every {what} up to step {min(found.steps):,} is identical"
    if found.steps[0] != found.steps[1] and not found.experiments:
        return f"{same}; one run is longer"
    return f"{same}, bit for bit{names}" if found.is_same or found.is_thorough else same


class Listed(NamedTuple):
    """A line of the list: a setting and its value in both runs, or one text about it."""

    name: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}  {' | '.join(self.values)}"


def listed(found: Difference) -> list[Listed]:
    """Return the differing settings and numbers of the data, one per line."""
    settings = [
        Listed(name, _pair_texts(pair))
        for name, pair in found.experiments.items()
        if name != "data.digest" or not found.data_tensors
    ]
    return settings + [line for each in found.data_tensors for line in _data_lines(each)]


def _data_lines(found: DataDifference) -> Iterator[Listed]:
    tensor = found.tensor
    shown = list(zip(tensor.positions, tensor.values, strict=True))[:MOST_CELLS]
    for position, (one, other) in shown:
        row, *rest = position
        # A column of a table has a name.
        others = [found.names[rest[0]]] if found.names and rest else [str(place) for place in rest]
        place = ", ".join([str(row), *others])
        yield Listed(f"data.{tensor.name}[{place}]", (number_text(one), number_text(other)))
    left = tensor.elements - len(shown)
    if left:
        columns = [found.names[column] if found.names else column for column in found.columns]
        where = f"in {several('row', found.rows, MOST_PLACES)}"
        where += f" and {several('column', columns, MOST_PLACES)}" if columns else ""
        more = f"and {left:,} more of {tensor.of:,} numbers, {where}; {tensor.size}".rstrip("; ")
        yield Listed(f"data.{tensor.name}", (more,))


def _pair_texts(pair: tuple[Any, Any]) -> tuple[str, str]:
    """Return two values in a line each; cut, unless they differ only later."""
    plain = (tuple(value) if isinstance(value, list) else value for value in pair)
    texts = [str(value).replace("\n", " ") for value in plain]
    short = [text if len(text) <= LONGEST else text[:24] + "..." for text in texts]
    # Cut alike, two texts that differ at their ends would look the same.
    one, other = short if short[0] != short[1] else texts
    return one, other


def match_text(found: Match) -> str:
    """Return the tensors of the first run's step that the second lacks, and the suspects, in lines."""
    one, other = found.names
    compared = ""
    if found.is_double:
        text = " and ".join(map("{} computes in {}".format, found.names, found.precisions))
        if found.precisions[0] == found.precisions[1]:
            text = f"both compute in {found.precisions[0]}"
        compared = f"in double precision, from the same state: {text}"
    elif found.problem is not None:
        compared = f"in {found.precisions[0]} only, not in double precision: {found.problem}"
    has = f"{other} has {found.found} of the {found.of} gradients, parameters and buffers of {one}"
    lines = [
        ("runs", f"{one}\n{other}"),
        ("step", f"{found.step:,}, loss {' | '.join(map(shortest, found.losses))}"),
        ("compared", compared),
        ("before", f"{other} does not have {named(found.begin)}" if found.begin else ""),
        ("after", f"{has}, within {found.rounding:g} of their largest number"),
        ("missing", named(found.end)),
    ]
    if found.end:
        # Each run has a suspect: what it has and the other one lacks.
        sides = zip(found.suspects, found.names, reversed(found.names), strict=True)
        lines += [("first", _suspect_text(each, *runs)) for each, *runs in sides if each is not None]
    return block(lines, f"step {found.step:,} {'matches' if found.is_match else 'does not match'}")


def _suspect_text(found: Suspect, name: str, other: str) -> str:
    given = "from what both have" if found.has_known_inputs else "from results in between"
    lines = [
        f"result of {name} that {other} does not have, {given}:",
        f"#{found.operation} {operation_name(found.observed.operation)}",
        *([] if found.observed.line is None else [str(found.observed.line)]),
    ]
    if math.isfinite(found.distance) and found.nearest is not None:
        far = f"off by {found.distance:.2g} of the largest number"
        lines.append(f"nearest in {other}: #{found.nearest}, {far}")
    return "\n".join(lines)


def rerun_text(found: Rerun) -> str:
    """Return where the steps of a rerun diverge from the recording, and by how much, in lines."""
    last = found.first + len(found.losses) - 1
    changed = (f"{name}: {one} | {there}" for name, (one, there) in found.changed.items())
    lines = [
        ("run", f"{found.name}, steps {found.first:,} to {last:,}"),
        ("changed", "\n".join(changed)),
        ("losses", _losses_text(found)),
        ("bits", "" if found.operation is None else _bits_text(found.operation)),
        ("rounding", _rounding_text(found)),
        ("nearer", _nearer_text(found) if found.others else ""),
        *(("note", problem) for problem in found.problems),
    ]
    return block(lines, _rerun_verdict(found))


def rerun_sentence(found: Rerun) -> str:
    """Return the conclusion in a sentence: where a run diverges, and by how much at most."""
    differ = found.has_loss and found.relative.any()
    return "; ".join([_rerun_verdict(found), *([_farthest_loss(found)] if differ else [])])


def _losses_text(found: Rerun) -> str:
    if not found.has_loss:
        return "not logged; only the states are compared"
    if not found.relative.any():
        return f"all {len(found.losses):,} bit-identical"
    first, lines = int(np.flatnonzero(found.relative)[0]), []
    # In another precision, the first step differs already.
    if found.place.precision is None:
        before = f"bit-identical up to step {found.first + first - 1:,}; " if first else ""
        lines.append(f"{before}step {found.first + first:,}: {_pair(found, first)}")
    lines += [_farthest_loss(found), f"the last: {_pair(found, len(found.losses) - 1)}"]
    return "\n".join(lines)


def _farthest_loss(found: Rerun) -> str:
    far = int(found.relative.argmax())
    share = f"{number(float(found.relative[far]))} of the recorded loss"
    return f"farthest apart at step {found.first + far:,}: {_pair(found, far)}, {share}"


def _pair(found: Rerun, place: int) -> str:
    return f"{shortest(float(found.recorded[place]))} | {shortest(float(found.losses[place]))}"


def _bits_text(found: OperationDifference) -> str:
    observed = found.sides[0]
    where = f"#{found.index} of step {found.step:,}, {operation_name(observed.operation)}"
    lines = [
        f"first difference: operation {where}",
        *([] if observed.line is None else [str(observed.line)]),
        *(f"{e.name}: {e.elements:,} of {e.of:,} numbers{_far(e)}" for e in found.results),
        *([] if found.inputs else ["its inputs are the same"]),
    ]
    return "\n".join(lines)


def _rounding_text(found: Rerun) -> str:
    count = len(found.compared)
    steps = "1 step was" if count == 1 else f"{count} steps were"
    lines = [
        f"{steps} repeated from recorded states, step {found.compared[0]:,} to {found.compared[-1]:,}"
    ]
    if found.beyond is None:
        lines.append(f"all results are within {found.rounding:g} of their largest number")
    else:
        lines.append(
            f"first result that is farther apart than {found.rounding:g} of its largest number:\n"
            f"  {_apart_text(found.beyond)}\n  {_why_apart(found.beyond, found)}"
        )
    if found.residue is not None:
        lines.append(
            "results that are zero except for rounding do not count; the first:\n"
            f"  {_apart_text(found.residue)}\n  {_why_apart(found.residue, found)}"
        )
    # `beyond` was described above.
    far = [each for each in found.farthest if each.relative > 0 and each != found.beyond]
    if far:
        lines += ["farthest apart:", *(f"  {_apart_text(each)}" for each in far)]
    return "\n".join(lines)


def _why_apart(each: Apart, found: Rerun) -> str:
    """Return in a sentence why the results of an operation are farther apart than its inputs."""
    there = f"in {found.place.precision}" if found.place.precision else "in the rerun"
    residue = each.residue
    if residue is None:
        return (
            "its inputs differ by less than that: the operation enlarges the difference, as the "
            "subtraction of nearly equal numbers does"
        )
    sizes = f"{residue.own:.2g} recorded, {residue.there:.2g} {there}"
    if each.is_residue:
        return (
            f"its terms cancel, and only rounding errors remain: at most {sizes}, from inputs of up to "
            f"{residue.of:.2g}"
        )
    return (
        f"numbers of its input {residue.argument} are zero except for rounding (at most {sizes}; the "
        f"largest of all is {residue.of:.2g}), and the result depends on their sign or their ratio, as "
        "the first step of Adam does, or the gradient of a ReLU"
    )


def _apart_text(found: Apart) -> str:
    far = f"{found.relative:.2g}" if np.isfinite(found.relative) else "differs"
    text = f"{far:<8} #{found.operation} of step {found.step:,}, {operation_name(found)}"
    return text + (f"\n{'':11}{found.line}" if found.line is not None else "")


def _nearer_text(found: Rerun) -> str:
    rows = sorted(found.distances.items(), key=lambda item: item[1]["median"])
    # Runs of different lengths are compared over the shortest.
    steps = min(map(len, (found.losses, *found.others.values())))
    over = f", over {steps:,} steps" if steps < len(found.losses) else ""
    return "\n".join(
        f"{name}: losses {row['median']:.2g} away in the median, {row['largest']:.2g} at most{over}"
        for name, row in rows
    )


def _rerun_verdict(found: Rerun) -> str:
    if found.place.precision is not None:
        if not found.has_loss:
            return f"{found.name} was repeated in {found.place.precision}"
        far = number(float(found.relative.max()))
        there = f"the losses in {found.place.precision}"
        return f"{there} are within {far} of those of {found.name}, relative to these"
    if found.has_same_bits:
        return f"{found.name} is bit-identical under these conditions"
    if found.diverges_at is None:
        return f"{found.name} differs under these conditions, but its steps from recorded states do not"
    return f"{found.name} differs from step {found.diverges_at:,} on"
