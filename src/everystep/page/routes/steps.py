"""Opened steps: their content, the numbers of their tensors, and the report that has some inside."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from everystep.errors import UsageError
from everystep.page.table_rows import whole
from everystep.page.worker_client import WorkerClient

__all__ = ["routes"]

_RANGE = re.compile(r"(\d{1,18}):(\d{1,18})", re.ASCII)


#: The questions about a step: the address of each, and its fields in the query.
QUESTIONS: dict[str, tuple[str, Callable[[Mapping[str, str]], dict[str, Any]]]] = {
    "content": ("", lambda query: {}),
    "numbers": (
        "/tensor",
        lambda query: {
            "id": _id(query),
            "index": whole(query, "index", 0),
            "count": whole(query, "count", 1),
            "rows": _range("rows", query.get("rows")),
            "columns": _range("columns", query.get("columns")),
            "most": whole(query, "most", 512),
        },
    ),
    "histogram": ("/histogram", lambda query: {"id": _id(query)}),
    "file": ("/file", lambda query: {"id": _id(query)}),
    "why": (
        "/why",
        lambda query: {
            "id": None if query.get("of") else _id(query),
            "index": query.get("index", ""),
            "name": query.get("of"),
        },
    ),
    "rows": ("/rows", lambda query: {}),
}


def _asking(kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Return what answers a question about a step."""

    async def ask(request: Request) -> Response:
        step = whole(request.path_params, "step", 0)
        asked = QUESTIONS[kind][1](request.query_params)
        state = request.app.state
        # Ranking rows may take seconds, and stepping must not wait for it.
        worker = state.second_worker if kind == "rows" else state.worker
        return await _answered(request, worker, kind, step=step, **asked)

    return ask


async def report(request: Request) -> Response:
    """Answer with a page to keep that needs no server, with the chosen steps inside."""
    texts = [text for text in request.query_params.get("steps", "").split(",") if text.strip()]
    steps = [whole({"steps": text}, "steps", 0) for text in texts]
    # A separate worker, so that stepping need not wait for it.
    worker = WorkerClient(request.app.state.run_index.directory)
    try:
        return await _answered(request, worker, "report", steps=steps)
    finally:
        await worker.close()


async def _answered(request: Request, worker: WorkerClient, kind: str, **asked: Any) -> Response:
    directory = request.app.state.run_index.place(request.path_params["name"])

    async def gone() -> None:
        # Nothing else comes: these requests have no body.
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer = await worker.ask(kind, directory, gone=gone, **asked)
    if answer.status != 200:
        return JSONResponse(answer.about, answer.status)
    if kind == "numbers":
        # The body is the numbers alone; what they are is in a header.
        headers = {"Everystep-Tensor": json.dumps(answer.about)}
        return Response(answer.content, media_type="application/octet-stream", headers=headers)
    if kind == "file":
        return Response(answer.content, media_type="application/octet-stream")
    if kind == "report":
        # A quote or a line break in a name would end the header.
        plain = re.sub(r"[^\w. -]", "_", directory.name, flags=re.ASCII)
        headers = {"Content-Disposition": f'attachment; filename="{plain}.html"'}
        return Response(answer.content, media_type="text/html; charset=utf-8", headers=headers)
    return Response(answer.content, media_type="application/json")


def _id(query: Mapping[str, str]) -> str:
    if not (id := query.get("id")):
        raise UsageError("no tensor given: add ?id=batch.x; the step's content lists its tensors")
    return id


def _range(label: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = _RANGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{label} are {text!r:.80}; write first:end, {label}=0:64")
    return int(match[1]), int(match[2])


routes = [
    *(
        Route(f"/api/runs/{{name:run}}/steps/{{step}}{address}", _asking(kind))
        for kind, (address, _) in QUESTIONS.items()
    ),
    Route("/api/runs/{name:run}/report", report),
]
