"""A rerun in the browser: a sentence, both losses in one plot, and errors in words."""

import re

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import expect_step, press

import everystep
from everystep.views.comparisons import rerun_sentence


@pytest.fixture
def form(visit):
    """The question of a run."""

    def form(run):
        return visit(f"/runs/{run}").get_by_role("form", name="Rerun", exact=True)

    return form


def test_a_run_in_another_precision_lies_over_the_recorded_one(form, recorded):
    asked = form("diverged")
    press(asked, "Rerun")
    expect(asked.locator(".alarm")).to_contain_text("needs a condition that differs from the recording")
    asked.get_by_label("precision").select_option("float64")
    press(asked, "Rerun")
    found = everystep.open(recorded / "diverged").rerun(precision="float64", progress=False)
    expect(asked.locator(".result")).to_have_text(f"{rerun_sentence(found)}.")
    for name in ("diverged", "diverged, float64"):
        expect(asked.get_by_role("button", name=name, exact=True)).to_be_visible()
    over = asked.locator(".u-over")
    box = over.bounding_box()
    over.hover(position={"x": 2, "y": box["height"] / 2})
    expect(asked.locator(".readout")).to_contain_text("step 1")
    expect(asked.locator(".readout")).to_contain_text(f"{found.losses[0]:.6g}"[:5])
    over.click(position={"x": 2, "y": box["height"] / 2})
    expect_step(asked.page, 1, of=30)
    asked.get_by_text("Details").click()
    expect(asked.locator("pre")).to_contain_text("farthest apart at step")


@pytest.mark.sweep
def test_a_rerun_is_cancelled(form):
    asked = form("chapter")
    asked.get_by_label("threads").fill("1")
    asked.get_by_label("precision").select_option("bfloat16")
    press(asked, "Rerun")
    expect(asked.locator(".task-text")).to_have_text(re.compile("^taking steps"))
    press(asked, "Cancel")
    expect(asked.locator(".note")).to_have_text("stopped")
    expect(asked.get_by_role("button", name="Rerun", exact=True)).to_be_enabled()
