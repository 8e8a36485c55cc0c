"""Processes in which a run is replayed, so that it computes as in the training.

That is this process if its numerics match those of the run, else workers started with them.
What cannot be set (another processor, another torch) stays different, and each loss is compared. Such
processes end with the one that started them, however that one was ended.
"""

from __future__ import annotations

import os
import select
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from everystep import device, numerics
from everystep.bounded import MEMORY
from everystep.errors import DamageWarning, TrainingError
from everystep.numerics import Numerics
from everystep.recording.database import FILE_NAME
from everystep.recording.facts import EngineFacts, Facts
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.opened_step import Step
from everystep.replay.run_replay import CountingSteps, Replay, uncounted
from everystep.step.state import State
from everystep.training.objects import Objects

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

__all__ = [
    "Opener",
    "end_with_stdin",
    "is_ending",
    "needs_worker",
    "pool",
    "process_count",
    "sent_tensor",
    "shared",
]

#: Seconds that a process which is asked to stop has to keep what it has done.
_PATIENCE = 60.0


def end_with_stdin(*, in_order: bool = False) -> None:
    """End this process once the other end of its stdin has closed, whatever it computes.

    in_order: as in `_end`.
    """

    def watch() -> None:
        found = select.poll()
        found.register(0, 0)  # only its end, not what is to be read
        found.poll()
        _end(in_order=in_order)

    # Where the system cannot watch a pipe that is read as well (Windows), the next read ends it.
    if hasattr(select, "poll"):
        Thread(target=watch, daemon=True).start()


def _end(*, in_order: bool) -> None:
    """End this process. in_order: stop it as Ctrl-C does, and end it a minute later."""
    if in_order:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(_PATIENCE)
    # `sys.exit` would only end the thread that watches.
    os._exit(1)


#: If the training took less than this, this process replays it alone: others must start first.
ALONE_SECONDS = 4.0
#: Bytes of a process besides what it replays.
_SMALLEST = 300_000_000

_ENDED_TOO_EARLY = (
    "a process that replays the run has ended too early: it was killed, or memory ran out. Try "
    "again; if it ends again, free memory, or use fewer processes"
)

P = ParamSpec("P")
T = TypeVar("T")
#: Distinguishes a finished run from the same run after it was resumed; None during training.
Edition = tuple[int, int] | None


def needs_worker(facts: Facts) -> bool:
    """Return whether this process cannot compute as the run did, but another one could.

    Raises:
        DeviceError: the device of the run is not available.
    """
    here = Numerics.read(device.select(facts.training.device))
    return facts.training.numerics.needs_other_process(here)


@contextmanager
def pool(
    count: int, threads: int, environment: dict[str, str], *, in_order: bool = False
) -> Iterator[tuple[ProcessPoolExecutor, Connection]]:
    """Return processes, and a connection that ends them when it is closed; they end afterwards.

    in_order: as in `_end`.

    Raises:
        TrainingError: none can be started.
    """
    from loky import ProcessPoolExecutor
    from loky.backend.reduction import register

    register(Tensor, sent_tensor)
    # The parent holds one end and never writes: when it ends in any way, the system closes it.
    alive, of_parent = Pipe(duplex=False)
    environment = environment | {"OMP_NUM_THREADS": str(threads)}
    # loky restarts a process that grew by 300 MB, as a leak, with a warning; the new one would have no
    # replay of the run.
    environment["LOKY_MAX_MEMORY_LEAK_SIZE"] = "1e18"
    begin = {"initializer": _begin, "initargs": (threads, alive, in_order)}
    executor = ProcessPoolExecutor(count, env=environment, **begin)
    try:
        before = _mask(signal.SIG_BLOCK)  # Ctrl-C would end it before it ignores that
        try:
            executor.submit(os.getpid)  # starts the first
        except OSError as error:
            reason = error.strerror or error
            raise TrainingError(f"another process cannot be started: {reason}") from None
        finally:
            _mask(signal.SIG_SETMASK, before)
        yield executor, of_parent
    finally:
        executor.shutdown(wait=True, kill_workers=True)
        alive.close()
        of_parent.close()


def process_count(run: RecordedRun, steps: int, asked: int | None, tasks: int, threads: int) -> int:
    """Return the number of processes for so many steps of a run, 1 for this one alone.

    asked: number of processes, None for one per core if worth their start, and if half of the memory is
    enough; threads: of each.
    """
    facts = run.facts
    # Several processes would share one accelerator, and its memory.
    if facts.training.device != "cpu":
        return 1
    if asked is None:
        seconds = (facts.seconds or 0.0) * steps / max(1, run.newest_step())
        if seconds < ALONE_SECONDS:
            return 1
        from loky import cpu_count

        # As a replay of a large model was measured to take, of all ranks together.
        each = _SMALLEST + 4 * len(run.ranks) * max((row.size for row in run.snapshot_rows()), default=0)
        asked = min(cpu_count() // threads, MEMORY // 2 // each)
    return max(1, min(asked, tasks))


def shared(
    opener: Opener,
    count: int,
    threads: int,
    task: Callable[..., T],
    given: Iterable[tuple[Any, ...]],
) -> Generator[T, None, None]:
    """Run a task with replays of a run in processes, and yield each result when it is ready.

    count: of processes; threads: of each; task: called with a replay and each of `given`; its errors are
    raised here.
    """
    place = opener.run.directory, opener.data, threads
    environment = opener.run.facts.training.numerics.environment()
    try:
        with pool(count, threads, environment) as (executor, _):
            submit = partial(executor.submit, _in_worker, *place, task)
            for future in as_completed([submit(*each) for each in given]):
                yield future.result()
    except BrokenProcessPool:
        raise TrainingError(_ENDED_TOO_EARLY) from None


# The edition is a key of the cache: a run that was resumed needs another replay.
@lru_cache(maxsize=2)
def _replay(directory: Path, threads: int | None, edition: Edition) -> Replay:
    return Replay(RecordedRun(directory), threads=threads)


def _edition_of(run: RecordedRun) -> Edition:
    return None if run.status == "running" else _stamp(run)


def _stamp(run: RecordedRun) -> tuple[int, int]:
    # Not of the log, which a reader makes and removes.
    status = (run.directory / FILE_NAME).stat()
    return status.st_mtime_ns, status.st_size


def _in_worker(
    directory: Path,
    data: Any,
    threads: int | None,
    task: Callable[Concatenate[Replay, P], T],
    *given: P.args,
    **named: P.kwargs,
) -> T:
    """Call a task with the replay of a run in this worker: the same one if it needs no other data."""
    if data is None:
        return task(_replay(directory, threads, _edition_of(RecordedRun(directory))), *given, **named)
    return task(Replay(RecordedRun(directory), data, threads), *given, **named)


def _mask(how: int, signals: Iterable[int] = (signal.SIGINT,)) -> Iterable[int]:
    """Change which signals wait, such as Ctrl-C, here and in new processes; return which did before."""
    return signal.pthread_sigmask(how, signals) if hasattr(signal, "pthread_sigmask") else ()


#: Set once the process that started this one wants it to end.
is_ending = Event()


#: Types of numbers that torch pickles, but cannot read again, and one of their size that it can.
_SENT_AS = {
    **{torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64},
    **{dtype: torch.uint8 for dtype in vars(torch).values() if str(dtype).startswith("torch.float8")},
}


def sent_tensor(tensor: Tensor) -> Any:
    """Return how a tensor of any dtype is pickled for another process."""
    sent_as = _SENT_AS.get(tensor.dtype)
    if sent_as is None:
        return tensor.__reduce_ex__(2)  # type: ignore[no-untyped-call]
    return Tensor.view, (tensor.detach().view(sent_as), tensor.dtype)


def _begin(threads: int, parent: Connection, in_order: bool) -> None:
    from loky.backend.reduction import register

    def watch() -> None:  # end this process once the other end of the pipe has closed
        wait([parent])
        is_ending.set()
        _end(in_order=in_order)

    # Ctrl-C is for the process that waits; it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if in_order and hasattr(os, "setpgid"):  # out of reach of the terminal
        os.setpgid(0, 0)
    _mask(signal.SIG_UNBLOCK)
    register(Tensor, sent_tensor)
    Thread(target=watch, daemon=True).start()
    warnings.simplefilter("ignore", DamageWarning)  # the caller reports damage
    torch.set_num_threads(threads)


#: Held while a thread replays: the state of a replay, and torch's numerics and generators, are those of
#: one step at a time.
ALONE = RLock()


class Opener:
    """Opens steps and states of a run; caches replayed ones.

    objects: those that trained it; counting: as of `Replay`; data: of the run, None if the run holds it
    itself.
    """

    def __init__(
        self,
        run: RecordedRun,
        objects: Objects | None = None,
        counting: CountingSteps = uncounted,
    ) -> None:
        # As early as possible: it has no effect on a library that has already computed.
        numerics.prepare()
        self.run = run
        self._counting = counting
        # Data is sent to each worker, so only where the run cannot give it to them.
        files = [stretch.facts.data_file for stretch in run.stretches]
        holds_all = all(file is None or file.stored for file in files)
        self.data = None if objects is None or holds_all else objects.data
        self._replay: Replay | None = None
        self._worker: ProcessPoolExecutor | None = None
        self._workers = ExitStack()
        # It must not refer to the opener itself, which would then live as long as the program.
        weakref.finalize(self, self._workers.close)
        #: The state of the run when its process was last chosen.
        self._known: tuple[Edition, EngineFacts | None] | None = None

    @property
    def problems(self) -> list[str]:
        """Problems found, such as an unreadable snapshot."""
        return list(self.call(getattr, "problems"))

    @property
    def diverged_at(self) -> int | None:
        """The first step with a different loss in the replay, None if there was none."""
        found: int | None = self.call(getattr, "diverged_at")
        return found

    def step(self, number: int) -> Step:
        """Open a step; see `Replay.step`."""
        return self.call(Replay.step, number)

    def state(self, number: int) -> State:
        """Return the state after a step; see `Replay.state`."""
        return self.call(Replay.state, number)

    def call(self, task: Callable[Concatenate[Replay, P], T], *given: P.args, **named: P.kwargs) -> T:
        """Call a task with the replay of the run, in a process that computes as the training did."""
        with ALONE:
            self._prepare()
            if self._replay is not None:
                return task(self._replay, *given, **named)
            assert self._worker is not None
            place = self.run.directory, self.data, None
            try:
                result: T = self._worker.submit(_in_worker, *place, task, *given, **named).result()
            except BrokenProcessPool:
                self._workers.close()
                self._worker = self._known = None  # the next question starts another one
                raise TrainingError(_ENDED_TOO_EARLY) from None
            return result

    def replay_here(self, *, may_share: bool = True) -> Replay:
        """Return a replay in this process, shared with the one that opens steps if possible."""
        self._prepare()
        if may_share and self._replay is not None:
            return self._replay
        return Replay(self.run, self.data, counting=self._counting)

    def _prepare(self) -> None:
        """Choose where to replay; start again if a run that is being trained has new steps."""
        if self._known is not None and self._known[0] == _stamp(self.run):
            return
        facts = self.run.facts
        known = _edition_of(self.run), facts.training.engine
        if self._known == known and known[1] is not None:
            return
        self._replay = None
        if not needs_worker(facts):
            self._replay = Replay(self.run, self.data, counting=self._counting)
        elif self._worker is None:
            numerics_there = facts.training.numerics
            alone = pool(1, numerics_there.threads, numerics_there.environment())
            self._worker, _ = self._workers.enter_context(alone)
        # Not earlier: after a failure, the next call tries and reports again.
        self._known = known
