"""Ask: put a question to every step of a run, an expression or a function of the opened step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from everystep.errors import ExpressionError
from everystep.recording.run import RecordedRun
from everystep.replay.columns import Answers, Evaluator
from everystep.replay.expression import Expression, Reference
from everystep.replay.objects import Objects
from everystep.replay.probe import Probe
from everystep.replay.replay import Replay
from everystep.replay.step import Step
from everystep.replay.walk import Piece, Walked, coarser, pieces, walk

__all__ = ["Question", "ask", "check_question"]

#: An expression, or what makes a number of an opened step.
Question = Expression | Callable[[Step], Any]


class Asking:
    """Takes the steps of a piece, and puts the question to those that are due.

    Args:
        question: what to ask.
        every: steps between two that are due.
        as_condition: whether the answer is a yes, kept as 1, or a no, which is not kept.
        only_first: stop at the first yes.
        skipped: steps whose answer is known.

    looks_back: whether tensors of the step before are wanted.
    """

    def __init__(
        self,
        question: Question,
        run: RecordedRun,
        *,
        every: int = 1,
        as_condition: bool = False,
        only_first: bool = False,
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        self._question = question
        self._every = every
        self._as_condition = as_condition
        self._only_first = only_first
        self._skipped = skipped
        self._evaluator = (
            Evaluator(question, run, as_condition) if isinstance(question, Expression) else None
        )
        self._answers: Answers = []
        self._first = 1
        self._probe: Probe | None = None
        self.looks_back = any(reference.is_previous for reference in self._tensors())

    @property
    def is_done(self) -> bool:
        """Whether no more steps need be taken."""
        return self._only_first and bool(self._answers)

    def begin(self, replay: Replay, piece: Piece) -> int:
        """Begin with the state before the piece; a step earlier where tensors of that step count."""
        self._answers, self._probe, self._first = [], None, piece.first
        earlier = self.looks_back and piece.first > replay.stretches[piece.at].first
        start = piece.first - 1 - earlier
        if self._evaluator is not None:
            known = replay.recorded_losses(start, start)
            self._evaluator.previous_loss = known[0] if known else None
        return start

    def take(self, replay: Replay, last: int, piece: Piece) -> Tensor:
        """Take the steps up to `last`, asking; return their losses."""
        revived = replay.revived
        losses: list[float] = []
        assert revived.state is not None
        while revived.state < last and not self.is_done:
            number = revived.state + 1
            if not self._is_looked_at(number):
                until = min(last, self._next_due(number) - 1 - self.looks_back)
                losses += revived.run(max(number, until)).tolist()
            elif self._evaluator is None:
                losses.append(self._open(replay, number))
            else:
                losses += self._look(replay, number, last)
            if self._evaluator is not None:
                self._evaluator.previous_loss = losses[-1]
        return torch.tensor(losses, dtype=torch.float64)

    def result(self) -> Answers:
        """Return the answers of the piece."""
        return self._answers

    def _open(self, replay: Replay, number: int) -> float:
        """Open a step, and put the question to it; return its loss."""
        assert not isinstance(self._question, Expression)
        step = replay.next_step()
        self._keep(number, self._number_of(self._question(step)))
        return step.loss

    def _look(self, replay: Replay, number: int, last: int) -> list[float]:
        """Take steps with a look at what the expression names; return their losses."""
        if self._probe is None:
            self._probe = Probe(replay.revived, self._tensors(), self._answer)
        if not replay.revived.is_by_program(number):
            return [self._probe.observe()]
        while number < last and self._is_looked_at(number + 1):
            number += 1
        return replay.revived.watch(number, self._probe).tolist()

    def _answer(self, number: int, loss: float) -> bool:
        """Answer at a step that has just been taken, if it is due; return whether to go on."""
        assert self._evaluator is not None
        if self._is_due(number):
            self._keep(number, self._evaluator.answer(number, loss, self._probe))
        self._evaluator.previous_loss = loss
        return not self.is_done

    def _keep(self, number: int, answer: float | None) -> None:
        if answer is not None and (answer or not self._as_condition):
            self._answers.append((number, answer))

    def _number_of(self, answer: Any) -> float | None:
        if answer is None:
            return None
        try:
            return float(bool(answer)) if self._as_condition else float(answer)
        except (TypeError, ValueError, RuntimeError):
            got = (
                f"a tensor of shape {tuple(answer.shape)}"
                if isinstance(answer, Tensor)
                else f"{answer!r:.80}"
            )
            raise ExpressionError(f"the function must give one number, not {got}") from None

    def _tensors(self) -> set[Reference]:
        if not isinstance(self._question, Expression):
            return set()
        recorded = ("loss", "step", "measurements")
        return {r for r in self._question.references if r.kind not in recorded}

    def _is_due(self, number: int) -> bool:
        is_new = number >= self._first and number not in self._skipped
        return number % self._every == 0 and is_new

    def _is_looked_at(self, number: int) -> bool:
        return self._is_due(number) or (self.looks_back and self._is_due(number + 1))

    def _next_due(self, number: int) -> int:
        return -(-(number + 1) // self._every) * self._every


def check_question(expression: Expression, run: RecordedRun, objects: Objects | None = None) -> None:
    """Check what an expression names against the first step of a run.

    Raises:
        ExpressionError: it names what is not there.
        RunError: the run has no step, or it cannot be opened.
    """
    replay = Replay(run, objects)
    step = replay.step(1)
    expression.check(
        {
            "parameters": list(step.parameters),
            "buffers": list(step.buffers),
            "gradients": list(step.gradients | step.parameters),
            "activations": list(step.activations)
            if step.is_by_program
            else replay.revived.module_paths(),
            "updates": list(step.updates),
        }
    )


def ask(
    question: Question,
    run: RecordedRun,
    wanted: tuple[int, int],
    *,
    objects: Objects | None = None,
    every: int = 1,
    as_condition: bool = False,
    only_first: bool = False,
    from_end: bool = False,
    skipped: frozenset[int] = frozenset(),
    processes: int | None = None,
    told: Callable[[int], None] = lambda steps: None,
) -> Iterator[Walked]:
    """Put a question to steps, and yield pieces of the run with their answers.

    Args:
        question: what to ask.
        run: of which run.
        wanted: the first and the last step.
        objects: what the user trained with, for steps that no program takes.
        every: steps between two that are asked.
        as_condition: whether the answer is yes or no; only each yes is kept, as 1.
        only_first: in each piece, stop at the first yes.
        from_end: begin with the last piece.
        skipped: steps whose answer is known already.
        processes: how many at once; absent: one for each core, where that is worth their start.
        told: is told of steps that are done.

    Raises:
        ExpressionError: the question does not fit.
        RunError: something that is needed is missing or cannot be read.
    """
    asking = Asking(
        question,
        run,
        every=every,
        as_condition=as_condition,
        only_first=only_first,
        skipped=skipped,
    )
    due = [
        piece
        for piece in coarser(pieces(run, *wanted), asking.looks_back)
        if any(n not in skipped for n in range(-(-piece.first // every) * every, piece.last + 1, every))
    ]
    yield from walk(run, due[::-1] if from_end else due, asking, objects, processes, told)
