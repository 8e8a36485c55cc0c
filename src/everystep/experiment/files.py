"""Files of data that an experiment names: a run may come from a stranger, who may name any file.

A file is read only if this user has named it: by training on it, or in the environment. For each file
trained on, the user's state directory has an empty file, named by a digest of the path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from platformdirs import user_state_path

from everystep.errors import DataError
from everystep.experiment.specification import ArrayData, DataSpecification, TableData

__all__ = ["check_may_be_read", "files_of", "note_named"]

#: Additional files that runs may read; separated as in PATH.
_ALLOWED = "EVERYSTEP_DATA"

#: Files that were named in this process; the state directory may not be writable.
_named: set[str] = set()


def files_of(data: DataSpecification) -> tuple[str, ...]:
    """Return the files that the data is in."""
    if isinstance(data, TableData):
        return (data.path,)
    if isinstance(data, ArrayData):
        return (data.x, data.y) if data.path is None else (data.path,)
    return ()


def note_named(files: Iterable[str]) -> None:
    """Note that the user has named files, so that their runs may read them."""
    for file in files:
        _named.add(file)
        with suppress(OSError):
            mark = _mark(file)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def check_may_be_read(data: DataSpecification) -> None:
    """Check that the user has named the files of the data.

    Raises:
        DataError: they have not; explains how.
    """
    given = os.environ.get(_ALLOWED, "").split(os.pathsep)
    allowed = {str(Path(each).absolute()) for each in given if each}
    files = files_of(data)
    for file in files:
        if not (file in _named or file in allowed or _is_noted(file)):
            raise DataError(
                f"the data is outside of the run, in {file!r:.200}, and a run may come from a stranger; "
                "everystep reads only files that you have trained on. If you trust the run, allow it: "
                f"{_ALLOWED}={os.pathsep.join(files):.400}; in Python, everystep.open(run, data=(x, y)) "
                "takes the data"
            )


def _is_noted(file: str) -> bool:
    with suppress(OSError):
        return _mark(file).is_file()
    return False


def _mark(file: str) -> Path:
    folder: Path = user_state_path("everystep") / "data"
    return folder / hashlib.sha256(os.fsencode(file)).hexdigest()
