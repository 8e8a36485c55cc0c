"""Why an operation has another result in another run: what it is given otherwise, and who set that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.program.observed import Observed
from everystep.recording.asked import Setting
from everystep.recording.texts import value_text
from everystep.replay.evidence import Evidence
from everystep.replay.given import Argument, draws, other_arguments, pairs_of_inputs
from everystep.replay.operations import OperationDifference, TensorDifference
from everystep.replay.origins import of_batch, of_draw, of_outside, of_state

__all__ = ["ANOTHER_OPERATION", "COMPUTED_OTHERWISE", "causes_of"]

#: All that the operation is given is the same.
COMPUTED_OTHERWISE = "the same inputs give different results"
#: Nothing that was asked for says why one run has an operation that the other has not.
ANOTHER_OPERATION = "another operation"
#: Settings that are named where it is open which of them is the cause.
MOST_NAMED = 6
#: The numbers by which torch's kernels know a reduction.
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_NAMES_OF_REDUCTIONS = {number: name for name, number in _REDUCTIONS.items()}


def causes_of(found: OperationDifference, evidence: Evidence) -> list[str]:
    """Return why an operation has another result, in words."""
    a, b = found.one, found.other
    if a is None or b is None or not found.is_one_operation:
        return _of_another_operation(found, evidence)
    if found.others:
        return _of_another_operation(found, evidence, _others_text(found.others, evidence))
    causes = list(_of_arguments(a, b, found, evidence))
    causes += _of_inputs(found, evidence, is_shape_known=bool(causes))
    if draws(a.operation.operator):
        causes += of_draw(evidence)
    if not causes and not found.inputs:
        causes += _of_layout(found, evidence)
    if causes or found.inputs:
        return list(dict.fromkeys(causes))
    if evidence.numerics:
        return [f"{COMPUTED_OTHERWISE}, under different numerics: {', '.join(evidence.numerics)}"]
    return [f"{COMPUTED_OTHERWISE}; all recorded numerics are the same"]


def _others_text(others: tuple[list[str], ...], evidence: Evidence) -> str:
    """Return the inputs that come from another source. others: in words, of both runs."""
    if others[0] == others[1]:
        return f"another part of {', '.join(dict.fromkeys(others[0]))}"
    texts = []
    for each in others:
        names = list(dict.fromkeys(each))
        left = len(names) - MOST_NAMED
        texts.append(", ".join(names[:MOST_NAMED]) + (f" and {left} more" if left > 0 else ""))
    if all(texts):
        return f"different inputs: {' | '.join(texts)}"
    ((run, text),) = [each for each in zip(evidence.names, texts, strict=True) if each[1]]
    return f"different inputs: {text} only in {run}"


def _of_another_operation(
    found: OperationDifference, evidence: Evidence, otherwise: str = ANOTHER_OPERATION
) -> list[str]:
    """Return the settings that say, or may say, why the operations differ; if none, `otherwise`.

    Without such a setting of torch's own code, what is known are the calls that only one step has.
    """
    sides = [each for each in (found.one, found.other) if each is not None]
    near = [each for side in sides for each in _near(side, evidence)]
    if near and all(each.is_torchs for each in near):
        texts = _texts(near)
        return texts if len(texts) == 1 else [f"one or more of: {'; '.join(texts)}"]
    if not near:
        phases = {side.operation.phase for side in sides}
        kinds = {"optimizer"} if phases == {"update"} else {"model", "parameters", "loss", "part"}
        near = [each for each in evidence.settings if each.kind in kinds]
    if kept := _kept_gradients(found, evidence):
        return [kept]
    calls = [
        f"only {run} has {text}"
        for run, text in zip(evidence.names, _calls(found, evidence), strict=True)
        if text
    ]
    # Settings of torch decide which operations the same Python runs.
    of_torch = [each for each in evidence.numerics if each.startswith("torch.")]
    known = [otherwise, *_modes(found, evidence), *calls]
    return ["; ".join(known) + _perhaps([*near, *of_torch])]


def _modes(found: OperationDifference, evidence: Evidence) -> list[str]:
    """Return what differs in the forward pass of the module there, such as whether it trains."""
    paths = {each.operation.module for each in (found.one, found.other) if each is not None}
    texts: list[str] = []
    for path in sorted(filter(None, paths)):
        sides = [
            {
                each.operation.operator: each
                for each in step.operations
                if (each.operation.phase, each.operation.module) == ("forward", path)
            }
            for step in evidence.steps
        ]
        owner, runs = evidence.modules.get(path, ""), [bool(side) for side in sides]
        if "Dropout" in owner and runs[0] is not runs[1]:
            only = evidence.names[runs.index(True)]
            texts.append(
                f"module {path} {owner}, which does nothing in eval mode, computes only in {only}"
            )
        for operator in sides[0].keys() & sides[1].keys():
            one, other = (side[operator] for side in sides)
            arguments = other_arguments(one.operation, other.operation)
            texts += [_argument_text(one, each, evidence) for each in arguments]
    return texts[:MOST_NAMED]


def _kept_gradients(found: OperationDifference, evidence: Evidence) -> str | None:
    """Return which run drops the gradients of the step before, if the other adds to these there."""
    dropped = [step.dropped.keys() for step in evidence.steps]
    pending = {f"gradient/{name}" for name in dropped[0] ^ dropped[1]}
    pending &= evidence.steps[0].state.keys() & evidence.steps[1].state.keys()
    read = {name for each in (found.one, found.other) if each is not None for name in each.inputs}
    if not pending & {name.partition("~")[0] for name in read}:
        return None
    by = 0 if any(name.removeprefix("gradient/") in dropped[0] for name in pending) else 1
    number = evidence.steps[0].number
    return (
        f"zero_grad: {evidence.names[by]} drops the gradients of step {number - 1:,}, "
        f"and {evidence.names[1 - by]} adds to them"
    )


def _calls(found: OperationDifference, evidence: Evidence) -> list[str]:
    """Return the operations from here on that only one step has, or more often, in words, for both."""
    counts = [
        Counter((_name(each), each.operation.phase) for each in step.operations[found.index :])
        for step in evidence.steps
    ]
    texts = []
    for own, others in (counts, counts[::-1]):
        more = [
            f"{name} ({phase}){f' {count} times' if count > 1 else ''}"
            for (name, phase), count in (own - others).items()
        ]
        left = len(more) - MOST_NAMED
        texts.append(", ".join(more[:MOST_NAMED]) + (f" and {left} more" if left > 0 else ""))
    return texts


def _name(seen: Observed) -> str:
    """Return the name of an operator without its overload, or the class of an optimizer."""
    operator = seen.operation.operator
    if operator == "aten._to_copy.default":
        given = (seen.operation.keywords.get(name) for name in ("dtype", "memory_format"))
        to = [kind for each in given if isinstance(each, dict) for kind in each.values()]
        return " ".join(["_to_copy to", *(kind for kind in to if kind != "preserve_format")])
    return seen.operation.name if operator.startswith("aten.") else operator.rpartition(".")[2]


def _perhaps(settings: Sequence[Setting | str]) -> str:
    return f"; perhaps because of {'; '.join(_texts(settings))}" if settings else ""


def _texts(settings: Sequence[Setting | str]) -> list[str]:
    texts = list(dict.fromkeys(map(str, settings)))
    left = len(texts) - MOST_NAMED
    return texts[:MOST_NAMED] + ([f"{left} more"] if left > 0 else [])


def _of_arguments(
    a: Observed, b: Observed, found: OperationDifference, evidence: Evidence
) -> Iterator[str]:
    """Yield the settings that arguments come from; the arguments too, if the settings do not show it.

    A number of a setting may also come as a tensor: a constant of the step, or its learning rate.
    """
    arguments = other_arguments(a.operation, b.operation)
    numbers = [each for each in found.inputs if _is_number_of_step(each, evidence)]
    pairs = [pair for argument in arguments for pair in _pairs_within(argument.values)]
    pairs += [pair for each in numbers for pair in each.values]
    near = _near(a, evidence)
    known = _explaining(near, pairs)
    named = [each for each in known if each.name in {argument.name for argument in arguments}]
    if pairs:
        is_sure = len(near) == 1 and near[0].is_torchs
        chosen = named or known or near * is_sure
        yield from map(str, chosen)
        if any(each in evidence.current for each in chosen):
            yield from evidence.schedules()
        if not known:
            texts = [_argument_text(a, each, evidence) for each in arguments]
            called = evidence.sources[0].called
            texts += [f"{called(each.name)}: {_values_text(each.values[0])}" for each in numbers]
            yield from (text + ("" if is_sure else _perhaps(near)) for text in texts)
    elif any(not each.positions for each in found.inputs):  # of another shape or dtype
        yield from (str(each) for each in near if each.kind == "model")


def _of_inputs(found: OperationDifference, evidence: Evidence, *, is_shape_known: bool) -> Iterator[str]:
    for each in found.inputs:
        name = each.name.partition("~")[0]
        if name in evidence.steps[0].batch.tensors:
            yield from of_batch(name, found, evidence)
        elif is_shape_known and not each.positions:
            continue
        elif name.startswith("group/"):  # a learning rate that is a tensor
            _, place, key = name.split("/", 2)
            yield str(evidence.of_group(key, place, each.values[0]))
        elif name in evidence.around[0].before:
            yield from of_state(name, evidence)
        elif not _is_number_of_step(each, evidence):
            yield from of_outside(each, evidence)


def _is_number_of_step(each: TensorDifference, evidence: Evidence) -> bool:
    """Tell whether an input is one number that neither the batch nor the state has."""
    name = each.name.partition("~")[0]
    is_known = name in evidence.steps[0].batch.tensors or name in evidence.around[0].before
    return each.of == 1 and bool(each.values) and not is_known


def _near(seen: Observed, evidence: Evidence) -> list[Setting]:
    """Return the settings that differ of what runs an operation: a module, the loss, an optimizer."""
    phase, module = seen.operation.phase, seen.operation.module
    if phase == "update":
        return evidence.of_update(module)
    is_of_loss = phase == "loss" or (phase == "backward" and module is None)
    found = [each for each in evidence.settings if each.kind == "loss" and is_of_loss]
    is_of_model = phase == "forward" or (phase == "backward" and module is not None) or not found
    return found + _of_module(module or "", evidence) * is_of_model


def _of_module(path: str, evidence: Evidence) -> list[Setting]:
    """Return the settings that differ of a module, or of the nearest one of torch's that it is in."""
    own = [each for each in evidence.settings if each.kind == "model" and each.path == path]
    if own or not path:
        return own
    around = _of_module(path.rpartition(".")[0], evidence)
    return around if all(each.is_torchs for each in around) else []


def _explaining(settings: list[Setting], pairs: list[tuple[Any, Any]]) -> list[Setting]:
    """Return the settings that pairs of arguments are made of: where some are the pair itself, these."""
    found: list[Setting] = []
    for pair in pairs:
        ranked = [(each, _way_to(each, pair)) for each in settings]
        best = min((way for _, way in ranked if way is not None), default=None)
        found += [each for each, way in ranked if way is not None and way == best]
    return [each for each in settings if each in found]


def _way_to(setting: Setting, pair: tuple[Any, Any]) -> int | None:
    """Return in which way torch makes a pair of arguments of a setting, None if in no known one."""
    for one, other in _pairs_within(setting.values):
        for way, (x, y) in enumerate(zip(_as_arguments(one), _as_arguments(other), strict=True)):
            if _same_number(pair[0], x) and _same_number(pair[1], y):
                return way
    return None


def _as_arguments(value: Any) -> tuple[Any, Any, Any]:
    """Return what may become of a setting: itself, its negative (a rate), what it leaves of 1 (a p)."""
    if value is None or isinstance(value, str):
        known = -1 if value is None else _REDUCTIONS.get(value, value)
        return known, value, value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value, value, value
    return value, -value, 1 - value


def _pairs_within(values: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    """Return the pairs of values that differ; of two lists of the same length, item by item."""
    one, other = values
    if isinstance(one, list | tuple) and not isinstance(other, list | tuple):
        other = [other] * len(one)
    if isinstance(other, list | tuple) and not isinstance(one, list | tuple):
        one = [one] * len(other)
    if isinstance(one, list | tuple) and len(one) == len(other):
        return [pair for a, b in zip(one, other, strict=True) if a != b for pair in [(a, b)]]
    return [(one, other)]


def _same_number(one: Any, other: Any) -> bool:
    """Tell whether two values are the same, if need be once they are rounded to float32."""
    if isinstance(one, bool) is not isinstance(other, bool):
        return False
    if isinstance(one, float) and isinstance(other, float):
        with np.errstate(over="ignore"):
            return bool(one == other or np.float32(one) == np.float32(other))
    return bool(one == other)


def _argument_text(seen: Observed, argument: Argument, evidence: Evidence) -> str:
    path = seen.operation.module
    owner = evidence.modules.get(path or "")
    module = f"module {' '.join(filter(None, (path, owner)))}: " if path else ""
    operator = seen.operation.operator.rpartition(".")[0]
    values = argument.values
    if argument.name == "reduction":
        values = tuple(_NAMES_OF_REDUCTIONS.get(value, value) for value in values)
    return f"{module}{argument.name} of {operator} {_values_text(values)}"


def _values_text(values: tuple[Any, Any]) -> str:
    return f"{value_text(values[0])} | {value_text(values[1])}"


def _of_layout(found: OperationDifference, evidence: Evidence) -> Iterator[str]:
    """Yield the tensors of the same numbers that lie otherwise in memory, on which bits may depend.

    If all of these were made in the step, also the first that an earlier operation was given.
    """
    operations = [step.operations for step in evidence.steps]
    number = found.index
    own = [*_other_layouts(operations[0][number], operations[1][number], evidence)]
    yield from (text for text, _ in own)
    if own and all(is_made for _, is_made in own):
        earlier = (
            text
            for one, other in zip(operations[0][:number], operations[1][:number], strict=True)
            for text, is_made in _other_layouts(one, other, evidence)
            if not is_made
        )
        yield from islice(earlier, 1)


def _other_layouts(one: Observed, other: Observed, evidence: Evidence) -> Iterator[tuple[str, bool]]:
    """Yield the inputs that lie otherwise in memory, in words, and whether the step made them."""
    sources = evidence.sources[0]
    for name, x, y in pairs_of_inputs(one, other, evidence.sources):
        if x.stride() != y.stride():
            layouts = f"{_layout_text(x)} | {_layout_text(y)}"
            yield f"{sources.called(name)} in memory: {layouts}", sources.of(name).made_by is not None


def _layout_text(tensor: Tensor) -> str:
    """Return how a tensor lies in memory, by the name of torch's memory format, or by its strides."""
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    for format, dimensions in zip(formats, (tensor.ndim, 4, 5), strict=True):
        if tensor.ndim == dimensions and tensor.is_contiguous(memory_format=format):
            return str(format).removeprefix("torch.").removesuffix("_format")
    return f"strides {tensor.stride()}"
