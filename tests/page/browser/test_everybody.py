"""For everybody: light and dark, phones, screen readers, keyboards; and against strangers."""

import http.client
import re
import shutil

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import at, heading

PLACES = ["/", "/runs/chapter", "/runs/digits?step=7&operation=0", "/compare?one=chapter&other=fork"]
HOSTILE = "<img src=x onerror=alert(1)>"


def wait_until_drawn(page, path):
    if path == "/":
        expect(page.locator("tr[data-name=chapter] svg path")).to_be_visible()
    elif path.startswith("/compare"):
        expect(page.locator("mark").first).to_be_visible()
    else:
        expect(page.locator(".u-over")).to_be_visible()
        if "step" in path:
            expect(heading(page)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PLACES)
def test_axe_finds_nothing_serious(view, runs, open_page, path, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(at(view(), path), color_scheme=scheme, bypass_csp=True)
    wait_until_drawn(page, path)
    page.wait_for_timeout(300)
    found = Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in serious] == []


@pytest.mark.parametrize("path", PLACES)
def test_a_phone_shows_all_of_it_without_going_sideways(view, runs, open_page, path):
    page = open_page(at(view(), path), viewport={"width": 360, "height": 740}, has_touch=True)
    wait_until_drawn(page, path)
    width, visible = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= visible == 360


def test_dark_mode_is_dark_and_follows_a_change(view, runs, open_page):
    page = open_page(at(view(), "/runs/chapter"), color_scheme="dark")
    expect(page.locator(".u-over")).to_be_visible()
    lightness = (
        "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number)"
    )
    assert max(page.evaluate(lightness)) < 60
    page.emulate_media(color_scheme="light")
    assert min(page.evaluate(lightness)) > 200


def test_names_and_texts_from_runs_are_text(view, runs, open_page):
    shutil.copytree(runs / "chapter", runs / HOSTILE)
    page = open_page(view().address)
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.get_by_role("link", name=HOSTILE).click()
    expect(page.locator("h1")).to_have_text(HOSTILE)
    page.keyboard.press("Home")
    expect(heading(page)).to_have_text("Step 1 of 500")
    page.get_by_role("button", name="Save this view").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.goto(page.url.partition("/runs/")[0] + "/compare?one=chapter&other=" + HOSTILE)
    expect(page.locator("main")).to_contain_text(re.compile("same", re.I))
    assert page.locator("img").count() == 0


def test_a_page_of_another_site_gets_nothing(view, runs, open_page):
    served = view()
    page = open_page(served.address)
    expect(page.locator("tr[data-name=chapter]")).to_be_visible()
    host, _, port = served.origin.removeprefix("http://").partition(":")
    for headers in ({"Host": f"attacker.example:{port}"}, {"Origin": "http://attacker.example"}, {}):
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", "/api/runs", headers=headers)
        assert connection.getresponse().status == 403
        connection.close()
    stranger = open_page(f"http://localhost:{port}/api/runs", expected=["403"])
    assert "chapter" not in stranger.content()


def test_a_run_that_is_not_there_is_said(view, runs, open_page):
    page = open_page(at(view(), "/runs/nothing"), expected=["404"])
    expect(page.get_by_role("alert")).to_contain_text("nothing")


def test_everything_can_be_done_by_keyboard(view, runs, open_page):
    page = open_page(view().address)
    expect(page.locator("tr[data-name=chapter]")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "chapter":
            break
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("chapter")
    page.keyboard.press("End")
    expect(heading(page)).to_have_text("Step 500 of 500")
