"""A task, in a process of its own: measure, when, verify, compare, fork, what if or rerun.

One request comes in, messages go out: `ready`, `progress`, `begun`, and at the end `result` or
`error`. Once it has said `ready`, SIGINT stops it, and what it has done by then is kept.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everystep import numerics
from everystep.errors import DamageWarning, EverystepError
from everystep.experiment.specification import parse_setting
from everystep.page.columns import reduced
from everystep.page.memory_limit import limit_memory, memory_message
from everystep.page.processes import Speaker
from everystep.page.shelf import shown_name
from everystep.page.sides import sides
from everystep.recording.facts import Facts
from everystep.replay.columns import Found
from everystep.replay.parent import end_with_stdin
from everystep.run import Run
from everystep.views.answers import (
    measured_text,
    nonfinite_data,
    nonfinite_text,
    plain,
    verify_data,
    verify_text,
    when_text,
)
from everystep.views.difference import diff_data, diff_sentence, diff_text
from everystep.views.progress import Silent
from everystep.views.rerun import rerun_sentence, rerun_text
from everystep.views.terminal import shortest
from everystep.views.what_if import what_if_data

__all__ = ["Voice", "do", "main"]

#: Seconds between two words on how far it is.
_PAUSE = 0.1
#: Steps that an answer lists; of more there is the number.
_LISTED = 10_000
#: Points of a curve that are sent.
_POINTS = 20_000


class Voice(Speaker):
    """Tells the server what happens."""

    _said = 0.0

    def progress(self, done: int, total: int, what: str) -> None:
        """Tell how far it is, unless it was said just now."""
        now = time.monotonic()
        if now - self._said >= _PAUSE or done >= total:
            self._said = now
            self.say("progress", {"done": min(done, total), "total": total, "what": what})

    def counting(self, what: str, total: int) -> Callable[[int], None]:
        """Return a function to call with the number of completed steps."""
        done = 0
        self.progress(done, total, what)

        def on_steps(steps: int) -> None:
            nonlocal done
            done += steps
            self.progress(done, total, what)

        return on_steps


def do(request: dict[str, Any], voice: Voice) -> None:
    """Do a task, and tell what comes of it: `result`, or `error` in words."""
    try:
        voice.say("ready", {})
        voice.say("result", plain(_TASKS[request["task"]](request, voice)))
    except EverystepError as error:
        voice.say("error", {"error": memory_message(error) or str(error)})
    except KeyboardInterrupt as stopped:
        voice.say("error", {"error": str(stopped) or "stopped", "cancelled": True})
    except Exception as error:
        message = memory_message(error) or f"{type(error).__name__}: {error}".strip()
        voice.say("error", {"error": message})


def main() -> None:
    """Do the task that stdin tells."""
    end_with_stdin(in_order=True)
    warnings.simplefilter("ignore", DamageWarning)  # who asks reports damage
    limit_memory()
    numerics.prepare()
    voice = Voice.begin()
    do(json.loads(sys.stdin.buffer.readline()), voice)


def _measure(asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    run, expression = Run(asked["run"]), asked["expression"]
    try:
        found = run.measure(
            expression,
            name=asked["name"],
            every=asked["every"],
            overwrite=asked["overwrite"],
            progress=voice.counting("measuring", len(run)),
        )
    except KeyboardInterrupt:
        count = len(run.measured(asked["name"] or expression))
        raise KeyboardInterrupt(
            f"stopped; {count:,} values are kept, and measuring the same again continues from there"
        ) from None
    return {
        "name": found.name,
        "text": measured_text(found),
        "values": len(found.values),
        "left_out": found.left_out,
    }


def _when(asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    run, condition = Run(asked["run"]), asked["condition"]
    is_origin = condition.strip() == "nonfinite"
    # The first NaN or infinity was made in the first step with such a loss, or before.
    last = run.facts.nonfinite_step if is_origin else None
    on_steps = voice.counting("looking", last or len(run))
    if is_origin:
        made = run.first_nonfinite(progress=on_steps)
        found = Found(() if made is None else (made.step.number,))
    else:
        made = None
        found = run.when(condition, asked["which"], progress=on_steps)
    losses = run.losses_at(found.steps[:_LISTED])
    listed = Found(tuple(losses))
    return {
        "count": len(found.steps),
        "steps": [{"step": step, "loss": shortest(loss)} for step, loss in losses.items()],
        "left_out_from": found.inexact,
        "nonfinite": nonfinite_data(made),
        "text": nonfinite_text(made) if is_origin else when_text(listed, losses) or "no step",
    }


def _verify(asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    run = Run(asked["run"])
    found = run.verify(progress=voice.counting("replaying", len(run)))
    return verify_data(run.name, found) | {"text": verify_text(run.name, run.facts, found)}


def _compare(asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    one, other = Run(asked["run"]), Run(asked["other"])
    on_steps = voice.counting("comparing", min(len(one), len(other)))
    found = one.diff(other, thorough=asked["thorough"], progress=on_steps)
    return diff_data(found) | {
        "text": diff_text(found),
        "sentence": diff_sentence(found),
        "sides": sides(found.operation, (one, other)),
    }


def _what_if(asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    at, until, rows = asked["at"], asked["until"], set(asked["rows"])
    trainings = 1 + (len(rows) if asked["each"] else 1)
    found = Run(asked["run"]).what_if(
        at,
        until,
        without_rows=rows,
        each=asked["each"],
        by=asked["by"],
        progress=voice.counting("training", max(0, until - at) * trainings),
    )
    return what_if_data(found)


def _rerun(asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    run = Run(asked["run"])
    count = len(run) - run.stretches[-1].first + 1 if len(run) else 0
    found = run.rerun(
        threads=asked["threads"],
        capability=asked["capability"],
        mkl=asked["mkl"],
        precision=asked["precision"],
        progress=voice.counting("taking steps", count),
    )
    steps = np.arange(found.first, found.first + len(found.losses))
    return {
        "there": found.place.precision or "rerun",
        "farthest": float(found.relative.max()),
        "sentence": rerun_sentence(found),
        "text": rerun_text(found),
        "losses": reduced(steps, found.losses, _POINTS) if found.has_loss else None,
    }


def _fork(asked: dict[str, Any], voice: Voice) -> dict[str, Any]:
    run = Run(asked["run"])
    watching = _Watching(voice)
    try:
        made = run.fork(
            asked["at"],
            dict(parse_setting(f"{path}={text}") for path, text in asked["settings"].items()),
            steps=asked["steps"],
            directory=run.directory.parent / asked["name"] if asked["name"] else _next_free(run),
            progress=watching,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {watching.run} has every step until then") from None
    return {"run": watching.run, "status": made.status, "notices": watching.notices}


class _Watching(Silent):
    """Watches a fork being trained."""

    def __init__(self, voice: Voice) -> None:
        self.run = "the fork"
        self.notices: list[str] = []
        self._voice = voice
        self._steps = 0

    def begin(self, directory: Path, facts: Facts) -> None:
        """Tell which run it is."""
        self.run, self._steps = shown_name(directory.name), facts.steps or 0
        self._voice.say("begun", {"run": self.run})

    def advance(self, first_step: int, losses: Sequence[float]) -> None:
        """Tell how far it is."""
        self._voice.progress(first_step + len(losses) - 1, self._steps, "training")

    def notice(self, message: str) -> None:
        """Keep it for the end."""
        self.notices.append(message)


def _next_free(run: Run) -> Path:
    """Return where a fork goes that nobody has named: beside its parent."""
    places = (run.directory.parent / f"{run.directory.name}-fork-{n}" for n in itertools.count(1))
    return next(place for place in places if not place.exists())


_TASKS: dict[str, Callable[[dict[str, Any], Voice], dict[str, Any]]] = {
    "measure": _measure,
    "when": _when,
    "verify": _verify,
    "compare": _compare,
    "fork": _fork,
    "whatif": _what_if,
    "rerun": _rerun,
}


if __name__ == "__main__":
    main()
