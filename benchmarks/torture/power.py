"""Power loss, as far as it can be simulated: files that were written last are torn, empty or missing.

A training is killed. Of the files that it left, the write-ahead log of the database is cut at any byte;
other files are emptied, cut to half of their size, or removed, and snapshots lose their names. After
each the run must open with what is sound and resume to the same bits, or say what is wrong.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.torture.children import ask
from benchmarks.torture.compare import lost_lines
from benchmarks.torture.operations import STEPS, _go
from benchmarks.torture.trial import Reference, Result, Trial

__all__ = ["losses_of_power"]

#: Of a training's operations, the shares at which it is killed.
SHARES = (0.45, 0.95)
#: Cuts of a write-ahead log, besides those at its first and last bytes.
CUTS = 40

Damage = Callable[[Path], None]


def losses_of_power(references: Sequence[Reference], seed: int) -> list[Callable[[], Result]]:
    """Return a trial for each damage to what each training left when it was killed."""
    generator = random.Random(seed)
    found: list[Callable[[], Result]] = []
    for reference in references:
        for share in SHARES:
            left = _left(reference, share)
            for name, damage in _damages(left / "run", generator):
                found.append(partial(_damaged, reference, left, name, damage))
    return found


def _left(reference: Reference, share: float) -> Path:
    """Kill a training after a share of its operations; return the directory that it left."""
    counting = Trial(reference, STEPS)
    _go(counting, None, False, "counted")
    count = len((counting.folder / "counted").read_text().splitlines())
    counting.close()
    trial = Trial(reference, STEPS)
    _go(trial, max(1, int(count * share)), False, "counted")
    return trial.folder


def _damages(place: Path, generator: random.Random) -> list[tuple[str, Damage]]:
    found: list[tuple[str, Damage]] = []
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = str(path.relative_to(place))
        size = path.stat().st_size
        if name.endswith(("-shm", ".lock", ".tmp")):
            continue
        if name.endswith("-wal"):
            cuts = sorted(generator.sample(range(size), min(CUTS, size)))
            found += [(f"{name} cut at {cut}", partial(_cut, name, cut)) for cut in cuts]
            found.append((f"{name} missing", partial(_remove, name)))
            continue
        if name == "run.sqlite":
            continue  # written only by a checkpoint, which syncs the log before it
        found.append((f"{name} empty", partial(_cut, name, 0)))
        found.append((f"{name} torn", partial(_cut, name, size // 2)))
        found.append((f"{name} missing", partial(_remove, name)))
    for path in sorted((place / "snapshots").iterdir()):
        name = str(path.relative_to(place))
        if path.name.isdecimal():
            found.append((f"{name} not renamed", partial(_unnamed, name)))
    return found


def _cut(name: str, size: int, place: Path) -> None:
    content = (place / name).read_bytes()[:size]
    (place / name).unlink()  # the file may be linked
    (place / name).write_bytes(content)
    _forget_index(place)


def _remove(name: str, place: Path) -> None:
    (place / name).unlink()
    _forget_index(place)


def _unnamed(name: str, place: Path) -> None:
    path = place / name
    path.rename(path.with_name(f".{path.name}.1.tmp"))
    _forget_index(place)


def _forget_index(place: Path) -> None:
    """Remove the shared-memory index, which does not outlive the power."""
    (place / "run.sqlite-shm").unlink(missing_ok=True)


def _damaged(reference: Reference, left: Path, name: str, damage: Damage) -> Result:
    """Damage what a killed training left; let it go on, and compare."""
    trial = Trial(reference, STEPS)
    shutil.copytree(left / "run", trial.place)
    damage(trial.place)
    result = trial.result
    result.interrupted = 1
    found = ask(lambda: lost_lines(trial.place, trial.folder / "lines"), trial.folder)
    if "error" not in found:
        result.opened = result.kept = 1
    elif not found["is_clear"]:
        result.failures.append(f"it does not open: {found['error']}")
    ended = trial.go()
    if ended.error is None and not ended.has_hung:
        trial.compare(may_be_unverified=True)
    elif ended.is_clear:
        result.refused = 1
        result.reason = ended.error
    else:
        result.failures.append(f"it does not go on: {ended.error or 'it hung'}")
    if result.failures:
        result.failures.append(name)
    if result.refused:
        result.reason = f"{name}: {result.reason}"
    return trial.close()
