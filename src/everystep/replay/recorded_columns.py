"""Questions in the form of expressions, and those that recorded columns answer. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from everystep.expression import Expression, Reference, parse
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.shown import Shown
from everystep.step.hyperparameters import is_hyperparameter

__all__ = [
    "Answers",
    "Evaluator",
    "Found",
    "HeldNumber",
    "ValueSource",
    "Which",
    "ask_columns",
    "chosen",
    "read_question",
    "recorded_at",
]

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
        first = ", ".join(f"{step:,}" for step in self.steps[:SHOWN])
        more = f" and {len(self.steps) - SHOWN:,} more" if len(self.steps) > SHOWN else ""
        inexact = f"; not exact from step {self.inexact[0]:,}" if self.inexact else ""
        return f"<found at {f'steps {first}{more}' if self.steps else 'no step'}{inexact}>"


def read_question(text: str, run: RecordedRun) -> Expression:
    """Read an expression about the steps of a run.

    Raises:
        ExpressionError: the expression is invalid, or names an unknown measurement.
    """
    names = run.measurement_names
    expression = parse(text, names)
    expression.check({"measurements": names})
    return expression


def ask_columns(
    expression: Expression, run: RecordedRun, wanted: tuple[int, int], *, as_condition: bool = False
) -> Answers:
    """Answer from recorded columns only.

    Raises:
        ExpressionError: the expression does not fit.
    """
    evaluator = Evaluator(expression, run, as_condition)
    first, last = wanted
    before = run.losses_between(first - 1, first - 1)
    evaluator.previous_loss = before[0] if before else None
    answers = []
    for number, loss in enumerate(run.losses_between(first, last), start=first):
        answer = evaluator.answer(number, loss, None)
        if answer is not None and (answer or not as_condition):
            answers.append((number, answer))
        evaluator.previous_loss = loss
    return answers


def chosen(steps: list[int], which: Which) -> tuple[int, ...]:
    """Return the first of steps in their order, the last, or all."""
    return tuple({"first": steps[:1], "last": steps[-1:], "all": steps}[which])


class HeldNumber:
    """A number that is recorded when it changes, such as a learning rate.

    values: by the first step that uses it, in order.
    """

    def __init__(self, values: Mapping[int, float]) -> None:
        self._steps = [*values]
        self._values = [*values.values()]

    def at(self, step: int) -> float | None:
        """Return the number at a step, None before it is recorded."""
        index = bisect_right(self._steps, step) - 1
        return self._values[index] if index >= 0 else None


def recorded_at(run: RecordedRun, name: str) -> Callable[[int], float | None]:
    """Return a function that looks up a measurement by step (None if it has none).

    A setting of an optimizer is recorded when it changes, and holds until the next change; of a loop,
    these are the learning rates. What a loop logs belongs to its step.
    """
    training, values = run.facts.training, run.measured(name)
    is_rate = name.partition("[")[0].rpartition(".")[2] == "lr" and bool(training.optimizers)
    is_held = is_rate if training.loop else is_hyperparameter(name)
    return HeldNumber(values).at if is_held else values.get


class ValueSource(Protocol):
    """The values of what expressions name, at a step."""

    def has(self, reference: Reference) -> bool:
        """Tell whether a value exists at this step."""

    def value_of(self, reference: Reference) -> Any:
        """Return the value of a reference."""


class _NothingThereError(Exception):
    """A name in an expression has no value at this step."""


class Evaluator:
    """Evaluates an expression, step after step."""

    def __init__(self, expression: Expression, run: RecordedRun, as_condition: bool) -> None:
        self._evaluate = expression.truth if as_condition else expression.number
        names = {r.name for r in expression.references if r.kind == "measurements"}
        self._recorded = {name: recorded_at(run, name) for name in names}
        self.previous_loss: float | None = None

    def answer(self, number: int, loss: float, values: ValueSource | None) -> float | None:
        """Return the answer at a step, or None if a value that it needs does not exist."""

        def value_of(reference: Reference) -> Any:
            found: Any = None
            if reference.kind == "step":
                found = number - reference.is_previous
            elif reference.kind == "loss":
                found = self.previous_loss if reference.is_previous else loss
            elif reference.kind == "measurements":
                found = self._recorded[reference.name](number - reference.is_previous)
            elif values is not None and values.has(reference):
                found = values.value_of(reference)
            if found is None:
                raise _NothingThereError
            return found

        try:
            return float(self._evaluate(value_of))
        except _NothingThereError:
            return None
