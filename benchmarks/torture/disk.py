"""A full disk: it is said, what was recorded stays, and the training goes on when there is space."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.torture.trial import Reference, Result, Trial
from everystep.recording.database import FILE_NAME

__all__ = ["full_disks"]

#: Sizes of the disk, as shares of what the whole run takes.
SHARES = [0.05, 0.1, *(share / 20 for share in range(3, 20)), 0.98]


def full_disks(references: Sequence[Reference]) -> list[Callable[[], Result]]:
    """Return a trial for each training and size of the disk.

    Raises:
        SystemExit: this user cannot mount a file system in memory.
    """
    if os.name != "posix" or os.geteuid():
        raise SystemExit(
            "a disk that is full is a small file system in memory, which only root can mount"
        )
    return [partial(_filled, reference, share) for reference in references for share in SHARES]


def _filled(reference: Reference, share: float) -> Result:
    """Train on a disk that is too small; look at what is there; make it larger, and go on."""
    trial = Trial(reference)
    whole = sum(p.stat().st_blocks * 512 for p in (reference.prepared / "run").rglob("*") if p.is_file())
    with _disk(trial.folder / "disk", int(share * whole)) as disk:
        trial.place = disk / "run"
        ended = trial.go()
        if ended.error is None:
            trial.compare()
        elif not ended.is_clear or ended.has_hung:
            trial.result.failures.append(f"on a disk of {share:.0%}: {ended.error}")
        else:
            if (trial.place / FILE_NAME).exists():
                trial.look()
            subprocess.run(["mount", "-o", f"remount,size={10 * whole}", disk], check=True)
            trial.finish()
    return trial.close()


@contextmanager
def _disk(place: Path, size: int) -> Iterator[Path]:
    """Mount a file system of so many bytes."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
