"""Snapshots: states on disk, and when to write and to thin them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from everystep.errors import RunError
from everystep.recording.files import (
    SNAPSHOTS,
    FileRow,
    completed,
    read_tensors,
    state_folder,
    write_tensors,
)

if TYPE_CHECKING:
    from everystep.step.state import State

__all__ = [
    "DEFAULT_BUDGET",
    "LARGE_BYTES",
    "PARAMETERS",
    "REST",
    "SnapshotPlan",
    "SnapshotRow",
    "read_snapshot",
    "snapshots_in",
    "write_snapshot",
]

PARAMETERS = "parameters.safetensors"
REST = "rest.safetensors"

#: Bytes of snapshots that a run may keep, by default.
DEFAULT_BUDGET = 512_000_000
#: A jump to any step should cost at most about this many seconds of replay.
REPLAY_SECONDS = 0.08
#: A resume should repeat at most about this many seconds between two snapshots.
RESUME_SECONDS = 300.0
#: Snapshots may take this share of the training's time, in the training thread and outside of it.
TIME_SHARE = 0.03
#: States from this size on are large: the time to write their bytes matters.
LARGE_BYTES = 1_000_000


class SnapshotRow(NamedTuple):
    """A state on disk: its step, and its two files, the parameters first."""

    step: int
    files: tuple[FileRow, ...]

    @property
    def size(self) -> int:
        """The size of both files."""
        return sum(file.size for file in self.files)

    @property
    def digests(self) -> tuple[bytes, ...]:
        """The digests of both files."""
        return tuple(file.digest for file in self.files)

    @property
    def directory(self) -> str:
        """The name of its directory within the run."""
        return self.files[0].name.rpartition("/")[0]


def snapshots_in(files: Iterable[FileRow]) -> list[SnapshotRow]:
    """Return the states among the files of a run, in order of their steps.

    Raises:
        RunError: one has not exactly its two files.
    """
    found: dict[int | None, dict[str, FileRow]] = {}
    for row in files:
        folder, _, file = row.name.partition("/")
        if folder == SNAPSHOTS:
            found.setdefault(row.step, {})[file.partition("/")[2]] = row
    if any(step is None or rows.keys() != {PARAMETERS, REST} for step, rows in found.items()):
        raise RunError("a state has other files than everystep writes: the database was changed")
    return sorted(SnapshotRow(step or 0, (rows[PARAMETERS], rows[REST])) for step, rows in found.items())


def write_snapshot(run: Path, state: State, first: SnapshotRow | None = None) -> SnapshotRow:
    """Write a state as `snapshots/000137/`: under a temporary name, synced, then renamed as a whole.

    first: that of state 0, which every run keeps. If most bytes of large parameters are still as they
    were in it (frozen layers, adapters), only the others are written.
    """
    name = state_folder(state.step)
    written, about = state.parameters, None
    if first is not None and (unchanged := _unchanged(run, state, first)):
        file = first.files[0]
        written = {name: each for name, each in written.items() if name not in unchanged}
        about = {"unchanged": unchanged, "size": file.size, "digest": file.digest.hex()}
    # Two files, so that the first one is exactly what `load_state_dict` of the model takes.
    files = (PARAMETERS, written, about), (REST, state.rest, state.settings)
    with completed(run / name) as temporary:
        # A process that was killed may have left it.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()  # the run may have been moved: no directory of that name may come back
        rows = (write_tensors(temporary / file, f"{name}/{file}", *given) for file, *given in files)
        return SnapshotRow(state.step, tuple(rows))


def _unchanged(run: Path, state: State, first: SnapshotRow) -> list[str]:
    """Return the names of parameters that are as in state 0, if they are large and most of all."""
    from safetensors import SafetensorError, safe_open

    from everystep.step.state import same_bits

    whole = sum(tensor.nbytes for tensor in state.parameters.values())
    # The comparison reads all of state 0, which small parameters are not worth.
    if whole < LARGE_BYTES or state.step == first.step:
        return []
    try:
        with safe_open(run / first.files[0].name, "pt") as file:
            known = {*file.keys()}
            found = {
                name: tensor.nbytes
                for name, tensor in state.parameters.items()
                if name in known and same_bits(tensor, file.get_tensor(name))
            }
    except (OSError, SafetensorError):  # without a readable state 0, this one is written whole
        return []
    return [*found] if 2 * sum(found.values()) > whole else []


def read_snapshot(run: Path, row: SnapshotRow) -> State:
    """Read a state of a run.

    Raises:
        RunError: it is missing, or was changed.
    """
    from everystep.step.state import State

    place = f"snapshot {run / row.directory}"
    (parameters, about), (rest, settings) = (read_tensors(run, file) for file in row.files)
    try:
        _Settings.model_validate(settings)
        known = None if about is None else _Unchanged.model_validate(about)
    except (ValidationError, TypeError):
        raise RunError(f"{place} has settings that everystep did not write") from None
    if known is not None:
        file = FileRow(f"{state_folder(0)}/{PARAMETERS}", known.size, known.digest)
        # With the digest that this state has of it: another state 0 would give other parameters.
        first, _ = read_tensors(run, file)
        if {*known.unchanged} & parameters.keys() or not {*known.unchanged} <= first.keys():
            raise RunError(f"{place} has settings that everystep did not write")
        parameters |= {name: first[name] for name in known.unchanged}
    # A file has them in the order of their dtypes, and is read in any.
    order = dict.fromkeys([*(name.partition("/")[2] for name in settings["names"]), *parameters])
    ordered = {name: parameters[name] for name in order if name in parameters}
    return State(row.step, ordered, rest, settings)


class _Checked(BaseModel):
    """Settings, as far as everystep relies on them."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Group(_Checked):
    """The settings of a param group, and the names of its parameters."""

    params: list[str]


class _Optimizer(_Checked):
    """An optimizer without its tensors."""

    class_name: str = Field(alias="class")
    groups: list[_Group]
    values: dict[str, Any]


class _HeldByPart(_Checked):
    """What a part holds in addition to tensors."""

    optimizer: _Optimizer | None = None


class _Unchanged(_Checked):
    """Parameters that are in the file of state 0, and what identifies that file."""

    unchanged: list[str]
    size: int
    digest: Annotated[bytes, BeforeValidator(bytes.fromhex)]


class _Settings(_Checked):
    """What a state holds in addition to tensors."""

    step: int | None = None
    names: list[str]
    held: dict[str, _HeldByPart] | None = None
    frozen: list[str] | None = None
    place: dict[str, Any] | None = None


@dataclass
class SnapshotPlan:
    """When to take a snapshot, and which to delete when the budget is full.

    Snapshots are at multiples of the interval, a power of two, so that any two runs share the steps of
    the sparser one. The interval starts where a jump costs up to `REPLAY_SECONDS`, or more if snapshots
    would cost more than `TIME_SHARE` of the training, and doubles whenever the budget is full, up to
    `longest`. State 0, the newest, and those in `pinned` are always kept. Those between are taken, too,
    at multiples of `longest_taken`, and kept as long as they are among the newest.

    lost_to: the last step that needs lost batches: the first state from there on is always kept, since
    steps open from it; newest: how many of the newest are always kept; is_kept: returns whether a step
    is kept: of the states before others, only the two newest stay, with which a resume begins.
    """

    budget: float
    interval: int | None = None
    kept: dict[int, int] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=lambda: {0})
    lost_to: int = 0
    longest: float = math.inf
    least: int = 1
    newest: int = 1
    longest_taken: float = math.inf
    is_kept: Callable[[int], bool] = lambda step: True

    def choose_interval(self, step_seconds: float, snapshot_seconds: float) -> None:
        """Choose the interval from the measured times of a step and of a snapshot."""
        # A coarse clock may show 0 seconds, and the loops below would not end.
        seconds = max(step_seconds, 1e-9)
        self.interval = self.least
        # Doubled, so that each interval divides all larger ones: see the class.
        while 2 * self.interval * seconds <= REPLAY_SECONDS:
            self.interval *= 2
        while self.interval * seconds * TIME_SHARE < snapshot_seconds:
            self.interval *= 2
        self.longest_taken = max(1, 2 ** int(math.log2(max(1.0, RESUME_SECONDS / seconds))))
        while self.longest_taken * seconds * TIME_SHARE < snapshot_seconds:
            self.longest_taken *= 2

    @property
    def taken(self) -> int | None:
        """The number of steps from one snapshot to the next, if it is chosen."""
        return None if self.interval is None else int(min(self.interval, self.longest_taken))

    def is_due(self, step: int) -> bool:
        """Return whether the state after `step` should be kept."""
        return self.taken is not None and step % self.taken == 0

    def add(self, step: int, size: int) -> list[int]:
        """Add a snapshot of `size` bytes; return the steps of those to delete for it."""
        self.kept[step] = size
        return self.thin()

    def thin(self) -> list[int]:
        """Return the steps of snapshots to delete to keep within the budget, and forget them."""
        given_up = self._take_out_between()
        always = self._always()
        # If these are too large, no interval would let others stay.
        if self.longest == math.inf and sum(self.kept[each] for each in always) > self.budget:
            others = self.kept.keys() - always
            for step in others:
                del self.kept[step]
            return [*given_up, *others]
        # Only while a snapshot may go: the interval would double without end.
        while (
            sum(self.kept.values()) > self.budget
            and self.kept.keys() - self._always()
            and 2 * (self.interval or 1) <= self.longest
        ):
            self.least = self.interval = 2 * (self.interval or 1)
            given_up += self._take_out_between()
        return given_up

    def _always(self) -> set[int]:
        """Return the states that are always kept."""
        behind = min((step for step in self.kept if step >= self.lost_to), default=0)
        always = {*self.pinned, behind, *sorted(self.kept)[-self.newest :]}
        return always & self.kept.keys()

    def _take_out_between(self) -> list[int]:
        """Remove snapshots off the interval, except those that are always kept."""
        # State 137 goes if the interval is 64, and 128 stays; of those before steps that are not kept,
        # even 128 goes once there are two newer ones.
        newest, interval = sorted(self.kept)[-2:], self.interval or 1
        always = self._always()
        off = [
            step
            for step in self.kept
            if step not in always and (step % interval or not (step in newest or self.is_kept(step + 1)))
        ]
        for step in off:
            del self.kept[step]
        return off
