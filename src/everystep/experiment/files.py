"""Files named in an experiment: whether reading them is allowed."""

from __future__ import annotations

import os

from everystep.errors import DataError

__all__ = ["ONLY_OWN_FILES", "check_may_be_read"]

#: Where this is in the environment, no file is read that an experiment names: that of a run from a
#: stranger may name any.
ONLY_OWN_FILES = "EVERYSTEP_ONLY_OWN_FILES"


def check_may_be_read(path: str) -> None:
    """Check that files which an experiment names are read in this process.

    Raises:
        DataError: they are not.
    """
    if ONLY_OWN_FILES in os.environ:
        raise DataError(
            f"the data is outside the run, in {path}; it is not read here, because a run may come "
            "from an untrusted source. Run `everystep step RUN STEP` in a terminal to read it"
        )
