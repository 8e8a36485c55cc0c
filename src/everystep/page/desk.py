"""The server's side of the worker: asks it to open steps, one at a time; starts it anew if it dies."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from everystep.errors import RunError
from everystep.page.processes import begin, end, kill

__all__ = ["Answer", "Desk", "Gone", "NoAnswer"]

#: Seconds that the worker has to end by itself.
_PATIENCE = 0.5


class Answer(NamedTuple):
    """What the worker says: an HTTP status, what the bytes are (or the error), and the bytes."""

    status: int
    about: dict[str, Any]
    content: bytes


class NoAnswer(Exception):  # noqa: N818  # it is no fault of whoever asked
    """The worker has ended instead of answering; the message is for the user."""


class Gone(Exception):  # noqa: N818
    """Whoever asked has gone before it was their turn."""


class Desk:
    """Asks a worker process about the steps of runs.

    directory: where the runs are; nothing outside it is opened.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._turn = asyncio.Lock()
        self._process: Process | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Start the worker, so that it is ready when the first step is asked for."""
        async with self._turn:
            if not self._is_alive and not self._is_closed:
                self._process = await _begin_worker()

    async def ask(
        self,
        kind: str,
        run: Path,
        *,
        disconnected: Callable[[], Awaitable[bool]] | None = None,
        **asked: Any,
    ) -> Answer:
        """Ask the worker something of a run; `asked`: plain data.

        disconnected: tells whether the one who asks has gone; then nothing is opened for them.

        Raises:
            RunError: the run is elsewhere.
            Gone: they have.
            NoAnswer: the worker ended instead of answering.
        """
        if run.absolute().parent != self._directory:
            raise RunError(f"{run.name} is not in {self._directory}, which is what is shown")
        async with self._turn:
            if disconnected is not None and await disconnected():
                raise Gone
            if self._is_closed:
                raise NoAnswer("the server is being stopped")
            if not self._is_alive:
                self._process = await _begin_worker()
            assert self._process is not None
            try:
                return await _exchange(self._process, {"kind": kind, "run": str(run.absolute())} | asked)
            except (OSError, asyncio.IncompleteReadError, ValueError):
                code = await kill(self._process)
                raise NoAnswer(
                    f"the process that opens steps has ended (exit code {code}); ask again, and a new "
                    "one does it. If it ends again, `everystep step` in a terminal may say why"
                ) from None
            except BaseException:  # cancelled: what it would still answer is nobody's
                await kill(self._process)
                raise

    async def close(self) -> None:
        """End the worker."""
        self._is_closed = True
        if self._process is not None:
            await end(self._process, _PATIENCE)

    @property
    def _is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None


async def _begin_worker() -> Process:
    # Threads that wait shall sleep: a training beside it may need every core, and a step whose threads
    # wait busily for each other then takes a hundred times as long.
    return await begin("everystep.page.worker", OMP_WAIT_POLICY="PASSIVE")


async def _exchange(process: Process, request: dict[str, Any]) -> Answer:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    await process.stdin.drain()
    line = await process.stdout.readuntil(b"\n")
    told = json.loads(line)
    content = await process.stdout.readexactly(told["bytes"])
    return Answer(told["status"], told["about"], content)
