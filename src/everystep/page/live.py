"""Changes on disk, sent to the page as they happen, by server-sent events.

After each event of the file system, a run is read once, for all listeners.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Send
from watchdog import events
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

from everystep.errors import RunError
from everystep.page.about import live_data
from everystep.page.columns import Columns, RunColumns, reduced
from everystep.page.run_index import RunIndex, Summaries
from everystep.recording.database import FILE_NAME
from everystep.recording.recorded_run import RecordedRun

__all__ = ["SILENCE", "EventStream", "Live", "event", "last_seen"]

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
    """Return an event as it is sent. number: what the browser sends when it connects again."""
    id = "" if number is None else f"id: {number}\n"
    return f"event: {name}\n{id}data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def last_seen(request: Request) -> int:
    """Return the number of the last event that the browser has seen, 0 for none."""
    given = request.headers.get("last-event-id") or request.query_params.get("after", "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 19 else 0


#: Minimum seconds between two readings.
RUN_PAUSE, LIST_PAUSE = 0.125, 0.5
#: Seconds after which the runs read so far are sent while others are still unread: first, and then.
MOMENT, LONGER = 0.25, 1.0
#: Seconds after which something is looked at again although no change was reported: where a change may
#: not be reported (a process is killed), and where none is expected (a finished run is continued).
AGAIN, SELDOM = 2.0, 10.0
#: New losses sent at once; more are reduced.
MOST_LOSSES = 2000

Content = TypeVar("Content")


class Sight(NamedTuple, Generic[Content]):
    """What was read: the content, where its changes show, and whether some may not show there.

    is_whole: reading again would not return more.
    """

    content: Content
    directories: set[Path]
    is_moving: bool
    is_whole: bool = True


class RunSight(NamedTuple):
    """The data that was read of a run."""

    run: RecordedRun
    columns: RunColumns
    status: str


# From a write to the browser:
#   the training writes run.sqlite-wal
#     Watches.on_any_event, in a thread of watchdog    sets an asyncio.Event
#     Feed._work                                       reads the run, once for all listeners
#     Live.run_events, for each open page              sends what differs from what it has sent
class Live:
    """Sends runs as they change."""

    def __init__(self, run_index: RunIndex, columns: Columns) -> None:
        self._run_index = run_index
        self._columns = columns
        self._feeds: dict[str | None, Feed[Any]] = {}

    async def run_events(self, name: str, after: int) -> AsyncIterator[str]:
        """Yield changes of a run since step `after`.

        Losses from a step that was already sent replace those sent from that step on.
        """
        sent: Any = None
        before: RunColumns | None = None
        yield "retry: 1000\n\n"
        feed = self._feed(name, lambda: self._look_at(name), RUN_PAUSE)
        with feed.listening() as changes:
            async for sight in changes:
                if sight is None:
                    # It may come back: the page keeps listening.
                    if sent != "gone":
                        yield event("gone", {}, 0)
                    sent, before, after = "gone", None, 0
                    continue
                columns: RunColumns = sight.columns
                # A training that is resumed repeats steps: their losses may differ from those already
                # sent.
                after = _agreed(before, columns, after)
                before = columns
                state = live_data(sight.run, columns, sight.status)
                if state != sent:
                    yield event("state", state, after)
                    sent = state
                if after < columns.steps:
                    steps = np.arange(after + 1, columns.steps + 1)
                    has_loss = columns.facts.has_loss
                    losses = reduced(steps, columns.losses[after:], MOST_LOSSES, are_logged=has_loss)
                    after = columns.steps
                    content = {"steps": losses["steps"], "losses": losses["values"]}
                    yield event("losses", content, after)

    async def list_events(self) -> AsyncIterator[str]:
        """Yield a summary of each run, as they are read; then those that change, and the names of
        deleted ones.

        `begins` marks the first event, `unread` is the number of runs still to come; when it is 0, a run
        that was not sent does not exist.
        """
        sent: Summaries | None = None
        yield "retry: 1000\n\n"
        feed = self._feed(None, self._look_at_all, LIST_PAUSE)
        with feed.listening() as changes:
            async for seen in changes:
                known = sent.runs if sent else {}
                changed = [run for name, run in seen.runs.items() if run != known.get(name)]
                gone = [name for name in known if name not in seen.runs]
                begins, unread = sent is None, seen.unread
                if changed or gone or begins or unread != (sent and sent.unread):
                    yield event(
                        "runs", {"runs": changed, "gone": gone, "begins": begins, "unread": unread}
                    )
                sent = seen

    def close(self) -> None:
        """Stop watching."""
        for feed in self._feeds.values():
            feed.stop()

    def _feed(self, key: str | None, look: Callable[[], Sight[Any]], pause: float) -> Feed[Any]:
        # Feeds without listeners have stopped; those of deleted runs would stay for ever.
        self._feeds = {known: feed for known, feed in self._feeds.items() if feed.listeners}
        return self._feeds.setdefault(key, Feed(look, pause))

    def _look_at(self, name: str) -> Sight[RunSight | None]:
        folder_of_all = self._run_index.directory
        try:
            run = self._run_index.run(name)
            columns = self._columns.of(run)
            status = run.status_by(columns.facts)
            if status not in (columns.facts.status, "killed"):
                columns = self._columns.of(run)  # it has ended since: now it has all of its steps
        except RunError:  # gone; or not there yet, or not whole
            folder = self._run_index.folder(name)
            return Sight(None, {folder_of_all} | ({folder} if folder else set()), is_moving=False)
        return Sight(
            RunSight(run, columns, status), {folder_of_all, run.directory}, is_moving=status == "running"
        )

    def _look_at_all(self) -> Sight[Summaries]:
        summaries = self._run_index.summaries(LONGER)
        runs = summaries.runs
        if summaries.unread:
            return Sight(summaries, {self._run_index.directory}, is_moving=True, is_whole=False)
        is_moving = any(run["status"] == "running" for run in runs.values())
        # What cannot be read, or is not a run yet, may become one.
        unsettled = {
            path
            for name, path in self._run_index.folders().items()
            if name not in runs or runs[name]["status"] in ("running", None)
        }
        return Sight(summaries, {self._run_index.directory, *unsettled}, is_moving)


class Feed(Generic[Content]):
    """Reads something when it changes, once for all listeners, and only while there are any."""

    def __init__(self, look: Callable[[], Sight[Content]], pause: float) -> None:
        self._look = look
        self._pause = pause
        self.listeners: set[asyncio.Event] = set()
        self._seen: list[Content] = []  # empty before the first look: None is a content, too
        self._changed = asyncio.Event()
        self._watches = Watches(self._changed)
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def listening(self) -> Iterator[AsyncIterator[Content]]:
        """Yield the content now, and whenever it may have changed."""
        news = asyncio.Event()
        self.listeners.add(news)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
            # If the task fails, its listeners wake up, and raise its error.
            self._task.add_done_callback(lambda task: self._tell())
        elif self._seen:
            news.set()
        try:
            yield self._contents(news)
        finally:
            self.listeners.discard(news)
            if not self.listeners:
                self.stop()

    def stop(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
        self._task = None
        self._seen = []
        self._watches.close()

    async def _contents(self, news: asyncio.Event) -> AsyncIterator[Content]:
        while True:
            await news.wait()
            news.clear()
            if self._task is not None and self._task.done():
                self._task.result()  # raises its error
            yield self._seen[0]

    async def _work(self) -> None:
        while True:
            # Before the look: a change that comes during it must lead to another look.
            self._changed.clear()
            sight = await asyncio.to_thread(self._look)
            is_complete = self._watches.watch(sight.directories)
            if self._seen != [sight.content]:
                self._seen = [sight.content]
                self._tell()
            # The next look continues with the unread runs; a pause would only delay the list.
            if not sight.is_whole:
                continue
            # A training writes many times a second.
            await asyncio.sleep(self._pause)
            wait = SELDOM if is_complete and not sight.is_moving else AGAIN
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)

    def _tell(self) -> None:
        for news in self.listeners:
            news.set()


#: Events that show that a run was written to, or that a directory was created or deleted.
_EVENTS: list[type[events.FileSystemEvent]] = [
    events.DirCreatedEvent,
    events.DirDeletedEvent,
    events.DirMovedEvent,
    events.FileDeletedEvent,
    events.FileModifiedEvent,
    events.FileMovedEvent,
]


class Watches(events.FileSystemEventHandler):
    """Sets an event when a run in one of some directories, or a directory in them, changes.

    Used from one event loop.
    """

    def __init__(self, changed: asyncio.Event) -> None:
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._observer: BaseObserver | None = None
        self._watched: dict[Path, tuple[ObservedWatch, tuple[int, int]]] = {}

    def watch(self, directories: set[Path]) -> bool:
        """Watch exactly these directories; a new one counts as changed: it may have been, just now.

        Returns:
            whether that is possible: all are there, and the system lets us watch them.
        """
        if self._observer is None:
            # It reports events of a directory that was just released as errors.
            logging.getLogger("watchdog").setLevel(logging.CRITICAL)
            self._observer = Observer()
            self._observer.start()
        for directory, (watch, place) in list(self._watched.items()):
            # Another directory may have replaced the one at its path.
            if directory not in directories or _place(directory) != place:
                del self._watched[directory]
                self._observer.unschedule(watch)
        for directory in directories - self._watched.keys():
            # Before `schedule`: a directory that is replaced in between is found at the next look.
            place_now = _place(directory)
            try:
                watch = self._observer.schedule(self, str(directory), event_filter=_EVENTS)
            except OSError:  # it has gone, or the system's limit of watches is reached
                continue
            if place_now is not None:
                self._watched[directory] = watch, place_now
                self._changed.set()
        return self._watched.keys() == directories

    def close(self) -> None:
        """Stop watching."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
        self._observer = None
        self._watched = {}

    def on_any_event(self, event: events.FileSystemEvent) -> None:
        """Set the event, from the thread of the observer."""
        names = {Path(str(path)).name for path in (event.src_path, event.dest_path)}
        # Reading a run touches its other files (the lock, the shared memory), which is not a change.
        is_made_by_looking = not event.is_directory and not names & {FILE_NAME, f"{FILE_NAME}-wal"}
        if not is_made_by_looking and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)


def _place(directory: Path) -> tuple[int, int] | None:
    """Return what distinguishes a directory from another one at its path; None if there is none."""
    with suppress(OSError):
        stat = directory.stat()
        return stat.st_dev, stat.st_ino
    return None


def _agreed(before: RunColumns | None, now: RunColumns, after: int) -> int:
    """Return the last step up to which the sent data is still valid."""
    after = after if after <= now.steps else 0 if before is None else now.steps
    if before is None:
        return after
    common = min(after, before.steps, now.steps)
    one, other = before.losses[:common], now.losses[:common]
    differing = np.flatnonzero(~((one == other) | (np.isnan(one) & np.isnan(other))))
    return int(differing[0]) if len(differing) else common
