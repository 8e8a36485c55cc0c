"""The processes beside the server: the one that opens steps, and one for each task."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import BinaryIO

from everystep.experiment.files import ONLY_OWN_FILES

__all__ = ["begin", "end", "kill", "own_stdout"]

#: Bytes that a line from such a process may have.
_LONGEST_LINE = 2**26


async def begin(module: str, **environment: str) -> Process:
    """Start a module of ours in a process of its own, which is written to and read from.

    environment: variables that it gets where the user has not set them.

    Its stderr is that of the server. Ctrl-C in the server's terminal does not reach it: the server
    ends it, in its own way. Nothing is imported from the directory that the server was started in,
    which may be a stranger's, and no file is read that a run only names.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=PIPE,
        stdout=PIPE,
        limit=_LONGEST_LINE,
        start_new_session=True,
        env=environment | os.environ | {"PYTHONSAFEPATH": "1", ONLY_OWN_FILES: "1"},
    )


async def end(process: Process, seconds: float) -> None:
    """Close the stdin of a process, and wait so long for it to end by itself."""
    if process.stdin is not None:
        process.stdin.close()
    with suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), seconds)
    await kill(process)


async def kill(process: Process) -> int:
    """End a process at once, with all that it has started; return its exit code."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return await process.wait()


def own_stdout() -> BinaryIO:
    """Return stdout for our own lines alone: whatever else this process prints goes to stderr."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own
