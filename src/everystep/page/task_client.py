"""The server's side of the tasks: starts them, keeps their messages, and stops them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from everystep.errors import EverystepError
from everystep.page.child_process import Child, Ended

__all__ = ["Busy", "Event", "Task", "Tasks"]

#: Tasks at the same time: each uses the whole processor.
MOST_AT_ONCE = 3
#: Tasks that change nothing: a page that is loaded again listens to the one that it had begun.
QUESTIONS = ("when", "first-nonfinite", "verify", "compare", "what-if", "rerun")
#: Ended tasks with a result that is still known.
REMEMBERED = 20
#: Seconds that a task has to end when it is stopped: a step may be long, and a fork takes a snapshot.
_PATIENCE = 60.0
#: The same when the server ends.
_LAST_PATIENCE = 5.0


class Busy(EverystepError):  # noqa: N818  # nothing is wrong
    """There are as many tasks as there may be; the message is for the user."""

    status = 409


# A browser that connects again sends the number of the last event that it has seen: Task.events(after=2)
# of the messages 1 progress, 2 begun, 3 progress, 4 progress yields 4 alone, the last of its kind.
class Event(NamedTuple):
    """A message of a task: its number, from 1, its kind, and its content."""

    number: int
    name: str
    content: dict[str, Any]


class Task:
    """A task under way, or over."""

    def __init__(self, process: Child, asked: dict[str, Any]) -> None:
        self._process = process
        self.asked = asked
        # Only the last message of each kind: a late listener needs no more.
        self._said: dict[str, Event] = {}
        self._changed = asyncio.Event()
        self._is_ready = False
        self._is_stopped = False
        self.is_over = False

    async def follow(self) -> Child | None:
        """Send the process its request, and keep its messages until the last.

        Returns the process if it waits for another task, and was not interrupted.
        """
        await self._process.ask(self.asked)
        try:
            while True:
                event, content, _ = await self._process.hear()
                if event == "ready":
                    self._is_ready = True
                elif event != "waiting":
                    self._keep(event, content)
                elif not self._is_stopped:
                    return self._process
                else:  # the answer came before the interrupt, or in spite of it
                    await self._process.kill()
        except Ended as ended:
            # Killed, or out of memory: the process could not report it itself.
            if not self._said.keys() & {"result", "error"}:
                text = (
                    "stopped"
                    if self._is_stopped
                    else f"the process of this task {ended} before it answered"
                )
                self._keep("error", {"error": text, "cancelled": self._is_stopped})
        finally:
            self.is_over = True
            self._tell()
        return None

    async def events(self, after: int = 0, silence: float | None = None) -> AsyncIterator[Event | None]:
        """Yield the messages after number `after`, and later ones as they come, to the end.

        silence: seconds without a message after which None is yielded.
        """
        while True:
            # Before the messages are read: one that comes meanwhile sets this event.
            changed = self._changed
            # By number: in the order in which they were sent.
            for event in sorted(self._said.values()):
                if event.number > after:
                    after = event.number
                    yield event
            # Another message has come while these were sent.
            if changed is not self._changed:
                continue
            if self.is_over:
                return
            try:
                await asyncio.wait_for(changed.wait(), silence)
            except TimeoutError:
                yield None

    async def stop(self) -> None:
        """Stop it; its results so far are kept."""
        if self._is_stopped or self.is_over:
            return
        self._is_stopped = True
        if not self._is_ready:  # it has not begun yet, and would not end in good order
            await self.kill()
            return
        # A second SIGINT would not wait for the step to be finished.
        self._process.interrupt()
        asyncio.get_running_loop().call_later(_PATIENCE, self._process.kill_now)

    @property
    def is_active(self) -> bool:
        """Whether it is running, has not answered yet, and was not stopped."""
        # After its answer, a process needs a moment to wait again, or to end.
        return not (self.is_over or self._is_stopped or self._said.keys() & {"result", "error"})

    @property
    def trains(self) -> str | None:
        """The run that it is training, if any."""
        begun = self._said.get("begun")
        return None if begun is None or self.is_over else begun.content["run"]

    async def kill(self) -> None:
        """End it at once, unless it is over."""
        if not self.is_over:
            await self._process.kill()

    def _keep(self, name: str, content: dict[str, Any]) -> None:
        newest = max((event.number for event in self._said.values()), default=0)
        self._said[name] = Event(newest + 1, name, content)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Tasks:
    """All tasks, by id."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[Task, asyncio.Task[None]]] = {}
        self._beginning = asyncio.Lock()
        #: One that has answered: the next task need not wait for torch to be imported.
        self._spare: Child | None = None

    async def begin(self, asked: dict[str, Any]) -> str:
        """Start a task; returns its id. A question that is being answered is not asked twice.

        Raises:
            Busy: there are too many already.
        """
        # A process takes time to start: meanwhile, another request could begin the same task.
        async with self._beginning:
            for id, (task, _) in self._tasks.items():
                if asked["task"] in QUESTIONS and task.asked == asked and task.is_active:
                    return id
            running = sum(not task.is_over for task, _ in self._tasks.values())
            if running >= MOST_AT_ONCE:
                raise Busy(f"{running} tasks are running already; wait for one to end, or cancel it")
            id = secrets.token_urlsafe(9)
            process, self._spare = self._spare, None
            if process is None or not process.is_alive:
                process = await Child.begin("everystep.page.task_process")
            task = Task(process, asked)
            self._tasks[id] = task, asyncio.create_task(self._follow(task))
        # A page that was asleep may still ask for the result of one of the last.
        over = [known for known, (each, _) in self._tasks.items() if each.is_over]
        for known in over[:-REMEMBERED]:
            del self._tasks[known]
        return id

    async def _follow(self, task: Task) -> None:
        process = await task.follow()
        if process is not None:
            process, self._spare = self._spare, process
        if process is not None:  # one is enough
            await process.kill()

    def find(self, id: str) -> Task | None:
        """Return the task with that id, if there is one."""
        return self._tasks[id][0] if id in self._tasks else None

    def training(self, run: str) -> str | None:
        """Return the id of the task that is training a run."""
        return next((id for id, (task, _) in self._tasks.items() if task.trains == run), None)

    async def close(self) -> None:
        """Stop all tasks, and wait for their end."""
        following = [follower for _, follower in self._tasks.values() if not follower.done()]
        for task, _ in self._tasks.values():
            await task.stop()
        if following:
            await asyncio.wait(following, timeout=_LAST_PATIENCE)
        for task, _ in self._tasks.values():
            await task.kill()
        await asyncio.gather(*following, return_exceptions=True)
        if self._spare is not None:
            await self._spare.kill()
