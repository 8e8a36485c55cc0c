"""Several runs in the browser: laid over each other, compared, forked; questions, and saved views."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import at, heading

import everystep


@pytest.fixture
def served(view, runs):
    return view()


def test_two_runs_are_picked_and_compared_down_to_the_operation(served, open_page):
    page = open_page(served.address)
    page.get_by_label("pick chapter", exact=True).check()
    page.get_by_label("pick fork", exact=True).check()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("main")).to_contain_text(re.compile("part at step 139"))
    text = page.locator("main").inner_text()
    assert "optimizer.lr" in text and "0.0002" in text
    assert "aten.mul" in text
    expect(page.locator("mark").first).to_be_visible()
    page.get_by_role("link", name=re.compile("step 138", re.I)).first.click()
    expect(heading(page)).to_have_text("Step 138 of 500")
    page.go_back()
    expect(page.locator("main")).to_contain_text(re.compile("part at step 139"))


def test_several_runs_are_laid_over_each_other_and_taken_away_again(served, open_page):
    page = open_page(served.address)
    page.get_by_label("pick chapter", exact=True).check()
    page.get_by_label("pick fork", exact=True).check()
    page.get_by_role("button", name="Overlay").click()
    expect(page.locator(".u-over")).to_be_visible()
    assert "beside=" in page.url


def test_a_fork_is_trained_from_the_step_that_is_looked_at(served, runs, open_page):
    page = open_page(at(served, "/runs/chapter?step=137"))
    expect(heading(page)).to_have_text("Step 137 of 500")
    page.keyboard.press("f")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Fork after step 137")
    dialog.get_by_label("optimizer.lr").fill("quick")
    dialog.get_by_role("button", name="Train it").click()
    expect(dialog).to_contain_text("optimizer.lr")
    expect(dialog.locator(".alarm, [role=alert]").first).to_be_visible()
    dialog.get_by_label("optimizer.lr").fill("3e-4")
    dialog.get_by_label("name").fill("faster")
    expect(dialog).to_contain_text("everystep fork chapter --at 137 --set optimizer.lr=3e-4")
    dialog.get_by_role("button", name="Train it").click()
    expect(page.locator("h1")).to_have_text("faster")
    assert page.url.endswith("/runs/faster?beside=chapter")
    expect(page.locator(".state.finished")).to_be_visible()
    fork = everystep.open(runs / "faster")
    assert fork.summary().parent == ("chapter", 137)
    by_hand = everystep.open(runs / "chapter").fork(137, lr=3e-4, directory="again", progress=False)
    assert fork.losses.equals(by_hand.losses)


def test_what_is_measured_in_hindsight_appears_in_the_plot(served, runs, open_page):
    page = open_page(at(served, "/runs/chapter"))
    field = page.get_by_label("Measure", exact=True).last
    form = page.locator("form", has=page.get_by_role("heading", name="Measure"))
    form.locator("input.mono").fill("norm(gradients['0.weight']")
    form.get_by_role("button", name="Measure", exact=True).click()
    expect(form.get_by_role("alert").or_(form.locator(".alarm")).first).to_be_visible()
    form.locator("input.mono").fill("norm(gradients['0.weight'])")
    form.get_by_label(re.compile("^name")).fill("size")
    form.get_by_role("button", name="Measure", exact=True).click()
    expect(form).to_contain_text("500 values")
    expect(page.get_by_role("button", name="size")).to_be_visible()
    assert len(everystep.open(runs / "chapter").measured("size")) == 500
    assert field is not None


def test_when_and_verify_answer_with_links_and_words(served, open_page):
    page = open_page(at(served, "/runs/chapter"))
    when = page.locator("form", has=page.get_by_role("heading", name="When"))
    when.locator("input.mono").fill("loss < 1")
    when.get_by_role("button", name="Find").click()
    when.get_by_role("link", name=re.compile("step 134")).click()
    expect(heading(page)).to_have_text("Step 134 of 500")
    verify = page.locator("form", has=page.get_by_role("heading", name="Verify"))
    verify.get_by_role("button", name="Verify").click()
    expect(verify).to_contain_text("is as it was recorded, bit for bit")


def test_a_saved_view_opens_without_a_server(served, open_page, tmp_path):
    page = open_page(at(served, "/runs/chapter?step=137"))
    expect(heading(page)).to_have_text("Step 137 of 500")
    page.get_by_role("button", name="Save this view").click()
    dialog = page.get_by_role("dialog")
    with page.expect_download() as download:
        dialog.get_by_role("link", name=re.compile("Save|Download", re.I)).or_(
            dialog.get_by_role("button", name=re.compile("Save|Download", re.I))
        ).first.click()
    saved = Path(tmp_path / "saved.html")
    download.value.save_as(saved)
    served.stop()
    page.context.close()
    alone = open_page(saved.as_uri(), offline=True)
    expect(alone.locator(".step")).to_contain_text("0.8888099")
    expect(alone.locator(".step")).to_contain_text("torch.sub(param, torch.mul(param.grad, 0.0001))")
