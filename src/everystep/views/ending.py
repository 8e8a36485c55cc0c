"""How a training ended before its last step, and how to go on with it."""

from __future__ import annotations

import shlex

from everystep.recording.facts import Facts
from everystep.recording.run import EXPERIMENT_FILE, RecordedRun
from everystep.views.terminal import shortest_name

__all__ = ["ending", "going_on"]


def ending(run: RecordedRun, facts: Facts, status: str, steps: int) -> str | None:
    """Return how a training ended before its last step; None if it did not.

    facts, status, steps: of the run, as already read.
    """
    if status == "killed":
        time = run.last_written.astimezone().strftime("%Y-%m-%d %H:%M")
        planned = f" of {facts.steps:,}" if facts.steps and facts.steps > steps else ""
        where = f"after step {steps:,}{planned}" if steps else "before its first step"
        return f"killed {where}, {time}"
    if status in ("stopped", "failed"):
        return f"{status}: {facts.reason}" if facts.reason else status
    return None


def going_on(run: RecordedRun, facts: Facts) -> str:
    """Return the command, or the call, that goes on with a training."""
    name = shortest_name(run.directory)
    trained = facts.trained
    if trained is not None and trained.loop is not None:
        return f"everystep.record(..., resume={name!r})"
    if (run.directory / EXPERIMENT_FILE).exists():
        return f"everystep resume {shlex.quote(name)}"
    return f"everystep.open({name!r}).resume(model=..., loss=..., optimizer=...)"
