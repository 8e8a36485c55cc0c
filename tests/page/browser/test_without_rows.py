"""What if rows are left out, in the browser: asked from the open step, and ranked."""

import re

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import expect_axe_finds_nothing_serious, expect_step, part, press

import everystep


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
