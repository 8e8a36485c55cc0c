"""What a run is, how its steps ran, how it ended, and the next commands, as text.

The terminal, the page, the report and a notebook show the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everystep.recording.directories import RUNS, is_sweep
from everystep.recording.facts import EngineFacts, Facts, ForkFacts, ResumeFacts, TrainingFacts
from everystep.recording.keep import kept_text
from everystep.recording.recorded_run import EXPERIMENT_FILE, RecordedRun
from everystep.recording.settings_diff import flat
from everystep.recording.texts import (
    loss_text,
    model_text,
    optimizers_text,
    scheduler_text,
    shortest,
    value_text,
)
from everystep.views.formatting import counted, labelled, measured_text, number, seconds_text, time_text

__all__ = [
    "closing",
    "continue_with",
    "ending",
    "engine_text",
    "facts_data",
    "facts_in_order",
    "header",
    "landmarks",
    "shortest_name",
    "state_data",
]

_LABEL_WIDTH = 8


def header(facts: Facts) -> str:
    """Return the description of a run, in the chapter's order, as text."""
    return "\n".join(labelled(label, text, _LABEL_WIDTH) for label, text in header_rows(facts))


def header_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return the description of a run as (label, text): device, data, model, loss, update.

    Raises:
        RunError: the run has no record of how it was trained.
    """
    training = facts.training
    numerics = training.numerics
    config = [f"{name}: {value_text(value)}" for name, value in flat(dict(facts.config or {})).items()]
    return [
        ("device", f"{training.device} ({numerics.processor}, {counted(numerics.threads, 'thread')})"),
        ("data", _data_text(training)),
        ("model", f"{model_text(training.modules)}\n{training.parameters:,} parameters"),
        ("loss", loss_text(training.loss)),
        ("update", _update_text(training)),
        ("steps", _steps_text(facts.steps or 0, training)),
        *([("config", "\n".join(config))] if config else []),
        *([("tags", ", ".join(facts.tags))] if facts.tags else []),
        *([("fork of", _fork_text(facts.fork))] if facts.fork else []),
        *([("resumed", _resumed_text(facts.resumed))] if facts.resumed else []),
    ]


def facts_in_order(facts: Facts) -> list[tuple[str, str]]:
    """Return the description of a run and how its steps ran, as (label, text), in the header's order."""
    has_taken = facts.training.engine or facts.training.loop
    how = f"\n{engine_text(facts)}" if has_taken else ""
    return [(label, f"{text}{how}" if label == "steps" else text) for label, text in header_rows(facts)]


def closing(directory: Path) -> str:
    """Return the final message of a training: how it ended, where the run is, and the next command."""
    run = RecordedRun(directory)
    summary = run.summary()
    facts = run.facts
    seconds = "" if facts.seconds is None else f" in {seconds_text(facts.seconds)}"
    lines = [] if facts.reason is None else [f"stopped: {facts.reason}", ""]
    measured = "".join(
        f", {name} {measured_text(name, value)}"
        for name, value in run.latest_measurements.items()
        # Not what was measured in hindsight, which does not come from this training.
        if name != "lr" and name not in facts.measured
    )
    has_loss = summary.first_loss is not None
    loss = f", loss {number(summary.first_loss)} to {number(summary.last_loss)}" if has_loss else ""
    taken = counted(summary.steps, "step")
    if summary.parent is not None:
        # The parent took the steps before: the time is only that of the others.
        at = summary.parent[1]
        taken = f"{counted(summary.steps - at, 'step')} after the parent's {at:,},"
    lines.append(f"{taken}{seconds}{loss}{measured}")
    lines.append(engine_text(facts) if summary.steps else "only the initial state, state 0, is recorded")
    lines.append(f"recorded in {directory}")
    # To paste into a shell, whatever the name of the directory.
    argument = shlex.quote(shortest_name(directory))
    following = [f"fork {argument} --at 0 --steps 500"]
    if summary.steps:
        following = [f"step {argument} {summary.steps}"]
        following += [f"{each} {argument}" for each in ("table", "plot", "report")]
    commands = (f"  everystep {command}" for command in (f"view {argument}", *following))
    return "\n".join([*lines, "", "next:", *commands])


def engine_text(facts: Facts) -> str:
    """Return how the steps of a run ran, and what verified that."""
    loop, engine, ranks = facts.training.loop, facts.training.engine, facts.training.ranks
    which = "" if ranks is None else f"this is rank {ranks.rank} of {ranks.count} ({ranks.backend})"
    if loop is not None:
        kept = f"its operations are in {counted(loop.programs, 'program')}"
        if lost := facts.batches_lost_to:
            kept += f"; the batches of steps up to {lost:,} were dropped to stay within the budget"
        if facts.not_kept:
            kept += f"; {kept_text(facts, facts.steps or 0)} (keep: {facts.not_kept[-1].keep})"
        # A fork of a loop: its code is not there, so programs took the steps.
        if engine is not None and facts.fork is not None:
            return f"by your own code up to step {facts.fork.at:,}, by program alone after it; {kept}"
        if ranks is not None:
            kept = f"{which}; {kept}"
        if loop.function is None:
            return f"by your own loop; {kept}"
        return f"by your own step; {kept}; {_function_text(loop.function, facts.steps or 0)}"
    if ranks is not None:
        return f"by Python; {which}, with the losses of its rows"
    if engine is None:
        return "by Python"
    # No step was taken by a program.
    if engine.eager_from == 1 or (engine.eager_from is not None and not engine.programs):
        return f"by Python: {engine.reason}"
    if engine.stands_behind == "alone":
        return "by program alone, without the objects that trained it; not checked against Python"
    vouched = ', which you vouched for (engine="program")' if engine.stands_behind == "vouched" else ""
    found = f"by program{vouched}; {_checks_text(engine)}"
    if engine.eager_from is None:
        return found
    return f"{found}; by Python from step {engine.eager_from:,}: {engine.reason}"


def _function_text(function: EngineFacts, steps: int) -> str:
    if not function.by_program:
        reason = f": {function.reason}" if function.reason else ""
        return f"Python ran every step, although you vouched for them{reason}"
    since = f" after step {function.after:,}" if function.after else ""
    return (
        f'a program, which you vouched for (engine="program"), ran {function.by_program:,} of '
        f"{steps - function.after:,} steps{since}, {_checks_text(function)}"
    )


def _checks_text(taken: EngineFacts) -> str:
    last = f", last at step {taken.verified_to:,}" if taken.checks else ""
    return f"checked against Python {counted(taken.checks, 'time')}{last}"


def _fork_text(fork: ForkFacts) -> str:
    changed = ", ".join(f"{path} = {value}" for path, value in fork.changed.items())
    since = f"; from there on {changed}" if changed else ""
    return f"{fork.parent}, with its steps up to {fork.at:,}{since}"


def _resumed_text(resumed: Sequence[ResumeFacts]) -> str:
    newest = resumed[-1]
    times = f" (the last of {len(resumed)} times)" if len(resumed) > 1 else ""
    lines = [f"after step {newest.at:,}, {time_text(newest.began)}{times}"]
    return "\n".join(lines + [f"changed: {each}" for each in newest.changed])


def _data_text(training: TrainingFacts) -> str:
    if training.loop is not None:
        return "the batches of your own loop"
    data = training.data
    what = data.name or Path(data.path or data.source).name
    shapes = f"{data.rows} rows" if data.x is None else f"x {data.x}, y {data.y}"
    kept_out = data.validation_rows
    return f"{what}: {shapes}" + (f"; {kept_out} rows for validation" if kept_out else "")


def _update_text(training: TrainingFacts) -> str:
    limit = training.max_grad_norm
    clipping = None if limit is None else f"gradients clipped to norm {limit:g}"
    update, scheduler = optimizers_text(training.optimizers), scheduler_text(training.schedulers)
    return "\n".join(filter(None, [clipping, update, scheduler]))


def _steps_text(steps: int, training: TrainingFacts) -> str:
    batches = training.batches
    if training.loop is not None or not steps:
        return f"{steps:,}"
    split = f", split among {training.ranks.count} processes" if training.ranks else ""
    if batches.batch_size is None:
        return f"{steps:,}, each with all {training.data.rows:,} rows{split}"
    return f"{steps:,}, {batches.batch_size} rows each{split}, {batches.steps_per_epoch:,} to an epoch"


def shortest_name(directory: Path) -> str:
    """Return the shortest argument for a run: its bare name if it is in runs/, or in a sweep there."""
    place = directory.parent.parent if is_sweep(directory.parent) else directory.parent
    return str(directory.relative_to(place)) if place == RUNS else str(directory)


def ending(run: RecordedRun, facts: Facts, status: str, steps: int) -> str | None:
    """Return how a training ended before its last step; None if it did not.

    facts, status, steps: of the run, as already read.
    """
    # Nothing recorded the end: the last time that something was written is known.
    if status == "killed":
        planned = f" of {facts.steps:,}" if facts.steps and facts.steps > steps else ""
        where = f"after step {steps:,}{planned}" if steps else "before its first step"
        return f"killed {where}, {time_text(run.last_written)}"
    if status in ("stopped", "failed"):
        return f"{status}: {facts.reason}" if facts.reason else status
    return None


def continue_with(run: RecordedRun, facts: Facts) -> str:
    """Return the command, or the call, that continues a training."""
    name = shortest_name(run.directory)
    trained = facts.trained
    if trained is not None and trained.loop is not None:
        if trained.engine is not None and facts.fork is not None:  # programs alone took its steps
            return f"everystep.record(..., fork={facts.fork.directory!r}, at={facts.fork.at})"
        return f"everystep.record(..., resume={name!r})"
    if (run.directory / EXPERIMENT_FILE).exists():
        ranks = None if trained is None else trained.ranks
        start = "" if ranks is None else f"torchrun --nproc-per-node {ranks.count} -m "
        return f"{start}everystep resume {shlex.quote(name)}"
    # Python objects are not in the run: the caller has to pass them again.
    return f"everystep.open({name!r}).resume(model=..., loss=..., optimizer=...)"


def state_data(run: RecordedRun, facts: Facts, status: str, steps: int) -> dict[str, Any]:
    """Return the progress of a run; for one that ended early, also why, and how to continue.

    facts, status, steps: of the run, as already read.
    """
    early = ending(run, facts, status, steps)
    return {
        "status": status,
        "ending": early,
        "continue_with": early and continue_with(run, facts),
        "note": facts.note,
        "steps": steps,
        "planned": steps if facts.steps is None else facts.steps,
        "seconds": facts.seconds,
    }


def facts_data(facts: Facts) -> dict[str, Any]:
    """Return everything known about a run as text, as the page and the report show it.

    facts: as (label, text); details: numerics and versions, each as a title, a short text, and all as
    (label, text); times: when it was trained, and how long that took, in lines.
    """
    training = facts.training
    numerics, versions = training.numerics.named(), training.versions
    seed = "the state of torch's generator" if training.seed is None else str(training.seed)
    times = [("started", facts.started), ("ended", facts.finished)]
    # In UTC, to the second: the page may be read anywhere.
    stamps = [f"{what} {time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" for what, time in times if time]
    seconds = [] if facts.seconds is None else [f"{seconds_text(facts.seconds)} of training"]
    return {
        "facts": [*facts_in_order(facts), ("seed", seed)],
        "details": [
            (
                "numerics",
                f"CPU capability {numerics['cpu_capability']}, MKL_CBWR {numerics['mkl_cbwr']}",
                [(key.replace("_", " "), _word(value)) for key, value in numerics.items()],
            ),
            (
                "versions",
                ", ".join(f"{n} {versions[n]}" for n in ("everystep", "torch") if n in versions),
                list(versions.items()),
            ),
        ],
        "times": "\n".join([*stamps, *seconds]),
    }


def landmarks(steps: NDArray[Any], losses: NDArray[Any]) -> dict[str, Any]:
    """Return the first, the last and the smallest loss, and the first that is not finite.

    steps, losses: of all steps, or of an excerpt that has them, in order (steps).
    """
    # NaN has no order, and the smallest loss is of those that are numbers.
    finite = np.isfinite(losses)
    places = {"first": 0, "last": len(losses) - 1} if len(losses) else {}
    if finite.any():
        places["smallest"] = int(np.argmin(np.where(finite, losses, np.inf)))
    bad = int(finite.argmin()) if not finite.all() else None
    return {
        "landmarks": [
            {
                "what": what,
                "step": int(steps[place]),
                "short": number(losses[place]),
                "full": shortest(losses[place]),
            }
            for what, place in places.items()
        ],
        "nonfinite": None if bad is None else {"step": int(steps[bad]), "loss": str(losses[bad])},
    }


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
