"""Measure in hindsight, and find the steps at which something is true."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from everystep.errors import UsageError
from everystep.recording.additions import adding
from everystep.recording.facts import MeasuredFacts
from everystep.recording.run import RecordedRun
from everystep.replay.ask import Question, ask
from everystep.replay.columns import Found, Which, ask_columns, chosen
from everystep.replay.expression import Expression
from everystep.replay.objects import Objects
from everystep.replay.walk import Piece, Walked
from everystep.training.measurements import RESERVED_NAMES

__all__ = ["Measured", "measure", "when"]


@dataclass(frozen=True)
class Measured:
    """What measuring has shown: values by step; left_out: steps from which on a replay was not exact."""

    name: str
    values: dict[int, float]
    left_out: tuple[int, ...]


def measure(
    run: RecordedRun,
    question: Question,
    name: str,
    *,
    every: int = 1,
    overwrite: bool = False,
    objects: Objects | None = None,
    processes: int | None = None,
    told: Callable[[int], None] = lambda steps: None,
) -> Measured:
    """Add a measurement to a run, as if it had been made while it was trained.

    What was measured before it was stopped is kept, and not measured again.

    Args:
        run: which run; nothing else in it is changed.
        question: an expression, or a function of the opened step that gives a number.
        name: of the measurement.
        every: steps between two measurements.
        overwrite: take the place of an earlier measurement in hindsight of that name.
        objects: what the user trained with, for steps that no program takes.
        processes: how many at once; absent: one for each core, where that is worth their start.
        told: is told of steps that are done.

    Raises:
        UsageError: the name is taken, or the question does not fit.
        RunError: something that is needed is missing, cannot be read, or is being written.
    """
    if not isinstance(every, int) or every < 1:
        raise UsageError(f"every must be a whole number of steps, 1 or more, not {every!r:.80}")
    last = run.summary().steps
    meaning = MeasuredFacts(expression=getattr(question, "text", None) or repr(question), every=every)
    left_out: list[int] = []
    with adding(run.directory) as additions:
        anew = _check_name(run, name, meaning, overwrite)
        additions.begin_measurement(name, meaning, anew=anew)
        values = {} if anew else run.measured(name)
        if isinstance(question, Expression) and question.is_recorded:
            answers = [(s, v) for s, v in ask_columns(question, run, (1, last)) if s % every == 0]
            additions.measurements([(name, step, value) for step, value in answers])
            told(last)
            return Measured(name, values | dict(answers), ())
        walked = ask(
            question,
            run,
            (1, last),
            objects=objects,
            every=every,
            skipped=frozenset(values),
            processes=processes,
            told=told,
        )
        with closing(walked):  # type: ignore[type-var]  # a generator
            for each in walked:
                exact, departed = _exact(each)
                left_out += departed
                additions.measurements([(name, step, value) for step, value in exact])
                values |= dict(exact)
    return Measured(name, dict(sorted(values.items())), tuple(sorted(left_out)))


def when(
    run: RecordedRun,
    condition: Question,
    which: Which = "first",
    *,
    objects: Objects | None = None,
    processes: int | None = None,
    told: Callable[[int], None] = lambda steps: None,
) -> Found:
    """Find the first step at which a condition is true, the last, or all.

    Raises:
        UsageError: the condition does not fit.
        RunError: something that is needed is missing or cannot be read.
    """
    last = run.summary().steps
    found: list[int] = []
    inexact: list[int] = []
    done: list[Piece] = []
    walked = ask(
        condition,
        run,
        (1, last),
        objects=objects,
        as_condition=True,
        only_first=which == "first",
        from_end=which == "last",
        processes=processes,
        told=told,
    )
    with closing(walked):  # type: ignore[type-var]  # a generator
        for each in walked:
            exact, departed = _exact(each)
            found += [step for step, _ in exact]
            inexact += departed
            done.append(each.piece)
            if (
                which != "all"
                and found
                and _is_settled(done, chosen(sorted(found), which)[0], which, last)
            ):
                break
    return Found(chosen(sorted(found), which), tuple(sorted(inexact)))


def _is_settled(done: list[Piece], step: int, which: Which, last: int) -> bool:
    """Tell whether no piece that is still to come can hold an earlier step (or a later one)."""
    own = next(piece for piece in done if piece.first <= step <= piece.last)
    if which == "first":
        return sum(p.last - p.first + 1 for p in done if p.last < own.first) == own.first - 1
    return sum(p.last - p.first + 1 for p in done if p.first > own.last) == last - own.last


def _exact(walked: Walked) -> tuple[list[tuple[int, float]], list[int]]:
    """Return the answers of steps that are the original, and the first of those that are not."""
    if walked.is_exact:
        return walked.result, []
    # Where only the closing state tells, nobody knows from which step of the piece on.
    departed = walked.first_loss.step if walked.first_loss else walked.piece.first
    return [(step, value) for step, value in walked.result if step < departed], [departed]


def _check_name(run: RecordedRun, name: str, meaning: MeasuredFacts, overwrite: bool) -> bool:
    """Return whether to begin anew; raise where the name is taken."""
    if not name or name in RESERVED_NAMES:
        raise UsageError(f"a measurement cannot be called {name!r}; choose another name")
    known = run.facts.measured
    if name not in run.measurement_names:
        return True
    if name not in known:
        raise UsageError(f"{run.name} has recorded {name!r} while it was trained; choose another name")
    if overwrite:
        return True
    if known[name].expression == meaning.expression:
        return False
    raise UsageError(
        f"{run.name} has a measurement {name!r} of something else ({known[name].expression}); choose "
        "another name, or overwrite it"
    )
