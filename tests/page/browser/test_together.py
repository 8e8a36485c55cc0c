"""Several runs in the browser: compared and forked; and views that are saved."""

import re
import shutil

import pytest
import torch
from playwright.sync_api import expect
from tests.page.browser.places import (
    at,
    changed,
    expect_axe_finds_nothing_serious,
    expect_everybody_can_read_it,
    expect_no_sideways_scrolling,
    expect_step,
    part,
    plot,
    row,
    unfold,
    value,
)
from tests.page.serving import remove

import everystep
from everystep.page.share import shared_report


def test_two_runs_are_compared_down_to_the_operation(visit):
    page = visit("/compare?one=chapter&other=chapter", bypass_csp=True)
    expect(page.get_by_text("These are the same run")).to_be_visible()
    page.get_by_role("combobox", name="second run: choose another").select_option("fork")
    expect(page).to_have_url(re.compile(r"one=chapter&other=fork$"))
    expect(page.get_by_text("diverge at step 139").first).to_be_visible()
    verdict = page.locator("main").get_by_role("status").filter(has_text="first differ at step")
    expect(verdict).to_contain_text(
        "The losses first differ at step 139; the first operation that differs is #12 of step 138"
    )
    expect(verdict).to_contain_text("cause: GradientDescent: lr 0.0001 | 0.0002")
    row = page.locator("table.differences tr").filter(has_text="optimizer GradientDescent.lr")
    expect(row.locator("td")).to_have_text(["0.0001", "0.0002"])
    plot(page)
    sides = page.locator(".parting .side")
    expect(sides).to_have_count(2)
    for side in sides.all():
        expect(side).to_contain_text("aten.mul.Tensor")
    marked = page.locator(".parting table.numbers mark")
    expect(marked.first).to_be_visible()
    one, other = [
        page.get_by_role("region", name=re.compile(f"mul of {run}$")) for run in ("chapter", "fork")
    ]
    assert one.locator("mark").count() == other.locator("mark").count() > 0
    assert float(other.locator("mark").first.inner_text()) == pytest.approx(
        2 * float(one.locator("mark").first.inner_text()), rel=1e-3
    )
    expect_everybody_can_read_it(page)
    sides.nth(1).get_by_role("link", name="Open it in step 138").click()
    expect_step(page, 138)
    expect(page).to_have_url(re.compile(r"/runs/fork\?step=138&phase=update&operation=12$"))
    page.go_back()
    expect(verdict).to_be_visible()  # at once: what was compared is known
    expect(page.get_by_role("progressbar")).to_have_count(0)
    page.get_by_role("button", name="swap the runs").click()
    expect(page).to_have_url(re.compile(r"one=fork&other=chapter$"))


@pytest.mark.sweep
def test_numbers_that_javascript_rounds_are_compared_in_full(recorded, visit, request):
    for name, added in (("one", 1), ("other", 2)):
        request.addfinalizer(lambda name=name: remove(recorded / name))
        model = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.ones_(model.bias)
        large = torch.tensor([2**53, -(2**62)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parts = {"model": model, "optimizer": optimizer, "large": large}
        with everystep.record(**parts, run=recorded / name) as recording:
            for x, count in recording.steps([(torch.ones(3, 2), torch.tensor(added))]):
                large.add_(count)
                recording.log(loss=model(x).sum())
    page = visit("/compare?one=one&other=other")
    first = page.locator("table.positions").first
    expect(first.locator("td")).to_have_text(
        [str(2**53 + 1), str(2**53 + 2), str(1 - 2**62), str(2 - 2**62)]
    )
    marks = page.locator("table.numbers").first.locator("mark")
    expect(marks).to_have_text([str(2**53 + 1), str(1 - 2**62)])


def test_a_copy_is_the_same_bit_for_bit_until_another_run_has_its_name(
    visit, recorded, copied, tmp_path
):
    run, new = copied("diverged"), shutil.copytree(recorded / "fork", tmp_path / "new")
    page = visit(f"/compare?one=diverged&other={run.name}")
    verdict = page.locator("p.verdict")
    expect(verdict).to_contain_text("is identical, bit for bit")
    page.get_by_role("button", name="Compare every operation").click()
    expect(verdict).to_have_text("The runs are bit-identical.")
    expect(page.get_by_text("The losses are identical up to step 30.")).to_be_visible()
    page.get_by_role("link", name="All runs").click()
    run.rename(tmp_path / "old")
    new.rename(run)
    expect(row(page, run.name)).to_contain_text("0.0002")
    page.go_back()
    expect(verdict).to_contain_text("first differ at step 2")


def test_a_run_without_steps_has_no_losses_to_tell(copied, visit):
    run = copied("chapter")
    with changed(run) as database:
        database.forget_after(0)
    page = visit(f"/compare?one={run.name}&other=chapter")
    expect(page.get_by_text("has no steps yet")).to_be_visible()
    expect(page.locator(".side p.small")).to_have_text(["0 steps", re.compile("^500 steps, loss 628")])


def test_a_run_to_compare_with_that_is_not_there_is_said(visit):
    page = visit("/compare?one=chapter&other=nothing")
    expect(page.get_by_text("There is no run nothing here; choose another one.")).to_be_visible()
    page.goto(page.url.partition("?")[0])
    expect(page.get_by_text("Choose two runs to compare.")).to_be_visible()


def test_a_run_leads_to_its_comparison_and_to_its_overlay(visit):
    page = visit("/runs/digits")
    page.get_by_role("button", name="Compare", exact=True).click()
    choice = page.get_by_role("dialog", name="digits and …")
    choice.get_by_role("listitem").filter(has_text="diverged").get_by_role(
        "link", name="plot together"
    ).click()
    expect(page).to_have_url(re.compile(r"/runs/digits\?overlay=diverged$"))
    expect(choice).to_be_hidden()


def test_a_fork_is_trained_from_the_step_that_is_looked_at(copied, recorded, visit):
    parent = copied("chapter")
    page = visit(f"/runs/{parent.name}?step=137")
    expect_step(page, 137)
    page.keyboard.press("f")
    dialog = page.get_by_role("dialog", name="Fork after step 137")
    rate, name = (dialog.get_by_label(label, exact=True) for label in ("optimizer.lr", "name"))
    begin = dialog.get_by_role("button", name="Train it")
    rate.fill("quick")
    name.fill(f"{parent.name}-faster")
    begin.click()
    expect(dialog.locator(".alarm")).to_contain_text("lr")
    expect(name).to_have_value(f"{parent.name}-faster")
    rate.fill("3e-4")
    command = (
        f"everystep fork {parent.name} --at 137 --set optimizer.lr=3e-4 --run runs/{parent.name}-faster"
    )
    expect(dialog).to_contain_text(command)
    begin.click()
    expect(page.locator("h1")).to_have_text(f"{parent.name}-faster")
    expect(page).to_have_url(re.compile(rf"/runs/{parent.name}-faster\?overlay={parent.name}$"))
    expect(page.locator(".run-head .state")).to_have_text("finished")
    fork = everystep.open(recorded / f"{parent.name}-faster")
    assert fork.summary().parent == (parent.name, 137)
    by_hand = everystep.open(parent).fork(137, lr=3e-4, run="./by-hand", progress=False)
    assert fork.losses.equals(by_hand.losses)
    page.get_by_text(f"fork of {parent.name} at 137").get_by_role("link", name=parent.name).click()
    expect(page.get_by_text("forked at 137:").filter(has_text="faster")).to_be_visible()


def test_a_fork_without_a_step_begins_at_the_first(visit):
    page = visit("/runs/chapter")
    page.get_by_role("button", name="Fork", exact=True).click()
    dialog = page.get_by_role("dialog", name="Fork before the first step")
    expect(dialog).to_contain_text("everystep fork chapter --at 0 ")
    dialog.get_by_role("button", name="Close", exact=True).click()


def test_a_fork_that_is_trained_here_can_be_stopped(copied, recorded, visit):
    parent = copied("chapter")
    page = visit(f"/runs/{parent.name}?step=500")
    expect_step(page, 500)
    page.get_by_role("button", name="Fork").click()
    dialog = page.get_by_role("dialog", name="Fork after step 500")
    dialog.get_by_label("steps").fill("10000000")
    dialog.get_by_label("name", exact=True).fill(f"{parent.name}-endless")
    dialog.get_by_role("button", name="Train it").click()
    expect(page.locator("h1")).to_have_text(f"{parent.name}-endless")
    expect(page.locator(".run-head .state")).to_have_text("running")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".run-head .state")).to_have_text("stopped")
    assert len(everystep.open(recorded / f"{parent.name}-endless")) > 500


@pytest.fixture(scope="module")
def saved(shared, recorded, browser, tmp_path_factory):
    """A view, saved: the chapter with its steps 1 and 137 inside."""
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    page.goto(at(shared, "/runs/chapter?step=137"))
    expect_step(page, 137)
    page.get_by_role("button", name="Save this view").click()
    dialog = page.get_by_role("dialog", name="Save this view")
    steps = dialog.get_by_label("steps", exact=True)
    expect(steps).to_have_value("137")
    steps.fill("1, 501")
    expect(dialog.get_by_role("alert")).to_have_text("there is no step 501; steps are 1 to 500")
    steps.fill("1, 137")
    expect(dialog).to_contain_text("everystep report chapter --step 1 --step 137 -o chapter.html")
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Save the page").click()
    expect(dialog.get_by_text("Saved.")).to_be_visible()
    assert download.value.suggested_filename == "chapter.html"
    file = tmp_path_factory.mktemp("saved") / "chapter.html"
    download.value.save_as(file)
    context.close()
    return file


@pytest.mark.sweep
def test_a_saved_view_opens_without_a_server(saved, recorded, open_page):
    page = open_page(saved.as_uri(), offline=True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    chosen = page.get_by_role("group", name="step", exact=True)
    chosen.get_by_role("button", name="137").click()
    shown = page.locator(".opened .step")
    expect(shown.locator("h2")).to_have_text("Step 137 of 500")
    expect(shown).to_contain_text("torch.sub(param, torch.mul(param.grad, 0.0001))")
    gradient = unfold(part(page, "Backward"), "2.bias.grad")
    heat = gradient.get_by_role("img", name=re.compile("^Heat map of 2.bias.grad"))
    heat.press("Home")
    step = everystep.open(recorded / "chapter")[137]
    assert value(gradient.locator(".heat-map .readout"), re.escape("[0]")) == pytest.approx(
        step.gradients["2.bias"][0].item(), rel=1e-6
    )
    chosen.get_by_role("button", name="1", exact=True).click()
    expect(shown.locator("h2")).to_have_text("Step 1 of 500")
    assert asked == []


def test_a_saved_view_shows_the_images_and_slices_that_it_holds(tmp_path, open_page):
    layer = torch.nn.Conv2d(3, 2, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with everystep.record(model=layer, optimizer=optimizer, run=tmp_path / "run") as recording:
        for images, maps in recording.steps([(torch.rand(16, 3, 16, 16), torch.rand(3, 300, 200))]):
            recording.log(loss=layer(images).sum() + maps.sum())
    (tmp_path / "saved.html").write_text(shared_report(recording.run, [1]), encoding="utf-8")
    page = open_page((tmp_path / "saved.html").as_uri())
    expect(page.locator("figure canvas")).to_have_count(12)  # of 3 slices each, in 9,216 numbers
    picture = (
        page.locator(".tensor")
        .filter(has_text=re.compile("3.300.200"))
        .locator(".thumbnail canvas")
        .first
    )
    part(page, "1 Forward").scroll_into_view_if_needed()
    expect(picture).to_have_attribute("width", "67")  # one slice of the three


@pytest.mark.sweep
def test_a_saved_view_is_for_everybody(saved, open_page):
    page = open_page(
        saved.as_uri(), color_scheme="dark", viewport={"width": 360, "height": 740}, bypass_csp=True
    )
    expect(page.locator(".opened .step h2")).to_be_visible()
    expect_no_sideways_scrolling(page)
    expect_axe_finds_nothing_serious(page)
