"""Files that an experiment names: whether they may be read."""

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
            f"the data lies outside the run, in {path}, and is not read here, since a run may come from "
            "a stranger; everystep step RUN STEP in a terminal reads it"
        )
