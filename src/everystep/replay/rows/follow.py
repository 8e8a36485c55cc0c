"""The rows of every tensor of a step, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from everystep.ops import RECORDS
from everystep.ops.labels import MIXED, SHARED, SUM, Reason, Tracked
from everystep.ops.rows import MixesError, Result, RowsCall, filled
from everystep.program.observed import Observed
from everystep.replay.rows.memory import Memory
from everystep.replay.step import Step
from everystep.step.observe import Place, Places, makes_gradients

__all__ = ["Followed", "follow"]

#: Sums of their arguments; with a number alone, a multiple of the other.
_ADDS = {"add", "sub"}
_LINEAR = _ADDS | {"clone", "copy", "_to_copy", "neg", "mul", "div"}
_PARAMETER = "parameter/"


class Followed(NamedTuple):
    """What rows make: gradients by parameter; the loss, if there is one; penalized: see `Penalties`."""

    gradients: dict[str, Tracked]
    loss: Tracked | None
    penalized: frozenset[str]


def follow(step: Step, rows: int) -> Followed:
    """Return the gradients of a step and its loss, with the rows that make them.

    rows: of the batch. What was there before the step, and what an optimizer wrote, belongs to no row.
    """
    memory, penalties = Memory(step, rows), Penalties(step.places)
    places = step.places
    due: dict[int, list[str]] = {}
    for parameter, place in places.gradients.items():
        due.setdefault(_after_backward(step, place), []).append(parameter)
    terms = {places.tensors[place.names[0]].storage for place in places.gradients.values()}
    if places.loss is not None:
        terms.add(places.tensors[places.loss].storage)
    _add_parts(step, terms)
    found: dict[str, Tracked] = {}
    for index in range(len(step.operations) + 1):
        for parameter in due.get(index, ()):
            place = places.gradients[parameter]
            is_last = index == place.after
            value = step.gradients[parameter]
            if not is_last and memory.is_written(place.names[0]):
                value = memory.value(place.names[0])
            tracked = memory.read(place.names[0], value)
            if memory.mixed is not None:
                # What backward makes of such a loss may look like terms of rows, and is none.
                tracked = tracked._replace(labels=filled(MIXED, value).labels, reason=memory.mixed)
            found[parameter] = tracked
        if index < len(step.operations):
            _take(memory, penalties, index, step.operations[index], terms)
    if places.loss is None:
        return Followed(found, None, penalties.parameters)
    loss = torch.as_tensor(step.loss, dtype=places.tensors[places.loss].torch_dtype)
    tracked = memory.read(places.loss, loss.reshape(places.tensors[places.loss].shape))
    return Followed(found, tracked, penalties.parameters)


def _add_parts(step: Step, terms: set[str]) -> None:
    """Add the memory of what is added up to a gradient or a loss, which is a term of it as well."""
    for seen in reversed(step.operations):
        made = {step.places.tensors[name].storage for name in (*seen.results, *seen.written)}
        is_linear = seen.operation.name.rstrip("_") in _ADDS or len(seen.inputs) == 1
        if made & terms and seen.operation.name.rstrip("_") in _LINEAR and is_linear:
            terms |= {step.places.tensors[name].storage for name in seen.inputs}


def _after_backward(step: Step, place: Place) -> int:
    """Return how many operations had run when backward had made a gradient, before it was clipped."""
    storage = step.places.tensors[place.names[0]].storage
    for index in range(place.after - 1, -1, -1):
        seen = step.operations[index]
        written = {step.places.tensors[name].storage for name in (*seen.results, *seen.written)}
        if storage in written:
            return place.after if makes_gradients(seen.operation) else _last_backward(step, index)
    return place.after


def _last_backward(step: Step, before: int) -> int:
    made = (i for i in range(before - 1, -1, -1) if makes_gradients(step.operations[i].operation))
    return next(made, before) + 1


def _take(memory: Memory, penalties: Penalties, index: int, seen: Observed, terms: set[str]) -> None:
    """Note what an operation wrote."""
    given = {name: memory.read(name, tensor) for name, tensor in seen.inputs.items()}
    made = {**seen.results, **seen.written}
    results, why = _results(memory, seen, given, terms)
    own = Reason(why or "mixes rows", index, seen.operation.operator)
    sums = [each.summed for each in given.values() if each.summed and each.has(SUM)]
    mixing = [each.reason for each in given.values() if each.reason and each.has(MIXED)]
    earlier = Reason.first([*mixing, *(each.then(own) for each in sums)])
    adding = Reason("adds up numbers of several rows", index, seen.operation.operator)
    summed = Reason.first([*sums, adding])
    is_data = all(each.is_data for each in given.values())
    # A loop that calls functions rather than modules has no other phase before backward.
    is_forward = seen.operation.phase in ("forward", "loss", "other") and index < memory.last_backward
    found: dict[str, Tracked] = {}
    for name, tensor in made.items():
        if name in seen.written and torch.equal(tensor, seen.inputs[name]):
            continue
        result = results.get(name) or filled(MIXED, tensor)
        is_mixed = bool((result.labels == MIXED).any())
        here = own._replace(why=result.why) if result.why else earlier or own
        reason = here if is_mixed else None
        tracked = Tracked(tensor, result.labels, result.terms, result.is_mean, reason, is_data, summed)
        memory.write(name, tracked)
        found[name] = tracked
        if is_mixed and not is_data and is_forward and not result.why:
            is_state = memory.places.storages[memory.places.tensors[name].storage].kind == "state"
            memory.mixed = Reason.first([memory.mixed, None if is_state else reason])
    if seen.operation.phase not in ("backward", "update"):
        penalties.note(seen, given, found)


def _results(
    memory: Memory, seen: Observed, given: Mapping[str, Tracked], terms: set[str]
) -> tuple[dict[str, Result], str | None]:
    """Return what is known of the results, by name, and why nothing is known of others."""
    places, operation = memory.places, seen.operation
    made = {**seen.results, **seen.written}
    if operation.phase == "update" and all(
        places.storages[places.tensors[name].storage].kind == "state" and "gradient/" not in name[:9]
        for name in made
    ):
        return {name: filled(SHARED, tensor) for name, tensor in made.items()}, None
    storages = {name: places.tensors[name].storage for name in (*given, *made)}
    call = RowsCall(
        seen,
        given,
        is_term=any(
            storages[name] in terms or not tensor.dim() for name, tensor in seen.results.items()
        ),
        is_backward=operation.phase not in ("forward", "loss"),
        from_state=frozenset(n for n in given if places.storages[storages[n]].kind == "state"),
    )
    record = RECORDS.get(call.kind)
    if record is not None and record.rows is not None:
        try:
            names = seen.results or seen.written  # some kernels only write
            return dict(zip(names, record.rows(call), strict=True)), None
        except MixesError as error:
            return {}, str(error)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return {}, "has no rule for these arguments"
    if all(each.is_shared for each in given.values()):
        return {name: filled(SHARED, tensor) for name, tensor in made.items()}, None
    return {}, "has no rule"


class Penalties:
    """Follows the state through the forward pass, up to where it meets numbers of rows.

    A parameter that goes into a loss only by way of numbers of rows has a gradient that rows make up:
    what is left of it is not a penalty, but numbers that are the same for all rows.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        #: Which parameters a storage was made from without rows; at first, those that lie there.
        self._ways: dict[str, frozenset[str]] = {}
        for name, spec in places.tensors.items():
            if name.startswith(_PARAMETER):
                own = frozenset({name.removeprefix(_PARAMETER)})
                self._ways[spec.storage] = self._ways.get(spec.storage, frozenset()) | own
        self._ends: set[str] = set()

    def note(self, seen: Observed, given: Mapping[str, Tracked], made: Mapping[str, Tracked]) -> None:
        """Note an operation that is not of a backward pass, with its arguments and results."""
        ways = [self._of(name) for name in given]
        together = frozenset[str]().union(*ways)
        self._ends -= {self._storage(name) for name in given}
        for name, tracked in made.items():
            storage = self._storage(name)
            has_rows = not tracked.is_shared and not tracked.has(SUM)
            before = self._ways.get(storage, frozenset()) if name in seen.written else frozenset()
            self._ways[storage] = before | (frozenset() if has_rows else together)
            if tracked.value.numel() == 1:
                self._ends.add(storage)

    @property
    def parameters(self) -> frozenset[str]:
        """The parameters that have such a term in a loss, which is a number that nothing reads."""
        names = frozenset[str]().union(*(self._ways.get(end, frozenset()) for end in self._ends))
        loss = self._places.loss
        return names | (self._of(loss) if loss is not None else frozenset())

    def _of(self, name: str) -> frozenset[str]:
        return self._ways.get(self._storage(name), frozenset())

    def _storage(self, name: str) -> str:
        return self._places.tensors[name].storage
