"""A training in the browser, while it runs."""

import os
import re
import time

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import heading, row


@pytest.mark.sweep
def test_a_training_is_seen_while_it_goes_on(train, visit):
    page = visit("/")
    training = train("live", "wine", "--steps", 10_000_000)
    expect(row(page, "live")).to_contain_text("running")
    os.setpriority(os.PRIO_PROCESS, training.pid, 15)  # it would take a whole processor from other tests
    expect(page.get_by_text("1 running")).to_be_visible()
    row(page, "live").get_by_role("link", name="live").click()
    status = page.get_by_text("of 10,000,000 steps")
    expect(status).to_contain_text("steps/s")
    before = status.inner_text()
    expect(status).not_to_have_text(before)
    slider = page.get_by_role("slider", name="step")
    last = slider.get_attribute("aria-valuemax")
    expect(slider).not_to_have_attribute("aria-valuemax", last)
    seen = page.locator(".dt-info")
    earlier = seen.inner_text()
    expect(seen).not_to_have_text(earlier)
    shown = page.get_by_role("group", name="what the plot shows")
    expect(shown.get_by_role("button", name="validation_loss")).to_have_attribute("aria-pressed", "true")

    page.keyboard.press("Home")
    expect(heading(page)).to_have_text(re.compile("^Step 1 of "))
    follow = page.get_by_role("button", name="follow")
    expect(follow).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("End")
    expect(follow).to_have_attribute("aria-pressed", "true")
    expect(heading(page)).not_to_have_text(re.compile("^Step 1 of "))
    first = heading(page).inner_text()
    expect(heading(page)).not_to_have_text(first)
    page.keyboard.press("ArrowLeft")
    expect(follow).to_have_attribute("aria-pressed", "false")

    def open_slowly(route):
        time.sleep(1)
        route.continue_()

    page.keyboard.press("Home")
    expect(heading(page)).to_have_text(re.compile("^Step 1 of "))
    page.route(re.compile(r"/steps/\d+$"), open_slowly)
    page.keyboard.press("End")  # what is followed is shown, however long it takes to open
    expect(heading(page)).not_to_have_text(re.compile("^Step 1 of "))
    page.unroute_all(behavior="wait")
    training.kill()
    expect(page.locator(".run-head .state")).to_have_text("killed")
    expect(follow).to_be_hidden()
    page.go_back()
    page.get_by_role("link", name="All runs").click()
    expect(row(page, "live")).to_contain_text("killed")
