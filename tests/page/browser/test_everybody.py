"""For everybody: light and dark, phones, screen readers, keyboards, and those whom motion disturbs."""

import re

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import (
    at,
    expect_axe_finds_nothing_serious,
    expect_everybody_can_read_it,
    expect_no_sideways_scrolling,
    expect_step,
    heading,
    plot,
    row,
)

PLACES = ["/", "/runs/digits?step=7&operation=0"]
PHONE = {"width": 360, "height": 740}
LIGHTNESS = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number)"


def wait_until_drawn(page, path):
    if path == "/":
        expect(row(page, "chapter").locator("svg.sparkline path")).to_be_visible()
    else:
        plot(page)
        expect(page.locator("tr[data-step]")).to_have_count(10)
    if "operation" in path:
        expect(page.locator("[data-number='0'] canvas[role=img]").first).to_be_visible()
        expect(page.locator(".panel[aria-busy]")).to_have_count(0)
        expect(page.get_by_role("img", name="image of row")).to_have_count(16)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("path", PLACES)
def test_nothing_goes_sideways_and_axe_finds_nothing_serious(visit, path):
    page = visit(path, bypass_csp=True)
    wait_until_drawn(page, path)
    expect_everybody_can_read_it(page, lambda: wait_until_drawn(page, path))


@pytest.mark.sweep
def test_axe_finds_nothing_serious_in_dialogs(visit):
    page = visit("/runs/chapter?step=137", bypass_csp=True)
    expect_step(page, 137)
    for name in ("keys", "Fork", "Compare", "Save this view"):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.get_by_role("dialog")).to_be_visible()
        expect_axe_finds_nothing_serious(page, within="dialog")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_phone_walks_through_a_run(visit):
    page = visit("/", viewport=PHONE, has_touch=True, is_mobile=True)
    row(page, "chapter").get_by_role("link", name="chapter").tap()
    page.get_by_role("button", name="first step (Home)").tap()
    expect_step(page, 1)
    page.get_by_role("button", name="the next step (→)").tap()
    expect_step(page, 2)
    page.locator("[data-number='1'] .unfold").first.tap()
    expect(page.locator("[data-number='1'] canvas[role=img]").first).to_be_visible()
    expect_no_sideways_scrolling(page)


def test_the_step_stands_beside_the_plot_where_there_is_room(visit):
    page = visit("/runs/chapter?step=137", viewport={"width": 1600, "height": 900})
    expect_step(page, 137)
    over = plot(page).bounding_box()
    assert heading(page).bounding_box()["x"] > over["x"] + over["width"]
    page.set_viewport_size({"width": 800, "height": 900})
    page.wait_for_function(
        "document.querySelector('.step').getBoundingClientRect().left < innerWidth / 2"
    )


def test_dark_mode_is_dark_and_follows_a_change(visit):
    page = visit("/runs/chapter", color_scheme="dark")
    plot(page)
    assert max(page.evaluate(LIGHTNESS)) < 60
    page.emulate_media(color_scheme="light")
    assert min(page.evaluate(LIGHTNESS)) > 200


def test_nothing_moves_for_those_whom_motion_disturbs(visit):
    page = visit("/runs/digits?step=7&operation=0")  # each window asks for reduced motion
    expect(page.locator("[data-number='0'] canvas[role=img]").first).to_be_visible()
    page.keyboard.press("ArrowRight")
    moving = """[...document.querySelectorAll("*")].filter((each) => {
      const { animationName, transitionDuration } = getComputedStyle(each);
      return animationName !== "none" || transitionDuration.split(", ").some((one) => parseFloat(one));
    }).length"""
    assert page.evaluate(moving) == page.evaluate("document.getAnimations().length") == 0


def test_everything_is_reached_by_keyboard(shared, open_page):
    page = open_page(at(shared, "/"))
    expect(row(page, "chapter")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    tab_to(page, "chapter")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("chapter")
    page.keyboard.press("End")
    expect_step(page, 500)
    tab_to(page, "#1")
    page.keyboard.press("Enter")
    expect(page.locator("[data-number='1'] canvas[role=img]").first).to_be_visible()


def tab_to(page, text):
    """Press Tab until what has the focus says a text, seen to have it."""
    for _ in range(150):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        if focused.count() and focused.inner_text().strip() == text:
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_the_title_and_a_status_tell_what_is_shown(visit):
    page = visit("/runs/chapter")
    expect(page).to_have_title(re.compile("^chapter .* everystep$"))
    expect(page.locator("#status")).to_have_text(re.compile("^chapter .* everystep$"))
    page.get_by_role("link", name="All runs").click()
    expect(page.locator("#status")).to_have_text("everystep")


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("path", ["/", "/runs/chapter?step=137"])
def test_the_bar_begins_and_ends_with_the_content(visit, path):
    page = visit(path, viewport={"width": 1920, "height": 1080})
    content = page.locator("main > div > :not(.unseen)").first
    expect(content).to_be_visible()
    brand, help_, box = (
        page.locator(selector).first.bounding_box() for selector in (".brand", "#help", "main")
    )
    assert brand["x"] == pytest.approx(content.bounding_box()["x"], abs=1)
    assert help_["x"] + help_["width"] == pytest.approx(box["x"] + box["width"] - 20, abs=1)
