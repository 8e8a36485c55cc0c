"""The process: its address, its port, its output, and its end."""

import re
import signal
import socket
import sys
from pathlib import Path

import pytest
from tests.page.serving import PATIENCE, events, served, written

from everystep.errors import RunError, UsageError
from everystep.page import server as page_server
from everystep.page.server import place_of


@pytest.mark.parametrize(
    ("what", "place"),
    [("runs", ("runs", None)), ("one", ("runs", "one")), ("runs/one", ("runs", "one")),
     ("runs/one/", ("runs", "one")), ("runs/one/..", ("runs", None)), ("empty", ("empty", None)),
     ("./runs/../runs", ("runs", None)), (".", (".", None))],
)  # fmt: skip
def test_what_is_served(write_run, tmp_path, what, place):
    write_run("one", [1.0])
    (tmp_path / "empty").mkdir()
    assert place_of(what) == ((tmp_path / place[0]).resolve(), place[1])


def test_a_run_is_found_from_within(write_run, monkeypatch, shelf):
    monkeypatch.chdir(write_run("one", [1.0]))
    assert place_of(".") == (shelf, "one")


def test_nothing_to_serve_is_said(everystep_command):
    assert "no run 'twolayer'" in everystep_command("view", "twolayer")[2]
    Path("file").write_text("")
    assert everystep_command("view", "file")[0] == 2
    Path("runs").mkdir()
    written(Path("runs/two-layer"))
    with pytest.raises(RunError, match="did you mean two-layer"):
        place_of("twolayer")


def test_a_host_that_is_none_of_ours(shelf):
    with pytest.raises(UsageError, match=r"--host 203\.0\.113\.1: this machine cannot listen there"):
        page_server.serve(shelf, host="203.0.113.1", browser=False)
    with pytest.raises(UsageError, match=r"--host no\.such\.invalid"):
        page_server.serve(shelf, host="no.such.invalid", browser=False)


def test_the_address_is_alone_on_stdout_the_next_port_is_taken_and_ctrl_c_ends_it(
    write_run, shelf, server
):
    """The pages that are open then continue with the next server."""
    write_run("a b", [1.0, 2.0])
    with served(shelf / "a b", "--port", str(server.port)) as first:
        assert first.port > server.port
        assert re.fullmatch(rf"http://127\.0\.0\.1:{server.port}/\?token=\w{{40}}", server.address)
        path = rf"http://127\.0\.0\.1:{first.port}/runs/a%20b\?token=\w{{40}}"
        assert re.fullmatch(path, first.address)
        assert first.client.get("/api/runs", headers={"Host": "evil.example"}).status_code == 403
        # Browsers send a cookie to every port.
        first.client.cookies.update(server.client.cookies)
        assert first.client.get("/api/runs").json()["runs"][0]["name"] == "a b"
        with (
            events(first.client, "/api/runs/a%20b/events") as one,
            events(first.client, "/api/events") as other,
        ):
            next(one), next(one), next(other)
            others = children_of(first.process.pid)
            first.process.send_signal(signal.SIGINT)
            assert list(one) == list(other) == []
        out, err = first.process.communicate(timeout=PATIENCE)
        assert (first.process.returncode, out, err) == (0, "", "Ctrl-C stops it\n")
        assert not any(Path(f"/proc/{pid}").exists() for pid in others)
    with served(shelf / "a b", "--port", str(first.port)) as second:
        assert second.address == first.address
        second.client.cookies = first.client.cookies
        with events(second.client, "/api/runs/a%20b/events", **{"Last-Event-ID": "1"}) as stream:
            assert next(stream)[0] == "state"
            assert next(stream)[1]["steps"] == [2]


def children_of(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return found.read_text().split() if found.exists() else []


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/static/../server.py", "/api/runs/../../x", "/static//etc/passwd", "*"],
)
def test_a_path_that_no_browser_would_send_leads_nowhere(server, path):
    cookie = "; ".join(f"{name}={value}" for name, value in server.client.cookies.items())
    host = f"127.0.0.1:{server.port}"
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", f"Cookie: {cookie}", "Connection: close", "", ""]
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        connection.sendall("\r\n".join(lines).encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split(b" ")[1] in (b"404", b"400")
    assert b"root:" not in answer


def test_it_names_no_versions_of_what_it_is_made_with(server):
    headers = server.client.get("/").headers
    assert {"server", "date", "x-powered-by"}.isdisjoint(headers)


@pytest.fixture
def started(monkeypatch):
    """Replace uvicorn and the browser; return the opened addresses."""
    opened = []
    monkeypatch.setattr(page_server._Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(page_server.webbrowser, "open", opened.append)
    for name in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    return opened


def test_a_host_beyond_loopback_says_what_it_opens(started, shelf, capfd):
    page_server.serve(shelf, host="0.0.0.0", browser=False)
    out, err = capfd.readouterr()
    assert out.startswith("http://127.0.0.1:")
    assert "this listens on 0.0.0.0: anyone with this address" in err
    assert "not encrypted" in err


def test_over_ssh_it_says_how_to_forward_the_port(started, shelf, capfd, monkeypatch):
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 5000 10.0.0.2 22")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    page_server.serve(shelf)
    out, err = capfd.readouterr()
    port = re.search(r":(\d+)/", out)[1]
    assert f"ssh -L {port}:127.0.0.1:{port} 10.0.0.2; then open the address" in err
    assert started == []


@pytest.mark.parametrize(
    ("terminal", "display", "asked", "is_opened"),
    [(True, ":0", None, True), (True, "", None, False), (False, ":0", None, False),
     (False, "", True, True), (True, ":0", False, False)],
)  # fmt: skip
@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="there is always a screen")
def test_a_browser_is_opened_where_it_is_seen(
    started, shelf, capfd, monkeypatch, terminal, display, asked, is_opened
):
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    page_server.serve(shelf, browser=asked)
    out = capfd.readouterr().out.strip()
    assert started == ([out] if is_opened else [])
