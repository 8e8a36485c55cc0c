"""Requests that do not come from the page itself are refused."""

import asyncio
import os
import re
from itertools import product

import pytest
from tests.page.serving import PORT

from everystep.page.assets import STYLE_SOURCE
from everystep.page.guard import Guard, cookie_of

OURS = f"127.0.0.1:{PORT}"
EVERY_ADDRESS = ["/", "/runs/x", "/compare", "/static/app.js", "/api/runs", "/api/nothing", "/nothing"]


@pytest.mark.parametrize("path", EVERY_ADDRESS)
def test_nothing_is_answered_without_the_token(page, path):
    cookies = ["", f"{cookie_of(page.token)}=wrong", f"everystep={page.token}", f"other={page.token}"]
    for method, cookie in product(["GET", "HEAD", "OPTIONS", "POST", "DELETE"], cookies):
        answer = page.ask(path, method, headers={"Cookie": cookie})
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
        assert page.token not in answer.text


def test_the_printed_address_opens_the_page_and_leaves_a_cookie(page):
    answer = page.ask(f"/runs/x?step=3&token={page.token}", headers={})
    assert answer.status_code == 200
    assert "<main" in answer.text
    cookie = answer.headers["set-cookie"]
    assert cookie == f"{cookie_of(page.token)}={page.token}; HttpOnly; SameSite=Strict; Path=/"
    assert (
        page.ask("/api/runs", headers={"Cookie": f"a=1; {cookie.split(';')[0]}; b={{"}).status_code
        == 200
    )


@pytest.mark.parametrize("token", ["", "wrong", "%00", "é" * 40, "a" * 5000])
def test_a_wrong_token_opens_nothing(page, token):
    answer = page.ask("/", params={"token": token}, headers={})
    assert answer.status_code == 403
    assert "everystep view" in answer.text
    assert page.ask(f"/api/runs?token={page.token}", headers={}).status_code == 403


@pytest.mark.parametrize(
    "host",
    ["evil.example", f"evil.example:{PORT}", "127.0.0.1.evil.example",
     "localhost.evil.example:1", "127.0.0.2",
     "0.0.0.0", "[::2]", "", "127.0.0.1:x",
     "127.0.0.1@evil.example", "evil.example#127.0.0.1", "192.168.0.7"],
)  # fmt: skip
def test_another_host_is_refused_so_that_names_cannot_be_rebound(page, host):
    for path in ("/", "/api/runs", f"/?token={page.token}"):
        assert page.ask(path, headers=page.headers | {"Host": host}).status_code == 403


@pytest.mark.parametrize("host", [OURS, "localhost:9000", "[::1]:8137", "LOCALHOST", "127.0.0.1"])
def test_the_names_of_this_machine_for_itself_are_accepted_whatever_the_port(page, host):
    """A port forwarded through SSH is another one on this side."""
    assert page.ask("/api/runs", headers=page.headers | {"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("listening", "host", "status"),
    [("192.168.0.7", "192.168.0.7:8137", 200), ("192.168.0.7", "192.168.0.8", 403),
     ("box.example", "BOX.example:1", 200), ("0.0.0.0", "192.168.0.7:8137", 200),
     ("::", "[fe80::1]:8137", 200),
     ("0.0.0.0", "evil.example", 403), ("0.0.0.0", os.uname().nodename, 200)],
)  # fmt: skip
def test_a_host_beyond_loopback_is_accepted_by_its_address_never_by_another_name(
    page, listening, host, status
):
    page.app = Guard(page.app._app, page.token, listening)
    assert page.ask("/api/runs", headers=page.headers | {"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": f"http://{OURS}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": f"https://{OURS}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
    ],
)
def test_what_another_page_asks_for_is_refused(page, headers, status):
    assert page.ask("/api/runs", headers=page.headers | headers).status_code == status


def test_a_link_elsewhere_opens_the_page_only_with_the_token(page):
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert page.ask(f"/?token={page.token}", headers=followed).status_code == 200
    assert page.ask("/", headers=page.headers | followed).status_code == 403
    # Not as an image or a script.
    assert page.ask(f"/?token={page.token}", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_form_cannot_ask_for_anything(page, kind):
    headers = page.headers | ({} if kind is None else {"Content-Type": kind})
    assert page.ask("/api/compare", "POST", headers=headers, content="{}").status_code == 403


@pytest.mark.parametrize("path", [*EVERY_ADDRESS, "/api/runs/none", "/api/runs/none/curve"])
@pytest.mark.parametrize("known", [True, False])
def test_every_answer_forbids_what_a_page_does_not_need(page, path, known):
    answer = page.ask(path, headers=page.headers if known else {})
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["style-src"] == f"'self' {STYLE_SOURCE}"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", STYLE_SOURCE)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    is_asset = known and path.startswith("/static/")
    assert answer.headers["cache-control"] == ("no-cache" if is_asset else "no-store")


def test_refusals_say_what_to_do(page):
    assert "Host: <b>" not in (
        text := page.ask("/", headers=page.headers | {"Host": "<b>.example"}).text
    )
    assert "&lt;b&gt;.example" in text
    assert "the address that everystep view prints" in text
    assert "prints" in page.ask("/api/runs", headers={}).json()["error"]


def test_an_address_that_is_not_there_leads_to_all_runs(page):
    answer = page.ask("/nowhere/x")
    assert answer.status_code == 404
    assert "There is no page at /nowhere/x" in answer.text and 'href="/"' in answer.text


def test_a_failure_tells_no_details_and_is_guarded_too(page):
    page.app._app.state.run_index.summaries = lambda seconds: 1 / 0
    answer = page.ask("/api/runs")
    assert answer.status_code == 500
    assert "division" not in answer.text
    assert "content-security-policy" in answer.headers


def test_web_sockets_are_closed(page):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(page.app({"type": "websocket", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
