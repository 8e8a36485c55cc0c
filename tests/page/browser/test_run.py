"""One run in the browser: its plot, its table, its steps, and what happens while it is trained."""

import re
import shutil
import subprocess
import sys

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import at, heading

import everystep

TRAIN = "from everystep.cli import main; main()"


@pytest.fixture
def chapter(view, runs, open_page):
    """The chapter's run, shown at a step."""
    served = view()

    def show(path="/runs/chapter?step=137", **options):
        page = open_page(at(served, path), **options)
        if "step=" in path:
            expect(heading(page)).to_have_text(f"Step {re.search('step=([0-9]+)', path)[1]} of 500")
        return page

    return show


def test_all_runs_lead_to_one_and_the_token_leaves_the_address(view, runs, open_page):
    page = open_page(view().address)
    expect(page.locator("tbody tr")).to_have_count(4)
    assert "token" not in page.url
    expect(page.locator("tr", has_text="fork of chapter at 137")).to_be_visible()
    expect(page.locator("tr[data-name=chapter] svg path")).to_be_visible()
    page.get_by_role("link", name="chapter", exact=True).first.click()
    expect(page.locator("h1")).to_have_text("chapter")
    assert page.url.endswith("/runs/chapter")


def test_a_step_shows_the_very_numbers_that_python_gives(chapter, runs):
    page = chapter()
    step = everystep.open(runs / "chapter")[137]
    expect(page.locator(".step")).to_contain_text(
        str(everystep.open(runs / "chapter").losses["loss"][136])
    )
    expect(page.locator(".step")).to_contain_text("bit for bit as recorded, by program")
    text = page.locator(".step").inner_text()
    assert f"{step.gradients['0.weight'].norm():.4g}" in text
    for words in ("Batch", "Forward", "Loss", "Zero grad", "Backward", "Update"):
        assert words in text
    assert "param - param.grad * 0.0001" in text
    assert "torch.sub(param, torch.mul(param.grad, 0.0001))" in text


def test_keys_step_jump_and_leave_and_back_works(chapter):
    page = chapter("/runs/chapter")
    expect(page.locator(".u-over")).to_be_visible()
    for key, number in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("Shift+ArrowRight", 12),
        ("ArrowLeft", 11),
        ("End", 500),
        ("Home", 1),
    ):
        page.keyboard.press(key)
        expect(heading(page)).to_have_text(f"Step {number} of 500")
        assert page.url.endswith(f"?step={number}")
    page.keyboard.press("/")
    page.keyboard.type("137")
    page.keyboard.press("Enter")
    expect(heading(page)).to_have_text("Step 137 of 500")
    page.go_back()
    expect(heading(page)).to_have_text("Step 1 of 500")
    page.go_forward()
    expect(heading(page)).to_have_text("Step 137 of 500")
    page.keyboard.press("Escape")
    expect(page.locator(".step")).to_be_hidden()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("play")
    page.keyboard.press("Escape")
    page.go_back()
    expect(heading(page)).to_have_text("Step 137 of 500")


def test_quick_stepping_ends_at_the_step_that_was_asked_for_last(chapter):
    page = chapter()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    expect(heading(page)).to_have_text("Step 177 of 500")
    page.go_back()
    expect(heading(page)).to_have_text("Step 137 of 500")


def test_play_goes_through_the_run_and_stops(chapter):
    page = chapter("/runs/chapter?step=495")
    page.get_by_label("how fast it plays").select_option(label="at full speed")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("p")
    expect(heading(page)).to_have_text("Step 500 of 500")
    expect(page.get_by_label("play (p)")).to_be_disabled()


def test_an_operation_unfolds_has_an_address_and_shows_its_numbers(chapter, runs):
    page = chapter("/runs/chapter?step=137&operation=1")
    expect(page.locator("[data-number='1']")).to_contain_text("aten.relu.default")
    canvas = page.locator("[data-number='1'] canvas").first
    expect(canvas).to_be_visible()
    canvas.scroll_into_view_if_needed()
    canvas.focus()
    page.keyboard.press("Home")
    step = everystep.open(runs / "chapter")[137]
    [given] = step.operations[1].inputs.values()
    pattern = re.compile(r"\[0, 0\] = (-?[0-9.e-]+)")
    readout = page.locator("[data-number='1']").get_by_text(pattern).first
    expect(readout).to_be_visible()
    number = float(pattern.search(readout.inner_text())[1])
    assert number in (pytest.approx(given[0, 0].item()), pytest.approx(given.relu()[0, 0].item()))


def test_a_click_on_the_plot_and_on_the_table_goes_there(chapter):
    page = chapter("/runs/chapter")
    over = page.locator(".u-over")
    expect(over).to_be_visible()
    box = over.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
    expect(heading(page)).to_have_text(re.compile(r"Step 2[45]\d of 500"))
    row = page.locator("tr[aria-selected=true]")
    expect(row).to_have_count(1)
    step = int(re.search(r"step=(\d+)", page.url)[1])
    assert row.get_attribute("data-step") == str(step)
    page.locator(f"tr[data-step='{step}'] ~ tr, tr:has(~ tr[data-step='{step}'])").first.click()
    expect(heading(page)).not_to_have_text(f"Step {step} of 500")


def test_the_table_searches_sorts_and_gives_csv(chapter, runs):
    page = chapter("/runs/chapter")
    rows = page.locator("tr[data-step]")
    expect(rows).to_have_count(10)
    page.get_by_placeholder(re.compile("137")).first.fill("100-104")
    expect(rows).to_have_count(5)
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    lines = download.value.path().read_text().splitlines()
    losses = everystep.open(runs / "chapter").losses
    assert [float(line.split(",")[1]) for line in lines[1:]] == pytest.approx(
        losses["loss"][99:104].to_list()
    )


def test_losses_that_are_not_finite_are_said_and_their_origin_is_found(view, runs, open_page):
    page = open_page(at(view(), "/runs/diverged"))
    alarm = page.locator(".alarm")
    expect(alarm).to_contain_text("the first that is not finite")
    page.get_by_role("button", name="Where did the first NaN come from?").click()
    expect(page.get_by_role("link", name="Look at it")).to_be_visible()
    page.get_by_role("link", name="Look at it").click()
    expect(heading(page)).to_be_visible()
    assert "operation=" in page.url


def test_images_are_shown_as_images_with_their_classes(view, runs, open_page):
    page = open_page(at(view(), "/runs/digits?step=7"))
    batch = page.locator("section", has=page.get_by_role("heading", name="Batch")).first
    expect(batch.locator("canvas").first).to_be_visible()
    step = everystep.open(runs / "digits")[7]
    assert str(step.batch.y[0].item()) in batch.inner_text()


def test_a_training_is_seen_while_it_goes_on(view, tmp_path, open_page):
    (tmp_path / "runs").mkdir()
    page = open_page(view("runs").address)
    expect(page.locator("main")).to_contain_text("everystep train")
    command = [
        sys.executable,
        "-c",
        TRAIN,
        "train",
        "--steps",
        "40000",
        "--set",
        "optimizer.lr=1e-6",
        "-q",
    ]
    training = subprocess.Popen([*command, "--run", "runs/live"], cwd=tmp_path)
    try:
        expect(page.locator("tr[data-name=live]")).to_contain_text("running")
        page.get_by_role("link", name="live").click()
        status = page.get_by_text(re.compile("of 40,000 steps"))
        expect(status).to_be_visible()
        expect(page.get_by_text(re.compile("steps/s"))).to_be_visible()
        before = status.inner_text()
        expect(status).not_to_have_text(before)
        page.keyboard.press("End")
        expect(heading(page)).to_be_visible()
        first = heading(page).inner_text()
        expect(heading(page)).not_to_have_text(first)  # it follows the training
        training.kill()
        expect(page.locator(".state.interrupted")).to_be_visible()
    finally:
        training.kill()
        training.wait()


def test_a_run_that_is_deleted_while_shown_is_said_and_stays_on_screen(view, runs, open_page):
    page = open_page(at(view(), "/runs/digits?step=7"), expected=["404"])
    expect(heading(page)).to_have_text(re.compile("^Step 7 of"))
    shutil.rmtree(runs / "digits")
    expect(page.get_by_text("This run was deleted")).to_be_visible()
    expect(heading(page)).to_be_visible()
    page.get_by_role("link", name="All runs").click()
    expect(page.locator("tr[data-name=chapter]")).to_be_visible()
    expect(page.locator("tr[data-name=digits]")).to_have_count(0)


def test_the_server_may_be_stopped_and_started_again_under_an_open_page(view, runs, open_page):
    served = view()
    page = open_page(
        at(served, "/runs/chapter?step=137"), expected=["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE"]
    )
    expect(heading(page)).to_have_text("Step 137 of 500")
    served.stop()
    expect(page.get_by_text(re.compile("does not answer"))).to_be_visible()
    view(port=int(served.origin.rpartition(":")[2]))
    expect(page.get_by_text(re.compile("does not answer"))).to_be_hidden(timeout=15_000)
    page.keyboard.press("ArrowRight")
    expect(heading(page)).to_have_text("Step 138 of 500")
