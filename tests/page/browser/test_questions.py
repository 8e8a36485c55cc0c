"""Questions to a whole run in the browser: measure, when, verify, rerun."""

import re

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import expect_step, plot, press

import everystep
from everystep.views.comparisons import rerun_sentence


@pytest.fixture
def ask(visit):
    """Show a run's form for a question."""

    def ask(run, question):
        return visit(f"/runs/{run}").get_by_role("form", name=question, exact=True)

    return ask


@pytest.mark.sweep
def test_what_is_measured_in_hindsight_appears_and_is_overwritten_only_when_asked(copied, ask):
    run = copied("chapter")
    form = ask(run.name, "Measure")
    field = form.get_by_role("textbox", name="Measure")
    field.fill("norm(gradients['0.weight']")
    press(form, "Measure")
    expect(form.locator(".alarm")).to_contain_text("norm(gradients['0.weight']")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_value("norm(gradients['0.weight']")
    form.get_by_role("button", name="norm(gradients['0.weight'])", exact=True).click()
    expect(field).to_have_value("norm(gradients['0.weight'])")
    form.get_by_role("textbox", name="name").fill("size")
    form.get_by_role("spinbutton", name="every").fill("10")
    overwrite = form.get_by_role("checkbox", name="overwrite an existing one")
    press(form, "Measure")
    expect(form).to_contain_text("50 values")
    expect(overwrite).to_be_hidden()
    expect(form.page.get_by_role("button", name="size", exact=True)).to_be_visible()
    expect(form.page.get_by_role("columnheader", name=re.compile("^size"))).to_be_visible()
    run = everystep.open(run)
    measured = run.measured("size")
    assert list(measured) == [*range(10, 501, 10)]
    assert measured[130] == pytest.approx(run[130].gradients["0.weight"].norm().item())
    field.fill("loss / 4")
    press(form, "Measure")
    expect(form.locator(".alarm")).to_contain_text("size")
    overwrite.check()
    press(form, "Measure")
    expect(form.locator(".result")).to_contain_text("size")
    assert run.measured("size")[10] == pytest.approx(run.losses["loss"][9] / 4)


def test_what_a_page_still_waits_for_is_given_up_when_the_reader_leaves(ask, copied):
    form = ask(copied("diverged").name, "Measure")
    page = form.page
    about = page.url.replace("/runs/", "/api/runs/")
    expect(page.get_by_role("columnheader").first).to_be_visible()
    form.get_by_role("textbox", name="Measure").fill("loss / 2")
    page.route(about, lambda route: None)  # never answered
    with page.expect_request(about):
        press(form, "Measure")
    with page.expect_event("requestfailed", lambda request: request.url == about):
        page.get_by_role("link", name="All runs").click()
    page.unroute(about)


@pytest.mark.sweep
def test_a_measuring_that_is_cancelled_keeps_what_is_done(copied, ask):
    run = copied("digits")
    form = ask(run.name, "Measure")
    slow = " + ".join(["median(activations['2'])"] * 30)
    form.get_by_role("textbox", name="Measure").fill(slow)
    form.get_by_role("textbox", name="name").fill("slow")
    press(form, "Measure")
    expect(form.locator(".task-text")).to_have_text(re.compile(r"^measuring: [0-9]+ of 184"))
    press(form, "Cancel")
    expect(form.locator(".note")).not_to_be_empty()
    expect(form.get_by_role("progressbar")).to_have_count(0)
    kept = everystep.open(run).measured("slow")
    assert list(kept) == list(range(1, 1 + len(kept))) and 0 < len(kept) < 184
    expect(form.get_by_role("button", name="Measure", exact=True)).to_be_enabled()


def test_when_answers_with_links_to_the_steps(ask, recorded):
    form = ask("chapter", "When")
    losses = everystep.open(recorded / "chapter").losses["loss"].to_list()
    below = [step for step, loss in enumerate(losses, 1) if loss < 1]
    form.get_by_role("textbox", name="Find the step when").fill("loss < 1")
    form.get_by_role("combobox", name="which").select_option("all")
    press(form, "Find")
    form.get_by_role("link", name=f"step {below[0]}", exact=True).click()
    expect_step(form.page, below[0])
    expect(form).to_contain_text(f"{len(below)} steps")
    expect(form.get_by_role("link")).to_have_count(60)
    press(form, f"{len(below) - 60} more")
    expect(form.get_by_role("link")).to_have_count(len(below))


@pytest.mark.sweep
def test_where_the_first_nan_came_from_is_found(ask):
    form = ask("diverged", "First NaN or infinity")
    plot(form.page)
    press(form, "Find")
    form.get_by_role("link", name="Open").click()
    expect(form.page.locator(".step h2")).to_have_text(re.compile(r"^Step \d+ of 30$"))
    number = re.search(r"operation=(\d+)", form.page.url)[1]
    expect(form.page.locator(f"[data-number='{number}']")).to_be_in_viewport()
    expect(form.page.locator(f"[data-number='{number}'] .nonfinite").first).to_be_visible()


@pytest.mark.sweep
def test_verify_says_that_it_is_as_recorded_bit_for_bit(ask):
    form = ask("diverged", "Verify")
    press(form, "Verify")
    expect(form).to_contain_text("replays bit for bit")


@pytest.mark.sweep
def test_a_run_in_another_precision_lies_over_the_recorded_one(ask, recorded):
    asked = ask("diverged", "Rerun")
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
