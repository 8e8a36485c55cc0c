"""Agreement: processes that train together (torch.distributed) agree on their recording as it begins.

They exchange what they agree on through the store by which they found each other: a collective of
everystep's own could meet one of the training.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

import torch

from everystep import clock
from everystep.device import select
from everystep.errors import EverystepError, RunError, UsageError, say
from everystep.recording.directories import RANKS, create_directory, rank_directory
from everystep.recording.facts import Facts, RanksFacts
from everystep.recording.recorded_run import EXPERIMENT_FILE, RecordedRun, stretch_at
from everystep.recording.recorder import Recorder
from everystep.recording.snapshots import DEFAULT_BUDGET
from everystep.recording.texts import processes_text
from everystep.step.collective_calls import has_ranks, shows_reductions
from everystep.step.generators import Generators
from everystep.step.state import State, state_differences

__all__ = ["Agreement", "check_stops_together", "ranks_here", "run_to_continue", "run_to_fork"]

R = TypeVar("R", bound=RecordedRun)
#: Seconds to wait for other ranks before that is reported, and before it is an error, as in torch.
NOTICE_SECONDS, MOST_SECONDS = 10, 1800
#: How what is agreed on about the run itself begins.
_RUN = "the run"
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
    """What the ranks of a training agree on as their recording begins; one that is alone, with itself.

    ranks: which of them this process is, None if it trains alone; rank, count: its number, and how many
    they are.

    Raises:
        UsageError: they communicate by something other than gloo, or torch is too old.
    """

    def __init__(self) -> None:
        self.ranks = ranks = ranks_here()
        self.rank, self.count = (0, 1) if ranks is None else (ranks.rank, ranks.count)
        if ranks is None:
            return
        self._number, self._exchanges = next(_numbers), count()
        if not shows_reductions():
            raise UsageError(
                f"torch {torch.__version__} does not show which reduction several processes compute; "
                "to record them, install a newer torch, such as 2.13"
            )
        if ranks.backend != "gloo":  # a replay cannot compute sums in the order of others
            raise UsageError(
                f"the processes communicate by {ranks.backend}, and a replay cannot repeat its sums "
                'yet; begin them with torch.distributed.init_process_group("gloo")'
            )

    def check(self, about: Mapping[str, Any]) -> None:
        """Check that all ranks begin the same recording. about: must be equal, by what it is.

        Raises:
            UsageError: another rank begins a different one.
        """
        # The same list on every rank, so all of them raise, or none.
        given = [dict(each) for each in self._shared(dict(about))]
        for rank, each in enumerate(given):
            # A rank that sees no run to resume begins one, which differs in all else, too.
            for key in sorted({**given[0], **each}, key=lambda key: not key.startswith(_RUN)):
                one, two = given[0].get(key), each.get(key)
                if one != two:
                    cure = "; all must see it in the same directory" if key.startswith(_RUN) else ""
                    raise UsageError(
                        f"the ranks do not begin the same recording: {key} is {one!r:.80} on rank 0, "
                        f"and {two!r:.80} on rank {rank}{cure}"
                    )

    def directory(self, wanted: Path | None, name: str, parent: RecordedRun | None = None) -> Path:
        """Create the directory of this rank's run, within that of rank 0.

        wanted, name: as `create_directory` has them; parent: of a fork, the run of this rank.

        Raises:
            RunError, RecordingError: it exists, or cannot be created, here or by rank 0.
        """
        if self.ranks is None:
            return create_directory(wanted, name)
        # Rank 0 makes `runs/a`, the others `runs/a/ranks/1`, ...: they need the name that it has found.
        place = Path()
        try:
            with self.together():
                if not self.rank:
                    top = None
                    try:
                        top = place = create_directory(wanted, name)
                    finally:
                        self.seen(top)
                elif (top := self.seen(None)) is not None:
                    within = rank_directory(top, self.rank) if parent is None else top / parent.within
                    place = create_directory(within, name)
        except RunError:
            # It holds those of the other ranks.
            if not self.rank and place.name:
                shutil.rmtree(place)
            raise
        return place

    @contextmanager
    def together(self) -> Iterator[None]:
        """Begin the run inside, if all ranks can.

        Raises:
            EverystepError: what is raised inside, or a RunError with that of another rank.
        """
        error = None
        try:
            yield
        except EverystepError as problem:
            error = problem
        # Before raising: the others wait for this rank's answer.
        problems = self._shared("" if error is None else str(error))
        if error is not None:
            raise error
        for other, text in enumerate(problems):
            if text:
                raise RunError(f"rank {other} cannot begin the run: {text}")

    def of_first(self, ask: Callable[[], bool]) -> bool:
        """Return what rank 0 alone finds, since it may change what all see on the disk.

        Raises:
            EverystepError: as `together`.
        """
        with self.together():
            found = not self.rank and ask()
        return bool(self._shared(found)[0])

    def is_same(self, value: Any) -> bool:
        """Return whether all ranks have the same value, as JSON can hold it."""
        found = self._shared(value)
        return all(each == found[0] for each in found)

    def seen(self, top: Path | None) -> Path | None:
        """Check that all ranks see the directory of rank 0's run, and return it. None: it has none.

        Raises:
            RunError: this machine does not see it, or has another one under the same path.
        """
        if self.ranks is None:
            return top
        mark = None
        if not self.rank and top is not None:
            (ranks := top.resolve() / RANKS).mkdir(exist_ok=True)
            mark = mkdtemp(dir=ranks)
        given, begun = self._shared(mark)[0], clock.now()
        place = Path(given or "")
        while not (is_seen := place.is_dir()) and clock.now() - begun < NOTICE_SECONDS / 2:
            time.sleep(0.1)  # a network may show it late
        self._shared(None)  # all have looked
        if mark is not None:
            Path(mark).rmdir()
        if not is_seen:
            raise RunError(
                f"{platform.node()} does not see {place.parents[1]}, in which rank 0 writes; use a "
                "directory that all machines share, under the same path"
            )
        return None if given is None else place.parents[1]

    def continued(self, own: R) -> R:
        """Return the run of this rank, which continues from a state that all ranks have, and can read.

        Raises:
            RunError: they have none.
        """
        if self.ranks is None:
            return own
        states = [row.step for row in own.own_snapshot_rows()]
        # A kill ends the ranks at different steps, and with different states on the disk.
        of_all, steps = zip(*self._shared([states, own.newest_step()]), strict=True)
        own.common_steps = min(steps)
        own.common_states = frozenset.intersection(*map(frozenset, of_all))
        # A resume begins with one of the two newest, and one that a rank cannot read is none of any.
        while lost := [each for found in self._shared(_unreadable(own, newest=2)) for each in found]:
            own.common_states -= {step for step, _ in lost}
            if not own.common_states:
                reason = "; ".join(problem for _, problem in lost)
                raise RunError(f"{own.name} has no state that all ranks can read: {reason}")
        return own

    def _shared(self, value: Any) -> list[Any]:
        """Give a value to the other ranks, and return those of all, in order."""
        if self.ranks is None:
            return [value]
        # torch has no public way to reach the store that init_process_group was given, or has made.
        store = torch.distributed.distributed_c10d._get_default_store()
        # The store lives as long as the processes do, and all ranks exchange in the same order.
        key = f"everystep/{self._number}/{next(self._exchanges)}"
        found = []
        try:
            store.set(f"{key}/{self.rank}", json.dumps(value))
            for rank in range(self.count):
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
                    f"rank {self.rank} waits for rank {rank}: every process of the training must "
                    "call everystep.record"
                )
            time.sleep(0.01)


def _unreadable(run: RecordedRun, newest: int) -> list[tuple[int, str]]:
    """Return which of the newest states cannot be read, with the reasons. newest: how many to read."""
    found = []
    for step in [step for step in run.snapshots if step <= (run.common_steps or 0)][-newest:]:
        problems: list[str] = []
        if run.state_near(step, after=step - 1, on_problem=problems.append) is None:
            found.append((step, problems[0]))
    return found


def check_stops_together(setting: str, cure: str) -> None:
    """Raise UsageError if several processes train, and a `setting` could end the training of one."""
    if ranks_here() is not None:
        raise UsageError(
            f"{setting}: a condition may hold on one process alone, and the others would wait for it; "
            f"{cure}"
        )


def run_to_fork(run: R, at: int, agreement: Agreement) -> R:
    """Return the run of this rank, to make a fork of after a step.

    Raises:
        RunError: another number of processes recorded the step.
    """
    place = stretch_at(run.stretches, at)
    before, now = run.stretches[place].facts.processes, agreement.count
    if before != now:
        raise RunError(
            f"{run.name} was recorded by {processes_text(before)}, and {processes_text(now)} would "
            f"continue it; fork it with {processes_text(before)}, and resume the fork with as many as "
            "you like"
        )
    return run.ranks_of(place)[agreement.rank]


def run_to_continue(run: R, agreement: Agreement) -> R:
    """Return the run of this rank, to continue from a state that all ranks have.

    If another number of processes recorded it, that is a state of all of those. A rank begins with that
    of the rank of the same number, and a new one with that of rank 0, and the random generators of its
    process. Rank 0 writes on in the run; others begin directories, since those of their numbers have
    what repeats the steps so far.

    Raises:
        RunError: another number recorded it, and the ranks had different parameters, or no step yet.
    """
    with agreement.together():  # a machine may have a copy of the run
        agreement.seen(run.ranks[0].directory)
    if run.facts.training.processes == agreement.count:
        return agreement.continued(run.ranks[agreement.rank])
    with agreement.together():  # rank 0 then changes what others have read
        return _continued_from(run, agreement)


def _continued_from(run: R, agreement: Agreement) -> R:
    """Return the run of this rank, to continue what another number of processes recorded."""
    top, rank = run.ranks[0], agreement.rank
    at = max(top.snapshots, default=0)
    ranks = top.ranks_of(place := stretch_at(top.stretches, at))  # those that took the step
    states = _states_alike(ranks, at)
    if top.stretches[place].facts.processes == agreement.count:  # later ones have left no state
        own = ranks[rank]
    elif agreement.ranks is None or not rank:
        own = top
    else:
        is_new = rank >= len(ranks)
        parent = 0 if is_new else rank
        own = _begun_from(ranks[parent], at, states[parent], agreement.ranks, is_new=is_new)
    own.common_states, own.common_steps = frozenset([0, at]), at
    own.others = run.facts.training.processes
    return own


def _states_alike(ranks: Sequence[RecordedRun], at: int) -> list[State]:
    """Return the states of all ranks after a step; check that parameters and optimizers are the same."""
    cure = "continue it with as many processes as before"
    # `after`: of this step itself, not one before it.
    states = [state for each in ranks if (state := each.state_near(at, after=at - 1)) is not None]
    if not at or len(states) < len(ranks):
        raise RunError(
            f"{ranks[0].name} has no readable state after a step of all its ranks, from which another "
            f"number of processes could continue it; {cure}, or record it again"
        )
    for rank, state in enumerate(states):
        found = [each.tensor for each in state_differences(states[0], state, only_seen=True)]
        # Buffers may differ, as those of batch norm do.
        own = {n.replace("parameter/", "parameters/") for n in state.settings.get("names", ())}
        own -= {n.replace("buffer/", "parameters/") for n in state.settings.get("names", ())}
        differing = [name for name in found if name in own or name.startswith("optimizer/")]
        if differing:
            raise RunError(
                f"{ranks[0].name} cannot be continued by another number of processes: after step "
                f"{at:,}, {differing[0].partition('/')[2]} is not the same on ranks 0 and {rank}; {cure}"
            )
    return states


def _begun_from(parent: R, at: int, state: State, ranks: RanksFacts, *, is_new: bool) -> R:
    """Begin the run of a rank with the losses of a parent up to a state, without what repeats them.

    is_new: the parent is the run of another rank.
    """
    facts = parent.facts
    place = rank_directory(parent.ranks[0].directory.resolve(), ranks.rank, ranks.count, at)
    shutil.rmtree(place, ignore_errors=True)  # of processes that ended before rank 0 had taken a step
    if is_new:  # with those of rank 0, it would draw the same numbers as that
        own = Generators.capture(select(facts.training.device)).tensors()
        drawn = {f"generator/{name}": tensor for name, tensor in own.items()}
        state = replace(state, rest=state.rest | drawn)
    file = facts.training.experiment_file or EXPERIMENT_FILE
    texts = {EXPERIMENT_FILE: parent.read_file(file).decode()} if parent.files(file) else {}
    given = facts.model_dump(include={"started", "steps", "config", "tags"})
    trained = facts.training.model_copy(update={"ranks": ranks, "experiment_file": None})
    status = "finished" if facts.status == "finished" and facts.steps == at else "stopped"
    begun = Facts(name=place.name, status=status, trained=trained, **given)
    create_directory(place, "")
    Recorder(place, begun, DEFAULT_BUDGET, parent, at, texts=texts, beginning=state).finish({})
    return type(parent)(place)
