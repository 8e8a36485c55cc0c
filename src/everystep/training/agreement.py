"""Agreement: processes that train together (torch.distributed) agree on their recording as it begins.

They exchange what they agree on through the store by which they found each other: a collective of
everystep's own could meet one of the training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch

from everystep import clock
from everystep.errors import EverystepError, RunError, UsageError, say
from everystep.recording.directories import create_directory, rank_directory
from everystep.recording.facts import RanksFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.step.collective_calls import has_ranks, shows_reductions

__all__ = ["Agreement", "check_same_number", "check_stops_together", "ranks_here"]

R = TypeVar("R", bound=RecordedRun)
#: Seconds to wait for other ranks before that is reported, and before it is an error, as in torch.
NOTICE_SECONDS, MOST_SECONDS = 10, 1800
#: The backend with sums that a replay can repeat, since they are computed in the same order there.
GLOO = "gloo"
#: Numbers the recordings of this process: the ranks begin the same ones.
_numbers = count()


def ranks_here() -> RanksFacts | None:
    """Return which of several processes this is, None if it trains alone."""
    if not has_ranks():
        return None
    distributed = torch.distributed
    rank, size = distributed.get_rank(), distributed.get_world_size()
    # A group for several kinds of devices has a backend for each.
    names = dict(each.split(":") for each in distributed.get_backend_config().split(",") if ":" in each)
    return RanksFacts(rank=rank, count=size, backend=names.get("cpu", distributed.get_backend()))


class Agreement:
    """What the ranks of a training agree on as their recording begins.

    Args:
        ranks: which of them this process is.

    Raises:
        UsageError: they communicate by something other than gloo, or torch is too old.
    """

    def __init__(self, ranks: RanksFacts) -> None:
        self.ranks = ranks
        self._number = next(_numbers)
        if not shows_reductions():
            raise UsageError(
                f"torch {torch.__version__} does not show which reduction several processes compute; "
                "to record them, install a newer torch, such as 2.13"
            )
        if ranks.backend != GLOO:
            raise UsageError(
                f"the processes communicate by {ranks.backend}, and a replay cannot repeat its sums "
                'yet; begin them with torch.distributed.init_process_group("gloo")'
            )

    def check(self, about: Mapping[str, Any]) -> None:
        """Check that all ranks begin the same recording. about: must be equal, by what it is.

        Raises:
            UsageError: another rank begins a different one.
        """
        given = [dict(each) for each in self._shared("about", dict(about))]
        for rank, each in enumerate(given):
            for key in dict.fromkeys((*given[0], *each)):
                one, two = given[0].get(key), each.get(key)
                if one != two:
                    raise UsageError(
                        f"the ranks do not begin the same recording: {key} is {one!r:.80} on rank 0, "
                        f"and {two!r:.80} on rank {rank}"
                    )

    def directory(self, wanted: Path | None, name: str) -> Path:
        """Create the directory of this rank's run, within that of rank 0.

        wanted, name: as `create_directory` has them.

        Raises:
            RunError, RecordingError: it exists, or cannot be created, here or by rank 0.
        """
        if self.ranks.rank:
            [found] = self._shared("directory", None, sources=[0])
            if "error" in found:
                raise RunError(f"rank 0 cannot begin the run: {found['error']}")
            return create_directory(rank_directory(Path(found["directory"]), self.ranks.rank), name)
        try:
            place = create_directory(wanted, name)
        except EverystepError as error:
            self._shared("directory", {"error": str(error)}, sources=[])
            raise
        self._shared("directory", {"directory": str(place.resolve())}, sources=[])
        return place

    def continued(self, own: R) -> R:
        """Return the run of this rank, which continues from a state that all ranks have."""
        states = [row.step for row in own.own_snapshot_rows()]
        known = self._shared("states", [states, own.newest_step()])
        of_all, steps = zip(*known, strict=True)
        own.common_states = frozenset.intersection(*map(frozenset, of_all))
        own.common_steps = min(steps)
        return own

    def _shared(self, topic: str, value: Any, sources: list[int] | None = None) -> list[Any]:
        """Give a value to the other ranks, and return theirs, in order.

        sources: the ranks to wait for; default: all.

        Raises:
            UsageError: one has not given any for `MOST_SECONDS`.
        """
        # torch has no public way to reach the store that init_process_group was given, or has made.
        store = torch.distributed.distributed_c10d._get_default_store()
        key = f"everystep/{self._number}/{topic}"
        found = []
        try:
            if value is not None:
                store.set(f"{key}/{self.ranks.rank}", json.dumps(value))
            for rank in range(self.ranks.count) if sources is None else sources:
                self._wait(store, f"{key}/{rank}", rank)
                found.append(json.loads(store.get(f"{key}/{rank}")))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            message = f"rank 0 has ended, or the processes no longer reach each other: {reason}"
            raise RunError(message) from None
        return found

    def _wait(self, store: Any, key: str, rank: int) -> None:
        begun, is_said = clock.now(), False
        while not store.check([key]):  # `wait` prints warnings of its own
            waited = clock.now() - begun
            if waited > MOST_SECONDS:
                raise UsageError(
                    f"rank {rank} has not begun a recording within {MOST_SECONDS} seconds; every "
                    "process of the training must call everystep.record, with the same parts"
                )
            if waited > NOTICE_SECONDS and not is_said:
                is_said = True
                say(
                    f"rank {self.ranks.rank} waits for rank {rank}: every process of the training must "
                    "call everystep.record"
                )
            time.sleep(0.01)


def check_stops_together(setting: str, cure: str) -> None:
    """Check that no condition ends the training of one of several processes. setting: that would.

    Raises:
        UsageError: several processes train.
    """
    if ranks_here() is not None:
        raise UsageError(
            f"{setting}: a condition may hold on one process alone, and the others would wait for it; "
            f"{cure}"
        )


def check_same_number(run: RecordedRun, ranks: RanksFacts | None, verb: str = "resume") -> None:
    """Check that as many processes continue a run as have recorded it. verb: what they do.

    Raises:
        RunError: it was recorded by another number.
    """
    known = run.facts.training.ranks
    before, now = (1 if each is None else each.count for each in (known, ranks))
    if before != now:
        raise RunError(
            f"{run.name} was recorded by {_processes(before)}, and {_processes(now)} would continue "
            f"it; {verb} it with {_processes(before)}"
        )


def _processes(number: int) -> str:
    return "one process" if number == 1 else f"{number} processes"
