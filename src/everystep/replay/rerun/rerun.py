"""Rerun: takes the steps of a run elsewhere, and says where they part from the recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from everystep.device import on_cpu
from everystep.errors import UsageError
from everystep.numerics import Numerics
from everystep.program.number_slots import READ
from everystep.program.precision import counters
from everystep.program.program import Program
from everystep.recording.run import RecordedRun
from everystep.replay.operations import OperationDifference, first_difference
from everystep.replay.processes import Opener, recorded_numerics
from everystep.replay.recorded_steps import read_program
from everystep.replay.replay import Replay
from everystep.replay.rerun.child import footprints
from everystep.replay.rerun.other_process import OtherProcess, other_process
from everystep.replay.rerun.place import Place
from everystep.replay.rounding import Apart, apart, tolerance
from everystep.replay.shown import Shown

if TYPE_CHECKING:
    import polars

__all__ = ["Rerun", "relative_distance", "rerun"]

#: Steps between two looks at the losses.
STRIDE = 256
#: Steps that are compared operation by operation, spread over the run, and bytes of them.
COMPARED, MOST_BYTES = 12, 1_000_000_000
#: Operations that are named as the farthest apart.
FARTHEST = 5


@dataclass(frozen=True)
class Rerun(Shown):
    """The steps of a run as they are elsewhere.

    place: where; changed: what bits depend on and differs there, by name, recorded and there; first: the
    first step; recorded, losses: of all steps (steps), recorded and there; has_loss: whether the run has
    losses; parts_at: the first step with another loss or another state, None if all bits are the same,
    or in another precision; operation: the first with other bits, in that step; compared: steps that
    were compared from the recorded state before each; rounding: how far apart numbers are by rounding
    alone; beyond: the first result of these steps that is farther apart; residue: the first result that
    is zero but for rounding: it is not among these; farthest: the operations that are farthest apart;
    others: losses of other runs that were asked for, by name; problems: what could not be compared, or
    was taken from the recording.
    """

    name: str
    place: Place
    changed: dict[str, tuple[Any, Any]]
    first: int
    recorded: NDArray[np.float64]
    losses: NDArray[np.float64]
    has_loss: bool
    parts_at: int | None
    operation: OperationDifference | None
    compared: tuple[int, ...]
    rounding: float
    beyond: Apart | None
    residue: Apart | None
    farthest: tuple[Apart, ...]
    others: dict[str, NDArray[np.float64]]
    problems: tuple[str, ...]

    def __repr__(self) -> str:
        if self.place.precision is not None:
            found = f"{len(self.losses):,} steps in {self.place.precision}"
        elif self.parts_at is None:
            found = f"{len(self.losses):,} steps are bit-identical"
        else:
            found = f"differs from step {self.parts_at:,} on"
        return f"<rerun of {self.name}: {found}>"

    @property
    def relative(self) -> NDArray[np.float64]:
        """How far the loss of each step is from the recorded one, relative to that (steps)."""
        return relative_distance(self.recorded, self.losses)

    @property
    def has_same_bits(self) -> bool:
        """Whether all losses, and all states that could be compared, are bit-identical."""
        return self.place.precision is None and self.parts_at is None and not self.relative.any()

    @property
    def curves(self) -> dict[str, polars.DataFrame]:
        """The losses as recorded, there, and of the runs laid beside, by name: columns step and loss."""
        import polars as pl

        there = self.place.precision or "rerun"
        losses = {self.name: self.recorded, f"{self.name}, {there}": self.losses} | self.others
        steps = np.arange(self.first, self.first + len(self.losses))
        return {
            name: pl.DataFrame({"step": steps[: len(each)], "loss": each[: len(steps)]})
            for name, each in losses.items()
        }


def relative_distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far numbers are from others, relative to the first; infinite if only one is finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = np.abs(other - one) / np.abs(one)
    both = np.isfinite(one) & np.isfinite(other)
    is_same = (one == other) | (np.isnan(one) & np.isnan(other))
    return np.where(is_same, 0.0, np.where(both, found, np.inf))


@on_cpu()
def rerun(
    opener: Opener,
    place: Place,
    others: Sequence[RecordedRun] = (),
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Rerun:
    """Take the steps of a run elsewhere, from its first state on, and compare them with the recording.

    Programs alone do it. Of a fork, these are the steps since it began. Then single steps are taken
    there from recorded states, so that what each operation adds can be told from what it was given.

    Args:
        opener: of the run.
        place: where.
        others: runs of as many steps to lay beside.
        on_progress: called with the number of steps just taken.

    Raises:
        ExperimentError: the place is not one.
        RunError: the steps cannot be taken there; gives the reason.
        TrainingError: the process there does not start, or ended early.
    """
    place.check()
    run = opener.run
    facts, first, last = run.facts, run.stretches[-1].first, run.newest_step()
    if last < first:
        raise UsageError(f"{run.name} has no steps to repeat")
    known = recorded_numerics(facts)
    recorded = np.array(run.losses_between(first, last))
    with other_process(place, place.environment(known)) as process:
        answer = process.ask(
            "open",
            run=str(run.directory.absolute()),
            threads=place.threads or known.threads,
            precision=place.precision,
            first=first,
        )
        search = _Search(opener, process, first, last)
        losses = np.array([*search.losses(recorded, place.precision is None, on_progress)])
        operation, parts_at = None, None
        if place.precision is None and search.differs_by is not None:
            parts_at = search.parting_step()
            if parts_at is not None:
                one = opener.step(parts_at)
                operation = first_difference(one, process.step(one, opener.state(parts_at - 1)))
        size = max(1, opener.step(first).bytes)
        steps = _spread(first, last, max(2, min(COMPARED, MOST_BYTES // size)))
        limit = _rounding(facts.loss_dtype, place)
        found = _compared(opener, process, steps, limit)
    return Rerun(
        name=run.name,
        place=place,
        changed=_changed(known, answer["numerics"], place),
        first=first,
        recorded=recorded,
        losses=losses,
        has_loss=facts.has_loss,
        parts_at=parts_at,
        operation=operation,
        compared=tuple(steps),
        rounding=limit,
        beyond=_first_beyond(found, limit),
        residue=next((each for each in found if each.is_residue and not each.follows), None),
        farthest=_farthest([each for each in found if not each.is_residue]),
        others={each.name: np.array(each.losses_between(first, last)) for each in others},
        problems=tuple(dict.fromkeys([*_taken_over(run), *_diverged(opener), *opener.problems])),
    )


class _Search:
    """Takes steps elsewhere, and finds where they part from the recording.

    differs_by: the first step by which a loss or a state differs, None: none does.
    """

    def __init__(self, opener: Opener, process: OtherProcess, first: int, last: int) -> None:
        self._opener = opener
        self._process = process
        self._first, self._last = first, last
        self._states = [r.step for r in opener.run.snapshot_rows() if first - 1 <= r.step < last + 1]
        self._same = first - 1
        self.differs_by: int | None = None

    def losses(
        self,
        recorded: NDArray[np.float64],
        are_compared: bool,
        on_progress: Callable[[int], None],
    ) -> Iterator[float]:
        """Yield the losses there. recorded: of the same steps; are_compared: look where bits differ."""
        done = self._first - 1
        while done < self._last:
            ends = [s for s in self._states if s > done] if are_compared else []
            end = min([done + STRIDE, self._last, *ends[:1]])
            losses = self._process.ask("run", last=end)["losses"]
            if are_compared and self.differs_by is None:
                begin = done - self._first + 1
                apart_at = relative_distance(recorded[begin : begin + len(losses)], np.array(losses))
                if apart_at.any():
                    self.differs_by = done + 1 + int(np.flatnonzero(apart_at)[0])
                elif end in self._states and self._process.ask("compare")["differ"]:
                    self.differs_by = end
                elif end in self._states:
                    self._same = end
            yield from losses
            on_progress(len(losses))
            done = end

    def parting_step(self) -> int | None:
        """Return the first step with another result, None if it cannot be found again."""
        assert self.differs_by is not None
        for begin in range(self._same + 1, self.differs_by + 1, STRIDE):
            end = min(begin + STRIDE - 1, self.differs_by)
            here: list[str] = self._opener.call(_own_footprints, begin, end)
            there = self._process.footprints(begin, end, self._opener.state(begin - 1))
            for step, (one, other) in enumerate(zip(here, there, strict=True), start=begin):
                if one != other:
                    return step
        return None


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return the first of some steps, the last, and others between, evenly."""
    steps = np.linspace(first, last, min(count, last - first + 1)).round().astype(int)
    return [int(step) for step in steps]


def _farthest(found: Sequence[Apart]) -> tuple[Apart, ...]:
    """Return the results that are farthest apart, of each place in the program only one."""
    kinds: dict[tuple[str, str | None, str], Apart] = {}
    for each in sorted(found, key=lambda each: -each.relative):
        kinds.setdefault((each.operator, each.module, each.phase), each)
    return tuple(kinds.values())[:FARTHEST]


def _own_footprints(replay: Replay, first: int, last: int) -> list[str]:
    with replay.in_force(first):
        replay.go_to(first - 1, replay.stretch_of(first))
    return footprints(replay, first, last)


def _rounding(dtype: str, place: Place) -> float:
    """Return how far apart numbers are by rounding alone, of a run with losses of a dtype and there."""
    own = torch.float64 if dtype == "float64" else torch.float32
    return tolerance(own, *([] if place.precision is None else [getattr(torch, place.precision)]))


def _first_beyond(found: Sequence[Apart], limit: float) -> Apart | None:
    """Return the first result that is farther apart than a limit, unless rounding alone makes it."""
    return next((each for each in found if not each.relative <= limit and not each.is_residue), None)


def _compared(opener: Opener, process: OtherProcess, steps: Sequence[int], limit: float) -> list[Apart]:
    """Return how far results of steps are apart."""
    found: list[Apart] = []
    for step in steps:
        own = opener.step(step)
        found += apart(own, process.step(own, opener.state(step - 1)), limit)
    return found


def _changed(known: Numerics, there: dict[str, Any], place: Place) -> dict[str, tuple[Any, Any]]:
    """Return what differs there, as far as both everysteps know of it."""
    found = {
        name: (value, there[name])
        for name, value in known.named().items()
        if name in there and there[name] != value
    }
    return found if place.precision is None else {"precision": ("as recorded", place.precision)} | found


def _diverged(opener: Opener) -> Iterator[str]:
    """Yield in words that a replay as it was recorded differs from the recording, too."""
    if opener.diverged_at is not None:
        yield (
            "a replay under the recorded conditions also differs from the recording, from step "
            f"{opener.diverged_at:,} on; run everystep verify for details"
        )


def _reads_numbers(program: Program) -> bool:
    """Tell whether Python read numbers of a step, other than counters of steps."""
    known = counters(program)
    read = (name for each in program.operations if each.operator == READ for name in each.reads())
    return any(program.tensors[name].storage not in known for name in read)


def _taken_over(run: RecordedRun) -> Iterator[str]:
    """Yield what a rerun takes from the recording instead of computing it."""
    loop = run.stretches[-1].facts.loop
    numbers = range(1, loop.programs + 1 if loop else 1)
    programs = (read_program(run, number) for number in numbers)
    if any(_reads_numbers(program) for program in programs):
        yield ("Python read numbers from tensors; the repeated steps use the recorded numbers")
    if run.change_files():
        yield "code between steps changed tensors; the repeated steps use the recorded changes"
