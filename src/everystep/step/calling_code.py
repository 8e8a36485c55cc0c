"""Calling code: the lines of the user's code that call the operations of a step.

They are found by the frames of Python when an operation is written down for the first time, so that a
step that is followed costs nothing.
"""

from __future__ import annotations

import hashlib
import linecache
import os
import sys
import sysconfig
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from everystep.program.operation import LONGEST_FILE, LONGEST_LINE, SourceLine

__all__ = [
    "CallingLine",
    "Calls",
    "LineTable",
    "calls_here",
    "is_called_in",
    "is_in_backward",
    "is_users_own",
    "named_here",
    "users_frame",
]

#: Calls that are kept of an operation, from the innermost on.
MOST_CALLS = 64
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_OPTIMIZERS = f"{_TORCH}optim{os.sep}"
_EVERYSTEP = f"{Path(__file__).parent.parent}{os.sep}"
_LIBRARY = f"{sysconfig.get_path('stdlib')}{os.sep}"
_PACKAGES = ("site-packages", "dist-packages")
#: Modules of everystep that stand between the user's code and an operation.
_WATCHING = f"{_EVERYSTEP}step{os.sep}", f"{_EVERYSTEP}training{os.sep}watched_steps.py"
#: The module that runs a backward pass.
_BACKWARD = f"{_EVERYSTEP}step{os.sep}backward.py"
#: Where torch runs a compiled function, or its uncompiled form in a mode.
_COMPILED, _COMPILED_RUN = f"{_TORCH}_dynamo{os.sep}eval_frame.py", "_TorchDynamoContext."
#: A file that was written later may not be the code that runs.
_BEGAN = time.time()


class CallingLine(NamedTuple):
    """A line that runs in a frame of Python. file: as Python names it; function: of the line."""

    file: str
    line: int
    function: str


#: The calls that lead to an operation, the innermost first.
Calls = tuple[CallingLine, ...]
#: Each way to an operation, once: the operations of many steps have it.
_known: dict[Calls, Calls] = {}


# From the operation outward, the frames of a loss in a user's loop, and what `_kind` makes of them:
#   step/cursor.py                 other: everystep, which watches
#   torch/nn/functional.py         other
#   loop.py, line 12, in loss_of   user: the innermost call
#   loop.py, line 30, in <module>  user: the last that counts
@cache
def _kind(file: str) -> str:
    """Return what code a file has: `user`, `backward`, `everystep`, `compiled`, or `other`."""
    if file in (_BACKWARD, _COMPILED):
        return "backward" if file == _BACKWARD else "compiled"
    if file.startswith(_EVERYSTEP):
        return "other" if file.startswith(_WATCHING) else "everystep"
    # Packages lie within the standard library's directory, and count as the user's code.
    is_packaged = any(name in file for name in _PACKAGES)
    if file.startswith(_TORCH) or (file.startswith(_LIBRARY) and not is_packaged):
        return "other"
    return "other" if file.startswith("<frozen ") else "user"


def is_users_own(file: str | None) -> bool:
    """Return whether a file has code of the user's, and of no package."""
    is_packaged = file is None or any(name in file for name in _PACKAGES)
    return file is not None and not is_packaged and _kind(file) == "user"


def users_frame() -> FrameType | None:
    """Return the frame of the user's own code that leads here; None: there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users_own(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def calls_here() -> tuple[Calls, bool]:
    """Return the user's calls that lead here, and whether a compiled function is among the frames."""
    found: list[CallingLine] = []
    is_compiled = False
    frame = sys._getframe(1)
    while frame is not None and len(found) < MOST_CALLS:
        code = frame.f_code
        kind = _kind(code.co_filename)
        # The lines above have called everystep, not the operation.
        if kind == "everystep":
            break
        if kind == "compiled":
            is_compiled = is_compiled or code.co_qualname.startswith(_COMPILED_RUN)
        elif kind == "user":
            # Generated code may have no line, or line 0.
            found.append(CallingLine(code.co_filename, frame.f_lineno or 1, code.co_name))
            # What is above it runs the script or the notebook.
            if code.co_name == "<module>":
                break
        frame = frame.f_back  # type: ignore[assignment]
    calls = tuple(found)
    return _known.setdefault(calls, calls), is_compiled


def is_in_backward() -> bool:
    """Return whether a backward pass leads here, without code of the user's in between.

    It runs such code only in hooks and in functions of their own.
    """
    frame = sys._getframe(1)
    while frame is not None:
        kind = _kind(frame.f_code.co_filename)
        if kind not in ("other", "compiled"):
            return kind == "backward"
        frame = frame.f_back  # type: ignore[assignment]
    return False


def named_here() -> str:
    """Return the user's line that leads here, as file and line, empty if there is none."""
    calls, _ = calls_here()
    return f"{_shown(calls[0].file)}:{calls[0].line}" if calls else ""


def is_called_in(file: str) -> bool:
    """Return whether code of a file, or of torch's optimizers, leads here, without the user's between.

    file: that of an optimizer.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == file or name.startswith(_OPTIMIZERS):
            return True
        if _kind(name) == "user":
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return True


class LineTable:
    """The table of the lines of a program.

    lines: so far; sources: the SHA-256 of each file, by its name in the lines.
    """

    def __init__(self) -> None:
        self.lines: list[SourceLine] = []
        self.sources: dict[str, str] = {}
        self._places: dict[tuple[CallingLine, int | None], int] = {}

    def place(self, calls: Calls) -> int | None:
        """Return the place of the innermost of some calls; add what is missing. None: there are none."""
        above: int | None = None
        for call in reversed(calls):
            if (call, above) not in self._places:
                name, digest = _shown(call.file), _digest(call.file)
                text = "" if digest is None else linecache.getline(call.file, call.line).strip()
                self.lines.append(
                    SourceLine(
                        file=name,
                        line=call.line,
                        function=_printable(call.function, LONGEST_FILE),
                        text=_printable(text, LONGEST_LINE),
                        above=above,
                    )
                )
                if digest is not None:
                    self.sources[name] = digest
                self._places[call, above] = len(self.lines) - 1
            above = self._places[call, above]
        return above


@cache
def _shown(file: str) -> str:
    """Return the name of a file as people know it."""
    if f"{os.sep}ipykernel_" in file:
        return "<notebook cell>"
    path = Path(file)
    # Without what differs from one machine to another.
    for name in _PACKAGES:
        if name in path.parts:
            return _printable(str(Path(*path.parts[path.parts.index(name) + 1 :])), LONGEST_FILE)
    script = getattr(sys.modules["__main__"], "__file__", None)
    with suppress(OSError):  # the working directory may be gone
        for place in (Path.cwd(), *([Path(script).absolute().parent] if script else [])):
            if path.is_relative_to(place):
                path = path.relative_to(place)
                break
    return _printable(str(path), LONGEST_FILE)


@cache
def _digest(file: str) -> str | None:
    """Return the SHA-256 of a file as it was loaded, None if that is unknown."""
    try:
        # It was changed since, perhaps after it was imported: its text may not be the code that runs.
        if Path(file).stat().st_mtime > _BEGAN:
            return None
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (OSError, ValueError):  # a cell of a notebook, or what `exec` was given
        lines = linecache.getlines(file)
        return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _printable(text: str, length: int) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)[:length]
