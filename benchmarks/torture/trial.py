"""Trials: a training is interrupted in some way, goes on, and is compared with one that was not."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.torture.children import Ended, ask, run
from benchmarks.torture.compare import content_of, different, lost_lines
from benchmarks.torture.trainings import Training

__all__ = ["Reference", "Result", "Trial", "each", "failed", "references", "table"]


@dataclass
class Reference:
    """The training that is not interrupted.

    seconds: that it takes; prepared: where its parent is.
    """

    training: Training
    content: dict[str, Any]
    seconds: float
    prepared: Path


@dataclass
class Result:
    """What a trial found.

    interrupted: how often; opened, kept: how often the run opened, and had all that was printed; again:
    how often it ended before it had a step, and was begun again; refused: how often it was refused with
    a message where that is allowed, and reason: the message; failures: what went wrong.
    """

    name: str
    part: str
    interrupted: int = 0
    opened: int = 0
    kept: int = 0
    again: int = 0
    refused: int = 0
    same: bool = False
    verified: bool = False
    reason: str | None = None
    failures: list[str] = field(default_factory=list)


class Trial:
    """One training that is interrupted, in a directory of its own."""

    def __init__(self, reference: Reference, steps: int | None = None) -> None:
        self.reference = reference
        self.training = reference.training
        self.steps = steps or self.training.steps
        self.folder = Path(tempfile.mkdtemp(prefix="everystep-torture-"))
        self.place = self.folder / "run"
        self.result = Result(self.training.name, self.training.part)

    def go(self, kill_after: float | None = None, before: Callable[[], None] = lambda: None) -> Ended:
        """Begin the training, or go on with it; kill it after some seconds.

        before: called in its process first.
        """
        training, prepared = self.training, self.reference.prepared

        def work(lines: Any) -> None:
            before()
            training.go(self.place, prepared, self.steps, lines)

        return run(work, self.folder, kill_after)

    def look(self, *, with_report: bool = False) -> None:
        """Open what a killed process left, and count what it has."""
        result = self.result
        result.interrupted += 1
        found = ask(lambda: lost_lines(self.place, self.folder / "lines", with_report), self.folder)
        if "error" in found:
            # A process that was killed before the database was whole leaves no run.
            result.failures.append(f"it does not open: {found['error']}")
            return
        result.opened += 1
        if found["lost"]:
            result.failures.append(f"{found['lost']} printed steps are gone")
        else:
            result.kept += 1

    def finish(self) -> None:
        """Go on to the last step, and compare."""
        result = self.result
        ended = self.go()
        if ended.error is not None and ended.is_clear and not self._has_steps():
            result.again += 1
            shutil.rmtree(self.place, ignore_errors=True)
            ended = self.go()
        if ended.killed or ended.has_hung or ended.error is not None:
            result.failures.append(f"it does not go on: {ended.error or 'it hung'}")
            return
        self.compare()

    def compare(self, *, may_be_unverified: bool = False) -> None:
        """Compare the finished run with the one that was not interrupted.

        may_be_unverified: it may say of what is damaged that it cannot be verified.
        """
        result = self.result
        content = ask(lambda: content_of(self.training, self.place), self.folder)
        if may_be_unverified and content.get("is_clear"):
            result.reason = content["error"]
            content = ask(lambda: content_of(self.training, self.place, verified=False), self.folder)
        if "error" in content:
            result.failures.append(f"the finished run does not open: {content['error']}")
            return
        found = different(content, self.reference.content)
        result.verified = content["verified"]
        result.same = not set(found) & {"steps", "losses", "measurements", "state", "nonfinite"}
        if may_be_unverified and not content["verified"]:
            found.remove("verified")
        if found:
            result.failures.append(f"differs in {', '.join(found)}: {content}")

    def close(self) -> Result:
        """Remove the directory of a trial that went well; the others stay to be looked at."""
        if self.result.failures:
            self.result.failures.append(f"see {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.result

    def _has_steps(self) -> bool:
        found = ask(lambda: lost_lines(self.place, self.folder / "lines"), self.folder)
        return bool(found.get("steps", 1))


@contextmanager
def references(trainings: Sequence[Training], steps: int | None = None) -> Iterator[list[Reference]]:
    """Train each without an interruption.

    Raises:
        SystemExit: one fails by itself.
    """
    folder = Path(tempfile.mkdtemp(prefix="everystep-reference-"))
    try:
        yield [_reference(each, folder / each.name, steps or each.steps) for each in trainings]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reference(training: Training, place: Path, last: int) -> Reference:
    place.mkdir()
    prepare = training.prepare
    if prepare is not None:
        _check(training, run(lambda _: prepare(place, last), place), place)
    began = time.monotonic()
    ended = run(lambda lines: training.go(place / "run", place, last, lines), place)
    seconds = time.monotonic() - began
    _check(training, ended, place)
    content = ask(lambda: content_of(training, place / "run"), place)
    if content.get("verified") is not True:
        raise SystemExit(f"{training.name} does not verify by itself: {content}")
    return Reference(training, content, seconds, place)


def _check(training: Training, ended: Ended, place: Path) -> None:
    if ended.error is not None or ended.has_hung:
        errors = (place / "errors").read_text()
        raise SystemExit(f"{training.name} fails by itself: {ended.error}\n{errors}")


def each(
    trials: Sequence[Callable[[], Result]], processes: int, seconds: float = float("inf")
) -> list[Result]:
    """Make trials, in several processes; begin none after so many seconds."""
    until = time.monotonic() + seconds
    folder = Path(tempfile.mkdtemp(prefix="everystep-results-"))
    children = []
    for number in range(processes):
        child = os.fork()
        if not child:
            try:
                with (folder / str(number)).open("w") as file:
                    for trial in trials[number::processes]:
                        if time.monotonic() > until:
                            break
                        result = trial()
                        for failure in failed([result]):
                            print(failure, file=sys.stderr, flush=True)
                        file.write(json.dumps(asdict(result)) + "\n")
                        file.flush()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    texts = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    shutil.rmtree(folder, ignore_errors=True)
    return [Result(**json.loads(text)) for text in texts]


def failed(results: Sequence[Result]) -> list[str]:
    """Return what went wrong, by training."""
    return [f"{result.name}: {failure}" for result in results for failure in result.failures]


def table(results: Sequence[Result], what: str) -> str:
    """Return counts as a table in Markdown. what: happened to the trainings."""
    rows: dict[str, Counter[str]] = {}
    for result in results:
        counts = Counter(
            interrupted=result.interrupted,
            opened=result.opened,
            kept=result.kept,
            trainings=1,
            same=result.same,
            verified=result.verified,
            refused=result.refused,
            again=result.again,
        )
        for name in (f"{result.part}: {result.name}", "all"):
            rows.setdefault(name, Counter()).update(counts)
    rows["all"] = rows.pop("all", Counter())
    columns = ("interrupted", "opened", "kept", "trainings", "same", "verified", "again", "refused")
    titles = (
        what,
        "opened",
        "nothing lost",
        "trainings",
        "same bits",
        "verified",
        "begun again",
        "refused",
    )
    lines = [f"| what | {' | '.join(titles)} |", "|---|" + "--:|" * len(titles)]
    lines += [f"| {name} | {' | '.join(f'{row[c]:,}' for c in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)
