"""The application: which address is answered by what, and how errors are reported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from everystep.errors import EverystepError
from everystep.page.assets import asset, index, problem
from everystep.page.child_process import status_of
from everystep.page.columns import Columns
from everystep.page.live import Live
from everystep.page.routes import runs, steps, tasks
from everystep.page.run_index import RunIndex
from everystep.page.task_client import Tasks
from everystep.page.worker_client import WorkerClient

__all__ = ["UntilEnd", "application"]

_PAGES = [Route(path, index) for path in ("/", "/runs/{name:run}", "/overlay", "/compare")]
_ASSETS = [Route("/static/{path:path}", asset)]


def application(directory: Path) -> Starlette:
    """Return the application for the runs in a directory, without access control."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        state = app.state
        state.live = Live(state.run_index, state.columns)
        await state.worker.start()
        yield
        state.live.close()
        await state.tasks.close()
        await _close_workers(app)

    app = Starlette(
        routes=[*_PAGES, *_ASSETS, *runs.routes, *steps.routes, *tasks.routes],
        exception_handlers={EverystepError: _told, HTTPException: _http_error, Exception: _failed},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.run_index, app.state.columns = RunIndex(directory), Columns()
    app.state.tasks = Tasks()
    # The second one starts its process with the first question that takes long.
    app.state.worker, app.state.second_worker = WorkerClient(directory), WorkerClient(directory)
    return app


async def _close_workers(app: Starlette) -> None:
    await asyncio.gather(app.state.worker.close(), app.state.second_worker.close())


class UntilEnd:
    """Ends answers in progress when the server ends: event streams, steps being opened."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._end = asyncio.Event()

    async def end(self) -> None:
        """End them."""
        self._end.set()
        await _close_workers(self._app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as the application does; at the end, as if the browser had disconnected."""

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_open = False

        async def receive_or_end() -> Message:
            # Whatever comes first: the browser's message or the end of the server.
            end = asyncio.ensure_future(self._end.wait())
            message = asyncio.ensure_future(receive())
            try:
                await asyncio.wait([end, message], return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                end.cancel()
                message.cancel()

        async def send_noting(message: Message) -> None:
            nonlocal is_open
            is_open = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        await self._app(scope, receive_or_end, send_noting)
        if is_open and self._end.is_set():
            await send({"type": "http.response.body", "body": b""})


async def _told(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_of(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    is_missing = error.status_code == 404
    text = f"there is no page at {request.url.path}" if is_missing else error.detail
    title = "Nothing here" if is_missing else "The request failed"
    answer = problem(request.url.path, error.status_code, title, text, has_link=True)
    answer.headers.update(error.headers or {})
    return answer


async def _failed(request: Request, error: Exception) -> Response:
    text = "everystep failed; its terminal shows the reason. Please report it"
    return JSONResponse({"error": text}, 500)
