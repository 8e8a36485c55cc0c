"""Access to the server: for clients that address it by its own name and know its token.

The token is an HMAC of the served directory with a secret that only the user can read. So it survives a
restart of the server, and an open page continues to work.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs

import platformdirs
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everystep.bounded import open_regular
from everystep.errors import UsageError
from everystep.page.assets import STYLE_SOURCE, problem

__all__ = ["Guard", "cookie_of", "host_without_port", "is_loopback", "token_of"]

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        f"style-src 'self' {STYLE_SOURCE}",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # an address may have the token in it
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def cookie_of(token: str) -> str:
    """Return the name of the cookie that holds a token: cookies know no ports, and servers are many."""
    return f"everystep-{hashlib.sha256(token.encode()).hexdigest()[:12]}"


class Guard:
    """Refuses requests that do not come from the page itself, and sets security headers.

    app: the guarded application; token: the required token; host: the host it listens on; names of this
    machine are allowed, too.
    """

    def __init__(self, app: ASGIApp, token: str, host: str = "127.0.0.1") -> None:
        self._app = app
        self._token = token
        self._cookie = cookie_of(token)
        self._host = host.lower().strip("[]")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        has_token = self._is_token(self._token_in_address(scope))
        reason = self._foreign(headers, has_token)
        kind = headers.get("content-type", "").partition(";")[0].strip()
        # A form on another site can send a POST, but not of this type.
        if reason is None and scope["method"] == "POST" and kind != "application/json":
            reason = "the request must be JSON (Content-Type: application/json)"
        if reason is None and not (has_token or self._has_cookie(headers)):
            reason = (
                "this page opens only at the address that everystep view prints in its terminal, "
                "including the token at its end"
            )

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.update(_HEADERS)
                answer.setdefault("Cache-Control", "no-store")
                if has_token and reason is None:
                    cookie = f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                    answer.append("Set-Cookie", cookie)
            await send(message)

        if reason is None:
            await self._app(scope, receive, send_guarded)
        else:
            refusal = problem(scope["path"], 403, "This page does not open at this address", reason)
            await refusal(scope, receive, send_guarded)

    def _foreign(self, headers: Headers, opens_page: bool) -> str | None:
        """Return why a request does not come from the page itself, or None.

        opens_page: the request is for a page, with the token in its address.
        """
        hosts = headers.getlist("host")
        host = host_without_port(hosts[0]) if len(hosts) == 1 else None
        # Another site can let its own name resolve to this machine (DNS rebinding).
        if host is None or not self._is_ours(host):
            shown = ", ".join(hosts) or "no host"
            return (
                f"this server is not {shown}; use the address that everystep view prints "
                "(with --host, it serves other machines)"
            )
        site = headers.get("sec-fetch-site", "none")
        is_opened = headers.get("sec-fetch-mode") == "navigate"
        is_own = site in ("same-origin", "none") or (is_opened and (site == "same-site" or opens_page))
        if is_own and headers.getlist("origin") in ([], [f"http://{hosts[0]}"]):
            return None
        return "another page sent this request; only this server's own pages may"

    def _is_ours(self, host: str) -> bool:
        if is_loopback(host) or host == self._host:
            return True
        if self._host not in ("0.0.0.0", "::", ""):
            return False
        # Every numeric address is allowed: no other site can make one resolve to another machine.
        with suppress(ValueError):
            return bool(ipaddress.ip_address(host))
        return host == socket.gethostname().lower()

    def _has_cookie(self, headers: Headers) -> bool:
        cookies = [cookie_parser(text).get(self._cookie) for text in headers.getlist("cookie")]
        return any(self._is_token(cookie) for cookie in cookies)

    def _is_token(self, text: str | None) -> bool:
        # In constant time, which shows nothing of how much of a guess is right.
        return text is not None and hmac.compare_digest(text.encode(), self._token.encode())

    def _token_in_address(self, scope: Scope) -> str | None:
        # Only the address of a page may have it, not that of something that pages use.
        if scope["method"] not in ("GET", "HEAD") or scope["path"].startswith(("/api/", "/static/")):
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        return given[-1] if given else None


def host_without_port(text: str) -> str | None:
    """Return the host of a Host header, in lower case, without brackets; None for an invalid one."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::\d{1,5})?", text)
    return None if found is None else (found[1] or found[2]).lower()


def is_loopback(host: str) -> bool:
    """Return whether a host can only be this machine."""
    return host in ("127.0.0.1", "::1", "localhost")


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
        # Another process may write it at the same time: the first one's stands.
        for _ in range(3):
            if (secret := _read(path)) is not None:
                return secret
            _write(path)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        reason = "what is written there cannot be read again as it was"
    raise UsageError(
        f"{path} cannot be used: {reason}; the page keeps a secret there, so that nobody else can open "
        "it (XDG_STATE_HOME names another place)"
    )


def _read(path: Path) -> bytes | None:
    """Return the secret, None where there is none that nobody else can have read or written."""
    with suppress(OSError), open_regular(path, follows_links=False) as file:
        status = os.fstat(file.fileno())
        is_ours = status.st_size == _BYTES
        if os.name == "posix":
            is_ours = is_ours and status.st_uid == os.getuid() and not status.st_mode & 0o077
        return file.read() if is_ours else None
    return None


def _write(path: Path) -> None:
    """Write a new secret, whole and for this user alone."""
    new = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(_BYTES))
    try:
        # What nobody can use is replaced; else the link fails if another process was first.
        if os.path.lexists(path) and _read(path) is None:
            new.replace(path)
        else:
            with suppress(FileExistsError):
                os.link(new, path)
    finally:
        new.unlink(missing_ok=True)
