"""Differences of ranks: after which steps parameters differ, and on which one runs differ first."""

from __future__ import annotations

from collections.abc import Callable

from everystep.answers.diff import Difference, diff
from everystep.errors import UsageError
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.parallel import Span, Visitor, spans
from everystep.replay.rank_stepper import RankStepper
from everystep.replay.run_replay import Replay
from everystep.step.state import same_bits
from everystep.training.objects import Objects

__all__ = ["RANKS_DIFFER", "RankQuery", "diff_of_ranks"]

#: The condition of a step after which a parameter is not the same on all ranks.
RANKS_DIFFER = "ranks differ"


class RankQuery(Visitor):
    """Runs the steps of a span, and notes those after which a parameter is not the same on all ranks."""

    may_share = True

    def __init__(self, *, only_first: bool) -> None:
        self._only_first = only_first
        self._answers: list[tuple[int, float]] = []

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        """Whether it needs no more steps."""
        return self._only_first and bool(self._answers)

    def due(self, run: RecordedRun) -> list[Span]:
        """Return the spans to look at.

        Raises:
            UsageError: one process trained the run.
        """
        if run.known_ranks is None:
            raise UsageError(
                f"{run.name} was trained by one process, and has no ranks that could differ"
            )
        return spans(run, 1, run.newest_step())

    def begin(self, replay: Replay, span: Span) -> int:
        """Begin with the state before the span."""
        self._answers = []
        return span.first - 1

    def run(self, replay: Replay, last: int) -> list[float]:
        """Run the next step, and compare the ranks; return its loss."""
        stepper = replay.stepper
        assert stepper.state is not None and isinstance(stepper, RankStepper)
        losses = stepper.run(stepper.state + 1)
        own = stepper.named_state()
        if not all(
            same_bits(tensor, other.named_state()[name])
            for other in stepper.others.values()
            for name, tensor in own.items()
            if name.startswith("parameter/") and name in other.named_state()
        ):
            self._answers.append((stepper.state, 1.0))
        return losses

    def result(self) -> list[tuple[int, float]]:
        """Return the steps of the span at which they differ, each with a 1."""
        return self._answers


def diff_of_ranks(
    one: RecordedRun,
    other: RecordedRun,
    *,
    thorough: bool,
    objects: tuple[Objects | None, Objects | None],
    on_progress: Callable[[int], None],
) -> Difference:
    """Return how two runs differ; of as many processes, how those of the rank do that differs first.

    What differs on one rank is on all others after the next collective, often in the same step.

    Args:
        one, other, thorough, objects, on_progress: as of `diff`.

    Raises:
        RunError: as `diff`.
    """
    pairs = [(one, other)]
    known = one.known_ranks, other.known_ranks
    if all(each is not None and not each.rank for each in known):  # not two ranks of one run
        ranks, others = one.ranks, other.ranks
        if len(ranks) == len(others):
            pairs = [*zip(ranks, others, strict=True)]
    found = [diff(*each, thorough=thorough, objects=objects, on_progress=on_progress) for each in pairs]

    def place(each: Difference) -> tuple[bool, float, float]:
        operation, loss = each.operation, each.loss
        if operation is None:
            return each.is_same, float("inf") if loss is None else loss.step, float("inf")
        return False, operation.step, operation.index

    return min(found, key=place)
