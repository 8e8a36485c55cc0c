"""A run elsewhere: as text and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from everystep.views.answers import labelled
from everystep.views.terminal import number, shortest

if TYPE_CHECKING:
    from everystep.replay.operations import OperationDifference
    from everystep.replay.rerun import Rerun
    from everystep.replay.rounding import Apart

__all__ = ["rerun_data", "rerun_sentence", "rerun_text"]


def rerun_text(found: Rerun) -> str:
    """Return where the steps of a run part from the recording elsewhere, and by how much, in lines."""
    last = found.first + len(found.losses) - 1
    lines = [labelled("run", f"{found.name}, steps {found.first:,} to {last:,}")]
    if found.changed:
        pairs = (f"{name}: {one} | {there}" for name, (one, there) in found.changed.items())
        lines.append(labelled("changed", "\n".join(pairs)))
    lines.append(labelled("losses", _losses_text(found)))
    if found.operation is not None:
        lines.append(labelled("bits", _bits_text(found.operation)))
    lines.append(labelled("rounding", _rounding_text(found)))
    if found.others:
        lines.append(labelled("nearer", _nearer_text(found)))
    lines += [labelled("note", problem) for problem in found.problems]
    return "\n".join([*lines, "", _verdict(found)])


def rerun_sentence(found: Rerun) -> str:
    """Return the conclusion in a sentence: where a run parts, and by how much at most."""
    if not found.has_loss or not found.relative.any():
        return _verdict(found)
    far = int(found.relative.argmax())
    apart = (
        f"farthest from the recorded losses at step {found.first + far:,}, by "
        f"{number(float(found.relative[far]))} times the recorded one"
    )
    if found.place.precision is not None:
        return f"In {found.place.precision}, the losses of {found.name} are {apart}"
    return f"{_verdict(found)}; its losses are {apart}"


def rerun_data(found: Rerun) -> dict[str, Any]:
    """Return the same as plain data."""
    return {
        "run": found.name,
        "changed": {name: list(pair) for name, pair in found.changed.items()},
        "first_step": found.first,
        "recorded": found.recorded.tolist(),
        "losses": found.losses.tolist(),
        "same_bits": found.has_same_bits,
        "parts_at": found.parts_at,
        "operation": None if found.operation is None else _operation_data(found.operation),
        "compared_steps": list(found.compared),
        "rounding": found.rounding,
        "beyond_rounding": None if found.beyond is None else _apart_data(found.beyond),
        "zero_but_for_rounding": None if found.residue is None else _apart_data(found.residue),
        "farthest": [_apart_data(each) for each in found.farthest],
        "distance": _distances(found),
        "problems": list(found.problems),
    }


def _losses_text(found: Rerun) -> str:
    if not found.has_loss:
        return "not logged; only the states are compared"
    if not found.relative.any():
        return f"all {len(found.losses):,} bit-identical"
    first, far = int(np.flatnonzero(found.relative)[0]), int(found.relative.argmax())
    lines = []
    if found.place.precision is None:
        before = f"bit-identical up to step {found.first + first - 1:,}; " if first else ""
        lines.append(f"{before}step {found.first + first:,}: {_pair(found, first)}")
    lines += [
        f"farthest apart at step {found.first + far:,}: {_pair(found, far)}, "
        f"{number(float(found.relative[far]))} of the recorded loss",
        f"the last: {_pair(found, len(found.losses) - 1)}",
    ]
    return "\n".join(lines)


def _pair(found: Rerun, place: int) -> str:
    return f"{shortest(float(found.recorded[place]))} | {shortest(float(found.losses[place]))}"


def _bits_text(found: OperationDifference) -> str:
    observed = found.one or found.other
    assert observed is not None
    operation = observed.operation
    module = f" of module {operation.module}" if operation.module else ""
    lines = [
        f"first difference: operation #{found.index} of step {found.step:,}, {operation.operator}"
        f"{module}, {operation.phase}"
    ]
    for each in found.results:
        far = f", {size}" if (size := str(each.size)) else ""
        lines.append(f"{each.name}: {each.elements:,} of {each.of:,} numbers{far}")
    if not found.inputs:
        lines.append("its inputs are the same")
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
            f"  {_apart_text(found.beyond)}\n  {_reason(found.beyond, found)}"
        )
    if found.residue is not None:
        lines.append(
            "results that are zero except for rounding do not count; the first:\n"
            f"  {_apart_text(found.residue)}\n  {_reason(found.residue, found)}"
        )
    far = [each for each in found.farthest if each.relative > 0 and each != found.beyond]
    if far:
        lines += ["farthest apart:", *(f"  {_apart_text(each)}" for each in far)]
    return "\n".join(lines)


def _reason(each: Apart, found: Rerun) -> str:
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
    module = f" of module {found.module}" if found.module else ""
    far = f"{found.relative:.2g}" if np.isfinite(found.relative) else "differs"
    return f"{far:<8} #{found.operation} of step {found.step:,}, {found.operator}{module}, {found.phase}"


def _nearer_text(found: Rerun) -> str:
    rows = sorted(_distances(found).items(), key=lambda item: item[1]["median"])
    steps = _common(found)
    return "\n".join(
        f"{name}: losses {row['median']:.2g} away in the median, {row['largest']:.2g} at most"
        + (f", over {steps:,} steps" if steps < len(found.losses) else "")
        for name, row in rows
    )


def _distances(found: Rerun) -> dict[str, dict[str, float]]:
    """Return how far the losses of each run are from those elsewhere, relative to these."""
    from everystep.replay.rerun import relative_distance

    count = _common(found)
    distances = {}
    for name, losses in ({found.name: found.recorded} | found.others).items():
        relative = relative_distance(found.losses[:count], losses[:count])
        distances[name] = {"median": float(np.median(relative)), "largest": float(relative.max())}
    return distances


def _common(found: Rerun) -> int:
    """Return how many steps all runs have that are laid beside each other."""
    return min(len(losses) for losses in (found.losses, *found.others.values()))


def _operation_data(found: OperationDifference) -> dict[str, Any]:
    observed = found.one or found.other
    assert observed is not None
    operation = observed.operation
    return {
        "step": found.step,
        "index": found.index,
        "operator": operation.operator,
        "phase": operation.phase,
        "module": operation.module,
        "results": [each._asdict() for each in found.results],
        "inputs": [each._asdict() for each in found.inputs],
    }


def _apart_data(each: Apart) -> dict[str, Any]:
    residue = None if each.residue is None else each.residue._asdict()
    return each._asdict() | {"residue": residue}


def _verdict(found: Rerun) -> str:
    if found.place.precision is not None:
        if not found.has_loss:
            return f"{found.name} was repeated in {found.place.precision}"
        far = number(float(found.relative.max()))
        there = f"the losses in {found.place.precision}"
        return f"{there} are within {far} of those of {found.name}, relative to these"
    if found.has_same_bits:
        return f"{found.name} is bit-identical under these conditions"
    if found.parts_at is None:
        return f"{found.name} differs under these conditions, but its steps from recorded states do not"
    return f"{found.name} differs from step {found.parts_at:,} on"
