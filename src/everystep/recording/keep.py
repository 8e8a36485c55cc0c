"""Keep: which steps of a long recording open afterwards; and what it will take on the disk.

Losses and measurements stay of all steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from everystep.bounded import MOST_STEPS
from everystep.errors import Fault, UsageError, size_text
from everystep.recording.facts import Facts, NotKeptFacts

__all__ = ["RECENT", "Ahead", "Keep", "Outlook", "is_kept", "keep_of", "kept_text"]

_NEWEST = re.compile(r"last ([\d_,]*\d) steps?")
#: What to write, for a message.
_CURE = 'write keep="last 2000 steps", or windows of steps: keep=[(0, 500), (9000, 10000)]'
#: Steps of windows between two looks at what is no longer needed.
_CHUNK = 1000
#: Bytes that a run may take without a notice.
_LARGE = 1_000_000_000
#: The newest steps that those to come are expected to be like.
RECENT = 8


# e.g. keep=[(0, 500), (9000, 10000)] has text "[(0, 500), (9000, 10000)]" and these windows; steps 501
# to 8,999, and those from 10,001 on, become `NotKeptFacts`.
class Keep(NamedTuple):
    """The steps that stay: the newest ones, or those of windows.

    text: as the user wrote it; newest: how many, None for windows; windows: their first and last steps.
    """

    text: str
    newest: int | None = None
    windows: tuple[tuple[int, int], ...] = ()

    @property
    def chunk(self) -> int:
        """How many steps are given up together."""
        return _CHUNK if self.newest is None else max(1, self.newest // 8)

    def not_kept(self, known: Iterable[NotKeptFacts], at: int) -> tuple[NotKeptFacts, ...]:
        """Return the steps that are not kept, as far as they are known in advance.

        known: those up to step `at`, after which the recording begins.
        """
        before = [each.model_copy(update={"last": min(each.last, at)}) for each in known]
        found = [each for each in before if each.first <= each.last]
        ends = [0, *(last for _, last in self.windows)]
        # What is not kept lies between the end of each window and the beginning of the next.
        begins = [*(first for first, _ in self.windows), MOST_STEPS + 1]
        for end, begin in zip(ends, begins, strict=True) if self.windows else ():
            first, last = max(end, at) + 1, begin - 1
            if first > last:
                continue
            if found and (found[-1].last + 1, found[-1].keep) == (first, self.text):
                first = found.pop().first  # of before a resume
            found.append(NotKeptFacts(first=first, last=last, keep=self.text))
        return tuple(found)

    def without(self, known: Iterable[NotKeptFacts], last: int) -> tuple[NotKeptFacts, ...]:
        """Return the steps that are not kept once all up to `last` are given up."""
        later = (each.model_copy(update={"first": max(each.first, last + 1)}) for each in known)
        given_up = NotKeptFacts(first=1, last=last, keep=self.text)
        return given_up, *(each for each in later if each.first <= each.last)


def kept_text(facts: Facts, last: int) -> str:
    """Return which of the steps up to `last` are kept, of a recording that keeps not all."""
    ranges = [f"{a:,} to {b:,}" if a < b else f"{a:,}" for a, b in facts.kept(last)]
    return f"only steps {' and '.join(ranges)} are kept" if ranges else "no step is kept"


def is_kept(step: int, not_kept: Sequence[NotKeptFacts]) -> bool:
    """Return whether a step is in none of these ranges."""
    return not any(each.first <= step <= each.last for each in not_kept)


def keep_of(value: Any) -> Keep | None:
    """Return the argument `keep` of a recording; None keeps all steps.

    Raises:
        UsageError: lists all faults.
    """
    if value is None:
        return None
    if isinstance(value, str):
        found = _NEWEST.fullmatch(value.strip())
        count = int(re.sub("[_,]", "", found[1])) if found else 0
        if not 1 <= count <= MOST_STEPS:
            raise UsageError(f"keep={value!r:.80} names no number of newest steps; {_CURE}")
        return Keep(f"last {count} steps", newest=count)
    if not isinstance(value, list | tuple) or not value:
        raise UsageError(f"keep={value!r:.80} is neither a text nor a list of windows; {_CURE}")
    faults, end = [], 0
    for place, window in enumerate(value):
        path = f"keep[{place}]"
        is_pair = isinstance(window, list | tuple) and len(window) == 2
        if not is_pair or any(type(step) is not int for step in window):
            faults.append(Fault(path, f"{window!r:.80} is not a pair of steps, such as (9000, 10000)"))
            continue
        first, last = window
        if not 0 <= first <= last or not 1 <= last <= MOST_STEPS:
            problem = f"({first}, {last}) has no steps; write the first, from 0, and the last, from 1"
            faults.append(Fault(path, problem))
        elif end and first <= end:
            problem = f"({first}, {last}) begins before the window before it ends, at {end}"
            faults.append(Fault(path, f"{problem}; write windows in order, without overlaps"))
        end = max(end, last)
    if faults:
        raise UsageError(faults, "the windows of steps to keep")
    return Keep(str([tuple(window) for window in value]), windows=tuple((a, b) for a, b in value))


class Ahead(NamedTuple):
    """The steps to come, as far as they are known.

    alike: how many are sure to bring new rows if the newest ones did; total: all; None if unknown.
    """

    alike: int | None
    total: int | None


class Outlook(NamedTuple):
    """What a recording has written after some steps, in bytes.

    steps: so far; batches: on the disk; rate: of new batches in a recent step; state: the newest
    snapshot; interval: steps between snapshots; snapshot_budget, batch_budget: the most that stays of
    each; keep: which steps stay.
    """

    steps: int
    batches: int
    rate: float
    state: int
    interval: int | None
    snapshot_budget: float
    batch_budget: float
    keep: Keep | None

    def notice(self, ahead: Ahead) -> str | None:
        """Return what to tell the user, None if the run will not be large."""
        batches, snapshots = self._batches(ahead), self._snapshots(ahead)
        kept = min(batches, self.batch_budget)
        if kept + snapshots <= _LARGE:
            return None
        about = "about" if ahead.total is not None else "at least"
        text = (
            f"this run will take {about} {size_text(kept + snapshots)}: {size_text(kept)} of batches "
            f"(now {size_text(self.rate)} a step) and {size_text(snapshots)} of snapshots "
            f"({size_text(self.state)} each)"
        )
        cures = []
        if self.rate:
            # A round number of steps, with half of what makes a run large: snapshots take space, too.
            count = 10 ** int(math.log10(max(1, _LARGE / 2 / self.rate)))
            cures.append(f'keep="last {count} steps"' if self.keep is None else "fewer steps in keep")
        if self.rate and (batches > self.batch_budget or ahead.total is None):
            full = self.steps + max(0, self.batch_budget - self.batches) / self.rate
            since = f"from about step {full:,.0f} on, " if self.keep is None else ""
            text += (
                f"; {since}the oldest batches are given up to stay within batch_budget "
                f"({size_text(self.batch_budget)}), and their steps do not open"
            )
            cures.append("a larger batch_budget")
        if 3 * self.state > self.snapshot_budget:
            text += (
                "; only the first and the two newest snapshots stay, and a step between them opens by a "
                "replay of all before it"
            )
            cures.append("a larger snapshot_budget")
        elif snapshots > kept:
            cures.append("a smaller snapshot_budget")
        return text + (f"; to change that, pass {' or '.join(cures)}" if cures else "")

    def _batches(self, ahead: Ahead) -> float:
        """Return what batches will take if nothing is given up to stay within the budget."""
        alike, keep = ahead.alike or 0, self.keep
        if keep is not None and keep.windows:
            last = self.steps + alike if ahead.alike is not None else keep.windows[-1][1]
            alike = sum(max(0, min(two, last) - max(one - 1, self.steps)) for one, two in keep.windows)
        found = self.batches + self.rate * alike
        if ahead.total is None and self.rate and keep is None:  # it may well run as long again
            found = max(found, 2 * self.batches)
        if keep is not None and keep.newest is not None:
            found = min(found, self.rate * (keep.newest + 2 * keep.chunk))
        return found

    def _snapshots(self, ahead: Ahead) -> float:
        """Return what snapshots will take: within the budget, but at least the first and two newest."""
        steps = ahead.total if ahead.total is not None else self.steps + (ahead.alike or self.steps)
        if self.keep is not None and self.keep.newest is not None:
            steps = min(steps, self.keep.newest)
        count = 3 + steps / self.interval if self.interval else 3
        return max(3 * self.state, min(count * self.state, self.snapshot_budget))
