"""Continuing a run: what must be unchanged, and what the run records about changes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NoReturn

from everystep.errors import RunError, say
from everystep.recording.facts import EarlierFacts, Facts, ResumeFacts, TrainingFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.settings_diff import settings_that_differ
from everystep.recording.texts import processes_text

__all__ = [
    "accepted_changes",
    "check_rules",
    "check_taken_by_loop",
    "facts_resumed",
    "refuse_changes",
    "resume_facts",
]

#: Characters of a value that a message shows.
_MOST_SHOWN = 200


def accepted_changes(
    run: RecordedRun,
    now: TrainingFacts,
    *,
    is_accepted: bool,
    left_out: tuple[str, ...] = (),
    left: TrainingFacts | None = None,
) -> tuple[str, ...]:
    """Return what changed, as `name: before | now`: settings, versions, numerics, processes.

    left_out: prefixes of the names of settings that do not count; left: how the training itself has left
    the objects, if it ran in this process: what is still so, the user has not changed.

    Raises:
        RunError: they are not accepted, or the state restores them; another number of processes does not
            refuse a resume.
    """
    before = run.facts.training
    settings = settings_that_differ(before, now, of_own_classes=False)
    if left is not None:
        by_user = {each.listed for each in settings_that_differ(left, now, of_own_classes=False)}
        settings = [each for each in settings if each.listed in by_user]
    found = {each.listed: each.values for each in settings if not each.listed.startswith(left_out)}
    for name in sorted(before.versions.keys() | now.versions.keys()):
        versions = before.versions.get(name), now.versions.get(name)
        if versions[0] != versions[1]:
            found[f"version of {name}"] = versions
    found |= before.numerics.differences(now.numerics)
    changed = tuple(f"{name}: {_shown(a)} | {_shown(b)}" for name, (a, b) in found.items())
    # A state restores these: the run would record a change that its next steps do not have.
    is_held = any(
        each.kind in ("optimizer", "scheduler") and each.name not in (None, "every") for each in settings
    )
    if changed and is_held:
        refuse_changes(run, changed, " (--force keeps the optimizers and schedulers of the run, too)")
    if changed and not is_accepted:
        cure = ", or accept this with --force (force=True), which discards the recorded steps after the"
        refuse_changes(run, changed, f"{cure} newest snapshot")
    return (*_changes_by_others(run, now), *changed)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def refuse_changes(run: RecordedRun, changed: tuple[str, ...], cure: str = "") -> NoReturn:
    """Raise RunError with what changed, before anything runs. cure: besides the usual ones."""
    raise RunError(
        "\n  ".join([f"{run.name} was trained with different settings (before | now):", *changed])
        + f"\nrestore what changed{cure}; to train with other settings, fork the run"
    )


def check_rules(run: RecordedRun, step: int) -> None:
    """Check that the steps after a state were taken by the rules that a run has now.

    Raises:
        RunError: a fork's parent took some, or the training before a change that was accepted.
    """
    facts = run.facts
    if facts.fork is not None and step < facts.fork.at and facts.training.loop is None:
        raise RunError(
            f"{run.name} cannot be resumed: it ended before the state that it begins with was on disk, "
            f"or that snapshot is damaged; fork {facts.fork.parent} again (--at {facts.fork.at})"
        )
    # The facts are those of the last stretch of steps, and a resume takes steps by these.
    changed = [each.at for each in facts.resumed if each.changed]
    count = facts.training.processes
    others = [each.last for each in facts.earlier if each.training.processes != count]
    if step < (since := max([0, *changed, *others])):
        raise RunError(
            f"{run.name} cannot be resumed: from step {since + 1:,} on it was trained with "
            f"different settings, and its snapshots from step {since:,} on are missing or damaged; fork "
            f"it at step {step:,}"
        )


def resume_facts(run: RecordedRun, at: int, changed: tuple[str, ...] = ()) -> ResumeFacts:
    """Return the facts of continuing after step `at`, with what changed."""
    facts = run.facts
    now = datetime.now(UTC).replace(microsecond=0)
    return ResumeFacts(at=at, began=now, seconds=_seconds(run, facts), changed=changed)


def _seconds(run: RecordedRun, facts: Facts) -> float | None:
    """Return how long the training has taken; of one that was killed, up to its last write."""
    if facts.status != "running":
        return facts.seconds
    # It was killed, so nothing was written at its end.
    last = facts.resumed[-1] if facts.resumed else None
    began, before = (facts.started, 0.0) if last is None else (last.began, last.seconds)
    if began is None or before is None:
        return None
    return before + max(0.0, (run.last_written - began).total_seconds())


def _changes_by_others(run: RecordedRun, now: TrainingFacts) -> tuple[str, ...]:
    """Return that another number of processes continues a run, if so; rank 0 reports it."""
    if run.others is None:
        return ()
    at, newest = run.common_steps or 0, run.newest_step()
    if now.ranks is None or not now.ranks.rank:
        message = (
            f"{run.name} was recorded by {processes_text(run.others)}, and continues with "
            f"{now.processes} after step {at:,}: its results may differ from those of a training "
            "without this change"
        )
        if newest > at:
            message += f"; steps {at + 1:,} to {newest:,}, which no state on the disk has, are discarded"
        if now.loop is not None:
            message += "; an epoch continues at the same share of its batches, if these have a length"
        say(message)
    return (f"processes: {run.others} | {now.processes}",)


def facts_resumed(run: RecordedRun, trained: TrainingFacts, steps: int, resumed: ResumeFacts) -> Facts:
    """Return the facts of a run that is resumed, to be written with its first new step."""
    before = run.facts
    # A stretch of no steps, of a run that was resumed twice at one step, is none.
    earlier = before.earlier
    if resumed.at > max((each.last for each in earlier), default=0):
        earlier = (*earlier, EarlierFacts(last=resumed.at, training=before.training))
    return Facts(
        steps=steps, trained=trained, earlier=earlier, resumed=(*before.resumed, resumed), finished=None
    )


def check_taken_by_loop(facts: Facts) -> None:
    """Raise RunError if a run of a loop was forked by its programs alone.

    No snapshot then has what the loop carries besides tensors.
    """
    if facts.training.engine is not None and facts.fork is not None:
        parent, at = facts.fork.directory, facts.fork.at
        raise RunError(
            f"programs took the steps of {facts.name} from step {at + 1:,} on, and a loop cannot "
            f"continue theirs; fork their parent in your code, and change it there once "
            f"recording.step_count is {at}: everystep.record(fork={parent!r}, at={at}, ...)"
        )
