"""Runs, their numbers by step, and their changes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from everystep.errors import RecordingError, RunError
from everystep.page.about import about_data
from everystep.page.columns import RunColumns, reduced
from everystep.page.live import MOMENT, EventStream, Live, last_seen
from everystep.page.routes.request_body import fields_of, line
from everystep.page.run_index import RunIndex, shown_name
from everystep.page.table_rows import frame_of, page_of, rows_of, wanted_of, whole
from everystep.recording.lock import write_note
from everystep.views.lists import columns_data

__all__ = ["routes"]

#: Points of a curve: by default, and at most.
POINTS, MOST_POINTS = 2000, 100_000


def all_runs(request: Request) -> Response:
    """Answer with a line about every run; with `soon`, only about those that are read in a moment."""
    run_index: RunIndex = request.app.state.run_index
    summaries = run_index.summaries(MOMENT if "soon" in request.query_params else math.inf)
    runs = list(summaries.runs.values())
    directory = shown_name(run_index.directory.name)
    content = {"directory": directory, "columns": columns_data(), "runs": runs}
    return JSONResponse(content | {"unread": summaries.unread})


def about(request: Request) -> Response:
    """Answer with everything about a run except its numbers by step."""
    run_index: RunIndex = request.app.state.run_index
    name = request.path_params["name"]
    forks, unread = run_index.forks(name, MOMENT)
    found = about_data(name, run_index.run(name), _columns(request), forks)
    task = request.app.state.tasks.training(name)
    return JSONResponse(found | {"unread": unread, "task": task})


def sparkline(request: Request) -> Response:
    """Answer with a small picture of the losses."""
    run = request.app.state.run_index.run(request.path_params["name"])
    return JSONResponse(request.app.state.columns.sparkline(run)._asdict())


def curve(request: Request) -> Response:
    """Answer with as many points of the losses, or of a measurement, as a plot shows."""
    columns = _columns(request)
    query = request.query_params
    measurement = query.get("measurement") or None
    steps, values = columns.curve(measurement)
    are_logged = measurement is not None or columns.facts.has_loss
    first = whole(query, "first", int(steps[0]) if len(steps) else 1)
    last = whole(query, "last", int(steps[-1]) if len(steps) else columns.steps)
    # Steps are in order: no look at all of them for a part of the plot.
    shown = slice(*steps.searchsorted([first, last + 1]))
    points = min(max(whole(query, "points", POINTS), 2), MOST_POINTS)
    found = reduced(steps[shown], values[shown], points, are_logged=are_logged)
    return JSONResponse({"first": first, "last": last, "total": len(steps[shown]), **found})


def table(request: Request) -> Response:
    """Answer with a page of the table of losses."""
    query = request.query_params
    start, length = whole(query, "start", 0), whole(query, "length", 10)
    around = whole(query, "around", 0) or None
    return JSONResponse(page_of(_columns(request), wanted_of(query), start, length, around))


def csv(request: Request) -> Response:
    """Answer with the rows that are asked for as a file."""
    columns = _columns(request)
    frame = frame_of(columns, rows_of(columns, wanted_of(request.query_params)))
    file = quote(f"{request.path_params['name']} losses.csv", safe="")
    # Two names: a plain one for old browsers, and that of the run, in UTF-8.
    headers = {"Content-Disposition": f"attachment; filename=losses.csv; filename*=UTF-8''{file}"}
    return Response(frame.write_csv(), headers=headers, media_type="text/csv")


async def note(request: Request) -> Response:
    """Write the note of a run, and answer with it as written."""
    text = line((await fields_of(request)).get("note"), "note")
    run = request.app.state.run_index.run(request.path_params["name"])
    try:
        written = await asyncio.to_thread(write_note, run.directory, text)
    except (RecordingError, RunError) as error:
        return JSONResponse({"error": str(error)}, 409)
    return JSONResponse({"note": written})


async def run_events(request: Request) -> Response:
    """Answer with the changes of a run, as they happen."""
    live: Live = request.app.state.live
    return _stream(request, live.run_events(request.path_params["name"], last_seen(request)))


async def list_events(request: Request) -> Response:
    """Answer with the changes of all runs, as they happen."""
    return _stream(request, request.app.state.live.list_events())


def _stream(request: Request, events: AsyncIterator[str]) -> Response:
    is_asked_for_headers = request.method == "HEAD"  # a stream would never end
    return Response(media_type=EventStream.media_type) if is_asked_for_headers else EventStream(events)


def _columns(request: Request) -> RunColumns:
    state = request.app.state
    columns: RunColumns = state.columns.of(state.run_index.run(request.path_params["name"]))
    return columns


routes = [
    Route("/api/runs", all_runs),
    Route("/api/events", list_events),
    Route("/api/runs/{name:run}", about),
    Route("/api/runs/{name:run}/sparkline", sparkline),
    Route("/api/runs/{name:run}/curve", curve),
    Route("/api/runs/{name:run}/table", table),
    Route("/api/runs/{name:run}/losses.csv", csv),
    Route("/api/runs/{name:run}/events", run_events),
    Route("/api/runs/{name:run}/note", note, methods=["POST"]),
]
