"""Walk: go through many steps of a run again, in pieces that processes share.

The pieces lie between snapshots. Each process computes with one thread, which is the fastest way to use
all cores; where that gives other losses or another closing state than were recorded, the piece is gone
through once more with as many threads as when the run was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from everystep.errors import RunError
from everystep.numerics import Numerics
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import read_snapshot
from everystep.replay.objects import Objects, needed
from everystep.replay.replay import Replay, same_number
from everystep.replay.workers import cores, needs_worker, replay_in_worker, workers
from everystep.step.check import as_integers, distance, same_bits
from everystep.step.state import State

__all__ = [
    "LossDifference",
    "Piece",
    "StateDifference",
    "Visitor",
    "Walked",
    "coarser",
    "differences",
    "pieces",
    "walk",
]

#: Where the training took less than this, this process goes through it alone: others must start first.
ALONE_SECONDS = 4.0
#: Steps that are taken between two looks at the losses.
STRIDE = 256
#: Neighbouring pieces that a process is given at once, if there are enough.
GROUP = 8
_OF_MODEL = re.compile(r"^(parameter|buffer)/")
#: Pieces for each core, where pieces should be long.
PIECES_EACH = 8


class Piece(NamedTuple):
    """Steps `first` to `last`, from one snapshot to the next, within the stretch `at`."""

    first: int
    last: int
    at: int


class LossDifference(NamedTuple):
    """A step whose loss was another when it was taken again."""

    step: int
    recorded: float
    replayed: float


class StateDifference(NamedTuple):
    """A tensor of a snapshot that was another when its state was reached again.

    elements: how many numbers differ; largest: by how many units in the last place at most, None where
    that cannot be said.
    """

    state: int
    tensor: str
    elements: int
    largest: int | None


@dataclass
class Walked:
    """What going through a piece has shown.

    losses: how many losses differed, and the first of them; states: tensors of the closing state that
    differ; compared: whether there was a closing state to compare; threads: with how many it was gone
    through, and under which numerics; result: what the visitor made of it.
    """

    piece: Piece
    threads: int
    numerics: Numerics | None = None
    different_losses: int = 0
    first_loss: LossDifference | None = None
    states: list[StateDifference] = field(default_factory=list)
    compared: bool = False
    problems: list[str] = field(default_factory=list)
    result: Any = None

    @property
    def is_exact(self) -> bool:
        """Whether all was as recorded."""
        return self.different_losses == 0 and not self.states


class Visitor(Protocol):
    """Takes the steps of a piece, and makes something of them. Travels to other processes."""

    @property
    def is_done(self) -> bool:
        """Whether no more steps of the piece need be taken."""

    def begin(self, replay: Replay, piece: Piece) -> int:
        """Return the state that the way begins with: that before the piece, or an earlier one."""

    def take(self, replay: Replay, last: int, piece: Piece) -> Tensor:
        """Take the steps from where the replay stands up to `last`; return their losses."""

    def result(self) -> Any:
        """Return what was made of the piece, and begin anew."""


def pieces(run: RecordedRun, first: int, last: int) -> list[Piece]:
    """Return the pieces that cover steps `first` to `last`."""
    stretches = run.stretches
    ends = {row.step for row in run.snapshot_rows() if first <= row.step < last}
    ends |= {stretch.first - 1 for stretch in stretches if first <= stretch.first - 1 < last}
    found = []
    for begin, end in zip([first - 1, *sorted(ends)], [*sorted(ends), last], strict=True):
        at = max(i for i, stretch in enumerate(stretches) if stretch.first <= begin + 1)
        found.append(Piece(begin + 1, end, at))
    return found


def coarser(wanted: list[Piece], is_wanted: bool) -> list[Piece]:
    """Return fewer, longer pieces, `PIECES_EACH` for each core, if that is wanted.

    That is for what must go back a step from each piece, which means through the piece before.
    """
    if not is_wanted:
        return wanted
    size = -(-len(wanted) // (PIECES_EACH * cores()))
    found: list[Piece] = []
    count = 0
    for piece in wanted:
        if found and found[-1].at == piece.at and count < size:
            found[-1] = found[-1]._replace(last=piece.last)
            count += 1
        else:
            found.append(piece)
            count = 1
    return found


def walk(
    run: RecordedRun,
    wanted: list[Piece],
    visitor: Visitor,
    objects: Objects | None = None,
    processes: int | None = None,
    told: Callable[[int], None] = lambda steps: None,
) -> Iterator[Walked]:
    """Go through pieces of a run, and yield each when it is done, not in their order.

    Args:
        run: which run.
        wanted: which pieces.
        visitor: takes the steps.
        objects: what the user trained with, for steps that no program takes.
        processes: how many processes there shall be; 1: this one alone; absent: one for each core,
            where that is worth their start.
        told: is told of steps that are done.

    Raises:
        RunError: something that is needed is missing or cannot be read.
    """
    facts, objects = run.facts, needed(run, objects)
    threads = facts.training.numerics.threads
    count = _processes(run, wanted, processes)
    if count == 1 and not needs_worker(facts):
        replay = Replay(run, objects)
        for piece in wanted:
            yield _go_through(replay, piece, visitor, threads)
            told(piece.last - piece.first + 1)
        return
    again: list[Piece] = []
    each = 1 if count > 1 else threads
    with workers(facts, count, each) as executor:
        futures: dict[Future[list[Walked]], list[Piece]] = {
            executor.submit(_in_worker, run.directory, objects, group, visitor, each): group
            for group in _groups(wanted, count)
        }
        for future in as_completed(futures):
            if future.cancelled():
                continue
            found = future.result()
            for walked in found:
                if walked.is_exact or threads == each:
                    yield walked
                    told(walked.piece.last - walked.piece.first + 1)
                else:
                    again.append(walked.piece)
            if again:
                # One thread is not what the run was trained with, and it matters: no use in going on so.
                for other, group in futures.items():
                    if not other.cancelled() and other.cancel():
                        again += group
    if again:
        with workers(facts, 1, threads) as executor:
            for piece in sorted(again):
                work = executor.submit(_in_worker, run.directory, objects, [piece], visitor, threads)
                yield work.result()[0]
                told(piece.last - piece.first + 1)


def _groups(wanted: list[Piece], count: int) -> Iterator[list[Piece]]:
    """Yield neighbours together: where one piece ends, the next can go on."""
    size = max(1, min(GROUP, len(wanted) // (4 * count)))
    for begin in range(0, len(wanted), size):
        yield wanted[begin : begin + size]


def _processes(run: RecordedRun, wanted: list[Piece], asked: int | None) -> int:
    facts = run.facts
    if facts.training.device != "cpu":
        return 1
    most = min(asked or cores(), len(wanted))
    if asked is not None:
        return max(1, most)
    steps = sum(piece.last - piece.first + 1 for piece in wanted)
    seconds = (facts.seconds or 0.0) * steps / max(1, run.summary().steps)
    return 1 if seconds < ALONE_SECONDS else max(1, most)


def _in_worker(
    directory: Path, objects: Objects | None, group: list[Piece], visitor: Visitor, threads: int
) -> list[Walked]:
    replay = replay_in_worker(directory, objects, threads)
    return [_go_through(replay, piece, visitor, threads) for piece in group]


def _go_through(replay: Replay, piece: Piece, visitor: Visitor, threads: int) -> Walked:
    found = Walked(piece, threads)
    with replay.in_force(piece.first):
        found.numerics = _numerics(replay.stretches[piece.at].facts.device)
        start = visitor.begin(replay, piece)
        replay.go_to(start, piece.at)
        step = start
        while step < piece.last and not visitor.is_done:
            try:
                losses = visitor.take(replay, min(piece.last, step + STRIDE), piece).tolist()
            except RunError as error:
                if not replay.stretches[piece.at].facts.loop:
                    raise
                replay.problems.append(
                    str(error)
                )  # the steps before it, and after it, may be as recorded
                break
            last = step + len(losses)
            _compare_losses(found, step + 1, losses, replay.recorded_losses(step + 1, last))
            if found.first_loss is not None:
                replay.note_departure(found.first_loss.step)
            step = last
        if step == piece.last:
            _compare_state(found, replay, piece)
    found.result = visitor.result()
    found.problems = list(replay.problems)
    return found


@cache
def _numerics(device: str) -> Numerics:
    return Numerics.read(torch.device(device))


def _compare_losses(found: Walked, first: int, losses: list[float], recorded: list[float]) -> None:
    if len(recorded) < len(losses):
        raise RunError(f"the run has no loss of step {first + len(recorded)}: its database was changed")
    for step, (loss, known) in enumerate(zip(losses, recorded, strict=True), start=first):
        if not same_number(loss, known) and step >= found.piece.first:
            found.different_losses += 1
            found.first_loss = found.first_loss or LossDifference(step, known, loss)


def _compare_state(found: Walked, replay: Replay, piece: Piece) -> None:
    """Compare the state at the end of a piece with the snapshot of it, if there is one."""
    row = next((r for r in replay.snapshot_rows() if r.step == piece.last), None)
    if row is None:
        return
    try:
        recorded = read_snapshot(replay.run.directory, row)
    except RunError as error:
        replay.problems.append(str(error))
        return
    here = replay.go_to(piece.last, piece.at).capture()
    found.compared = True
    # A fork may begin with another optimizer, or other random numbers, than its parent ended with.
    is_fork = replay.stretch_of(piece.last + 1) != piece.at
    found.states = differences(recorded, here, only_model=is_fork)


def differences(recorded: State, replayed: State, *, only_model: bool = False) -> list[StateDifference]:
    """Return the tensors of two states that differ; Python's and NumPy's generators are left out.

    only_model: compare parameters and buffers alone.
    """
    found = []
    both = _compared(recorded), _compared(replayed)
    for name in sorted(both[0] | both[1]):
        if only_model and not name.startswith(("parameters/", "buffer/")):
            continue
        # A pending gradient is in a snapshot only where the next step uses it.
        if name.startswith("gradient/") and not (name in both[0] and name in both[1]):
            continue
        one, two = (_tensor(state, name) for state in (recorded, replayed))
        if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
            found.append(StateDifference(recorded.step, name, 0, None))
        elif not same_bits(one, two):
            elements = int((as_integers(one) != as_integers(two)).sum())
            found.append(StateDifference(recorded.step, name, elements, distance(one, two)))
    return found


def _compared(state: State) -> set[str]:
    # What a loop of the user's draws besides its steps is not repeated, but given to those that draw.
    is_own_loop = "parts" in state.settings
    left_out = ("generator/",) if is_own_loop else ("generator/python", "generator/numpy")
    own = {n for n in state.rest if not n.startswith(left_out)}
    found = own | {f"parameters/{name}" for name in state.parameters}
    # Which are in a state_dict may change on the way, as layers come and go.
    return {_OF_MODEL.sub("parameters/", name) for name in found} if is_own_loop else found


def _tensor(state: State, name: str) -> Tensor | None:
    kind, _, path = name.partition("/")
    if kind != "parameters":
        return state.rest.get(name)
    others = (state.rest.get(f"{each}/{path}") for each in ("parameter", "buffer"))
    return state.parameters.get(path, next((each for each in others if each is not None), None))
