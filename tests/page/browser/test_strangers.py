"""Against strangers in the browser: hostile names, and other pages; test_guard.py has the requests."""

import re
import shutil

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import at, changed, expect_step, plot, row
from tests.page.serving import remove

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def hostile(recorded):
    """A run with markup as its name and texts."""
    run = shutil.copytree(recorded / "chapter", recorded / HOSTILE)
    with changed(run) as database:
        database.write_facts({"status": "failed", "reason": HOSTILE})
        database.write_measurements([(HOSTILE, 1, 2.0)])
    yield HOSTILE
    remove(run)


def test_names_and_texts_from_runs_are_text(hostile, visit):
    page, shown = visit("/"), []

    def dismiss(dialog):
        shown.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    row(page, hostile).get_by_role("link", name=hostile).click()
    expect(page.locator("h1")).to_have_text(hostile)
    said = page.locator(".banner p").first
    expect(said).to_have_text(
        re.compile(rf"^failed: {re.escape(hostile)}\. To continue: everystep resume '")
    )
    plot(page)
    expect(page.get_by_role("columnheader", name=hostile)).to_be_visible()
    expect(page.get_by_role("button", name=hostile, exact=True)).to_be_visible()
    page.keyboard.press("Home")
    expect_step(page, 1)
    for name in ("Save this view", "Fork", "Compare"):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
    assert page.locator("img").count() == 0 and not shown
    page.remove_listener("dialog", dismiss)


def test_through_a_forwarded_port_the_printed_address_works(shared, open_page):
    page = open_page(at(shared, "/").replace("127.0.0.1", "localhost"))
    expect(row(page, "chapter")).to_be_visible()


def test_a_page_of_another_site_gets_nothing_although_the_cookie_is_there(shared, open_page):
    expected = ["CORS", "ERR_FAILED", "ERR_BLOCKED", "403", "Content Security", "frame"]
    page = open_page(at(shared, "/"), expected=expected)
    expect(row(page, "chapter")).to_be_visible()
    stranger = page.context.new_page()
    stranger.route(
        "http://stranger.example/",
        lambda route: route.fulfill(body="<p>hello", content_type="text/html"),
    )
    stranger.goto("http://stranger.example/")
    statuses = []
    stranger.on("response", lambda response: statuses.append(response.status))
    read = """address =>
      fetch(address, { credentials: "include" }).then((found) => found.text(), () => "nothing")"""
    assert stranger.evaluate(read, f"{shared.origin}/api/runs") == "nothing"
    change = """address =>
      fetch(address, { method: "POST", mode: "no-cors", credentials: "include", body: "{}" })
        .catch(() => 0)"""
    stranger.evaluate(change, f"{shared.origin}/api/runs/chapter/verify")
    framed = """address => new Promise((done) => {
      const frame = document.createElement("iframe");
      frame.onload = () => done(frame.contentDocument === null);
      frame.src = address;
      document.body.append(frame);
    })"""
    assert stranger.evaluate(framed, f"{shared.origin}/")
    assert 200 not in statuses
