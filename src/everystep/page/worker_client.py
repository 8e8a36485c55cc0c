"""The server's side of the worker: asks it to open steps, one at a time; restarts it if it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from everystep.errors import EverystepError, RunError
from everystep.page.child_process import Child, Ended
from everystep.recording.directories import RANKS

__all__ = ["Answer", "Gone", "NoAnswer", "WorkerClient"]

#: Seconds that the worker has to end.
_PATIENCE = 0.5
#: Seconds that it may continue with an answer that no request waits for, and to stop it.
_LEAVING_PATIENCE = 1.0
#: Seconds that an answer may take, since other requests wait. Tasks, which can be cancelled, have no
#: limit.
_LONGEST = 600.0
#: Seconds that it has to import torch.
_STARTING_PATIENCE = 10.0
#: A stopping server treats all clients as disconnected; only those that still listen read this.
_STOPPING = "the server is being stopped"


class Answer(NamedTuple):
    """An answer of the worker: an HTTP status, what the bytes are (or the error), and the bytes."""

    status: int
    about: dict[str, Any]
    content: bytes


class NoAnswer(EverystepError):  # noqa: N818  # the request is not at fault
    """The worker has ended instead of answering; the message is for the user."""

    status = 502


class Gone(NoAnswer):
    """Whoever asked has gone before it was their turn."""


class WorkerClient:
    """Asks a worker process about the steps of runs.

    directory: where the runs are; nothing outside it is opened.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._turn = asyncio.Lock()
        self._process: Child | None = None
        self._ready: Child | None = None  # the one that has answered: it can be interrupted
        self._is_closed = False

    async def start(self) -> None:
        """Start the worker, so that it is ready when the first step is asked for."""
        async with self._turn:
            if not self._is_closed:
                await self._running()

    async def ask(
        self, kind: str, run: Path, *, gone: Callable[[], Awaitable[None]] | None = None, **asked: Any
    ) -> Answer:
        """Send the worker a request about a run; `asked`: plain data.

        gone: returns when the client has disconnected; then the request is dropped, or stopped.

        Raises:
            RunError: the run is in another directory.
            Gone: the client has disconnected.
            NoAnswer: the worker ended before it answered, or took too long.
        """
        own = run.absolute()  # that of a rank is within that of rank 0
        whole = own.parents[1] if own.parent.name == RANKS else own
        if self._directory not in [*whole.parents][:2] or ".." in own.parts:  # or in a sweep there
            raise RunError(f"{run.name} is not in {self._directory}, the directory that is shown")
        # Without `gone`, an event that nobody sets: the client never leaves.
        leaving = asyncio.ensure_future(gone() if gone else asyncio.Event().wait())
        try:
            async with self._turn:
                await asyncio.sleep(0)  # a client that disconnected while it waited is noticed
                if leaving.done():
                    raise Gone(_STOPPING)
                return await self._answer({"kind": kind, "run": str(run.absolute())} | asked, leaving)
        finally:
            leaving.cancel()

    async def _answer(self, request: dict[str, Any], leaving: asyncio.Future[Any]) -> Answer:
        if self._is_closed:
            raise NoAnswer(_STOPPING)
        process = await self._running()
        exchange = asyncio.ensure_future(_exchange(process, request))
        try:
            await asyncio.wait(
                {exchange, leaving}, timeout=_LONGEST, return_when=asyncio.FIRST_COMPLETED
            )
            if not exchange.done():
                has_left = leaving.done()
                await self._give_up(process, exchange)
                if has_left:
                    raise Gone(_STOPPING)
                raise NoAnswer(
                    f"this took more than {_LONGEST / 60:.0f} minutes and was stopped, because other "
                    "requests wait; `everystep step` in a terminal has no such limit"
                )
            self._ready = process
            return exchange.result()
        except Ended as ended:
            raise NoAnswer(
                f"the process that opens steps {ended}; try again: a new process starts. If it ends "
                "again, `everystep step` in a terminal may show why"
            ) from None
        except asyncio.CancelledError:  # no request waits for its answer
            exchange.cancel()
            await process.kill()
            raise

    async def _give_up(self, process: Child, exchange: asyncio.Future[Answer]) -> None:
        """Have the worker stop an answer that no request waits for: the next one waits."""
        is_ready = process is self._ready
        # First it may finish; then it is interrupted; at last killed, and its open runs are lost.
        for seconds in (_LEAVING_PATIENCE, _LEAVING_PATIENCE if is_ready else _STARTING_PATIENCE):
            done, _ = await asyncio.wait({exchange}, timeout=seconds)
            if done:
                with suppress(Ended):
                    exchange.result()
                return
            if is_ready:
                process.interrupt()
        exchange.cancel()
        await process.kill()

    async def close(self) -> None:
        """End the worker."""
        self._is_closed = True
        if self._process is not None:
            await self._process.end(_PATIENCE)

    async def _running(self) -> Child:
        if self._process is None or not self._process.is_alive:
            # Waiting threads should sleep soon: a training may need every core. Sleeping at once would
            # cost more than half of the speed without one.
            self._process = await Child.begin("everystep.page.worker", GOMP_SPINCOUNT="1000")
        return self._process


async def _exchange(process: Child, request: dict[str, Any]) -> Answer:
    await process.ask(request)
    _, content, data = await process.hear()
    return Answer(content["status"], content["about"], data)
