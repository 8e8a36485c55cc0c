"""Addresses, and where things are on the page."""

import re
from contextlib import closing, contextmanager

from playwright.sync_api import expect

from everystep.recording.database import Database


def at(view, path):
    """Return the address of a place, with the token."""
    token = view.address.partition("?")[2]
    return f"http://127.0.0.1:{view.port}{path}{'&' if '?' in path else '?'}{token}"


def heading(page):
    return page.locator(".step h2").first


def expect_step(page, step, of=500):
    """Wait until a step is drawn."""
    expect(heading(page)).to_have_text(f"Step {step:,} of {of:,}")


def row(page, name):
    """Return the row of a run in the list of all runs."""
    return page.locator(f"tr[data-name='{name}']")


def rows(page):
    """Return the rows of the table of steps."""
    return page.locator("tr[data-step]")


def part(page, name):
    """Return a part of a run or of a step, by its name: `Forward`."""
    return page.get_by_role("region", name=name, exact=True)


def press(place, name):
    place.get_by_role("button", name=name, exact=True).click()


def operation(page, number):
    return page.locator(f"[data-number='{number}']")


def unfold(host, name):
    """Unfold a tensor by its name, or by that of its parameter; return its part."""
    by_name = host.page.get_by_role("button", name=name, exact=True)
    button = host.page.locator(f".unfold[title='{name}']").or_(by_name)
    found = host.locator(".unfolding", has=button).last
    found.locator("> .head > .unfold").click()
    return found


def plot(page):
    """Return where the pointer meets the plot, once it is drawn."""
    over = page.locator(".u-over")
    expect(over).to_be_visible()
    return over


def across(host, share):
    """Return a point at a share of the width of something, half way down."""
    host.scroll_into_view_if_needed()
    box = host.bounding_box()
    return box["x"] + share * box["width"], box["y"] + box["height"] / 2


def picture(canvas):
    """Return what is drawn on a canvas."""
    return canvas.evaluate("canvas => canvas.toDataURL()")


def expect_another_picture(canvas, before):
    """Wait until a canvas shows something else than before."""
    canvas.page.wait_for_function(
        "([canvas, before]) => canvas.toDataURL() !== before", arg=[canvas.element_handle(), before]
    )


def value(readout, place=r"\[.*\]"):
    """Return the number that a heat map shows for the cell under the pointer."""
    expect(readout).to_have_text(re.compile(rf"^{place} = "))
    return float(readout.inner_text().rpartition("= ")[2])


def expect_axe_finds_nothing_serious(page, *, within=None, rules=None):
    """within: a selector, default: the whole page; rules: their names, default: all."""
    from axe_playwright_python.sync_playwright import Axe

    # Of what passes, one example each is enough: a page has thousands.
    options = {"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
    found = Axe().run(page, within, options).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], each["nodes"][0]["html"][:200]) for each in serious]


def expect_no_sideways_scrolling(page):
    """Wait until the page is as wide as the window: a plot follows that in a later frame."""
    page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth")


def expect_everybody_can_read_it(page, wait=lambda: None):
    """On a phone, on a wide screen, in light and in dark. wait: until it is drawn again."""
    usual = page.viewport_size
    for width in (360, 720, 1060, 2560):
        page.set_viewport_size({"width": width, "height": 740})
        wait()
        expect_no_sideways_scrolling(page)
    page.set_viewport_size(usual)
    wait()
    expect_axe_finds_nothing_serious(page)
    page.emulate_media(color_scheme="dark")
    wait()
    expect_axe_finds_nothing_serious(page, rules=["color-contrast"])


@contextmanager
def changed(run):
    """Change a run's database."""
    with closing(Database.change(run / "run.sqlite")) as database, database.transaction():
        yield database
