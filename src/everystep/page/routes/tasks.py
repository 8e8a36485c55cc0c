"""Tasks, by what they do; each answers with an id, its events say the rest."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from everystep.errors import UsageError
from everystep.page.event_stream import SILENCE, EventStream, event, last_seen
from everystep.page.routes.asked import Asked
from everystep.page.tasks import Busy, Task

__all__ = ["routes"]

#: Characters of a name.
_LONGEST_NAME = 200
#: Seconds of silence after which a comment is sent, so that nothing on the way closes the stream.
_SILENCE = 20.0


async def measure(request: Request) -> Response:
    """Add a measurement to a run."""
    asked = await Asked.of(request)
    task = {
        "expression": asked.text("expression"),
        "name": asked.text("name", None, longest=_LONGEST_NAME),
        "every": asked.whole("every", 1, least=1),
        "overwrite": asked.flag("overwrite"),
    }
    return await _begun(request, "measure", task)


async def when(request: Request) -> Response:
    """Find the steps at which a condition is true."""
    asked = await Asked.of(request)
    task = {"condition": asked.text("condition"), "which": asked.text("which", "first")}
    return await _begun(request, "when", task)


async def verify(request: Request) -> Response:
    """Take every step of a run again."""
    await Asked.of(request)
    return await _begun(request, "verify", {})


async def fork(request: Request) -> Response:
    """Train a run that is its parent's up to a step."""
    asked = await Asked.of(request)
    name = asked.text("name", None, longest=_LONGEST_NAME)
    if name is not None:
        _check_new(name, request)
    task = {
        "at": asked.whole("at"),
        "settings": asked.settings("settings"),
        "steps": asked.whole("steps", None, least=1),
        "name": name,
    }
    return await _begun(request, "fork", task)


async def what_if(request: Request) -> Response:
    """Train again without some rows, and compare a number at a step."""
    asked = await Asked.of(request)
    task = {
        "at": asked.whole("at"),
        "until": asked.whole("until", least=1),
        "rows": asked.wholes("rows"),
        "each": asked.flag("each"),
        "by": asked.text("by", "loss"),
    }
    return await _begun(request, "whatif", task)


async def rerun(request: Request) -> Response:
    """Take the steps of a run under other numerics, or in another precision."""
    asked = await Asked.of(request)
    # Another interpreter is a program: no page names one.
    task = {
        "threads": asked.whole("threads", None, least=1),
        "capability": asked.text("capability", None),
        "mkl": asked.text("mkl", None),
        "precision": asked.text("precision", None),
    }
    return await _begun(request, "rerun", task)


async def compare(request: Request) -> Response:
    """Find where two runs part."""
    asked = await Asked.of(request)
    shelf = request.app.state.shelf
    one, other = (shelf.run(asked.text(side)) for side in ("one", "other"))
    task = {"other": str(other.directory.absolute()), "thorough": asked.flag("thorough")}
    return await _begun(request, "compare", {"run": str(one.directory.absolute())} | task)


async def events(request: Request) -> Response:
    """Say what a task says, as server-sent events, until it ends."""
    task = _task(request)
    if task is None:
        return _unknown()
    return EventStream(_stream(task, last_seen(request)))


async def cancel(request: Request) -> Response:
    """Stop a task; what it has done is kept."""
    task = _task(request)
    if task is None:
        return _unknown()
    await task.stop()
    return JSONResponse({})


async def _begun(request: Request, kind: str, task: dict[str, Any]) -> Response:
    if "run" not in task:
        run = request.app.state.shelf.run(request.path_params["name"])
        task = {"run": str(run.directory.absolute())} | task
    try:
        return JSONResponse({"task": await request.app.state.tasks.begin({"task": kind} | task)})
    except Busy as error:
        return JSONResponse({"error": str(error)}, 409)


async def _stream(task: Task, after: int) -> AsyncIterator[str]:
    async for each in task.events(after, _SILENCE):
        yield SILENCE if each is None else event(each.name, each.content, each.number)


def _task(request: Request) -> Task | None:
    found: Task | None = request.app.state.tasks.find(request.path_params["id"])
    return found


def _unknown() -> Response:
    return JSONResponse({"error": "this task does not exist any more; ask again"}, 404)


def _check_new(name: str, request: Request) -> None:
    """Check that a name is that of a new run in the directory that is shown, and no path.

    Raises:
        UsageError: it is not.
    """
    is_plain = (
        name.isprintable() and not name.startswith((".", "-", "~")) and not set(name) & set("/\\:")
    )
    if not is_plain or len(os.fsencode(name)) > _LONGEST_NAME:
        raise UsageError(f"{name!r:.80} cannot be a run's name; write a short one, without / and \\")
    if (request.app.state.shelf.directory / name).exists():
        raise UsageError(f"{name!r:.80} is there already, and no run is overwritten; choose another")


routes = [
    Route("/api/runs/{name}/measure", measure, methods=["POST"]),
    Route("/api/runs/{name}/when", when, methods=["POST"]),
    Route("/api/runs/{name}/verify", verify, methods=["POST"]),
    Route("/api/runs/{name}/fork", fork, methods=["POST"]),
    Route("/api/runs/{name}/whatif", what_if, methods=["POST"]),
    Route("/api/runs/{name}/rerun", rerun, methods=["POST"]),
    Route("/api/compare", compare, methods=["POST"]),
    Route("/api/tasks/{id}/events", events),
    Route("/api/tasks/{id}", cancel, methods=["DELETE"]),
]
