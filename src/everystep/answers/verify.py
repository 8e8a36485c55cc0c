"""Verify: replays every step of a run, and reports exactly what matches the recording."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from everystep.device import on_cpu
from everystep.recording.keep import is_kept
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.parallel import Visitor, parallel, spans
from everystep.replay.processes import Opener
from everystep.replay.run_replay import LossDifference
from everystep.replay.shown import Shown
from everystep.step.state import StateDifference, distance

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification(Shown):
    """The result of replaying every step of a run.

    steps: the number of replayed steps, of `all_steps`: a recording may `keep` fewer; computed_losses:
    the number of their losses that operations computed, which are compared: of a loss that Python code
    computed, the numbers that it read are compared; different_steps: the number with a different loss;
    first_loss: the first of these, None if all match; loss_distance: its distance in units in the last
    place; snapshots: the number of states after state 0 that were compared, of `all_snapshots`; states:
    how they differ, in order; numerics: those that differ here, with the recorded and the current value;
    problems: unreadable files; threads: the number of steps replayed by number of threads.
    """

    steps: int
    all_steps: int
    computed_losses: int
    different_steps: int
    first_loss: LossDifference | None
    loss_distance: int | None
    snapshots: int
    all_snapshots: int
    states: tuple[StateDifference, ...]
    numerics: dict[str, tuple[Any, Any]]
    problems: tuple[str, ...]
    threads: dict[int, int]

    def __repr__(self) -> str:
        if self.is_exact:
            of = f" of {self.all_steps:,}" if self.steps < self.all_steps else ""
            states = f"{self.snapshots:,} snapshot{'s' * (self.snapshots != 1)}"
            found = f"{self.steps:,}{of} steps and {states} replay bit-identical"
        elif self.first_loss is not None:
            step = self.first_loss.step
            found = f"{self.different_steps:,} of {self.steps:,} losses differ, first at step {step:,}"
        elif self.states:
            found = f"the losses match, but state {self.states[0].state:,} differs"
        else:
            found = "; ".join(self.problems)
        return f"<verification: {found}>"

    @property
    def is_exact(self) -> bool:
        """Whether every loss and every snapshot that is kept is bit-identical, and all were readable."""
        return not (self.different_steps or self.states or self.problems)


@on_cpu()
def verify(
    opener: Opener,
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Verification:
    """Answer `Run.verify`. on_progress: called with the number of steps just replayed."""
    run = opener.run
    steps, not_kept = run.newest_step(), run.facts.not_kept
    found = parallel(opener, spans(run, 1, steps), Visitor(), processes, on_progress)
    replayed = list(found) if steps else []
    damaged = [str(finding) for finding in (*run.findings(), *run.database_findings())]
    # Their steps are compared with those of this run: what is left is the damage of their files.
    others = [each for each in run.ranks if each.directory != run.directory]
    for rank in others:
        damaged += [f"{rank.name}: {finding}" for finding in rank.findings()]
    longest = max(others, key=RecordedRun.newest_step, default=run)
    if longest.newest_step() > steps:  # the steps that this rank does not have
        more = verify(Opener(longest), processes, on_progress)
        damaged += [f"{longest.name}: {each}" for each in ([] if more.is_exact else [repr(more)])]
    # Processes end in any order.
    replayed.sort(key=lambda each: each.span)
    firsts = [each.first_loss for each in replayed if each.first_loss is not None]
    dtype = getattr(torch, run.facts.loss_dtype)
    # The distance counts numbers of the dtype that the loss is computed in.
    pair = [torch.tensor([n], dtype=dtype) for each in firsts[:1] for n in each[1:]]
    numerics = run.facts.training.numerics.differences(replayed[0].numerics) if replayed else {}
    numerics.pop("threads", None)  # those that were set are counted below
    threads: Counter[int] = Counter()
    for each in replayed:
        threads[each.numerics.threads] += each.taken
    return Verification(
        steps=sum(each.taken for each in replayed),
        all_steps=steps,
        computed_losses=sum(each.computed_losses for each in replayed),
        different_steps=sum(each.different_losses for each in replayed),
        first_loss=firsts[0] if firsts else None,
        loss_distance=distance(*pair) if pair else None,
        snapshots=sum(each.compared for each in replayed),
        all_snapshots=sum(  # a replay begins with state 0, and so compares nothing with it
            0 < row.step <= steps and is_kept(row.step, not_kept) for row in run.snapshot_rows()
        ),
        states=tuple(difference for each in replayed for difference in each.states),
        numerics=numerics,
        problems=(*damaged, *dict.fromkeys(p for each in replayed for p in each.problems)),
        threads=dict(+threads),
    )
