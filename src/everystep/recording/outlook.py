"""Outlook: what a recording is going to take on the disk, from what its first steps took."""

from __future__ import annotations

import math
from typing import NamedTuple

from everystep.recording.keep import Keep

__all__ = ["RECENT", "Ahead", "Outlook"]

#: Less is not worth a notice.
_LARGE = 1_000_000_000
#: The newest steps that those to come are expected to be like.
RECENT = 8


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
            f"this run will take {about} {_size(kept + snapshots)}: {_size(kept)} of batches (now "
            f"{_size(self.rate)} a step) and {_size(snapshots)} of snapshots ({_size(self.state)} each)"
        )
        cures = []
        if self.rate:
            count = 10 ** int(math.log10(max(1, _LARGE / 2 / self.rate)))
            cures.append(f'keep="last {count} steps"' if self.keep is None else "fewer steps in keep")
        if self.rate and (batches > self.batch_budget or ahead.total is None):
            full = self.steps + max(0, self.batch_budget - self.batches) / self.rate
            since = f"from about step {full:,.0f} on, " if self.keep is None else ""
            text += (
                f"; {since}the oldest batches are given up to stay within batch_budget "
                f"({_size(self.batch_budget)}), and their steps do not open"
            )
            cures.append("a larger batch_budget")
        if 2 * self.state > self.snapshot_budget:
            text += "; the first and the newest snapshot stay in any case"
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
        """Return what snapshots will take: within the budget, but at least the first and the newest."""
        steps = ahead.total if ahead.total is not None else self.steps + (ahead.alike or self.steps)
        if self.keep is not None and self.keep.newest is not None:
            steps = min(steps, self.keep.newest)
        count = 2 + steps / self.interval if self.interval else 2
        return max(2 * self.state, min(count * self.state, self.snapshot_budget))


def _size(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
