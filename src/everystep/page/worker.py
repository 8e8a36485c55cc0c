"""The worker: opens steps for the server, which imports no torch itself.

It answers each request with one message: an HTTP status, what the bytes are or the error, and the
bytes. Nothing of a run is executed.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from everystep import numerics
from everystep.errors import DamageWarning, EverystepError, RunError
from everystep.page.child_process import Message, Speaker, limit_memory, memory_message, status_of
from everystep.page.regions import histogram, npy, region
from everystep.recording.database import FILE_NAME
from everystep.replay.opened_step import Step
from everystep.replay.processes import end_with_stdin
from everystep.replay.run_replay import no_such_step
from everystep.run import Run
from everystep.views.step_data import tensor_of

__all__ = ["Openers", "answers", "main"]

#: Runs that are kept open, so that stepping is quick.
KEPT_RUNS = 3
#: Terms of a sum, and rows of each order, that are shown.
TERMS, MOST_ROWS = 8, 100

#: The file of the functions that import a module, as frames name it.
_IMPORTING = "<frozen importlib._bootstrap>"

#: The description of an answer's bytes, and the bytes; other answers are sent as JSON.
Found = tuple[dict[str, Any], bytes]


class Openers:
    """The runs that were used last, with their replays."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, tuple[tuple[Any, ...], Run]] = OrderedDict()

    def run(self, directory: str) -> Run:
        """Return a run; one that was replaced under the same name is opened again.

        Raises:
            RunError: it is not there, or cannot be read.
        """
        known = self._runs.pop(directory, None)
        run = known[1] if known else Run(directory)
        # A run may be removed, and another one trained under its name, while the page is open.
        stamp = self._stamp(run)
        if known and known[0] != stamp:
            run = Run(directory)
        self._runs[directory] = stamp, run
        # An open run holds states and programs in memory.
        while len(self._runs) > KEPT_RUNS:
            self._runs.popitem(last=False)
        return run

    def forget(self, directory: str) -> None:
        """Forget a run: it was left in the middle of a step."""
        self._runs.pop(directory, None)

    def step(self, directory: str, number: int) -> tuple[Run, Step]:
        """Open a step.

        Raises:
            StepError: there is no such step.
        """
        run = self.run(directory)
        # -1 is the newest step in Python; an address has no such names.
        if number < 1:
            raise no_such_step(run, number)
        return run, run[number]

    def _stamp(self, run: Run) -> tuple[Any, ...]:
        """Return what distinguishes a run from another one of the same name."""
        path: Path = run.directory / FILE_NAME
        try:
            status = path.stat()
        except OSError as error:
            raise RunError(f"the run {run.name} no longer exists: {error.strerror}") from None
        return status.st_dev, status.st_ino, run.facts.started


class Interruption:
    """SIGINT, by which the server reports that no request waits for the answer.

    Within, it raises KeyboardInterrupt, or SystemExit where a module is being imported.
    """

    def __init__(self) -> None:
        self._is_heard = False
        signal.signal(signal.SIGINT, self._hear)

    def __enter__(self) -> None:
        self._is_heard = True

    def __exit__(self, *error: object) -> None:
        self._is_heard = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # Once for each request: a second signal must not interrupt what handles the first.
        if not self._is_heard:
            return
        self._is_heard = False
        while frame is not None:
            if frame.f_code.co_filename == _IMPORTING:
                # Half a module stays half: all later answers would fail. A new process starts.
                raise SystemExit(128 + number)
            frame = frame.f_back
        raise KeyboardInterrupt


def answers(
    openers: Openers, lines: Iterator[bytes], interruption: AbstractContextManager[None] | None = None
) -> Iterator[Message]:
    """Yield the answer to each line; interruption: raises KeyboardInterrupt when one is stopped."""
    for line in lines:
        about: dict[str, Any] = {}
        content = b""
        request: dict[str, Any] = {}
        try:
            request = json.loads(line)
            with interruption or nullcontext():
                about, content = _answer(openers, request)
            status = 200
        except KeyboardInterrupt:
            openers.forget(request["run"])
            status, about = 499, {"error": "given up"}
        except EverystepError as error:
            message = memory_message(error)
            status = 500 if message else status_of(error)
            about = {"error": message or str(error)}
        except Exception as error:  # it must not end: the next question may be another
            reason = f"{type(error).__name__}: {error}".strip(": ").partition("\n")[0]
            message = memory_message(error) or f"the step cannot be shown: {reason}"
            status, about = 500, {"error": message}
        if status == 500 and isinstance(request, dict):
            place = str(request.get("run", ""))
            openers.forget(place)  # it may be in the middle of a step
            if place and not Path(place, FILE_NAME).exists():
                # Deleted while it was read: the error is not about the run.
                status, about = 404, {"error": f"the run {Path(place).name} no longer exists"}
        yield Message("answer", {"status": status, "about": about}, content)


def main() -> None:
    """Answer until stdin is closed."""
    end_with_stdin()
    warnings.simplefilter("ignore", DamageWarning)  # the process that asks reports damage
    interruption = Interruption()
    limit_memory()
    numerics.prepare()
    # Replays use the threads of their run; other computations on their tensors are small.
    torch.set_num_threads(1)
    speaker = Speaker.begin()
    for answer in answers(Openers(), iter(sys.stdin.buffer.readline, b""), interruption):
        speaker.say(*answer)


def _tensor(step: Step, run: Run, asked: dict[str, Any]) -> Tensor:
    return tensor_of(step, asked["id"], run.facts)


def _numbers(step: Step, run: Run, asked: dict[str, Any]) -> Found:
    wanted = (asked[key] for key in ("index", "rows", "columns", "most", "count"))
    return region(_tensor(step, run, asked), *wanted)


def _why(step: Step, run: Run, asked: dict[str, Any]) -> dict[str, Any]:
    from everystep.answers.why import why
    from everystep.views.why_text import spot_of

    wanted = asked["name"] or spot_of(step, run.facts, asked["id"], asked["index"])
    found = why(step, wanted, back=1, terms=TERMS)
    if found.origin == "state" and found.causes and found.began is None:
        found = found.causes[0]  # the answer that follows the number into the state before
    return found.data()


#: The questions about a step.
_KINDS: dict[str, Callable[[Step, Run, dict[str, Any]], Found | dict[str, Any]]] = {
    "content": lambda step, run, asked: step.data(),
    "numbers": _numbers,
    "histogram": lambda step, run, asked: histogram(_tensor(step, run, asked)),
    "file": lambda step, run, asked: ({}, npy(_tensor(step, run, asked))),
    "why": _why,
    "rows": lambda step, run, asked: run.rows(step.number).data(most=MOST_ROWS),
}


def _answer(openers: Openers, asked: dict[str, Any]) -> Found:
    if asked["kind"] == "report":
        from everystep.page.share import shared_report  # imports much that steps do without

        page = shared_report(openers.run(asked["run"]), asked["steps"])
        return {}, page.encode("utf-8", "replace")
    answer = _KINDS[asked["kind"]]
    run, step = openers.step(asked["run"], asked["step"])
    found = answer(step, run, asked)
    if isinstance(found, tuple):
        return found
    # Bytes that are not text may name a run; Python has them as surrogates, UTF-8 has none.
    return {}, json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


if __name__ == "__main__":
    main()
