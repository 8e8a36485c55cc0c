"""Keep: which steps of a long recording open afterwards. Losses and measurements stay of all steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from everystep.bounded import MOST_STEPS
from everystep.errors import Fault, UsageError
from everystep.recording.facts import Facts, NotKeptFacts

__all__ = ["Keep", "is_kept", "keep_of", "kept_text"]

_NEWEST = re.compile(r"last ([\d_,]*\d) steps?")
#: What to write, for a message.
_CURE = 'write keep="last 2000 steps", or windows of steps: keep=[(0, 500), (9000, 10000)]'
#: Steps of windows between two looks at what is no longer needed.
_CHUNK = 1000


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
