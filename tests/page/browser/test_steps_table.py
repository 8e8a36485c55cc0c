"""The table of every step in the browser."""

import math
import re

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import changed, expect_step, part, rows

import everystep


@pytest.fixture
def table(visit):
    """Show the table of a run."""

    def show(run, **options):
        page = visit(f"/runs/{run}", **options)
        expect(rows(page)).to_have_count(10)
        return page

    return show


def sort(page, column):
    part(page, "table of every step").get_by_role("columnheader", name=re.compile(f"^{column}")).click()


def turn_to(page, number):
    page.get_by_role("navigation", name="pagination").get_by_role(
        "link", name=number, exact=True
    ).click()


def beginning(number):
    """Return the pattern of a number's first digits."""
    return re.compile("^" + re.escape(str(number)[:6]))


def column(page, number):
    return page.locator(f"tr[data-step] > :nth-child({number})")


def test_a_click_goes_to_the_step_and_the_table_follows(table):
    page = table("chapter")
    rows(page).nth(3).click()
    expect_step(page, 4)
    selected = page.locator("tr[aria-selected=true]")
    expect(selected).to_have_attribute("data-step", "4")
    page.keyboard.press("End")
    expect(selected).to_have_attribute("data-step", "500")
    expect(rows(page)).to_have_count(10)
    page.keyboard.press("Shift+ArrowLeft")
    expect(selected).to_have_attribute("data-step", "490")


def test_it_is_searched_by_step_and_by_range_of_losses(table, recorded):
    page = table("chapter", expected=["400"])
    search = page.get_by_role("searchbox", name="steps")
    search.fill("137")
    expect(rows(page)).to_have_count(1)
    search.fill("100-104")
    expect(column(page, 1)).to_have_text(["100", "101", "102", "103", "104"])
    search.fill("many")
    expect(page.locator(".table-part .note")).to_contain_text("many")
    search.fill("")
    page.get_by_role("textbox", name="losses from").fill("0.5")
    page.get_by_role("textbox", name="losses to").fill("1")
    page.keyboard.press("Enter")
    losses = everystep.open(recorded / "chapter").losses
    found = [str(step) for step, loss in losses.select("step", "loss").iter_rows() if 0.5 <= loss <= 1]
    expect(part(page, "table of every step")).to_contain_text(
        f"1 to 10 of {len(found)} (filtered from 500)"
    )
    expect(column(page, 1)).to_have_text(found[:10])


def test_it_is_sorted_by_loss_with_nan_beyond_the_largest(table, recorded):
    page = table("diverged")
    losses = everystep.open(recorded / "diverged").losses["loss"].to_list()
    finite = [loss for loss in losses if math.isfinite(loss)]
    sort(page, "loss")
    expect(column(page, 2).first).to_have_text(beginning(min(finite)))
    turn_to(page, "3")
    expect(column(page, 2).last).to_have_text("nan")
    sort(page, "loss")
    expect(column(page, 2).first).to_have_text("nan")
    turn_to(page, "3")
    expect(column(page, 2).last).to_have_text(beginning(min(finite)))


def test_it_is_sorted_by_what_was_measured_with_blanks_last(table, recorded):
    page = table("digits")
    measured = everystep.open(recorded / "digits").measured("validation_loss")
    smallest = [str(step) for step, _ in sorted(measured.items(), key=lambda pair: pair[1]) if step]
    sort(page, "validation_loss")
    expect(column(page, 1)).to_have_text([*smallest, *[re.compile(".")] * (10 - len(smallest))])
    blank = page.locator("tr[data-step]").last.locator("td").last
    expect(blank).to_have_text("")
    sort(page, "validation_loss")
    expect(column(page, 1)).to_have_text(
        [*reversed(smallest), *[re.compile(".")] * (10 - len(smallest))]
    )


def test_as_many_rows_are_shown_as_one_likes(table):
    page = table("chapter")
    page.get_by_label("a page").select_option("25")
    expect(rows(page)).to_have_count(25)
    turn_to(page, "20")
    expect(column(page, 1).last).to_have_text("500")


def test_what_is_found_is_copied(table, recorded):
    page = table("chapter", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("searchbox", name="steps").fill("100-102")
    expect(rows(page)).to_have_count(3)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_text("3 rows are in the clipboard.")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()").splitlines()
    losses = everystep.open(recorded / "chapter").losses["loss"]
    assert copied[0].split("\t")[:2] == ["step", "loss"]
    assert [float(line.split("\t")[1]) for line in copied[1:]] == pytest.approx(losses[99:102].to_list())


@pytest.mark.parametrize("search", ["", "100-104"])
def test_what_is_found_is_saved_as_csv(table, recorded, search):
    page = table("chapter")
    if search:
        page.get_by_role("searchbox", name="steps").fill(search)
        expect(rows(page)).to_have_count(5)
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    [head, *lines] = download.value.path().read_text().splitlines()
    losses = everystep.open(recorded / "chapter").losses["loss"].to_list()
    assert head == "step,loss"
    assert [float(line.split(",")[1]) for line in lines] == pytest.approx(
        losses[99:104] if search else losses
    )


def test_a_long_table_has_all_its_pages(copied, visit):
    run = copied("chapter")
    with changed(run) as database:
        database.write_losses(501, [0.5] * 20_000)
    page = visit(f"/runs/{run.name}?step=500")
    expect(page.locator("tr[aria-selected=true]")).to_have_attribute("data-step", "500")
    turn_to(page, "2,050")
    expect(column(page, 1).last).to_have_text("20,500")


def test_the_address_says_how_it_is_sorted(table, visit, recorded):
    page = table("digits")
    sort(page, "loss")
    sort(page, "loss")
    expect(page).to_have_url(re.compile(r"\?sort=loss&direction=desc$"))
    expect(column(page, 2).first).to_have_text(re.compile("^2"))
    largest = column(page, 1).all_inner_texts()
    rows(page).first.click()
    expect_step(page, int(largest[0]), of=everystep.open(recorded / "digits").summary().steps)
    assert re.search(r"step=\d+&sort=loss&direction=desc$", page.url)
    page.go_back()
    expect(column(page, 1)).to_have_text(largest)
    linked = visit("/runs/digits?sort=loss&direction=desc")
    expect(column(linked, 1)).to_have_text(largest)


def test_a_link_that_sorts_by_what_is_not_there_says_so(visit):
    page = visit("/runs/chapter?sort=nothing", expected=["400"])
    expect(column(page, 1).first).to_have_text("1")
    expect(page.get_by_text("no column 'nothing' to sort by")).to_be_visible()
