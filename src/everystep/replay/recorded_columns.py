"""Questions in the form of expressions, and those that recorded columns answer. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from everystep.bounded import MOST_STEPS
from everystep.errors import named
from everystep.expression import Expression, Reference, parse
from everystep.recording.facts import TrainingFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.shown import Shown

__all__ = [
    "RANKS_DIFFER",
    "Answers",
    "Evaluator",
    "Found",
    "Which",
    "ask_columns",
    "changed_settings",
    "chosen",
    "read_question",
    "recorded_at",
]

#: The condition of a step after which a parameter is not the same on all ranks.
RANKS_DIFFER = "ranks differ"
#: Steps in the `repr` of an answer.
SHOWN = 10
Answers = list[tuple[int, float]]
Which = Literal["first", "last", "all"]


@dataclass(frozen=True)
class Found(Shown):
    """Steps at which a condition is true; inexact: steps from which on a replay was not exact."""

    steps: tuple[int, ...]
    inexact: tuple[int, ...] = ()

    def __repr__(self) -> str:
        steps = named([f"{step:,}" for step in self.steps], SHOWN)
        inexact = f"; not exact from step {self.inexact[0]:,}" if self.inexact else ""
        return f"<found at {f'steps {steps}' if steps else 'no step'}{inexact}>"


def read_question(text: str, run: RecordedRun) -> Expression:
    """Read an expression about the steps of a run.

    Raises:
        ExpressionError: the expression is invalid, or names an unknown measurement.
    """
    names = run.measurement_names
    expression = parse(text, names)
    expression.check({"measurements": names})
    return expression


def ask_columns(expression: Expression, run: RecordedRun, *, as_condition: bool = False) -> Answers:
    """Return the answers at all steps from recorded columns only.

    Raises:
        ExpressionError: the expression does not fit.
    """
    evaluator = Evaluator(expression, run, as_condition)
    losses = run.losses["loss"].to_list()  # it warns of altered ones
    pairs = enumerate(zip([None, *losses], losses, strict=False), start=1)
    found = ((number, evaluator.answer(number, pair)) for number, pair in pairs)
    return [(number, answer) for number, answer in found if answer is not None]


def chosen(steps: list[int], which: Which) -> tuple[int, ...]:
    """Return the first of steps in their order, the last, or all."""
    return tuple({"first": steps[:1], "last": steps[-1:], "all": steps}[which])


def _held(changes: Mapping[int, float]) -> Callable[[int], float | None]:
    """Return a function that looks up a number that is recorded when it changes (None before), by step.

    changes: by the first step that uses each, in order.
    """
    steps, values = [*changes], [None, *changes.values()]
    # `values` has one more, for the steps before the first change.
    return lambda step: values[bisect_right(steps, step)]


def changed_settings(
    run: RecordedRun, facts: TrainingFacts, first: int, last: int = MOST_STEPS
) -> Callable[[int], dict[str, float]]:
    """Return a function that looks up the settings that changed in steps `first` to `last`, by step.

    The state before has the others.
    """
    found = {}
    for name in run.measurement_names:
        if facts.is_setting(name):
            changes = run.values_of(name).items()
            found[name] = _held({step: value for step, value in changes if first <= step <= last})

    def at(step: int) -> dict[str, float]:
        values = ((name, each(step)) for name, each in found.items())
        return {name: value for name, value in values if value is not None}

    return at


def recorded_at(run: RecordedRun, name: str) -> Callable[[int], float | None]:
    """Return a function that looks up a measurement by step (None if it has none)."""
    values = run.values_of(name)
    return _held(values) if run.facts.training.is_setting(name) else values.get


class _NothingThereError(Exception):
    """A name in an expression has no value at this step."""


class Evaluator:
    """Evaluates an expression at steps of a run.

    as_condition: whether the answer is yes, which is 1, or no, which is no answer.
    """

    def __init__(self, expression: Expression, run: RecordedRun, as_condition: bool = False) -> None:
        self._expression = expression
        self._as_condition = as_condition
        names = {r.name for r in expression.references if r.kind == "measurements"}
        self._recorded = {name: recorded_at(run, name) for name in names}

    def answer(
        self,
        number: int,
        losses: tuple[float | None, float],
        tensor_of: Callable[[Reference], Any] = lambda reference: None,
    ) -> float | None:
        """Return the answer at a step, or None if a value that it needs does not exist.

        losses: of the step before, None if there is none, and of the step; tensor_of: returns what no
        column has, None if it does not exist.
        """

        def value_of(reference: Reference) -> Any:
            found: Any
            if reference.kind == "step":
                found = number - reference.is_previous
            elif reference.kind == "loss":
                found = losses[not reference.is_previous]
            elif reference.kind == "measurements":
                found = self._recorded[reference.name](number - reference.is_previous)
            else:
                found = tensor_of(reference)
            if found is None:
                raise _NothingThereError
            return found

        try:
            if self._as_condition:
                return 1.0 if self._expression.truth(value_of) else None
            return self._expression.number(value_of)
        except _NothingThereError:
            return None
