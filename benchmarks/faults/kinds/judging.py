"""Whether diff names the step, the operation and the cause of a planted difference."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.faults.kinds import learning, loops, modules, surroundings
from benchmarks.faults.kinds.sides import Kind, Place
from everystep.answers import diff
from everystep.views.comparisons import listed

__all__ = ["Judgement", "all_kinds", "judged", "place_of", "table"]

#: All runs are short; on a busy machine, none may count as long.
diff.THOROUGH_SECONDS = math.inf


class Judgement(NamedTuple):
    """What diff says of a kind, and whether that is right.

    listed: whether the list of settings is right, None if it is not judged; expects_nothing: whether no
    operation differs.
    """

    kind: str
    step: bool
    operation: bool
    cause: bool
    listed: bool | None
    expects_nothing: bool
    said: str
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether all of it is."""
        return self.step and self.operation and self.cause and self.listed is not False


def all_kinds() -> Iterator[Kind]:
    """Yield the kinds."""
    for module in (modules, learning, surroundings, loops):
        yield from module.kinds()


def judged(kind: Kind) -> Judgement:
    """Train both sides of a kind in the working directory, and judge what diff says."""
    one, other = kind.one(), kind.other()
    started = time.perf_counter()
    found = one.diff(other, progress=False)
    seconds = time.perf_counter() - started
    parted = found.operation
    causes = tuple(parted.causes) if parted else ()
    place = place_of(found)
    lines = tuple(map(str, listed(found)))
    said = f"step {parted.step}: {'; '.join(causes)}" if parted else "no operation differs"
    return Judgement(
        kind.name,
        (parted.step if parted else None) == kind.step,
        place == kind.place,
        len(causes) == len(kind.causes)
        and all(_matches(a, b) for a, b in zip(kind.causes, causes, strict=True)),
        None if kind.listed is None else lines == kind.listed,
        kind.step is None,
        said,
        seconds,
    )


def table(found: list[Judgement]) -> str:
    """Return a row for each kind, and how many are right."""
    lines = ["| kind | step | operation | cause | said |", "|---|---|---|---|---|"]
    for each in found:
        marks = " | ".join("right" if ok else "WRONG" for ok in (each.step, each.operation, each.cause))
        lines.append(f"| {each.kind} | {marks} | {each.said} |")
    counts = (sum(getattr(each, name) for each in found) for name in ("step", "operation", "cause"))
    right = "{} steps, {} operations, {} causes".format(*counts)
    milliseconds = statistics.median(each.seconds for each in found) * 1000
    without = [each for each in found if each.expects_nothing]
    named = sum(not each.is_right for each in without)
    lists = [each.listed for each in found if each.listed is not None]
    return "\n".join(
        [
            *lines,
            "",
            f"of {len(found)} kinds right: {right}, {sum(lists)} of {len(lists)} lists",
            f"of {len(without)} kinds without a difference in any operation, one is named in {named}",
            f"median of a diff: {milliseconds:.1f} ms",
        ]
    )


def place_of(found: diff.Difference) -> Place | None:
    """Return where two runs part, None where no operation differs."""
    if found.operation is None:
        return None
    observed = found.operation.one or found.operation.other
    assert observed is not None
    operation = observed.operation
    return Place(operation.phase, operation.module, operation.operator)


def _matches(expected: str, said: str) -> bool:
    """Tell whether a text is the expected one, in which `...` stands for anything."""
    return re.fullmatch(".+".join(map(re.escape, expected.split("..."))), said) is not None
