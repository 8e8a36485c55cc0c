"""The note of a run, written."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from everystep.errors import RecordingError, RunError
from everystep.page.routes.asked import fields_of, line
from everystep.recording.lock import write_note

__all__ = ["routes"]


async def note(request: Request) -> Response:
    """Write the note of a run, and answer with it as written."""
    text = line(await fields_of(request), "note")
    run = request.app.state.shelf.run(request.path_params["name"])
    try:
        written = await asyncio.to_thread(write_note, run.directory, text)
    except (RecordingError, RunError) as error:
        return JSONResponse({"error": str(error)}, 409)
    return JSONResponse({"note": written})


routes = [Route("/api/runs/{name}/note", note, methods=["POST"])]
