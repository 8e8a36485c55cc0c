"""Server-sent events (HTML standard): how they are sent, and where a stream resumes."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Send

__all__ = ["SILENCE", "EventStream", "event", "last_seen"]

#: A comment, sent after a while without events so that no proxy closes the stream.
SILENCE = ": still there\n\n"


class EventStream(StreamingResponse):
    """An answer of server-sent events. Its source is closed when the browser has gone."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        """Send the events as they come."""
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


def event(name: str, content: Any, number: int | None = None) -> str:
    """Return an event as it is sent. number: the browser sends it when it reconnects."""
    id = "" if number is None else f"id: {number}\n"
    return f"event: {name}\n{id}data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def last_seen(request: Request) -> int:
    """Return the number of the last event that the browser received, 0 for none."""
    said = request.headers.get("last-event-id") or request.query_params.get("after", "")
    return int(said) if said.isascii() and said.isdecimal() and len(said) < 19 else 0
