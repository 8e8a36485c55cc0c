"""A cache of programs that passed the soundness check on this machine.

The check imports torch's compiler for its shape kernels, which takes a second. The cache is an empty
file per program in the user's cache directory, named by a digest of the program and of the checker.
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
    """Return whether a program with this text passed the same check before."""
    with suppress(OSError):
        return _mark(text).is_file()
    return False


def note_sound(text: bytes) -> None:
    """Note that a program with this text is sound; do nothing if the cache is not writable."""
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
