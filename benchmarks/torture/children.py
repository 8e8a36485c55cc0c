"""Child processes: forked from one that has imported torch, which takes seconds; forking does not."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

__all__ = ["Ended", "ask", "run"]

#: Seconds after which a child hangs.
TIMEOUT = 120.0


class Ended(NamedTuple):
    """How a child ended.

    killed: by SIGKILL; error: its exception, None without; is_clear: whether the error is one that
    everystep reports to its user; has_hung: whether it had to be ended; signal: that ended it.
    """

    killed: bool
    error: str | None
    is_clear: bool
    has_hung: bool
    signal: int | None = None


def run(
    work: Callable[[TextIO], None],
    folder: Path,
    kill_after: float | None = None,
    number: int = signal.SIGKILL,
    is_ready: Callable[[], bool] = lambda: True,
) -> Ended:
    """Run work in a child, and kill it after some seconds.

    work: called with the file that is its stdout, `folder`/lines; standard error goes to
    `folder`/errors. number: of the signal. is_ready: tells from when on the seconds count.
    """
    report = folder / "report"
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        _in_child(work, folder, report)
    status, has_hung = _waited(child, kill_after, number, is_ready)
    is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not has_hung
    found: dict[str, Any] = {}
    if report.exists():
        found = json.loads(report.read_text())
    elif not os.WIFSIGNALED(status) and status:
        found = {"error": f"wait status {status}", "is_clear": False}
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Ended(is_killed, found.get("error"), found.get("is_clear", False), has_hung, ended_by)


def ask(question: Callable[[], Any], folder: Path) -> Any:
    """Return what a question answers in a child: plain data, or `{"error": ..., "is_clear": ...}`."""
    answer = folder / "answer"
    answer.unlink(missing_ok=True)
    ended = run(lambda lines: _answer(question, answer), folder)
    if answer.exists():
        return json.loads(answer.read_text())
    error = "it hung" if ended.has_hung else ended.error or "it ended without an answer"
    return {"error": error, "is_clear": ended.is_clear}


def _answer(question: Callable[[], Any], path: Path) -> None:
    text = json.dumps(question())
    path.write_text(text)


def _waited(
    child: int, kill_after: float | None, number: int, is_ready: Callable[[], bool]
) -> tuple[int, bool]:
    began = ready = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, False
        now = time.monotonic()
        if kill_after is not None and not is_ready():
            ready = now
        elif kill_after is not None and now - ready >= kill_after:
            os.kill(child, number)
            kill_after = None
        if now - began > TIMEOUT:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], True
        time.sleep(0.002 if kill_after is None else min(0.002, max(0.0, kill_after - (now - ready))))


def _in_child(work: Callable[[TextIO], None], folder: Path, report: Path) -> None:
    from everystep.errors import EverystepError

    code = 0
    try:
        errors = os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(errors, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        with (folder / "lines").open("a") as lines:
            work(lines)
    except BaseException as error:
        code = 1
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        report.write_text(json.dumps({"error": text, "is_clear": isinstance(error, EverystepError)}))
    finally:
        os._exit(code)
