"""The rows of every tensor of a step, operation by operation, and of the memory that they write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.answers.trace import Trace
from everystep.ops import RECORDS
from everystep.ops.labels import MIXED, SHARED, SUM, Reason, Tracked, compressed
from everystep.ops.row_rules import MixesError, Result, RowsCall, filled
from everystep.program.observed import Observed
from everystep.program.operation import TensorSpec, fills
from everystep.replay.opened_step import Step

__all__ = ["Followed", "RowsFollower"]

#: Sums of their arguments; with a number alone, a multiple of the other.
_ADDS = {"add", "sub"}
_LINEAR = _ADDS | {"clone", "copy", "_to_copy", "neg", "mul", "div"}
_PARAMETER = "parameter/"
_NONE = frozenset[str]()
_OTHER_DTYPE = Reason("memory is read as a dtype of another size")
_OUTSIDE = Reason("a tensor that the step reads may come from operations with recorded results only")
_SHARED = Reason("rows of the batch share memory")


class Followed(NamedTuple):
    """What rows make: gradients by parameter; the loss, if there is one.

    penalized: parameters that go into a loss without rows, too.
    """

    gradients: dict[str, Tracked]
    loss: Tracked | None
    penalized: frozenset[str]


# What is followed, e.g. of `mean(square(x @ w - y))` with 3 rows:
#   x, y           row of each number: its place along the first axis
#   x @ w - y      the same rows: each is computed from its own
#   mean           SUM: one number, with a term of each row
#   w.grad         SUM again: a term of each row, in all of its numbers
# What several rows go into without a sum, such as a maximum over the batch, is MIXED.
class RowsFollower:
    """Follows the operations of a step, with the rows that make their results.

    Tensors from before the step, and those that an optimizer wrote, belong to no row.
    """

    def __init__(self, step: Step, rows: int) -> None:
        self._step = step
        self._count = rows
        self._places = step.places
        self._trace = Trace(step)
        self._memory = _Memory(self._trace, rows)
        phases = [seen.operation.phase for seen in step.operations]
        #: The operations before the last of backward; all, without backward.
        self._last_backward = max(
            (i for i, phase in enumerate(phases) if phase == "backward"), default=len(phases)
        )
        #: Why the loss is not a sum of losses of single rows; None: it may be one.
        self._mixed: Reason | None = None
        self._terms = self._storages_of_terms()
        # A parameter that enters the loss only through numbers of rows has a gradient that is a sum over
        # rows: its rest is not a penalty, but numbers that are the same for all rows. So the state is
        # followed through the forward pass, too, until it meets numbers of rows.
        #: The parameters that a storage was computed from without rows; at first, those in it.
        self._ways: dict[str, frozenset[str]] = {}
        for name, spec in self._places.tensors.items():
            if name.startswith(_PARAMETER):
                own = {name.removeprefix(_PARAMETER)}
                self._ways[spec.storage] = self._ways.get(spec.storage, _NONE) | own
        #: Single numbers that nothing reads.
        self._ends: set[str] = set()

    def followed(self) -> Followed:
        """Return the gradients of the step and its loss, with the rows that make them."""
        step, places, memory = self._step, self._places, self._memory
        due: dict[int, list[str]] = {}
        for parameter, place in places.gradients.items():
            due.setdefault(place.after, []).append(parameter)
        found: dict[str, Tracked] = {}
        for index in range(len(step.operations) + 1):
            for parameter in due.get(index, ()):
                value = step.gradients[parameter]
                tracked = memory.read(places.gradients[parameter].names[0], value)
                if self._mixed is not None:
                    # The gradients of such a loss may look like terms of rows, but are not.
                    labels = filled(MIXED, value).labels
                    tracked = tracked._replace(labels=labels, reason=self._mixed)
                found[parameter] = tracked
            if index < len(step.operations):
                self._take(index, step.operations[index])
        penalized = _NONE.union(*(self._ways.get(end, _NONE) for end in self._ends))
        # A tensor that no operation wrote was logged as a number, or computed outside of the step.
        if places.loss is None or not self._trace.writers(places.loss):
            return Followed(found, None, penalized)
        spec = places.tensors[places.loss]
        loss = torch.as_tensor(step.loss, dtype=spec.torch_dtype).reshape(spec.shape)
        penalized |= self._ways.get(spec.storage, _NONE)
        return Followed(found, memory.read(places.loss, loss), penalized)

    def apart(self) -> Reason | None:
        """Return why tensors of the batch may have different rows, as those of micro-batches do.

        Those of one batch meet: of inputs and targets, or of a pair, a result is made before the sum.
        """
        trace = self._trace
        batch = [name for name, each in self._step.batch.tensors.items() if each.dim()]
        #: The tensors of the batch that a storage was computed from; those that met, by each of them.
        sources = {trace.storage(n): {n} for n in batch if n in self._places.tensors}
        met = {name: {name} for name in batch}
        learned: set[str] = set()
        for seen in self._step.operations:
            given = [(n, sources[s]) for n in seen.inputs if (s := trace.storage(n)) in sources]
            here = set[str]().union(*(each for _, each in given))
            if seen.operation.phase == "backward":
                learned |= here
                continue
            # The losses of micro-batches are added up, or stacked for their mean.
            is_sum = seen.operation.name.rstrip("_") in _ADDS | {"stack", "cat"}
            if len(given) > 1 and not (is_sum and not any(seen.inputs[n].dim() for n, _ in given)):
                together = here.union(*(met[name] for name in here))
                met |= dict.fromkeys(together, together)
            if not here:
                continue
            for name in (*seen.results, *seen.written):
                if trace.kind(name) != "state":  # such as the running mean of all batches
                    sources[trace.storage(name)] = here | sources.get(trace.storage(name), set())
        one, *others = [name for name in batch if name in learned] or [""]
        apart = next((name for name in others if name not in met[one]), None)
        if apart is None:
            return None
        return Reason(f"no operation joins {one} and {apart} of the batch, so their rows may differ")

    def _storages_of_terms(self) -> set[str]:
        """Return the memory of gradients and the loss, and of the terms added up to them."""
        names = [place.names[0] for place in self._places.gradients.values()]
        names += [] if self._places.loss is None else [self._places.loss]
        terms = {self._trace.storage(name) for name in names}
        # From the loss and the gradients back to what was added up to them.
        for seen in reversed(self._step.operations):
            name = seen.operation.name.rstrip("_")
            made = {self._trace.storage(each) for each in (*seen.results, *seen.written)}
            if name in _LINEAR and (name in _ADDS or len(seen.inputs) == 1) and made & terms:
                terms |= {self._trace.storage(each) for each in seen.inputs}
        return terms

    def _take(self, index: int, seen: Observed) -> None:
        memory, trace, operation = self._memory, self._trace, seen.operation
        given = {name: memory.read(name, tensor) for name, tensor in seen.inputs.items()}
        results, why = self._results(seen, given)
        own = Reason(why or "mixes rows", index, operation.operator)
        # A sum over rows that is used further mixes them: the reason is where the sum was made.
        sums = [each.summed for each in given.values() if each.summed and each.has(SUM)]
        mixing = [each.reason for each in given.values() if each.reason and each.has(MIXED)]
        earlier = Reason.first([*mixing, *(each.then(own) for each in sums)])
        summed = Reason.first([*sums, own._replace(why="adds up numbers of several rows")])
        is_data = all(each.is_data for each in given.values())
        # A loop that calls functions rather than modules has no other phase before backward.
        is_forward = operation.phase in ("forward", "loss", "other") and index < self._last_backward
        found: dict[str, Tracked] = {}
        for name, tensor in {**seen.results, **seen.written}.items():
            # A write that changes no number leaves the rows of the tensor as they were.
            if name in seen.written and torch.equal(tensor, seen.inputs[name]):
                continue
            result = results.get(name) or filled(MIXED, tensor)
            here = own._replace(why=result.why) if result.why else earlier or own
            reason = here if bool((result.labels == MIXED).any()) else None
            found[name] = Tracked(
                tensor, result.labels, result.terms, result.is_mean, reason, is_data, summed
            )
            memory.write(name, found[name])
            if reason and is_forward and not (is_data or result.why or trace.kind(name) == "state"):
                self._mixed = Reason.first([self._mixed, reason])
        if operation.phase not in ("backward", "update"):
            self._note_ways(seen, given, found)

    def _results(
        self, seen: Observed, given: Mapping[str, Tracked]
    ) -> tuple[dict[str, Result], str | None]:
        """Return labels of the results, by name, and the reason for results without labels."""
        trace, made = self._trace, {**seen.results, **seen.written}
        shared = {name: filled(SHARED, tensor) for name, tensor in made.items()}
        if seen.operation.phase == "update" and all(
            trace.kind(name) == "state" and not name.startswith("gradient/") for name in made
        ):
            return shared, None
        call = RowsCall(
            seen,
            given,
            count=self._count,
            is_term=any(
                trace.storage(name) in self._terms or not tensor.dim()
                for name, tensor in seen.results.items()
            ),
            is_backward=seen.operation.phase not in ("forward", "loss"),
            from_state=frozenset(name for name in given if trace.kind(name) == "state"),
        )
        record = RECORDS.get(call.kind)
        if record is not None and record.rows is not None:
            try:
                names = seen.results or seen.written  # some kernels only write
                return dict(zip(names, record.rows(call), strict=True)), None
            except MixesError as error:
                return {}, str(error)
            # Rules are written for usual arguments; rarer ones may not fit them.
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                return {}, "has no rule for these arguments"
        return (shared, None) if all(each.is_shared for each in given.values()) else ({}, "has no rule")

    def _note_ways(
        self, seen: Observed, given: Mapping[str, Tracked], made: Mapping[str, Tracked]
    ) -> None:
        """Note the parameters behind what an operation made that is not of a backward pass."""
        storages = {self._trace.storage(name) for name in given}
        together = _NONE.union(*(self._ways.get(storage, _NONE) for storage in storages))
        self._ends -= storages
        for name, tracked in made.items():
            storage = self._trace.storage(name)
            has_rows = not tracked.is_shared and not tracked.has(SUM)
            before = self._ways.get(storage, _NONE) if name in seen.written else _NONE
            self._ways[storage] = before | (_NONE if has_rows else together)
            if tracked.value.numel() == 1:
                self._ends.add(storage)


class _Written(NamedTuple):
    spec: TensorSpec
    tracked: Tracked


class _Memory:
    """Writes to the storages of a step, and their rows.

    Memory that no operation has written belongs to no row, except the batch, with a row along the first
    axis of each tensor.
    """

    def __init__(self, trace: Trace, rows: int) -> None:
        self._trace = trace
        self._written: dict[str, list[_Written]] = {}
        given: dict[str, dict[str, Tracked]] = {}
        for name, tensor in trace.step.batch.tensors.items():
            spec = trace.step.places.tensors.get(name)
            if spec is not None and spec.shape == tuple(tensor.shape):
                labels = _filled(SHARED, spec)
                if tensor.dim():
                    places = torch.arange(rows, dtype=torch.int32)
                    labels = places.reshape(-1, *[1] * (tensor.dim() - 1)).expand(spec.shape)
                given.setdefault(spec.storage, {})[name] = Tracked(tensor, labels, is_data=True)
        for name, spec in trace.step.places.tensors.items():
            if trace.kind(name) != "input":
                continue
            here = given.get(spec.storage, {})
            if not here and (prod(spec.shape) <= 1 or not trace.step.places.has_unseen):
                continue  # from outside, and not of a row, such as the weights of classes
            if not here or not self._agree(here):
                reason = _SHARED if here else _OUTSIDE
                self.write(name, Tracked(torch.empty(0), _filled(MIXED, spec), reason=reason))
            elif name in here:
                self.write(name, here[name])

    def _agree(self, tracked: dict[str, Tracked]) -> bool:
        """Return whether no number on a storage belongs to two rows."""
        written = [_Written(self._trace.spec(name), each) for name, each in tracked.items()]
        for spec, _ in written:
            if any(
                size > 1 and not stride for size, stride in zip(spec.shape, spec.stride, strict=True)
            ):
                return False
        # If tensors have different labels for one number, the last one hides the others.
        start = torch.tensor(MIXED, dtype=torch.int32)
        return all(
            torch.equal(_laid(written, spec, start, lambda each: each.labels), own.labels)
            for spec, own in written
        )

    def write(self, name: str, tracked: Tracked) -> None:
        """Note the new content of a tensor."""
        spec = self._trace.spec(name)
        before = self._written.get(spec.storage, [])
        # Only writes that can still be seen are kept: a loop writes the same memory again and again.
        kept = [each for each in before if not _covers(spec, each.spec)]
        tracked = tracked._replace(labels=compressed(tracked.labels))
        self._written[spec.storage] = [*kept, _Written(spec, tracked)]

    def read(self, name: str, value: Tensor) -> Tracked:
        """Return the tensor with its labels; value: its numbers."""
        found = self._read(name, value)
        terms = found.terms
        if terms is None or not self._trace.spec(name).is_conjugated:
            return found
        return found._replace(terms=lambda row: terms(row).conj().resolve_conj())

    def _read(self, name: str, value: Tensor) -> Tracked:
        spec = self._trace.spec(name)
        written = self._written.get(spec.storage, [])
        if not written:
            labels = _filled(SHARED, spec).to(value.device)
            return Tracked(value, labels, is_data=self._trace.kind(name) != "state")
        last = written[-1]
        if _same_place(last.spec, spec):
            return last.tracked._replace(value=value, labels=last.tracked.labels.to(value.device))
        reason = Reason.first(each.tracked.reason for each in written)
        if len({each.torch_dtype.itemsize for each in (spec, *(w.spec for w in written))}) > 1:
            return Tracked(value, _filled(MIXED, spec), reason=reason or _OTHER_DTYPE)
        laid = _laid(written, spec, torch.tensor(SHARED, dtype=torch.int32), lambda each: each.labels)
        labels = compressed(laid).to(value.device)

        def terms(row: int) -> Tensor:
            return _laid(written, spec, value.new_zeros(()), lambda each: each.terms and each.terms(row))

        return Tracked(
            value,
            labels,
            terms if bool((labels == SUM).any()) else None,
            is_mean=all(each.tracked.is_mean for each in written if each.tracked.terms),
            reason=reason,
            is_data=all(each.tracked.is_data for each in written),
            summed=Reason.first(each.tracked.summed for each in written if each.tracked.has(SUM)),
        )


def _filled(label: int, spec: TensorSpec) -> Tensor:
    return torch.full((), label, dtype=torch.int32).expand(spec.shape)


def _laid(
    written: list[_Written],
    spec: TensorSpec,
    start: Tensor,
    of: Callable[[Tracked], Tensor | None],
) -> Tensor:
    """Return the content of a tensor after a sequence of writes.

    start: fills its memory before (0-dimensional); of: returns the content of a write.
    """
    specs = spec, *(each.spec for each in written)
    # As the storage lay in memory: writes to any view of it are copied there, one after the other.
    flat = start.repeat(max(each.end // each.torch_dtype.itemsize for each in specs))
    for each in written:
        content = of(each.tracked)
        if content is not None:
            _on(flat, each.spec).copy_(content.reshape(each.spec.shape))
    return _on(flat, spec)


def _on(flat: Tensor, spec: TensorSpec) -> Tensor:
    return flat.as_strided(spec.shape, spec.stride, spec.offset)


def _same_place(one: TensorSpec, other: TensorSpec) -> bool:
    """Return whether two tensors have the same numbers and shape; strides along size 1 do not count."""
    if one.shape != other.shape or one.offset != other.offset or one.dtype != other.dtype:
        return False
    return all(a == b or n == 1 for n, a, b in zip(one.shape, one.stride, other.stride, strict=True))


def _covers(new: TensorSpec, old: TensorSpec) -> bool:
    """Return whether a tensor overwrites another for sure: the same place, or all of a dense range."""
    if _same_place(new, old):
        return True
    inside = new.offset <= old.offset and new.end >= old.end
    is_alike = new.torch_dtype.itemsize == old.torch_dtype.itemsize
    return inside and is_alike and fills(new.geometry)
