"""The other processes of the server: the one that opens steps, and one for each task.

They share one protocol. The server writes requests, a line of JSON each. A process answers with
messages: a line of JSON, `{"event": ..., "content": {...}, "bytes": n}`, and then n bytes. Nothing else
is read on either side.

They open runs, which may be a stranger's, and a program of a few bytes can ask for tensors of any size.
Where the system offers it (Linux), such a process gets no more than a share of the machine's memory: it
reports that and continues, and no other process is ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple, Self

from everystep.bounded import MEMORY
from everystep.errors import RunError, UsageError

__all__ = ["Child", "Ended", "Message", "Speaker", "limit_memory", "memory_message", "status_of"]

#: Bytes that the line of a message may have.
_LONGEST_LINE = 2**26
#: Seconds that a process has to end after it closed its output, for its exit code.
_ENDING_PATIENCE = 5.0


class Message(NamedTuple):
    """A message of a process: its kind, its content, and the bytes that follow."""

    event: str
    content: dict[str, Any]
    data: bytes = b""


class Ended(Exception):  # noqa: N818  # a task ends this way
    """The process sends no more messages; the text is for the user: "has ended (exit code -9)"."""


class Child:
    """A module of everystep, running in its own process."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def begin(cls, module: str, **environment: str) -> Self:
        """Start it.

        environment: variables that it gets where the user has not set them.

        Its stderr is that of the server. Ctrl-C in the server's terminal does not reach it: the server
        ends it, in its own way. Nothing is imported from the directory that the server was started in,
        which may be a stranger's.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            stdin=PIPE,
            stdout=PIPE,
            limit=_LONGEST_LINE,
            # Its own session: no Ctrl-C from the terminal, and a group to kill with all its children.
            start_new_session=True,
            # The user's variables win over ours, except that the working directory is not imported from.
            env=environment | os.environ | {"PYTHONSAFEPATH": "1"},
        )
        return cls(process)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def ask(self, request: dict[str, Any]) -> None:
        """Send it a request; where it has ended already, `hear` reports that."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()

    async def hear(self) -> Message:
        """Return its next message.

        Raises:
            Ended: it sends no more messages, or sent an invalid one and was killed.
        """
        assert self._process.stdout is not None
        try:
            about = json.loads(await self._process.stdout.readuntil(b"\n"))
            data = await self._process.stdout.readexactly(about["bytes"])
            return Message(about["event"], about["content"], data)
        except (asyncio.IncompleteReadError, OSError):
            text = "has ended"
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _ENDING_PATIENCE)
        except (asyncio.LimitOverrunError, ValueError, KeyError, TypeError):
            text = "returned an unreadable answer"
        raise Ended(f"{text} (exit code {await self.kill()})")

    def interrupt(self) -> None:
        """Send it Ctrl-C's signal."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)

    async def end(self, seconds: float) -> None:
        """Close its stdin, and wait up to so long for it to end."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), seconds)
        await self.kill()

    async def kill(self) -> int:
        """Kill it with all its children, and wait; return its exit code."""
        self.kill_now()
        return await self._process.wait()

    def kill_now(self) -> None:
        """Kill it with all its children."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Speaker:
    """The answers of such a process; it sends nothing after the server has closed the pipe."""

    def __init__(self, out: BinaryIO) -> None:
        self._out: BinaryIO | None = out

    @classmethod
    def begin(cls) -> Self:
        """Reserve stdout for messages: other output of this process goes to stderr."""
        # A print of a library, or of C code, must not be read as a message.
        own = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return cls(own)

    def say(self, event: str, content: dict[str, Any], data: bytes = b"") -> None:
        """Send a message."""
        if self._out is None:
            return
        # The line tells how many bytes follow: tensors are sent as they are, not as text.
        about = {"event": event, "content": content, "bytes": len(data)}
        try:
            self._out.write(json.dumps(about).encode() + b"\n" + data)
            self._out.flush()
        except BrokenPipeError:
            self._out = None


#: The share of the machine's memory that one process may take.
SHARE = 0.75


def limit_memory(limit: int | None = None) -> None:
    """Limit the memory of this process, and of those that it starts.

    limit: bytes; default: a share of the machine's memory.
    """
    # Counted are private pages that can be written, not address space: CUDA reserves much of that.
    with suppress(ImportError, AttributeError, ValueError, OSError):  # the system has no such limit
        import resource

        wanted = limit or int(SHARE * MEMORY)
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        # An administrator's limit may be lower.
        known = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *known]), hard))


def status_of(error: Exception) -> int:
    """Return the HTTP status that answers an error of everystep: its own, if it has one."""
    known = 404 if isinstance(error, RunError) else 400 if isinstance(error, UsageError) else 500
    return getattr(error, "status", known)


def memory_message(error: Exception) -> str | None:
    """Return a message if memory was refused, else None."""
    if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
        return None
    return (
        "this takes more memory than a process of the page may use: three quarters of this machine's. "
        "The commands of everystep in a terminal have no such limit"
    )
