"""Notices while a run is recorded."""

from __future__ import annotations

import sys

__all__ = ["say"]


def say(message: str) -> None:
    """Print a notice on stderr."""
    print(f"everystep: {message}", file=sys.stderr)
