"""The token that opens the page, derived from a secret that only the user can read."""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

import platformdirs

from everystep.errors import UsageError

__all__ = ["token_of"]

_BYTES = 32


def token_of(directory: Path) -> str:
    """Return the token that opens a directory of runs; the same at every start.

    Raises:
        UsageError: the secret can neither be read nor written.
    """
    named = os.fsencode(directory.resolve())
    return hmac.new(_secret(), named, "sha256").hexdigest()[:40]


def _secret() -> bytes:
    path = Path(platformdirs.user_state_dir("everystep", appauthor=False)) / "page-secret"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Another process may write it at the same time: the first one is kept.
        for _ in range(3):
            if (secret := _read(path)) is not None:
                return secret
            _write(path)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        reason = "what is written there reads back different"
    raise UsageError(
        f"{path} cannot be used: {reason}; the page keeps a secret there, so that nobody else can open "
        "it (XDG_STATE_HOME names another place)"
    )


def _read(path: Path) -> bytes | None:
    """Return the secret, None if there is none, or if another user may have read or written it."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_size == _BYTES
        if os.name == "posix":
            is_ours = is_ours and status.st_uid == os.getuid() and not status.st_mode & 0o077
        return file.read() if is_ours else None


def _write(path: Path) -> None:
    """Write a new secret, whole and for this user alone."""
    new = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(_BYTES))
    try:
        if os.path.lexists(path) and _read(path) is None:
            new.replace(path)
        else:
            with suppress(FileExistsError):
                os.link(new, path)
    finally:
        new.unlink(missing_ok=True)
