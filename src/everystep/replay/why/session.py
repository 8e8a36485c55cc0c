"""A session: the opened steps that an answer goes through."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from everystep.device import on_cpu
from everystep.errors import UsageError
from everystep.ops import Call, NoRuleError, Piece, how_made
from everystep.replay.step import Step
from everystep.replay.why.answer import Group, Number, Origin, Term, Why
from everystep.replay.why.compute import as_tensor, computed, same_value_bits
from everystep.replay.why.rows import row_at
from everystep.replay.why.trace import (
    Before,
    Halves,
    Spot,
    Trace,
    Written,
    same_number_bits,
)

__all__ = ["MOST_TOGETHER", "Session"]

#: So many steps are opened together on the way back.
MOST_TOGETHER = 8
_ORIGINS: dict[str, Origin] = {"input": "batch", "state": "state"}


class Session:
    """The steps that an answer goes through.

    Args:
        step: where it begins.
        back: how many steps before are followed, as far as known; they are opened in the order in which
            they ran, since a replay goes forward.
    """

    def __init__(self, step: Step, back: int = 0) -> None:
        self._first = step
        self._together = min(max(back, 1), MOST_TOGETHER)
        self._traces = {step.number: Trace(step)}

    def open(self, number: int) -> Trace:
        """Open a step.

        Raises:
            UsageError: the steps before are not there.
        """
        if number not in self._traces:
            if self._first.earlier is None:
                raise UsageError(
                    "this step does not know the run that it is of, so the steps before cannot be "
                    "followed; use everystep.open(run).why(step, expression, back=...)"
                )
            for each in range(max(number - self._together + 1, 1), number):
                self._first.earlier(each)
            self._traces[number] = Trace(self._first.earlier(number))
        return self._traces[number]

    def trace(self, number: int) -> Trace:
        """Return the trace of a step that was opened before; opens it again if it was let go of."""
        if number == self._first.number and number not in self._traces:
            self._traces[number] = Trace(self._first)
        return self.open(number)

    def forget_after(self, number: int) -> None:
        """Let go of the steps after one: a NaN may have a long way."""
        self._traces = {n: trace for n, trace in self._traces.items() if n <= number}

    def goes_far(self) -> None:
        """Expect to go back many steps."""
        self._together = MOST_TOGETHER

    @property
    def goes_back(self) -> bool:
        """Whether it can open the steps before."""
        return self._first.earlier is not None

    def read(self, step: Step, spot: Spot) -> Tensor:
        """Return the number at a spot."""
        trace = self.trace(step.number)
        origin = trace.origin(spot)
        if isinstance(origin, Halves):
            return torch.complex(self.read(step, origin.real), self.read(step, origin.imaginary))
        found = trace.after(origin) if isinstance(origin, Written) else trace.at_first(origin)
        if found is not None:
            return found
        for number, seen in enumerate(step.operations):
            if spot.name in seen.inputs and trace.origin(replace(spot, after=number)) == origin:
                element = seen.inputs[spot.name][spot.index]
                return element if spot.half is None else torch.view_as_real(element)[spot.half]
        raise UsageError(
            f"nothing in step {step.number} reads {spot.name}, so its numbers are not known"
        )

    def number(self, step: int, spot: Spot, value: Tensor) -> Number:
        """Return a number that was read at a spot."""
        trace = self.trace(step)
        origin = trace.origin(spot)
        name, row = _called(trace, origin)
        dtype = str(value.dtype).removeprefix("torch.")
        return Number(name, value.item(), dtype, step, row, spot, self)

    def earlier(self, number: Number) -> Number | None:
        """Return a number of the state as the step before left it, None if it is another one there."""
        trace = self.trace(number.step)
        origin = trace.origin(number.spot)
        if not isinstance(origin, Before) or origin.kind != "state" or number.step == 1:
            return None
        if not self.goes_back:
            return None
        before = self.open(number.step - 1)
        left = before.step.end.get(origin.name)
        now = trace.at_first(origin)
        if left is None or now is None or left.shape != trace.step.state[origin.name].shape:
            return None
        name = before.step.places.ends.get(origin.name, origin.name)
        half = None if origin.part is None else origin.part.half_of(left.dtype)
        if origin.part is not None and half is None:
            return None
        element = left[origin.index]
        value = element if origin.part is None else origin.part.of(element)
        if not same_number_bits(value, now):
            return None
        spot = Spot(name, origin.index, len(before.step.operations), half)
        return self.number(number.step - 1, spot, value)

    @on_cpu()
    def why(self, number: Number, terms: int) -> Why:
        """Return where a number comes from."""
        trace = self.trace(number.step)
        origin = trace.origin(number.spot)
        if isinstance(origin, Before):
            return self._not_made(number, trace, origin)
        if isinstance(origin, Halves):
            return self._halves(number, trace.step, origin)
        seen = trace.step.operations[origin.operation]
        after = trace.after(origin)
        if after is not None and not same_number_bits(after, as_tensor(number)):
            note = (
                f"operation #{origin.operation} wrote {after.item()!r} there; something that is not an "
                "operation of the step has changed it since"
            )
            return Why(number, "unseen", trace.step, origin.operation, note=note)
        step, operation = trace.step, origin.operation
        if origin.part is not None:
            return self._part(number, step, origin, terms)

        def at(piece: Piece, k: int) -> Number:
            index = piece.at(k)
            spot = Spot(piece.name, index, operation + piece.is_result)
            return self.number(step.number, spot, call.tensor_of(piece).detach()[index])

        call = self.call(step, origin)
        try:
            return computed(number, step, operation, how_made(call), call, at, terms)
        except NoRuleError:
            return Why(number, "operation", step, operation, unknown=tuple(seen.inputs))

    def _halves(self, number: Number, step: Step, origin: Halves) -> Why:
        """Return the answer for a complex number of which the parts were written one by one."""
        spots = {"real": origin.real, "imaginary": origin.imaginary}
        numbers = {key: self.number(step.number, s, self.read(step, s)) for key, s in spots.items()}
        groups = tuple(Group(key, (Term({key: each}),), 1) for key, each in numbers.items())
        return Why(number, "parts", step, formula="complex(real, imaginary)", groups=groups)

    def _part(self, number: Number, step: Step, origin: Written, terms: int) -> Why:
        """Return the answer for a number that is a part of what an operation wrote."""
        trace = self.trace(step.number)
        dtype, part = trace.spec(origin.name).torch_dtype, origin.part
        if part is None or part.half_of(dtype) is None:
            note = f"it wrote {dtype} there, and these are some of its bits".replace("torch.", "")
            seen = step.operations[origin.operation]
            return Why(
                number, "operation", step, origin.operation, unknown=tuple(seen.inputs), note=note
            )
        spot = Spot(origin.name, origin.index, origin.operation + 1)
        whole = self.why(self.number(step.number, spot, self.read(step, spot)), terms)
        if whole.origin == "unseen":
            return replace(whole, number=number)
        key = "imag" if part.half_of(dtype) else "real"
        recomputed = whole.recomputed if whole.recomputed is None else getattr(whole.recomputed, key)
        return replace(
            whole,
            number=number,
            recomputed=recomputed,
            is_equal=recomputed is not None and same_value_bits(recomputed, number),
            note=f"its {'imaginary' if key == 'imag' else 'real'} part: {whole.number.name} is complex",
        )

    def call(self, step: Step, origin: Written) -> Call:
        """Return the operation that made a number, for its rule."""
        trace, seen = self.trace(step.number), step.operations[origin.operation]
        results = seen.results
        if origin.name not in results:  # written, but nobody looked at it: only its dtype counts
            empty = torch.empty(0, dtype=trace.spec(origin.name).torch_dtype)
            results = {**results, origin.name: empty}
        outputs = trace.outputs(origin.operation)
        return Call(seen.operation, seen.inputs, results, outputs, origin.place, origin.index)

    def _not_made(self, number: Number, trace: Trace, origin: Before) -> Why:
        kind: Origin = _ORIGINS.get(origin.kind, "constant")
        step = trace.step
        note = ""
        if kind == "batch" and origin.name.removeprefix("batch/") not in step.batch.tensors:
            kind, note = "outside", "given to the step by your own code: not of the batch"
            if step.places.has_unseen:
                note += ", or made by an operation that is kept as numbers only"
        elif kind == "batch":
            note = _row_text(step, number.row)
        elif kind == "setting":
            note = "a setting of the optimizer at this step"
        elif kind == "constant":
            note = "a constant: the same in every step that has these operations"
        elif number.step == 1:
            note = "the state before the first step"
        else:
            note = f"the state after step {number.step - 1:,}"
        return Why(number, kind, step, note=note)


def _row_text(step: Step, row: int | None) -> str:
    return "of the batch" if row is None else f"row {row} of {step.batch.whole}"


def _called(trace: Trace, origin: Written | Before | Halves) -> tuple[str, int | None]:
    """Return the expression for a number, and its row, if it is of the batch."""
    if isinstance(origin, Halves):
        halves = [_called(trace, trace.origin(each)) for each in (origin.real, origin.imaginary)]
        return f"complex({halves[0][0]}, {halves[1][0]})", halves[0][1]
    index = str([*origin.index]) if origin.index else ""
    if origin.part is not None:
        half = origin.part.half_of(trace.spec(origin.name).torch_dtype)
        index += ".bits" if half is None else (".real", ".imag")[half]
    if isinstance(origin, Written):
        place = f".{origin.place + 1}" if origin.place else ""
        return f"#{origin.operation}{place}{index}", None
    kind, _, rest = origin.name.partition("/")
    step, row = trace.step, None
    if origin.kind == "input":
        path = origin.name.removeprefix("batch/")
        row = row_at(step, origin.name, origin.index)
        if row is not None and step.batch.rows is not None:
            row = int(step.batch.rows[row])
        if path in ("x", "y"):
            return f"batch.{path}{index}", row
    if kind in ("parameter", "buffer") and rest in getattr(step, f"{kind}s"):
        return f"{kind}s[{rest!r}]{index}", None
    return f"tensors[{origin.name!r}]{index}", row
