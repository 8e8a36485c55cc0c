"""Snapshots: states on disk, and when to write and to thin them."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from everystep.errors import RunError
from everystep.recording.database import SnapshotRow
from everystep.recording.files import read_own, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from everystep.step.state import State

__all__ = [
    "DEFAULT_BUDGET",
    "PARAMETERS",
    "REST",
    "SnapshotPlan",
    "check_snapshot",
    "read_snapshot",
    "remove_snapshots",
    "write_snapshot",
]

PARAMETERS = "parameters.safetensors"
REST = "rest.safetensors"

#: Bytes of snapshots that a run may keep, by default.
DEFAULT_BUDGET = 512_000_000
#: A jump to any step should cost at most about this many seconds of replay.
REPLAY_SECONDS = 0.08
#: Snapshots may take this share of the training's time, most of it outside the training thread.
TIME_SHARE = 0.03


def write_snapshot(folder: Path, state: State) -> SnapshotRow:
    """Write a state as `folder/000137/`: under a temporary name, synced, then renamed as a whole."""
    name = f"{state.step:06d}"
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # One key only: safetensors writes several in no fixed order, and the digest must hold.
    settings = {"everystep": json.dumps(state.settings, sort_keys=True)}
    digest = hashlib.sha256()
    try:
        size = _write_file(temporary / PARAMETERS, state.parameters, None, digest)
        size += _write_file(temporary / REST, state.rest, settings, digest)
        temporary.rename(folder / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return SnapshotRow(state.step, f"{folder.name}/{name}", digest.hexdigest(), size)


def _write_file(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None, digest: hashlib._Hash
) -> int:
    """Write tensors into a file, synced, and add its bytes to a digest; return how many there are.

    A training computes meanwhile: bytes are copied once, into the file, and Python's lock is released.
    """
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        digest.update(content)
        os.fsync(file.fileno())
        return len(content)


def read_snapshot(run: Path, row: SnapshotRow) -> State:
    """Read a state of a run.

    Raises:
        RunError: it is missing, or was changed.
    """
    from everystep.step.state import State

    place = f"snapshot {run / row.directory}"
    parameters, rest = check_snapshot(run, row)
    tensors, settings = read_tensors(rest, "everystep", place)
    settings = {} if settings is None else settings
    try:
        _Settings.model_validate(settings)
    except ValidationError:
        raise RunError(f"{place} has settings that everystep did not write") from None
    return State(row.step, read_tensors(parameters, "", place)[0], tensors, settings)


def check_snapshot(run: Path, row: SnapshotRow) -> tuple[bytes, bytes]:
    """Return the contents of the two files of a state.

    Raises:
        RunError: one is missing, or was changed.
    """
    parameters = read_own(run, f"{row.directory}/{PARAMETERS}", row.bytes)
    rest = read_own(run, f"{row.directory}/{REST}", row.bytes)
    digest = hashlib.sha256(parameters)
    digest.update(rest)
    if digest.hexdigest() != row.digest:
        raise RunError(
            f"snapshot {run / row.directory} was changed after recording: its digest is "
            f"{digest.hexdigest()[:12]}..., but the run recorded {row.digest[:12]}..."
        )
    return parameters, rest


class _Group(BaseModel):
    """The settings of a param group, and the names of its parameters."""

    model_config = ConfigDict(extra="allow", strict=True)
    params: list[str]


class _Optimizer(BaseModel):
    """An optimizer without its tensors."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)
    class_name: str = Field(alias="class")
    groups: list[_Group]
    values: dict[str, Any]


class _HeldByPart(BaseModel):
    """What a part holds in addition to tensors."""

    model_config = ConfigDict(extra="allow", strict=True)
    optimizer: _Optimizer | None = None


class _Settings(BaseModel):
    """What a state holds in addition to tensors, as far as everystep relies on it."""

    model_config = ConfigDict(extra="allow", strict=True)
    step: int | None = None
    names: list[str] | None = None
    held: dict[str, _HeldByPart] | None = None
    frozen: list[str] | None = None
    place: dict[str, Any] | None = None


@dataclass
class SnapshotPlan:
    """When to take a snapshot, and which to delete when the budget is full.

    Snapshots are at multiples of the interval, a power of two, so that any two runs share the steps of
    the sparser one. The interval starts where a jump costs up to `REPLAY_SECONDS`, or more if snapshots
    would cost more than `TIME_SHARE` of the training, and doubles whenever the budget is full. State 0,
    the newest, and those in `pinned` are always kept.
    """

    budget: int
    interval: int | None = None
    kept: dict[int, int] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=lambda: {0})

    def choose_interval(self, step_seconds: float, snapshot_seconds: float) -> None:
        """Choose the first interval from the measured times of a step and of a snapshot."""
        seconds = max(step_seconds, 1e-9)
        self.interval = 1
        while 2 * self.interval * seconds <= REPLAY_SECONDS:
            self.interval *= 2
        while self.interval * seconds * TIME_SHARE < snapshot_seconds:
            self.interval *= 2

    def is_due(self, step: int) -> bool:
        """Return whether the state after `step` should be kept."""
        return self.interval is not None and step % self.interval == 0

    def add(self, step: int, size: int) -> list[int]:
        """Add a snapshot of `size` bytes; return the steps of those to delete for it."""
        self.kept[step] = size
        given_up = self._take_out_between()
        while sum(self.kept.values()) > self.budget and self.kept.keys() - self.pinned - {
            max(self.kept)
        }:
            self.interval = 2 * (self.interval or 1)
            given_up += self._take_out_between()
        return given_up

    def _take_out_between(self) -> list[int]:
        """Remove snapshots off the interval, except those that are always kept."""
        newest, interval = max(self.kept), self.interval or 1
        off = [s for s in self.kept if s != newest and s not in self.pinned and s % interval]
        for step in off:
            del self.kept[step]
        return off


def remove_snapshots(folder: Path, steps: Iterable[int]) -> None:
    """Remove the directories of snapshots that are no longer in the database."""
    for step in steps:
        shutil.rmtree(folder / f"{step:06d}", ignore_errors=True)
