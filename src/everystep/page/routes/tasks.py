"""Long questions and forks: a request is answered by the id of a task, and the task sends events."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from everystep.errors import RunError, UsageError
from everystep.page.live import SILENCE, EventStream, event, last_seen
from everystep.page.routes.request_body import Field, fields_of, flag, ints, maybe, settings, text, whole
from everystep.page.task_client import Task

__all__ = ["routes"]

#: Characters of a name.
_LONGEST_NAME = 200
#: Seconds of silence after which a comment is sent, so that nothing on the way closes the stream.
_SILENCE = 20.0

#: Readers of a name, and of a number of things.
_name, _count = partial(text, longest=_LONGEST_NAME), partial(whole, least=1)

#: The questions about a run: the fields of each, and how they are read.
QUESTIONS: dict[str, dict[str, Field]] = {
    "measure": {"expression": text, "name": maybe(_name), "every": maybe(_count, 1), "overwrite": flag},
    "when": {"condition": text, "which": maybe(text, "first")},
    "first-nonfinite": {},
    "verify": {},
    "fork": {"name": maybe(_name), "at": whole, "settings": settings, "steps": maybe(_count)},
    "what-if": {"at": whole, "until": _count, "rows": ints, "each": flag, "by": maybe(text, "loss")},
    # Another interpreter is a program: no page names one.
    "rerun": {
        "threads": maybe(_count),
        "capability": maybe(text),
        "mkl": maybe(text),
        "precision": maybe(text),
    },
    "compare": {"one": text, "other": text, "thorough": flag},
}


def _asking(kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Return what answers a question with the id of the task that was begun."""

    async def begin(request: Request) -> Response:
        fields = await fields_of(request)
        asked = {name: read(fields.get(name), name) for name, read in QUESTIONS[kind].items()}
        run_index = request.app.state.run_index
        if kind == "compare":
            # By name, like all runs: a path from the page is never opened.
            directory = run_index.run(asked.pop("one")).directory
            asked["other"] = str(run_index.run(asked["other"]).directory.absolute())
        else:
            if kind == "fork" and asked["name"] is not None:
                _check_new(asked["name"], request)
            directory = run_index.run(request.path_params["name"]).directory
        task = {"task": kind, "run": str(directory.absolute()), "asked": asked}
        return JSONResponse({"task": await request.app.state.tasks.begin(task)})

    return begin


async def events(request: Request) -> Response:
    """Send the messages of a task as server-sent events, until it ends."""
    return EventStream(_stream(_task(request), last_seen(request)))


async def cancel(request: Request) -> Response:
    """Stop a task; its results so far are kept."""
    await _task(request).stop()
    return JSONResponse({})


async def _stream(task: Task, after: int) -> AsyncIterator[str]:
    async for each in task.events(after, _SILENCE):
        yield SILENCE if each is None else event(each.name, each.content, each.number)


def _task(request: Request) -> Task:
    found: Task | None = request.app.state.tasks.find(request.path_params["id"])
    if found is None:
        raise RunError("this task no longer exists; ask again")
    return found


def _check_new(name: str, request: Request) -> None:
    """Check that a name can be that of a new run in the served directory, and is not a path."""
    is_plain = (
        name.isprintable() and not name.startswith((".", "-", "~")) and not set(name) & set("/\\:")
    )
    if not is_plain or len(os.fsencode(name)) > _LONGEST_NAME:
        raise UsageError(f"{name!r:.80} cannot be a run's name; choose a short one without / and \\")
    if (request.app.state.run_index.directory / name).exists():
        raise UsageError(
            f"{name!r:.80} already exists, and everystep never overwrites a run; choose another"
        )


routes = [
    *(
        Route(
            "/api/compare" if kind == "compare" else f"/api/runs/{{name:run}}/{kind}",
            _asking(kind),
            methods=["POST"],
        )
        for kind in QUESTIONS
    ),
    Route("/api/tasks/{id}/events", events),
    Route("/api/tasks/{id}", cancel, methods=["DELETE"]),
]
