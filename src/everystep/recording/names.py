"""Names of measurements: everystep reads only so many, and only so long ones, and writes no others."""

from __future__ import annotations

from collections.abc import Collection

from everystep.errors import UsageError

__all__ = ["LONGEST_NAME", "MOST_NAMES", "check_measurement_names"]

#: Characters of a measurement's name, and how many measurements a run may have.
LONGEST_NAME, MOST_NAMES = 10_000, 10_000


def check_measurement_names(names: Collection[str]) -> None:
    """Check that a run can hold measurements of all these names.

    Raises:
        UsageError: one is too long, or there are too many.
    """
    for name in names:
        if len(name) > LONGEST_NAME:
            raise UsageError(
                f"the name {name[:40]!r}... of a measurement has {len(name):,} characters, and a run "
                f"holds names of up to {LONGEST_NAME:,}; choose a shorter one"
            )
    if len(names) > MOST_NAMES:
        raise UsageError(
            f"these are {len(names):,} measurements, and a run holds {MOST_NAMES:,}; log fewer names, "
            "such as the norm or the mean of many numbers"
        )
