"""Which programs have been found sound on this machine, so that they need not be checked again.

The check imports torch's compiler for its kernels of shapes, which takes a second. What is kept is an
empty file for each program, named by a digest of its text and of what checks it, in the user's cache.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from platformdirs import user_cache_path

from everystep.program import soundness, trusting

__all__ = ["is_known_sound", "note_sound"]


def is_known_sound(text: bytes) -> bool:
    """Tell whether a program of this text has been found sound before, by the same check."""
    with suppress(OSError):
        return _mark(text).is_file()
    return False


def note_sound(text: bytes) -> None:
    """Note that a program of this text is sound; where no cache can be written, nothing is kept."""
    with suppress(OSError):
        mark = _mark(text)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mark(text: bytes) -> Path:
    folder: Path = user_cache_path("everystep") / "sound"
    return folder / hashlib.sha256(_checker() + text).hexdigest()


@cache
def _checker() -> bytes:
    files = (soundness.__file__, trusting.__file__)
    source = b"".join(Path(file).read_bytes() for file in files)
    return f"{version('everystep')} {torch.__version__} ".encode() + hashlib.sha256(source).digest()
