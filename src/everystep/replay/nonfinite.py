"""The first cause of a non-finite value: which operation made a NaN or an infinity, and of what."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import RunError
from everystep.program.execute import BoundProgram, Observed
from everystep.recording.run import RecordedRun
from everystep.replay.objects import Objects
from everystep.replay.opener import Opener
from everystep.replay.replay import Replay
from everystep.replay.replayable import Replayable
from everystep.replay.step import Step
from everystep.replay.walk import Piece, pieces, walk

__all__ = ["NonFinite", "find_nonfinite"]


@dataclass(frozen=True)
class NonFinite:
    """Where the first NaN or infinity of a run came from.

    step: the opened step; index: of the operation that made it, None where it came in with the batch or
    the state; name: of the tensor; nans, infinities: how many there are in it; rows: the rows of the
    data that it belongs to, where the tensor has a row for each of the batch.
    """

    step: Step
    index: int | None
    name: str
    nans: int
    infinities: int
    rows: tuple[int, ...]

    @property
    def operation(self) -> Observed | None:
        """The operation that made it, with its inputs."""
        return None if self.index is None else self.step.operations[self.index]


class _Counts(NamedTuple):
    nans: int
    infinities: int


class _Watching:
    """Takes steps, and stops at the first in which something is not finite that was not meant to be.

    meant: the operations whose infinities are meant, such as those of a causal mask: there, only NaNs
    count.
    """

    def __init__(self, meant: frozenset[int]) -> None:
        self._meant = meant
        self._found: int | None = None
        self._plans: dict[BoundProgram, tuple[list[Any], Tensor]] = {}
        self._training: Replayable | None = None

    @property
    def is_done(self) -> bool:
        """Whether one has been found."""
        return self._found is not None

    def begin(self, replay: Replay, piece: Piece) -> int:
        """Begin with the state before the piece."""
        self._found, self._plans = None, {}
        return piece.first - 1

    def take(self, replay: Replay, last: int, piece: Piece) -> Tensor:
        """Take steps up to `last`, or to the first that is not finite; return their losses."""
        revived, losses = replay.revived, []
        assert revived.state is not None
        self._training = revived
        while revived.state < last and not self.is_done:
            number = revived.state + 1
            if revived.is_by_program(number):
                losses.append(revived.watch(last, self))
                continue
            step = replay.next_step()
            losses.append(torch.tensor([step.loss], dtype=torch.float64))
            self._note(number, _first_made(step) is None)
        return torch.cat(losses) if losses else torch.empty(0)

    def calls(self, bound: BoundProgram) -> list[Any]:
        """Return the calls of a step with a look at each result."""
        if bound not in self._plans:
            self._plans[bound] = self._plan(bound)
        return self._plans[bound][0]

    def after(self, number: int, bound: BoundProgram) -> bool:
        """Note whether everything in a step was finite; return whether it was."""
        finite = bool(self._plans[bound][1].all())
        if bound.program.optimizer_step is not None and self._training is not None:
            finite &= all(map(_all_finite, self._training.named_state().values()))
        return self._note(number, finite)

    def _note(self, number: int, finite: bool) -> bool:
        self._found = self._found if finite else number
        return finite

    def result(self) -> int | None:
        """Return the step, or None."""
        return self._found

    def _plan(self, bound: BoundProgram) -> tuple[list[Any], Tensor]:
        """Return the calls of a step with a look at each result, and where the answers are."""
        operations = bound.program.operations
        flags = torch.ones(len(operations), dtype=torch.bool, device=bound.loss.device)
        after: dict[int, list[Any]] = {}
        for index, operation in enumerate(operations):
            names = [name for name in operation.results if name] or operation.written()
            tensors = [bound.tensor(name) for name in names]
            floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
            if floats:
                after[index] = [partial(self._look, flags[index], floats, index in self._meant)]
        return bound.calls_with(after), flags

    @staticmethod
    def _look(flag: Tensor, tensors: list[Tensor], only_nans: bool) -> None:
        flag.fill_(True)
        for tensor in tensors:
            looked = ~torch.isnan(tensor) if only_nans else torch.isfinite(tensor)
            flag.logical_and_(looked.all())


def find_nonfinite(
    run: RecordedRun,
    objects: Objects | None = None,
    processes: int | None = None,
    told: Callable[[int], None] = lambda steps: None,
) -> NonFinite | None:
    """Return where the first NaN or infinity of a run came from, or None if all is finite.

    Every result of every operation is looked at. Infinities that an operation is told to make (a causal
    mask) do not count, and what is made of them only where it is a NaN.

    Raises:
        RunError: something that is needed is missing or cannot be read, or a step was not the same when
            it was taken again, so that nothing can be said of it.
    """
    last = run.summary().steps
    if not last:
        return None
    opener = Opener(run, objects)
    first = opener.step(1)
    found = _first_made(first)
    if found is not None:
        return found
    meant = frozenset(
        i for i, each in enumerate(first.operations) if _count(each.results.values()) != (0, 0)
    )
    bound = min(last, run.facts.get("nonfinite_step") or last)
    steps: dict[int, int | None] = {}
    departed: list[int] = []
    walked = walk(run, pieces(run, 1, bound), _Watching(meant), objects, processes, told)
    with closing(walked):  # type: ignore[type-var]  # a generator
        for each in walked:
            steps[each.piece.first] = each.result
            departed += [each.first_loss.step] if each.first_loss else []
            if each.result is not None and _covers(steps, run, bound, each.result):
                break
    candidates = sorted(step for step in steps.values() if step is not None)
    if departed and (not candidates or min(departed) <= candidates[0]):
        raise RunError(
            f"step {min(departed)} of {run.name} was not the same when it was taken again, so that "
            "nothing can be said of what was finite in it; everystep verify says more"
        )
    for step in candidates:
        made = _first_made(opener.step(step))
        if made is not None:
            return made
    return None


def _covers(steps: dict[int, int | None], run: RecordedRun, last: int, found: int) -> bool:
    """Tell whether all pieces before the step found have been gone through."""
    return all(piece.first in steps for piece in pieces(run, 1, last) if piece.first <= found)


def _first_made(step: Step) -> NonFinite | None:
    """Return what first made a NaN or an infinity in a step, if anything did."""
    for name, tensor in _given(step):
        counts = _count([tensor])
        if counts != (0, 0):
            return NonFinite(step, None, name, *counts, _rows(step, tensor))
    for index, observed in enumerate(step.operations):
        before = _count(observed.inputs.values())
        for name, tensor in observed.results.items():
            nans, infinities = _count([tensor])
            is_meant = before.infinities > 0 or _is_told(observed)
            if (nans and not before.nans) or (infinities and before == (0, 0) and not is_meant):
                return NonFinite(step, index, name, nans, infinities, _rows(step, tensor))
    return None


def _given(step: Step) -> Iterator[tuple[str, Tensor]]:
    """Yield what a step begins with."""
    yield from step.batch.tensors.items()
    yield from step.parameters.items()


def _is_told(observed: Observed) -> bool:
    """Tell whether an infinity is among the arguments."""
    text = (*observed.operation.arguments, *observed.operation.keywords.values())
    return any(
        (isinstance(value, dict) and value.get("float") in ("inf", "-inf"))
        or (isinstance(value, float) and math.isinf(value))
        for value in text
    )


def _count(tensors: Any) -> _Counts:
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    nans = sum(int(torch.isnan(tensor).sum()) for tensor in floats)
    return _Counts(nans, sum(int(torch.isinf(tensor).sum()) for tensor in floats))


def _rows(step: Step, tensor: Tensor) -> tuple[int, ...]:
    """Return the rows of the data in which a tensor with a row for each of the batch is not finite."""
    first = next(iter(step.batch.tensors.values()), None)
    rows = len(first) if first is not None and first.ndim else 0
    if tensor.ndim == 0 or len(tensor) != rows:
        return ()
    places = torch.nonzero(~torch.isfinite(tensor).reshape(rows, -1).all(1)).flatten()
    return tuple((places if step.batch.rows is None else step.batch.rows[places.cpu()]).tolist())


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
