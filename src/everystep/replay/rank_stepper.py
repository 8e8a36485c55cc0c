"""The stepper of a rank: repeats steps of processes that trained together, all in this process.

The ranks run in turn, each until it reaches a collective. Once all ranks of the collective have, it is
computed with the backend that the training used, so its sums are added in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache, partial
from itertools import cycle
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from everystep.errors import RunError
from everystep.ops.operators import REFUSALS, without_autograd
from everystep.program.collectives import taking_part
from everystep.program.memory import copied_together
from everystep.recording.blocks import same_number
from everystep.replay.bound_steps import Hook
from everystep.replay.recorded_steps import NotReplayedError, RecordedSteps
from everystep.replay.replay_stepper import ReplayStepper
from everystep.step.generators import Generators
from everystep.step.observe import Observation
from everystep.step.state import State

__all__ = ["RankStepper"]

#: Seconds that a collective within this process may take.
SECONDS = 600
#: A collective of one rank: its name and its arguments, the tensors that it writes into first.
Collective = tuple[str, tuple[Any, ...]]


# Two ranks take a step, each in a thread. One runs at a time: all draw from torch's only generator,
# which is set to that of the rank.
#   rank 0   forward, backward up to all_reduce_   waits                            ... update
#   rank 1                                         backward up to all_reduce_, too
#   both are there: `_compute` lets gloo sum, as in the training, and both are ready to run again
class RankStepper(ReplayStepper):
    """Repeats the steps of one rank, and with it those of all others.

    rank: the number of this rank; others: the recorded steps of the other ranks, by number.
    """

    def __init__(
        self,
        steps: RecordedSteps,
        diverged: Callable[[int, str], object],
        rank: int,
        others: Mapping[int, RecordedSteps],
    ) -> None:
        super().__init__(steps, diverged)
        self._rank = rank
        self.others = {
            n: ReplayStepper(each, partial(self._note_other, n)) for n, each in others.items()
        }
        self._generators: dict[int, Tensor] = {}
        self._differing: set[int] = set()
        #: Why the next step cannot be repeated, once that was tried.
        self._reason: Exception | None = None
        # Whether the processor flushes denormal numbers belongs to each thread.
        begin = torch.set_flush_denormal, (steps.facts.numerics.flush_denormal,)
        self._pool = ThreadPoolExecutor(len(others) + 1, "everystep rank", *begin)

    def _note_other(self, rank: int, step: int, problem: str) -> None:
        self._diverged(step, f"rank {rank}: {problem}")

    @contextmanager
    def _as_rank(self, rank: int) -> Iterator[None]:
        """Draw from the generator of a rank inside."""
        if rank == self._rank:
            yield
            return
        own = torch.get_rng_state()
        if rank in self._generators:
            torch.set_rng_state(self._generators[rank])
        try:
            yield
        finally:
            self._generators[rank] = torch.get_rng_state()
            torch.set_rng_state(own)

    def load(self, state: State, *others: State) -> None:
        """Restore the states of all ranks; if those of others are not given, they are read from disk."""
        for place, (rank, other) in enumerate(self.others.items()):
            run, at, problems = other.steps.run, state.step, list[str]()
            read = partial(run.state_near, at, after=at - 1, on_problem=problems.append)
            found = others[place] if others else read()
            if found is None:
                reason = "; ".join(problems) or "it has no such state"
                raise RunError(f"rank {rank} of {run.name} cannot begin at state {at}: {reason}")
            with self._as_rank(rank):
                other.load(found)
        super().load(state)
        self._reason = None
        self._differing.clear()

    def capture_ranks(self, *, is_live: bool = False) -> list[State]:
        """Return the current states of all ranks, this one first."""
        found = super().capture_ranks(is_live=is_live)
        for rank, other in self.others.items():
            with self._as_rank(rank):
                found.append(other.capture(is_live=is_live))
        return found

    def _take(self, hook: Hook | None) -> float:
        return self._together(partial(super()._take, hook))

    def observe(self) -> Observation:
        """Run the next step of all ranks, and return everything in that of this one."""
        # The step is repeated once for the results of its collectives, which this rank is then given.
        self.settle()
        number, device = self.state, self.steps.device
        own, drawn = copied_together(self._tensors), Generators.capture(device)
        results: list[list[Tensor]] = []

        def keep(calls: Mapping[int, Collective]) -> None:
            if self._rank in calls:
                results.append([tensor.clone() for tensor in calls[self._rank][1][0]])

        self._together(partial(super()._take, None), keep)
        self._begin(number, own)
        drawn.restore(device)
        known = cycle(results)  # a part of the step may run again

        def give(name: str, arguments: tuple[Any, ...]) -> None:
            for tensor, result in zip(arguments[0], next(known), strict=True):
                tensor.copy_(result)

        # The other ranks are one step ahead already: their part is known.
        with taking_part(give):
            return super().observe()

    def _together(
        self,
        own: Callable[[], float],
        done: Callable[[Mapping[int, Collective]], object] = lambda calls: None,
    ) -> float:
        """Repeat a step of all ranks; return what `own` returns, which repeats that of this one.

        done: as of `_in_turn`. It raises why a rank cannot repeat it, now or before.
        """
        # Some ranks have ended the step, others have not: only `load` brings them together again.
        if self._reason is not None:
            raise self._reason
        before = self.state
        functions: dict[int, Callable[[], float]] = {self._rank: own}
        for rank, other in self.others.items():
            if before < other.steps.last:  # a rank may have fewer batches
                functions[rank] = partial(self._run_other, rank, before + 1)
        ended = [rank for rank in self.others if rank not in functions]
        try:
            losses = _in_turn(self._pool, functions, self._as_rank, done)
        except REFUSALS as error:
            # The rank of this stepper may have ended its step before another one failed.
            self.state, self._reason = before, error
            if ended:
                last = self.others[ended[0]].steps.last
                self._reason = NotReplayedError(
                    f"step {before + 1} of {self._run.name} needs rank {ended[0]}, which has recorded "
                    f"only {last} steps"
                )
            raise self._reason from None
        return losses[self._rank]

    def _run_other(self, rank: int, step: int) -> float:
        """Repeat a step of another rank, and compare its loss with the recorded one."""
        other = self.others[rank]
        [loss] = other.run(step, self.hooks.get(rank))
        known = other.steps.loss(step)
        is_same = other.steps.is_changed or same_number(loss, known)
        if not is_same and rank not in self._differing:
            self._differing.add(rank)
            self._diverged(step, f"rank {rank}: the loss of step {step} is {loss}, not {known}")
        return loss


def _in_turn(
    pool: ThreadPoolExecutor,
    functions: Mapping[int, Callable[[], float]],
    as_rank: Callable[[int], AbstractContextManager[None]],
    done: Callable[[Mapping[int, Collective]], object],
) -> dict[int, float]:
    """Run functions of all ranks in turn, each until it ends or reaches a collective.

    Returns what they return, by rank. as_rank: lets a rank draw from its own generator; done: is called
    with the arguments of a collective, by rank, after it.
    """
    threads = torch.get_num_threads()
    losses: dict[int, float] = {}
    #: Whether a rank is to run, or to end, when it waits.
    turns = {rank: SimpleQueue[bool]() for rank in functions}
    #: What a rank waits for, or how it ended: a collective, None, or an error.
    stops = SimpleQueue[Collective | BaseException | None]()

    def meet(rank: int, name: str, arguments: tuple[Any, ...]) -> None:
        stops.put((name, arguments))
        # False where another rank has failed: this one must not wait for a collective that never comes.
        if not turns[rank].get():
            raise RuntimeError("another rank has ended")

    def work(rank: int) -> None:
        if not turns[rank].get():
            return
        torch.set_num_threads(threads)  # each thread of the system has a number of its own
        try:
            with without_autograd(), taking_part(partial(meet, rank)):
                losses[rank] = functions[rank]()
        except BaseException as error:
            stops.put(error)
        else:
            stops.put(None)

    futures = [pool.submit(work, rank) for rank in functions]
    ready, waiting = [*sorted(functions)], dict[int, Collective]()
    try:
        while ready:
            rank = ready.pop(0)
            with as_rank(rank):
                turns[rank].put(True)
                # All others wait for a turn, so this is from the rank that has it.
                stop = stops.get()
            if isinstance(stop, BaseException):
                raise stop
            if stop is None:
                continue
            waiting[rank] = stop
            # The last argument has the ranks, in the order of their group: see `collectives`.
            ranks = [*dict.fromkeys(stop[1][-1])]
            if rank not in ranks:
                raise NotReplayedError(f"rank {rank} takes part in {stop[0]} of {ranks}")
            if waiting.keys() >= {*ranks}:
                calls = {each: waiting.pop(each) for each in ranks}
                _compute(calls)
                done(calls)
                ready += ranks
        for rank, (name, _) in waiting.items():
            raise NotReplayedError(
                f"rank {rank} waits in {name} for other ranks, which have no such operation in this "
                "step: the ranks did different things, or the run was changed"
            )
    finally:
        # Ranks that still wait for a turn would occupy the threads of the pool forever.
        for turn in turns.values():
            turn.put(False)
        wait(futures)
    return losses


def _compute(calls: Mapping[int, Collective]) -> None:
    """Compute a collective. calls: of its ranks, in their order."""
    name = next(iter(calls.values()))[0]
    given = [arguments for _, arguments in calls.values()]
    # Its tensors may have other sizes on each rank; of all others, they are alike.
    is_exchange = {n for n, _ in calls.values()} == {"all_to_all_from_"} and _exchanged(given)
    about = {(each, _about(arguments)) for each, arguments in calls.values()}
    if len(about) > 1 and not is_exchange:
        raise NotReplayedError(
            f"the ranks {', '.join(map(str, calls))} take part in different collectives: "
            + ", ".join(sorted({each for each, _ in about}))
        )
    try:
        # All start before any is waited for, since each needs the others.
        works = [
            _STARTS[name](group, *each) for group, each in zip(_groups(len(calls)), given, strict=True)
        ]
        for work in works:
            work.wait()
    except (*REFUSALS, AttributeError) as error:
        raise NotReplayedError(f"{name} of {len(calls)} ranks failed: {error}") from None


def _about(value: Any) -> Any:
    """Return what must be the same of the arguments of all ranks."""
    if isinstance(value, Tensor):
        return value.dtype, value.numel()
    return tuple(map(_about, value)) if isinstance(value, list | tuple) else value


def _exchanged(given: Sequence[tuple[Any, ...]]) -> bool:
    """Return whether each rank sends as many rows to each other as that one takes.

    given: the arguments of `all_to_all_from_` of each rank. Without sizes, all are equal.
    """
    count = len(given)

    def sizes(tensor: Tensor, wanted: Sequence[int]) -> list[int]:
        return [*wanted] or [len(tensor) // count] * count

    taken = [sizes(results[0], of) for results, _, of, _, _ in given]
    sent = [sizes(tensor, to) for _, tensor, _, to, _ in given]
    are_alike = len({(t.dtype, t.shape[1:]) for r, g, *_ in given for t in (r[0], g)}) == 1
    is_square = {*map(len, (*taken, *sent))} == {count}
    return are_alike and is_square and taken == [*map(list, zip(*sent, strict=True))]


def _reduction(reduce: str) -> Any:
    return getattr(torch.distributed.ReduceOp, reduce.upper())


def _reducing(kind: str, reduce: str) -> Any:
    options = getattr(torch.distributed, f"{kind}Options")()
    options.reduceOp = _reduction(reduce)
    return options


#: Starts a collective of one rank, given its group and its arguments; the result waits for the end.
_STARTS: dict[str, Callable[..., Any]] = {
    "all_reduce_": lambda group, tensors, reduce, _: group.allreduce([*tensors], _reduction(reduce)),
    "all_reduce_coalesced_": lambda group, tensors, reduce, _: group.allreduce_coalesced(
        [*tensors], _reducing("AllreduceCoalesced", reduce)
    ),
    "reduce_": lambda group, tensors, reduce, target, ranks: group.reduce(
        *tensors, [*ranks].index(target), _reduction(reduce)
    ),
    "broadcast_": lambda group, tensors, source, ranks: group.broadcast(
        *tensors, [*ranks].index(source)
    ),
    "all_gather_": lambda group, results, given, _: group.allgather([*results], given),
    "all_gather_into_": lambda group, results, given, _: group._allgather_base(results[0], given),
    "reduce_scatter_from_": lambda group, results, given, reduce, _: group._reduce_scatter_base(
        results[0], given, _reducing("ReduceScatter", reduce)
    ),
    "all_to_all_from_": lambda group, results, given, to, of, _: group.alltoall_base(
        results[0], given, [*to], [*of]
    ),
}


@cache
def _groups(count: int) -> list[Any]:
    """Return groups of gloo for a number of ranks that are all in this process."""
    gloo = torch.distributed.ProcessGroupGloo
    store = torch.distributed.HashStore()

    def joined(rank: int) -> Any:
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._threads = 1
        options._timeout = timedelta(seconds=SECONDS)
        return gloo(store, rank, count, options)

    try:
        with ThreadPoolExecutor(count) as pool:  # each waits for all
            return [*pool.map(joined, range(count))]
    except RuntimeError as error:
        raise NotReplayedError(f"the ranks cannot be connected in this process: {error}") from None
