"""The process that serves the page: where, to whom, and until when. Imports no torch."""

from __future__ import annotations

import asyncio
import errno
import os
import shlex
import socket
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path
from types import FrameType
from urllib.parse import quote

import uvicorn

from everystep.errors import UsageError
from everystep.page.app import UntilEnd, application
from everystep.page.guard import Guard, is_loopback, token_of
from everystep.page.run_index import shown_name
from everystep.recording.directories import RUNS, find_run, is_run, is_sweep

__all__ = ["place_of", "serve"]

#: Number of ports to try, from the requested one.
PORTS = 100
#: Seconds that answers in progress have to end.
PATIENCE = 1


def place_of(what: str | Path) -> tuple[Path, str | None]:
    """Return the directory of runs to serve, and the run to open at, if one was named.

    Raises:
        RunError: there is neither. runs/ need not exist yet.
    """
    path = Path(what)
    # A directory of runs; else a run, a sweep by its name, or runs/, which the first training makes.
    if not is_run(path) and path.is_dir():
        return path.resolve(), None
    if not path.exists() and is_sweep(RUNS / path):
        return (RUNS / path).resolve(), None
    if path == RUNS and not path.exists():
        return path.resolve(), None
    found = find_run(what)
    # A link to a run is served from the directory that contains the link.
    run = found.resolve() if found.name in ("", "..") else found.absolute()
    return run.parent, run.name


def serve(
    directory: Path,
    run: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8137,
    browser: bool | None = None,
) -> None:
    """Serve the page of the runs in a directory, until Ctrl-C.

    run: the name of the one to open at; host: to listen on; beyond loopback, other machines can reach
    the page; port: to listen on; if it is taken, the next free one; browser: open a browser; None: if
    there is a screen.

    Raises:
        UsageError: nothing can be served there.
    """
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    token = token_of(directory)
    until_end = UntilEnd(application(directory))
    server = _Server(Guard(until_end, token, host), until_end)
    path = f"/runs/{quote(shown_name(run), safe='')}" if run else "/"
    # The token is in the address once; the answer sets it as a cookie.
    address = f"http://{_shown(host)}:{port}{path}?token={token}"
    print(address, flush=True)
    _say(host, port)
    if browser or (browser is None and _has_screen()):
        webbrowser.open(address)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """Waits for its end without looking at the clock: uvicorn's own loop wakes up ten times a second."""

    def __init__(self, app: Guard, until_end: UntilEnd) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                # Not "auto", which takes what else is installed: one server is what tests cover.
                http="h11",
                ws="none",
                loop="asyncio",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=PATIENCE,
            )
        )
        self._until_end = until_end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_to_end = asyncio.Event()

    async def main_loop(self) -> None:
        """Serve until a signal asks to end."""
        self._loop = asyncio.get_running_loop()
        await self.on_tick(0)  # sets the headers of all answers
        if not self.should_exit:
            await self._asked_to_end.wait()
        await self._until_end.end()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, as a signal asks."""
        # Pressed again while it ends, Ctrl-C does not make it end more quickly, only less well.
        if not self.should_exit:
            super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._asked_to_end.set)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the first of the ports that is free."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: this machine cannot listen there ({error})") from None
    for candidate in range(port, min(port + PORTS, 65536)):
        # With the protocol named, answers in two pieces do not wait for each other (TCP_NODELAY).
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name == "posix":  # to have the port at once after a restart; Windows would share it
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((place[0], candidate, *place[2:]))
            listening.listen(128)
        except OSError as error:
            listening.close()
            # A taken port, or one that is reserved: the next may be free.
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                reason = error.strerror or str(error)
                raise UsageError(f"--host {host}: this machine cannot listen there ({reason})") from None
        else:
            return listening
    last = min(port + PORTS, 65536) - 1
    raise UsageError(f"ports {port} to {last} are all taken; choose another: --port {port + PORTS}")


def _shown(host: str) -> str:
    """Return the host for an address that can be opened on this machine."""
    if host in ("0.0.0.0", "::", ""):
        return socket.gethostname() if "SSH_CONNECTION" in os.environ else "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _say(host: str, port: int) -> None:
    lines = []
    if not is_loopback(host):
        lines.append(
            f"this listens on {host}: anyone with this address who can reach this machine sees all "
            "runs here, and can measure and train in your name; the connection is not encrypted"
        )
    elif connection := os.environ.get("SSH_CONNECTION", "").split():
        here = connection[2] if len(connection) > 2 else socket.gethostname()
        forwarded = f"{port}:{_shown(host)}:{port}"
        lines.append(
            f"on your own machine: ssh -L {forwarded} {shlex.quote(here)}; then open the address"
        )
    lines.append("Ctrl-C stops it")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _has_screen() -> bool:
    if not sys.stdout.isatty() or "SSH_CONNECTION" in os.environ:
        return False
    is_desktop = sys.platform in ("darwin", "win32")
    return is_desktop or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
