"""Measurements in hindsight, and steps at which a condition is true: a question asked at every step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import InitVar, dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from torch import Tensor

from everystep.bounded import check_steps
from everystep.errors import ExpressionError, UsageError
from everystep.experiment.metrics import RESERVED_NAMES
from everystep.expression import Expression, Reference
from everystep.recording.facts import MeasuredFacts, check_measurement_names
from everystep.recording.keep import is_kept
from everystep.recording.lock import adding
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.opened_step import Step
from everystep.replay.parallel import Replayed, Span, Visitor, parallel, spans
from everystep.replay.probe import Probe, opened_value
from everystep.replay.processes import Opener
from everystep.replay.recorded_columns import Answers, Evaluator, Found, Which, ask_columns, chosen
from everystep.replay.recorded_steps import NotReplayedError
from everystep.replay.run_replay import Replay
from everystep.replay.shown import Shown

__all__ = ["Measured", "Question", "measure", "until", "when"]

#: An expression, what makes a number of an opened step, or `RANKS_DIFFER`.
Question = Expression | Callable[[Step], Any] | str


@dataclass
class Query(Visitor):
    """Runs the steps of a span, and asks a question at those that are due.

    every: steps between two that are due; as_condition: whether the answer is yes, stored as 1, or no,
    which is not stored; only_first: stop at the first yes; skipped: steps with a known answer;
    looks_back: whether it needs tensors of the step before.
    """

    question: Question
    run_asked: InitVar[RecordedRun]
    every: int = 1
    as_condition: bool = False
    only_first: bool = False
    skipped: frozenset[int] = frozenset()

    def __post_init__(self, run_asked: RecordedRun) -> None:
        self._tensors: set[Reference] = set()
        # A function may open steps itself.
        self.may_share = isinstance(self.question, Expression | str)
        if isinstance(self.question, Expression):
            self._evaluator = Evaluator(self.question, run_asked, self.as_condition)
            self._tensors = {r for r in self.question.references if not r.is_recorded}
        self.looks_back = any(reference.is_previous for reference in self._tensors)
        #: Whether a step must be opened: for a function, and for rows.
        self._opens = not self.may_share or any(r.kind == "rows" for r in self._tensors)
        self._answers: Answers = []
        self._first = 1
        self._previous_loss: float | None = None
        self._before: dict[Reference, Tensor] = {}
        self._probe: Probe | None = None

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        """Whether it needs no more steps."""
        return self.only_first and bool(self._answers)

    def begin(self, replay: Replay, span: Span) -> int:
        """Begin with the state before the span; a step earlier if it needs tensors of that step."""
        # A visitor is used for many spans, one after the other.
        self._answers, self._probe, self._first, self._before = [], None, span.first, {}
        earlier = self.looks_back and span.first > 1
        earlier = earlier and is_kept(span.first - 1, replay.run.facts.not_kept)
        at = replay.stretch_of(span.first)
        if earlier and span.first == replay.stretches[at].first:
            earlier = False
            # The stepper of a stretch begins with the state: another one takes the step before.
            with suppress(NotReplayedError), replay.in_force(span.first - 1):
                probe = Probe(replay.go_to(span.first - 2, at - 1), self._tensors)
                probe.stepper.run(span.first - 1, probe)
                self._before = probe.before
        start = span.first - 1 - earlier
        known = replay.recorded_losses(start, start)
        self._previous_loss = known[0] if known else None
        return start

    def run(self, replay: Replay, last: int) -> list[float]:
        """Run the next steps, and ask; return their losses."""
        stepper = replay.stepper
        number = stepper.state + 1
        if not self._is_looked_at(number):  # up to the next step to look at, without stopping
            # The next multiple of `every`, and one step before it if that is looked at, too.
            next_due = -(-(number + 1) // self.every) * self.every
            until = min(last, next_due - 1 - self.looks_back)
            # At least this step, though the next one may be looked at: else nothing would run.
            losses = stepper.run(max(number, until))
        elif self._opens:
            step = replay.next_step()
            self._answer(number, step.loss, step)
            losses = [step.loss]
        else:
            self._probe = self._probe or Probe(stepper, self._tensors, self._answer, self._before)
            while number < last and self._is_looked_at(number + 1):
                number += 1
            losses = stepper.run(number, self._probe)
        self._previous_loss = losses[-1]
        return losses

    def result(self) -> Answers:
        """Return the answers of the span."""
        return self._answers

    def _answer(self, number: int, loss: float, step: Step | None = None) -> bool:
        """Answer at a step that just ran, or was opened, if it is due; return whether to continue."""
        if self._is_due(number):
            answer = self._asked(number, loss, step)
            if answer is not None:
                self._answers.append((number, answer))
        self._previous_loss = loss
        return not self.is_done

    def _asked(self, number: int, loss: float, step: Step | None) -> float | None:
        """Return the answer at a step, if there is one."""
        losses = self._previous_loss, loss
        if isinstance(self.question, Expression):
            if step is not None:
                return self._evaluator.answer(number, losses, partial(opened_value, step))
            assert self._probe is not None
            return self._evaluator.answer(number, losses, self._probe.value_of)
        if isinstance(self.question, str):
            assert self._probe is not None
            return 1.0 if self._probe.stepper.ranks_differ() else None
        assert step is not None
        answer = self.question(step)
        if answer is None:
            return None
        try:
            if self.as_condition:
                return 1.0 if answer else None
            return float(answer)
        except (TypeError, ValueError, RuntimeError):
            is_tensor = isinstance(answer, Tensor)
            got = f"a tensor of shape {tuple(answer.shape)}" if is_tensor else f"{answer!r:.80}"
            raise ExpressionError(f"the function must return one number, not {got}") from None

    def due(self, run: RecordedRun) -> list[Span]:
        """Return the spans of a run in which a step is due."""
        found = spans(run, 1, run.newest_step(), are_long=self.looks_back)
        return [each for each in found if any(map(self._is_due, range(each.first, each.last + 1)))]

    def _is_due(self, number: int) -> bool:
        return number >= self._first and number % self.every == 0 and number not in self.skipped

    def _is_looked_at(self, number: int) -> bool:
        return self._is_due(number) or (self.looks_back and self._is_due(number + 1))


@dataclass(frozen=True, repr=False)
class Measured(Shown):
    """The result of measuring: values by step; left_out: steps from which on a replay was not exact."""

    name: str
    values: dict[int, float]
    left_out: tuple[int, ...]


def measure(
    opener: Opener,
    question: Question,
    name: str,
    *,
    every: int = 1,
    overwrite: bool = False,
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Measured:
    """Answer `Run.measure`. It keeps the values of an interrupted measurement, and continues after them.

    on_progress: called with the number of steps just replayed.
    """
    check_steps(every)
    run = opener.run
    meaning = MeasuredFacts(expression=getattr(question, "text", None) or repr(question), every=every)
    left_out: list[int] = []
    with adding(run.directory) as database:
        is_new = _check_name(run, name, meaning, overwrite)
        values = {} if is_new else {**run.values_of(name)}

        def keep(answers: Answers) -> None:
            nonlocal is_new
            # Its name is written with its first values, so a process killed before them leaves none.
            rows = [(name, step, value) for step, value in answers]
            database.add_measurements(rows, {name: meaning}, [name] if is_new else [])
            values.update(answers)
            is_new = False

        # No step need be replayed: recorded columns have the answer.
        if isinstance(question, Expression) and question.is_recorded:
            last = run.newest_step()
            keep([(s, v) for s, v in ask_columns(question, run) if s % every == 0])
            on_progress(last)
        else:
            query = Query(question, run, every=every, skipped=frozenset(values))
            left_out += _not_kept(run)
            replayed = parallel(opener, query.due(run), query, processes, on_progress)
            try:
                with closing(replayed):  # type: ignore[type-var]  # a generator
                    for each in replayed:
                        exact, diverged = _exact(each)
                        left_out += diverged
                        keep(exact)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"stopped; {len(values):,} values are saved; measure the same again to continue"
                ) from None
    return Measured(name, dict(sorted(values.items())), tuple(sorted(left_out)))


def when(
    opener: Opener,
    condition: Question | str,
    which: Which = "first",
    *,
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Found:
    """Answer `Run.when`. condition: an expression, a function, or the text `RANKS_DIFFER`."""
    run = opener.run
    if isinstance(condition, str) and run.known_ranks is None:
        raise UsageError(f"{run.name} was trained by one process, and has no ranks that could differ")
    query = Query(condition, run, as_condition=True, only_first=which == "first")
    # For the last step, the spans are replayed from the end.
    due = query.due(run)[:: -1 if which == "last" else 1]

    def is_found(each: Replayed) -> bool:
        return which != "all" and bool(_exact(each)[0])

    done = [_exact(each) for each in until(is_found, opener, due, query, processes, on_progress)]
    found = sorted(step for answers, _ in done for step, _ in answers)
    left_out = [step for _, each in done for step in each]
    return Found(chosen(found, which), tuple(sorted(left_out + _not_kept(run))))


def until(
    is_found: Callable[[Replayed], bool],
    opener: Opener,
    due: list[Span],
    visitor: Visitor,
    processes: int | None,
    on_progress: Callable[[int], None],
) -> list[Replayed]:
    """Replay spans until one has a result and all spans before it are replayed; return the result."""
    done: dict[Span, Replayed] = {}
    replayed = parallel(opener, due, visitor, processes, on_progress)
    with closing(replayed):  # type: ignore[type-var]  # a generator
        for each in replayed:
            done[each.span] = each
            # Only once all spans before are done: one of them might have an earlier answer.
            if any(is_found(done[span]) for span in takewhile(done.__contains__, due)):
                break
    return [*done.values()]


def _not_kept(run: RecordedRun) -> list[int]:
    """Return the first of each range of steps that were not kept."""
    last = run.newest_step()
    return [each.first for each in run.facts.not_kept if each.first <= last]


def _exact(replayed: Replayed) -> tuple[list[tuple[int, float]], list[int]]:
    """Return the answers of steps that are the original, and the first of those that are not."""
    unsound = replayed.unsound_from
    if unsound is None:
        return replayed.result, []
    return [(step, value) for step, value in replayed.result if step < unsound], [unsound]


def _check_name(run: RecordedRun, name: str, meaning: MeasuredFacts, overwrite: bool) -> bool:
    """Return whether to begin from the first step; raise if the name is taken."""
    if not name or name in RESERVED_NAMES:
        raise UsageError(f"{name!r} is not allowed as the name of a measurement; choose another name")
    known = run.facts.measured
    before = run.measurement_names
    check_measurement_names({*before, name})
    if name not in before:
        return True
    if name not in known:
        raise UsageError(f"{run.name} already recorded {name!r} during training; choose another name")
    if overwrite:
        return True
    if known[name].expression == meaning.expression:
        return False
    raise UsageError(
        f"{run.name} already has a measurement {name!r} of another expression "
        f"({known[name].expression}); choose another name, or overwrite it"
    )
