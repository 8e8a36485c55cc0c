"""The table of every step: on the page, and with its plot in a report opened without a network."""

import math
import re
from contextlib import ExitStack

import pytest
from playwright.sync_api import expect
from tests.page.browser.conftest import Window
from tests.page.browser.places import changed, expect_axe_finds_nothing_serious, expect_step, part, rows
from tests.sealing import seal

import everystep
from everystep.recording.recorded_run import RecordedRun
from everystep.views.report import report_html


@pytest.fixture
def on_page(visit):
    """Show the table of a run on the page."""

    def show(run, **options):
        page = visit(f"/runs/{run}", **options)
        expect(rows(page)).to_have_count(10)
        return page

    return show


@pytest.fixture(scope="module")
def written(recorded, tmp_path_factory):
    """Return the path of the report of a run, which is written once."""
    directory = tmp_path_factory.mktemp("reports")

    def written(run):
        path = directory / f"{run}.html"
        if not path.exists():
            path.write_text(report_html(RecordedRun(recorded / run)), encoding="utf-8")
        return path

    return written


@pytest.fixture(scope="module")
def offline(browser):
    """Windows without a network that stay open from report to report, by their options."""
    opened = {}

    def window(**options):
        key = repr(sorted(options.items()))
        return opened.get(key) or opened.setdefault(key, Window(browser, offline=True, **options))

    yield window
    for each in opened.values():
        each.close()


@pytest.fixture
def saved(written, offline):
    """Open the report of a run, at a step if there is one to look at."""
    with ExitStack() as stack:

        def open_report(run, at="", **options):
            window = offline(**options)
            stack.callback(window.check, ())
            window.page.emulate_media(media="screen")
            window.page.goto("about:blank")  # another step alone would not load it again
            window.page.goto(written(run).as_uri() + at)
            expect(rows(window.page).first).to_be_visible()
            return window.page

        yield open_report


@pytest.fixture(params=["on_page", "saved"])
def table(request):
    return request.getfixturevalue(request.param)


def sort(page, column):
    page.get_by_role("columnheader", name=re.compile(f"^{column}")).click()


def turn_to(page, number):
    page.get_by_role("navigation", name="pagination").get_by_role(
        "link", name=number, exact=True
    ).click()


def beginning(number):
    """Return the pattern of a number's first digits."""
    return re.compile("^" + re.escape(str(number)[:6]))


def column(page, number):
    return page.locator(f"tr[data-step] > :nth-child({number})")


def info(page):
    return page.locator(".dt-info")


def losses_of(directory):
    return RecordedRun(directory).losses["loss"].to_list()


# In both.


def test_it_is_sorted_by_loss_with_nan_beyond_the_largest(table, recorded):
    page = table("diverged")
    smallest = beginning(min(filter(math.isfinite, losses_of(recorded / "diverged"))))
    for first, last in ((smallest, "nan"), ("nan", smallest)):
        sort(page, "loss")
        expect(column(page, 2).first).to_have_text(first)
        turn_to(page, "3")
        expect(column(page, 2).last).to_have_text(last)


def test_it_is_sorted_by_what_was_measured_with_blanks_last(table, recorded):
    page = table("digits")
    measured = everystep.open(recorded / "digits").measured("validation_loss")
    ordered = [str(step) for step, _ in sorted(measured.items(), key=lambda pair: pair[1]) if step]
    for steps in (ordered, ordered[::-1]):
        sort(page, "validation_loss")
        expect(column(page, 1)).to_have_text([*steps, *[re.compile(".")] * (10 - len(steps))])
        expect(column(page, 4).last).to_have_text("")


def test_it_is_searched_by_step_and_by_range_of_losses(table, recorded):
    page = table("chapter")
    search = page.get_by_role("searchbox", name="steps")
    search.fill("100-104")
    expect(column(page, 1)).to_have_text(["100", "101", "102", "103", "104"])
    search.fill("")
    low, high = page.get_by_label("losses from"), page.get_by_label("losses to")
    low.fill("0.5")
    high.fill("1")
    high.press("Enter")
    losses = enumerate(losses_of(recorded / "chapter"), 1)
    found = [str(step) for step, loss in losses if 0.5 <= loss <= 1]
    expect(info(page)).to_have_text(f"1 to 10 of {len(found)} (filtered from 500)")
    expect(column(page, 1)).to_have_text(found[:10])


def test_what_is_found_is_copied_and_saved_as_csv(table, recorded):
    page = table("digits", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("searchbox", name="steps").fill("100-102")
    expect(rows(page)).to_have_count(3)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_text("3 rows are in the clipboard.")).to_be_visible()
    copied = [line.split("\t") for line in page.evaluate("navigator.clipboard.readText()").splitlines()]
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    written = [line.split(",") for line in download.value.path().read_text().splitlines()]
    assert written == copied
    assert written[0] == ["step", "loss", "validation_accuracy", "validation_loss"]
    losses = losses_of(recorded / "digits")
    assert [(int(step), float(loss)) for step, loss, *_ in written[1:]] == [
        (step, pytest.approx(losses[step - 1])) for step in (100, 101, 102)
    ]


def test_a_report_has_the_columns_and_the_rows_of_the_page(saved, on_page):
    report, page = saved("digits"), on_page("digits")
    for place in ("thead th", "tbody tr"):
        inside = f".everystep-table {place}"
        assert report.locator(inside).all_inner_texts() == page.locator(inside).all_inner_texts()


# On the page.


def test_a_click_goes_to_the_step_and_the_table_follows(on_page):
    page = on_page("chapter")
    rows(page).nth(3).click()
    expect_step(page, 4)
    selected = page.locator("tr[aria-selected=true]")
    expect(selected).to_have_attribute("data-step", "4")
    page.keyboard.press("End")
    expect(selected).to_have_attribute("data-step", "500")
    expect(rows(page)).to_have_count(10)
    page.keyboard.press("Shift+ArrowLeft")
    expect(selected).to_have_attribute("data-step", "490")


def test_as_many_rows_are_shown_as_one_likes(on_page):
    page = on_page("chapter")
    page.get_by_label("per page").select_option("25")
    expect(rows(page)).to_have_count(25)
    turn_to(page, "20")
    expect(column(page, 1).last).to_have_text("500")


def test_a_long_table_has_all_its_pages(copied, visit):
    run = copied("chapter")
    with changed(run) as database:
        database.write_losses(501, [0.5] * 20_000)
    page = visit(f"/runs/{run.name}?step=500")
    expect(page.locator("tr[aria-selected=true]")).to_have_attribute("data-step", "500")
    turn_to(page, "2,050")
    expect(column(page, 1).last).to_have_text("20,500")


def test_the_address_says_how_it_is_sorted(on_page, visit, recorded):
    page = on_page("digits")
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


def test_what_names_no_steps_is_said_on_the_page(on_page):
    page = on_page("chapter", expected=["400"])
    page.get_by_role("searchbox", name="steps").fill("many")
    expect(part(page, "table of every step").locator(".note")).to_contain_text("many")


# In a report.


@pytest.mark.sweep
def test_steps_are_searched_for(saved):
    page = saved("chapter")
    search = page.get_by_role("searchbox", name="steps")
    for text, first, count in [
        ("3", 3, 1), ("2-4", 2, 3), ("2..4", 2, 3), (" 2 – 4 ", 2, 3),  # noqa: RUF001
        (">498", 499, 2), ("<3", 1, 2), ("≤3", 1, 3), ("497-", 497, 4),
        ("-2", 1, 2), ("4-2", None, 0), ("501", None, 0), ("1,000", None, 0),
        ("999999999999999999", None, 0),
    ]:  # fmt: skip
        search.fill(text)
        if count:
            expect(info(page)).to_have_text(f"1 to {count} of {count} (filtered from 500)")
            expect(column(page, 1).first).to_have_text(str(first))
        else:
            expect(info(page)).to_have_text("no rows (filtered from 500)")
    search.fill("")
    expect(info(page)).to_have_text("1 to 10 of 500")
    for text in ("abc", "1" * 400, "-"):
        search.fill(text)
        expect(
            page.get_by_text(f"search '{text[:80]}' is not a range of steps; write 137")
        ).to_be_visible()


def test_a_range_of_losses_includes_the_losses_that_bound_it(saved):
    page = saved("chapter")
    low, high = page.get_by_label("losses from"), page.get_by_label("losses to")
    low.fill(column(page, 2).nth(5).inner_text())
    high.fill(column(page, 2).nth(2).inner_text())
    high.press("Enter")
    expect(column(page, 1)).to_have_text(["3", "4", "5", "6"])
    low.fill("x")
    low.press("Enter")
    expect(page.get_by_text("losses from 'x': not a number; write 0.25 or 1e-3")).to_be_visible()


def test_a_row_a_point_and_the_address_go_to_a_step(saved, recorded):
    page = saved("chapter")
    readout = page.locator(".saved-plot .readout")
    expect(readout).to_have_text("Drag to zoom, double click to see the whole run.")
    selected, mark = page.locator("tr[aria-selected=true]"), page.locator(".saved-plot .at-step")
    rows(page).nth(3).click()
    expect(selected).to_have_attribute("data-step", "4")
    expect(mark).to_have_text(re.compile("^4 · "))
    plot = page.get_by_role("slider", name="step")
    plot.focus()
    page.keyboard.press("End")
    loss = re.escape(str(RecordedRun(recorded / "chapter").losses["loss"].to_numpy()[-1]))
    expect(readout).to_have_text(re.compile(rf"^step 500\s*loss {loss}\s*$"))
    for key in ("ArrowLeft", "Enter"):
        page.keyboard.press(key)
    expect(selected).to_have_attribute("data-step", "499")
    expect(page).to_have_url(re.compile("#step=499$"))
    page.go_back()
    expect(selected).to_have_attribute("data-step", "4")
    plot.focus()
    page.keyboard.press("ArrowRight")  # goes on from the step that is looked at
    expect(readout).to_have_text(re.compile(r"^step 5\s*loss "))
    page.get_by_role("link", name="7", exact=True).first.press("Enter")
    expect(selected).to_have_attribute("data-step", "7")
    linked = saved("chapter", at="#step=137")
    expect(linked.locator("tr[aria-selected=true]")).to_have_attribute("data-step", "137")
    expect(linked.locator(".saved-plot .at-step")).to_have_text(re.compile("^137 · "))


def test_a_step_that_a_report_does_not_have_shows_no_loss(written, open_page):
    page = open_page(written("chapter").as_uri(), offline=True)
    expect(rows(page).first).to_be_visible()
    page.clock.install()
    page.evaluate("location.hash = 'step=501'")
    page.clock.run_for(1000)  # after which it would have looked for the loss
    expect(page.locator(".saved-plot .readout")).to_have_text(re.compile(r"^step 501\s*$"))


@pytest.mark.sweep
def test_a_long_run_can_be_browsed(copied, saved):
    run = copied("chapter")
    with changed(run) as database:
        database.write_losses(501, [0.5] * 99_499 + [98.75])
        database.write_facts({"steps": 100_000})
    seal(run)
    page = saved(run.name)
    sort(page, "loss")
    expect(column(page, 2).first).to_have_text(beginning(min(losses_of(run))))
    page.get_by_role("searchbox", name="steps").fill("100000")
    expect(column(page, 2)).to_have_text(["98.75"])


def test_measurements_have_buttons_and_axes_of_their_own_which_everybody_can_read(saved):
    page = saved("digits", color_scheme="dark")
    buttons = page.get_by_role("group", name="what the plot shows").get_by_role("button")
    expect(buttons).to_have_text(
        ["loss", "validation_accuracy", "validation_loss", "line", "log axis"], use_inner_text=True
    )
    expect(buttons.nth(1)).to_have_attribute("aria-pressed", "true")
    axes = page.locator(".saved-plot .u-axis")
    expect(axes).to_have_count(3)
    buttons.nth(1).click()
    expect(axes).to_have_count(2)
    page.set_viewport_size({"width": 360, "height": 780})
    expect_axe_finds_nothing_serious(page)


@pytest.mark.sweep
def test_the_losses_of_other_ranks_share_the_axis_of_the_loss(copied, saved):
    run = copied("chapter")
    with changed(run) as database:
        database.write_measurements([("loss (rank 1)", step, 2.0) for step in (1, 500)])
    page = saved(run.name)
    button = page.get_by_role("button", name="loss (rank 1)", exact=True)
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".saved-plot .u-axis")).to_have_count(2)


def test_on_paper_there_are_rows_without_controls(saved):
    page = saved("chapter")
    page.emulate_media(media="print")
    expect(page.get_by_role("searchbox", name="steps")).to_be_hidden()
    expect(page.get_by_role("navigation", name="pagination")).to_be_hidden()
    expect(rows(page)).to_have_count(10)
    expect(info(page)).to_have_text("1 to 10 of 500")
