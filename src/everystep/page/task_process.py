"""A task, in its own process: measure, when, verify, compare, fork, what if or rerun.

It reads a request and sends messages: `ready`, `progress`, `begun`, and at the end `result` or `error`.
After `ready`, SIGINT stops it, and its results so far are kept. Then it sends `waiting` and waits for
the next request, since importing torch takes longer than many answers; but it ends after an interrupt,
and after an error that is not an answer.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from everystep import numerics
from everystep.errors import DamageWarning, EverystepError
from everystep.experiment.specification import parse_setting
from everystep.page.child_process import Speaker, limit_memory, memory_message
from everystep.page.columns import reduced
from everystep.page.run_index import shown_name
from everystep.page.sides import sides
from everystep.recording.directories import name_of
from everystep.recording.facts import Facts
from everystep.replay.processes import end_with_stdin
from everystep.run import Run
from everystep.views.plain import plain_data
from everystep.views.progress import Silent
from everystep.views.run_view import finite_text

__all__ = ["Voice", "do", "main"]

#: Seconds between two reports of progress.
_PAUSE = 0.1
#: Steps that an answer lists; further ones are only counted.
_LISTED = 10_000
#: Points of a curve that are sent.
_POINTS = 20_000


# The messages of a measurement, as the server reads them:
#   ready     {}                                                   from here on, SIGINT stops it in order
#   progress  {"done": 120, "total": 500, "what": "steps"}         ten times a second at most
#   result    {"values": 500, "text": "...", ...}                  or error {"error": "..."}
#   waiting   {}                                                   it can run another task
class Voice(Speaker):
    """Reports progress to the server; called with the number of steps just completed."""

    _said = 0.0
    _done = _total = 0
    _what = ""

    def progress(self, done: int, total: int, what: str) -> None:
        """Report the progress, unless it was reported just now."""
        now = time.monotonic()
        # The last one is always sent: a bar that stops at 98% looks like a failure.
        if now - self._said >= _PAUSE or done >= total:
            self._said = now
            self.say("progress", {"done": min(done, total), "total": total, "what": what})

    def begin_counting(self, what: str, total: int) -> None:
        """Begin to count `total` steps."""
        self._done, self._total, self._what = 0, total, what
        self(0)

    def __call__(self, steps: int) -> None:
        """Count steps that were just completed."""
        self._done += steps
        self.progress(self._done, self._total, self._what)


def do(request: dict[str, Any], voice: Voice) -> bool:
    """Run a task, and send its `result`, or its `error` as text; return whether it was answered."""
    try:
        # The server may interrupt from here on; before, an interrupt could leave no message.
        voice.say("ready", {})
        answer = _TASKS[request["task"]]
        voice.say("result", plain_data(answer(Run(request["run"]), request["asked"], voice)))
        return True
    except EverystepError as error:
        memory = memory_message(error)
        voice.say("error", {"error": memory or str(error)})
        return memory is None
    except KeyboardInterrupt as stopped:
        voice.say("error", {"error": str(stopped) or "stopped", "cancelled": True})
    except Exception as error:
        message = memory_message(error) or f"{type(error).__name__}: {error}".strip()
        voice.say("error", {"error": message})
    return False


def main() -> None:
    """Run the tasks that stdin describes, one after the other."""
    sys.unraisablehook = _not_lost
    # The server has ended, however that happened: nobody waits for the answer.
    end_with_stdin(in_order=True)
    warnings.simplefilter("ignore", DamageWarning)  # the server reports damage
    limit_memory()
    numerics.prepare()
    voice = Voice.begin()
    with suppress(KeyboardInterrupt):  # the server has ended while this process waited
        while (request := sys.stdin.buffer.readline()) and do(json.loads(request), voice):
            voice.say("waiting", {})


def _not_lost(lost: sys.UnraisableHookArgs) -> None:
    """Interrupt again: Python drops an interrupt that arrives while an object is deleted."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        # From another thread: here it would be dropped as well.
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def _with_text(found: Any, **more: Any) -> dict[str, Any]:
    data: dict[str, Any] = found.data()
    return data | {"text": found.to_text()} | more


def _measure(run: Run, asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    found = run.measure(asked.pop("expression"), **asked, progress=voice)
    return _with_text(found, values=len(found.values))


def _first_nonfinite(run: Run, asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    found = run.first_nonfinite(progress=voice)
    if found is None:
        return {"found": None, "text": finite_text(run)}
    return {"found": found.data(), "text": found.to_text()}


def _compare(run: Run, asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    other = Run(asked["other"])
    found = run.diff(other, thorough=asked["thorough"], progress=voice)
    return _with_text(found, sides=sides(found.operation, (run, other)))


def _rerun(run: Run, asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    found = run.rerun(**asked, progress=voice)
    steps = np.arange(found.first, found.first + len(found.losses))
    drawn = reduced(steps, found.losses, _POINTS) if found.has_loss else None
    # Of all losses, only those of the rerun are sent, as many as a plot shows.
    data = {key: each for key, each in found.data().items() if key not in ("recorded", "others")}
    return data | {"losses": drawn, "text": found.to_text()}


def _fork(run: Run, asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    watching = _Watching(voice)
    try:
        made = run.fork(
            asked["at"],
            dict(parse_setting(f"{path}={text}") for path, text in asked["settings"].items()),
            steps=asked["steps"],
            run=run.directory.parent / asked["name"] if asked["name"] else _next_free(run),
            progress=watching,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {watching.run} has every step up to then") from None
    return {"run": watching.run, "status": made.status, "notices": watching.notices}


class _Watching(Silent):
    def __init__(self, voice: Voice) -> None:
        self.run = "the fork"
        self.notices: list[str] = []
        self._voice = voice
        self._steps = 0

    def begin(self, directory: Path, facts: Facts) -> None:
        self.run, self._steps = shown_name(name_of(directory)), facts.steps or 0
        self._voice.say("begun", {"run": self.run})

    def advance(self, first_step: int, losses: Sequence[float]) -> None:
        self._voice.progress(first_step + len(losses) - 1, self._steps, "training")

    def notice(self, message: str) -> None:
        self.notices.append(message)


def _next_free(run: Run) -> Path:
    """Return the directory of an unnamed fork: next to its parent."""
    places = (run.directory.parent / f"{run.directory.name}-fork-{n}" for n in itertools.count(1))
    return next(place for place in places if not place.exists())


_TASKS: dict[str, Callable[[Run, dict[str, Any], Voice], dict[str, Any]]] = {
    "measure": _measure,
    "when": lambda run, asked, voice: run.when(**asked, progress=voice).data(most=_LISTED),
    "first-nonfinite": _first_nonfinite,
    "verify": lambda run, asked, voice: _with_text(run.verify(progress=voice)),
    "compare": _compare,
    "fork": _fork,
    "what-if": lambda run, asked, voice: run.what_if(
        without_rows=set(asked.pop("rows")), **asked, progress=voice
    ).data(),
    "rerun": _rerun,
}


if __name__ == "__main__":
    main()
