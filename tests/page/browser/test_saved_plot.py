"""The plot of a report, opened from a file without a network: that of the page, on its own numbers."""

import re

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import expect_axe_finds_nothing_serious

from everystep.recording.recorded_run import RecordedRun
from everystep.views.report import report_html


@pytest.fixture
def saved(recorded, open_page, tmp_path):
    """Open the report of a recorded run from a file."""

    def open_report(name, **context):
        path = tmp_path / "report.html"
        path.write_text(report_html(RecordedRun(recorded / name)), encoding="utf-8")
        page = open_page(path.as_uri(), offline=True, **context)
        expect(page.locator(".saved-plot canvas")).to_be_visible()
        return page

    return open_report


def readout(page):
    return page.locator(".saved-plot .readout")


def test_arrow_keys_walk_through_the_losses(saved, recorded):
    page = saved("chapter")
    expect(readout(page)).to_have_text("Drag to zoom, double click to see the whole run.")
    page.get_by_role("slider", name="step").focus()
    page.keyboard.press("End")
    loss = str(RecordedRun(recorded / "chapter").losses["loss"].to_numpy()[-1])
    expect(readout(page)).to_have_text(re.compile(rf"^step 500\s*loss {re.escape(loss)}\s*$"))
    page.keyboard.press("Shift+ArrowLeft")
    expect(readout(page)).to_have_text(re.compile("^step 490"))
    page.keyboard.press("Enter")  # opens nothing: there is no step to open
    expect(readout(page)).to_have_text(re.compile("^step 490"))


def test_measurements_have_buttons_and_axes_of_their_own(saved):
    page = saved("digits")
    buttons = page.get_by_role("group", name="what the plot shows").get_by_role("button")
    expect(buttons).to_have_text(
        ["loss", "validation_accuracy", "validation_loss", "line", "log axis"], use_inner_text=True
    )
    accuracy = buttons.nth(1)
    expect(accuracy).to_have_attribute("aria-pressed", "true")
    axes = page.locator(".saved-plot .u-axis")
    expect(axes).to_have_count(3)
    accuracy.click()
    expect(axes).to_have_count(2)


def test_everybody_can_read_it(saved):
    page = saved("digits", color_scheme="dark", viewport={"width": 360, "height": 780})
    expect_axe_finds_nothing_serious(page)
