"""Death at every operation on files: the process of a training is killed at its n-th, for every n.

Operations are what changes files below the run: opening to write, renaming, creating and removing files
and directories, hard links, `fsync`, tensors written by safetensors, and the beginning and the commit of
each transaction of SQLite. A process dies before the operation; where a file is opened or written also
after it was begun, with the file empty or cut to half of its size.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.torture.trial import Reference, Result, Trial

__all__ = ["STEPS", "Operations", "operations"]

#: Steps of each training: few, each with a snapshot of its own.
STEPS = 10
#: Audited by Python (its library reference, "Audit events table"), with the place of the path.
AUDITED = {
    "os.rename": 1,
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.link": 1,
    "os.truncate": 0,
}
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_STATEMENTS = ("BEGIN", "COMMIT", "PRAGMA journal_mode")


class Operations:
    """Counts operations below a directory, and ends this process at one of them.

    Args:
        directory: of the run.
        last: the operation at which the process dies, from 1; None: only count.
        is_torn: die after the file was begun instead of before.
        report: where the count, and the operations, are written.
    """

    def __init__(self, directory: Path, last: int | None, is_torn: bool, report: Path) -> None:
        self._directory = f"{directory.resolve()}{os.sep}"
        self._itself = str(directory.resolve())
        self._last = last
        self._is_torn = is_torn
        self._report = report
        self._count = 0
        self._lock = threading.RLock()
        self._is_busy = threading.local()

    def install(self) -> None:
        """Watch this process until it ends."""
        import safetensors.torch

        sys.addaudithook(self._audit)
        sync, save, connect = os.fsync, safetensors.torch.save_file, sqlite3.connect

        def fsync(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            self._done("fsync", Path(f"/proc/self/fd/{number}").readlink())
            sync(file)

        def save_file(tensors: Any, path: Any, *rest: Any) -> None:
            def half() -> None:
                save(tensors, path, *rest)
                os.truncate(path, Path(path).stat().st_size // 2)

            self._done("save", path, half)
            save(tensors, path, *rest)

        def connected(path: Any, *rest: Any, **settings: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(path, *rest, **settings)
            self._trace(connection, path)
            return connection

        os.fsync, sqlite3.connect = fsync, connected  # type: ignore[assignment]
        safetensors.torch.save_file = save_file  # type: ignore[assignment]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(self._is_busy, "value", False):
            return
        if event == "open":
            path, mode, flags = arguments
            is_to_write = flags & _TO_WRITE if isinstance(flags, int) else "w" in (mode or "")
            if is_to_write and not isinstance(path, int) and not flags & os.O_DIRECTORY:
                self._done("open", path, lambda: Path(os.fsdecode(path)).open("wb").close())
        elif event in AUDITED:
            self._done(event, arguments[AUDITED[event]])

    def _trace(self, connection: sqlite3.Connection, path: Any) -> None:

        def begun(statement: str) -> None:
            if statement.strip().startswith(_STATEMENTS):
                self._done(statement.strip()[:20], path)

        connection.set_trace_callback(begun)

    def _is_within(self, path: Any) -> bool:
        try:
            found = str(Path(os.fsdecode(path)).absolute())
        except (TypeError, ValueError):
            return False
        return found == self._itself or found.startswith(self._directory)

    def _done(self, name: str, path: Any, begun: Callable[[], None] | None = None) -> None:
        """Count an operation; die if it is the last. begun: does a part of it."""
        if not self._is_within(path) or getattr(self._is_busy, "value", False):
            return
        self._is_busy.value = True
        try:
            with self._lock:
                self._count += 1
                kind = "torn" if begun is not None else "-"
                with self._report.open("a") as file:
                    file.write(f"{self._count}\t{kind}\t{name}\t{os.fsdecode(path)}\n")
                if self._count == self._last:
                    if self._is_torn and begun is not None:
                        begun()
                    os.kill(os.getpid(), signal.SIGKILL)
                    signal.pause()
        finally:
            self._is_busy.value = False


def in_detail() -> None:
    """Let this process write each step by itself, and a snapshot of each."""
    from everystep.recording import recorder, snapshots
    from everystep.training import writer

    recorder.Recorder.is_behind = property(lambda self: False)  # type: ignore[assignment, method-assign]
    snapshots.REPLAY_SECONDS = 0.0
    snapshots.TIME_SHARE = 1e9
    writer.FLUSH_SECONDS = 0.0
    writer.TIMED_STEPS = 2


def operations(references: Sequence[Reference]) -> list[Callable[[], Result]]:
    """Return a trial for every operation of each training, and of each that is resumed."""
    found: list[Callable[[], Result]] = []
    for reference in references:
        begin = _counted(reference, None)
        found += [partial(_died, reference, None, *one) for one in begin]
        half = begin[len(begin) * 2 // 3][0]
        found += [partial(_died, reference, half, *one) for one in _counted(reference, half)]
    return found


def _counted(reference: Reference, before: int | None) -> list[tuple[int, bool]]:
    """Return the operations of a training: their numbers, and whether they can be torn."""
    trial = Trial(reference, STEPS)
    if before is not None:
        _go(trial, before, False, "before")
    _go(trial, None, False, "counted")
    rows = [line.split("\t") for line in (trial.folder / "counted").read_text().splitlines()]
    trial.close()
    found = [(int(number), False) for number, *_ in rows]
    return found + [(int(number), True) for number, kind, *_ in rows if kind == "torn"]


def _go(trial: Trial, last: int | None, is_torn: bool, report: str) -> Any:
    def before() -> None:
        in_detail()
        Operations(trial.place, last, is_torn, trial.folder / report).install()

    return trial.go(before=before)


def _died(reference: Reference, before: int | None, number: int, is_torn: bool) -> Result:
    """Let a training die at an operation, or one that goes on after it died at another; finish it."""
    trial = Trial(reference, STEPS)
    if before is not None:
        _go(trial, before, False, "before")
    ended = _go(trial, number, is_torn, "operations")
    if ended.killed:
        trial.look()
    elif ended.error is not None:
        trial.result.failures.append(f"it fails before: {ended.error}")
    if not trial.result.failures:
        trial.finish()
    if trial.result.failures:
        torn = " torn" if is_torn else ""
        trial.result.failures.append(f"operation {number}{torn}, after {before}")
    return trial.close()
