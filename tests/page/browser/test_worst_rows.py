"""Rows of a step in the browser: the worst are ranked as the address says, and left out when asked."""

import re

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import (
    expect_axe_finds_nothing_serious,
    expect_no_sideways_scrolling,
    expect_step,
    part,
    press,
)

import everystep


def worst(page):
    return part(page, "Batch").get_by_role("row").filter(has=page.get_by_role("rowheader"))


def choose(page, order):
    part(page, "Batch").get_by_role("button", name=f"by {order}", exact=True).click()


def expect_rows(page, numbers):
    """Wait until these rows of the data are listed, the first of them."""
    expect(worst(page).get_by_role("rowheader")).to_have_text(list(map(str, numbers)))


@pytest.fixture
def ranked(recorded):
    """Return the rows of a step of a run in an order, the worst first."""

    def ranked(step, order):
        rows = everystep.open(recorded / "digits")[step].rows
        return [rows.numbers[place] for place in rows.ranked(getattr(rows, order))]

    return ranked


def test_rows_are_ranked_when_asked_for_and_the_address_says_how(visit, ranked, recorded):
    page = visit("/runs/digits?step=7")
    expect_step(page, 7, of=184)
    expect(worst(page)).to_have_count(0)
    choose(page, "loss")
    by_loss = ranked(7, "loss")
    expect_rows(page, by_loss[:10])
    rows = everystep.open(recorded / "digits")[7].rows
    place = rows.numbers.index(by_loss[0])
    share = (
        rows.gradient[place]
        / rows.gradient.new_tensor([s.whole for s in rows.gradients.values()]).norm()
    )
    expect(worst(page).first).to_contain_text(f"{rows.loss[place]:.4g}")
    expect(worst(page).first).to_contain_text(f"{100 * share:.1f}%")
    picture = worst(page).first.get_by_role("img")
    expect(picture).to_have_attribute("aria-label", re.compile(f"^image of row {by_loss[0]}, target"))
    choose(page, "gradient")
    expect_rows(page, ranked(7, "gradient")[:10])
    page.go_back()
    expect_rows(page, by_loss[:10])
    page.get_by_role("button", name="54 more", exact=True).click()
    expect_rows(page, by_loss[:20])
    page.keyboard.press("ArrowRight")
    expect_step(page, 8, of=184)
    expect_rows(page, ranked(8, "loss")[:20])
    choose(page, "loss")
    expect(worst(page)).to_have_count(0)
    page.go_back()
    expect_rows(page, ranked(8, "loss")[:10])


@pytest.mark.sweep
def test_a_link_ranks_them_on_a_phone_too(visit, ranked):
    phone = {"width": 390, "height": 844}
    page = visit("/runs/digits?step=7&open=rows+by+gradient", viewport=phone, color_scheme="dark")
    expect_rows(page, ranked(7, "gradient")[:10])
    header = page.get_by_role("columnheader", name="gradient", exact=True)
    expect(header).to_have_attribute("aria-sort", "descending")
    expect_no_sideways_scrolling(page)
    expect_axe_finds_nothing_serious(page)


@pytest.mark.sweep
def test_a_server_that_says_no_is_quoted_in_place(visit):
    page = visit("/runs/digits?step=7", expected=["/steps/7/rows"])
    page.route("**/steps/7/rows", lambda route: route.fulfill(status=500, json={"error": "no memory"}))
    choose(page, "loss")
    expect(part(page, "Batch").get_by_role("alert")).to_have_text("no memory")
    page.unroute("**/steps/7/rows")
    choose(page, "loss")
    choose(page, "loss")
    expect(worst(page)).to_have_count(10)
    expect(part(page, "Batch").get_by_role("alert")).to_be_hidden()


# What if rows are left out: asked from the open step, and ranked.


@pytest.fixture
def ask(visit):
    """Open the dialog at a step of the digits."""

    def ask(step, query=""):
        page = visit(f"/runs/digits?step={step}{query}")
        expect_step(page, step, of=184)
        if not query:
            press(part(page, "Batch"), "What if rows are left out?")
        return page

    return ask


def field(page, name):
    return page.get_by_role("dialog").get_by_label(name)


def cases(page):
    return page.get_by_role("dialog").get_by_role("row")


@pytest.mark.sweep
def test_each_row_is_left_out_in_turn(ask, recorded):
    page = ask(23)
    field(page, "compare at step").fill("24")
    expect(page.get_by_role("dialog").locator(".command")).to_have_text(
        re.compile("what-if digits --at 22 --until 24 --without-rows-of 23 --each$")
    )
    press(page, "Train again")
    expect(cases(page)).to_have_count(32)
    run = everystep.open(recorded / "digits")
    found = run.what_if(22, 24, without_rows_of=23, each=True, processes=1, progress=False)
    for row, case in ((2, found.cases[0]), (31, found.cases[-1])):
        name, value, change = cases(page).nth(row).locator("th, td").all_inner_texts()
        assert name == str(case.rows[0])
        assert float(value) == pytest.approx(case.value, rel=1e-3)
        assert float(change) == pytest.approx(case.value - found.recorded.value, rel=1e-3)
    expect(cases(page).nth(1)).to_contain_text(f"{found.recorded.value:.4g}".rstrip("0"))
    expect_axe_finds_nothing_serious(page, within="dialog")
    press(page, "Close")


@pytest.mark.sweep
def test_a_row_of_the_ranking_is_left_out_by_a_click(ask, recorded):
    page = ask(7, "&open=rows+by+loss")
    run = everystep.open(recorded / "digits")
    rows = run[7].rows
    worst = rows.numbers[rows.ranked(rows.loss)[0]]
    press(part(page, "Batch"), str(worst))
    expect(field(page, "rows to leave out")).to_have_value(str(worst))
    field(page, "rows to leave out").fill("12, a")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("“a” is not a row")
    field(page, "rows to leave out").fill(str(worst))
    field(page, "what to compare").fill("norm(gradients['0.bias'])")
    press(page, "Train again")
    by = "norm(gradients['0.bias'])"
    found = run.what_if(6, 12, without_rows=[worst], by=by, progress=False)
    expect(cases(page)).to_have_count(3)
    expect(cases(page).first).to_contain_text(f"{by} at step 12")
    value = cases(page).last.locator("td").first.inner_text()
    assert float(value) == pytest.approx(found.cases[0].value, rel=1e-3)
    press(page, "Close")
