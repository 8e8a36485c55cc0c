"""The columns of a run's table of steps: the same in the terminal, in files, notebooks and the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.recording.facts import Facts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from everystep.recording.blocks import Series

__all__ = ["StepColumn", "numbers_at", "step_columns"]


class StepColumn(NamedTuple):
    """A column: its title, the measurement that it shows (None: the loss), and the rank that has it.

    holds: a number is that of all steps until the next one, as of a setting recorded where it changes.
    """

    title: str
    measurement: str | None
    rank: int = 0
    holds: bool = False


def step_columns(facts: Facts, measurements: Iterable[str], ranks: int) -> list[StepColumn]:
    """Return the columns after the step: the losses, if any are logged, then the measurements.

    ranks: how many have losses to show.
    """
    titles = ["loss", *(f"loss (rank {rank})" for rank in range(1, ranks))]
    found = [StepColumn(title, None, rank) for rank, title in enumerate(titles) if facts.has_loss]
    for name in measurements:
        # Titles are the keys of the table, so no two may be the same.
        title = f"{name} (measured)" if name in ("step", *titles) else name
        found.append(StepColumn(title, name, holds=facts.is_setting(name)))
    return found


def numbers_at(series: Series, steps: NDArray[np.int64], *, holds: bool) -> Any:
    """Return the numbers of a series at some steps: a masked array (steps), masked where there are none.

    holds: as of a `StepColumn`.
    """
    import numpy as np

    at, values = series
    if not len(at):
        return np.ma.array(np.zeros(len(steps), values.dtype), mask=True)
    # The newest number up to each step; -1 before the first one.
    places = np.searchsorted(at, steps, side="right") - 1
    is_there = (places >= 0) & (holds | (at[places] == steps))
    return np.ma.array(values[places], mask=~is_there)
