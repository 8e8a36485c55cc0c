"""Opened steps: their content, the numbers of their tensors, and the report that has some inside."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from everystep.errors import UsageError
from everystep.page.desk import Answer, Desk, Gone, NoAnswer

__all__ = ["routes"]

_WHOLE = re.compile(r"\d{1,18}", re.ASCII)
_RANGE = re.compile(r"(\d{1,18}):(\d{1,18})", re.ASCII)


async def content(request: Request) -> Response:
    """Answer with all of a step but the numbers of its tensors."""
    return await _asked(request, "content", step=_step(request))


async def tensor(request: Request) -> Response:
    """Answer with the numbers of a region of a tensor."""
    query = request.query_params
    return await _asked(
        request,
        "numbers",
        step=_step(request),
        id=_id(request),
        index=_whole("index", query.get("index", "0")),
        count=_whole("count", query.get("count", "1")),
        rows=_range("rows", query.get("rows")),
        columns=_range("columns", query.get("columns")),
        most=_whole("most", query.get("most", "512")),
    )


async def histogram(request: Request) -> Response:
    """Answer with the histogram of a tensor."""
    return await _asked(request, "histogram", step=_step(request), id=_id(request))


async def why(request: Request) -> Response:
    """Answer with where a number comes from: of a tensor (`id`, `index`), or `of` a name."""
    query = request.query_params
    name = query.get("of")
    id = None if name else _id(request)
    return await _asked(
        request, "why", step=_step(request), id=id, index=query.get("index", ""), name=name
    )


async def rows(request: Request) -> Response:
    """Answer with the rows that make most of the loss and of the gradients."""
    # It may take seconds, and who goes from step to step does not wait for it.
    return await _answered(request, request.app.state.second_desk, "rows", step=_step(request))


async def file(request: Request) -> Response:
    """Answer with a tensor as a file of NumPy's."""
    return await _asked(request, "file", step=_step(request), id=_id(request))


async def report(request: Request) -> Response:
    """Answer with a page to keep that needs no server, with the chosen steps inside."""
    texts = [text for text in request.query_params.get("steps", "").split(",") if text.strip()]
    steps = [_whole("steps", text.strip()) for text in texts]
    desk = Desk(request.app.state.shelf.directory)  # who goes from step to step need not wait for it
    try:
        return await _answered(request, desk, "report", steps=steps)
    finally:
        await desk.close()


async def _asked(request: Request, kind: str, **asked: Any) -> Response:
    return await _answered(request, request.app.state.desk, kind, **asked)


async def _answered(request: Request, desk: Desk, kind: str, **asked: Any) -> Response:
    """Ask a worker, and give its answer on."""
    directory = request.app.state.shelf.place(request.path_params["name"])

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    try:
        answer = await desk.ask(kind, directory, gone=gone, **asked)
    except NoAnswer as error:
        return JSONResponse({"error": str(error)}, 502)
    except Gone:
        # A server that stops says that clients have gone who still listen; of others, nobody reads it.
        return JSONResponse({"error": "the server is being stopped"}, 502)
    if answer.status != 200:
        return JSONResponse(answer.about, answer.status)
    return _response(kind, answer, directory.name)


def _response(kind: str, answer: Answer, name: str) -> Response:
    if kind == "numbers":
        headers = {"Everystep-Tensor": json.dumps(answer.about)}
        return Response(answer.content, media_type="application/octet-stream", headers=headers)
    if kind == "file":
        return Response(answer.content, media_type="application/octet-stream")
    if kind == "report":
        plain = re.sub(r"[^\w. -]", "_", name, flags=re.ASCII)
        headers = {"Content-Disposition": f'attachment; filename="{plain}.html"'}
        return Response(answer.content, media_type="text/html; charset=utf-8", headers=headers)
    return Response(answer.content, media_type="application/json")


def _step(request: Request) -> int:
    return _whole("step", request.path_params["step"])


def _id(request: Request) -> str:
    id = request.query_params.get("id")
    if not id:
        raise UsageError("no tensor given: add ?id=batch.x; the step's content lists its tensors")
    return id


def _whole(label: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise UsageError(f"{label} is {text!r:.80}; write a whole number from 0 on")
    return int(text)


def _range(label: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = _RANGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{label} are {text!r:.80}; write first:end, {label}=0:64")
    return int(match[1]), int(match[2])


routes = [
    Route("/api/runs/{name}/steps/{step}", content),
    Route("/api/runs/{name}/steps/{step}/tensor", tensor),
    Route("/api/runs/{name}/steps/{step}/histogram", histogram),
    Route("/api/runs/{name}/steps/{step}/file", file),
    Route("/api/runs/{name}/steps/{step}/why", why),
    Route("/api/runs/{name}/steps/{step}/rows", rows),
    Route("/api/runs/{name}/report", report),
]
