"""A step of a user's loop in the browser: its segments, in the order in which they happened."""

import re

import pytest
import torch
from playwright.sync_api import expect
from tests.page.browser.places import (
    expect_axe_finds_nothing_serious,
    expect_no_sideways_scrolling,
    expect_step,
    operation,
    part,
)
from tests.page.serving import remove
from tests.training.loops import gan_with_two_optimizers
from torch import nn

import everystep

GAN = [
    "Batch",
    "1 Other",
    "2 Forward · generator",
    "3 Loss",
    "4 Forward · discriminator",
    "5 Loss",
    "6 Forward · discriminator",
    "7 Loss",
    "8 Backward",
    "9 Update · optimizer_d",
    "10 Forward · discriminator",
    "11 Loss",
    "12 Backward",
    "13 Update · optimizer_g",
    "14 Other",
]
PASSES = 4


def accumulation(run):
    """Record steps of four passes, with their gradients clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [[torch.randn(5, 6) for _ in range(PASSES)] for _ in range(4)]
    with everystep.record(run=run, model=model, optimizer=optimizer) as recording:
        for batch in recording.steps(batches):
            optimizer.zero_grad()
            for x in batch:
                loss = model(x).square().mean() / PASSES
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            recording.log(loss=loss)


def read_by_python(run):
    """Record steps after which Python reads a tensor as a number."""
    model = nn.Linear(6, 3)
    with everystep.record(run=run, model=model) as recording:
        for x in recording.steps([torch.ones(5, 6)] * 4):
            recording.log(loss=model(x).sum().item())


@pytest.fixture(scope="module")
def loops(recorded):
    """A GAN with two optimizers, a model with accumulation, and a number that Python reads."""
    torch.manual_seed(0)
    runs = {name: recorded / name for name in ("gan", "accumulated", "read")}
    gan_with_two_optimizers(6, lambda **parts: everystep.record(run=runs["gan"], **parts))
    accumulation(runs["accumulated"])
    read_by_python(runs["read"])
    yield {name: everystep.open(run) for name, run in runs.items()}
    for run in runs.values():
        remove(run)


@pytest.fixture
def show(loops, visit):
    def show(name, step, query="", **options):
        page = visit(f"/runs/{name}?step={step}{query}", **options)
        expect_step(page, step, len(loops[name]))
        return page

    return show


def headings(page):
    return page.locator(".step h3 > a").all_inner_texts()


def test_an_operation_without_results_shows_no_statistics(show):
    page = show("read", 2)
    row = page.locator(".operation").filter(has_text="read by Python")
    expect(row).to_be_visible()
    expect(row.locator(".statistics")).to_be_hidden()


def toggle(page, number):
    return operation(page, number).get_by_role("button", name=re.compile(f"^operation #{number}:"))


def names(rows):
    """Return the names of parameters, or what stands where there is none."""
    buttons = rows.locator("> .head > .unfold")
    return buttons.evaluate_all("all => all.map(one => one.title || one.textContent)")


def numbers_of(host):
    return [
        int(each)
        for each in host.locator(".operation").evaluate_all("all => all.map(o => o.dataset.number)")
    ]


def test_the_line_of_code_stands_above_the_operations_that_it_called(show, loops):
    page = show("accumulated", 3)
    lines = [seen.line for seen in loops["accumulated"][3].operations]
    clips = next(place for place, line in enumerate(lines) if "clip_grad_norm_" in line.text)
    text = f"{lines[clips].place}{lines[clips].text}"
    expect(operation(page, clips).locator(".code-line")).to_have_text(text)
    expect(operation(page, clips + 1).locator(".code-line")).to_be_hidden()
    toggle(page, clips + 1).click()
    calls = operation(page, clips + 1).locator(".calls li")
    expect(calls.first).to_have_text(text)
    expect(calls).to_have_count(1 + len(lines[clips].callers))


def test_a_step_is_its_segments_in_order_each_with_its_model_or_optimizer(show, loops):
    page = show("gan", 3)
    expect(page.locator(".exactness")).to_have_text(
        "Replayed without the code of your loop, bit-identical."
    )
    expect(page.locator(".facts-part > summary")).to_have_text("optimizer_g: Adam; optimizer_d: Adam")
    assert headings(page) == GAN
    phases = page.get_by_role("navigation", name="phases of the step")
    assert phases.get_by_role("link").all_inner_texts() == GAN
    shown = numbers_of(page.locator(".step"))
    assert shown == list(range(len(loops["gan"][3].operations)))
    for name, layers in (("2 Forward · generator", 3), ("4 Forward · discriminator", 3)):
        network = part(page, name).get_by_role("list", name="the network, layer by layer")
        expect(network.get_by_role("button")).to_have_count(layers)
    expect(part(page, "6 Forward · discriminator").locator(".layers")).to_have_count(0)
    # An update lists the parameters of its optimizer with their gradients.
    step = loops["gan"][3]
    for name, model in (
        ("9 Update · optimizer_d", "discriminator"),
        ("13 Update · optimizer_g", "generator"),
    ):
        update = part(page, name)
        own = [each for each in step.parameters if each.startswith(f"{model}.")]
        assert names(update.locator(".update-row")) == own
        assert names(update.locator(".tensor")) == [f"{each}.grad" for each in own]
        heading = update.get_by_role("heading", level=3)
        expect(heading).to_contain_text(re.compile(r"Adam, lr = 0\.001, betas = \(0\.5, 0\.999\)"))
        size = f"{100 * step.updates[own[0]].relative_size:.3g}%"
        expect(update.locator(".update-row .relative").first).to_have_text(size)


@pytest.mark.sweep
def test_segment_and_operation_are_in_the_address(show):
    page = show("gan", 3)
    page.get_by_role("navigation", name="phases of the step").get_by_role(
        "link", name="12 Backward"
    ).click()
    expect(page).to_have_url(re.compile(r"\?step=3&phase=backward-2$"))
    backward = part(page, "12 Backward")
    expect(backward).to_be_in_viewport()
    expect(backward).to_have_class(re.compile("marked"))
    number = numbers_of(part(page, "10 Forward · discriminator"))[0]
    toggle(page, number).click()
    expect(page).to_have_url(re.compile(rf"phase=forward-4&operation={number}$"))
    expect(operation(page, number).get_by_text("Arguments")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect_step(page, 4, 6)
    expect(toggle(page, number)).to_have_attribute("aria-expanded", "true")
    # A link of elsewhere names the phase alone: the segment of the operation is marked.
    page = show("gan", 3, f"&phase=forward&operation={number}")
    expect(toggle(page, number)).to_be_in_viewport()
    expect(page.locator(".phase.marked")).to_have_attribute("aria-label", "10 Forward · discriminator")


def test_segments_that_repeat_stand_together_folded(show, loops):
    page = show("accumulated", 2)
    assert headings(page) == [
        "Batch",
        f"1 Forward, loss, backward \N{MULTIPLICATION SIGN} {PASSES}",
        "2 Other",
        "3 Update",
    ]
    passes = page.locator(".pass")
    expect(passes).to_have_count(PASSES)
    expect(page.get_by_role("list", name="the network, layer by layer")).to_have_count(1)
    expect(page.locator(".pass .operation").first).not_to_be_visible()
    expect(passes.first.locator("summary")).to_have_text(
        re.compile(r"^Pass 1 of 4\s*#0 to #\d+\s*backward from #\d+ = [\d.]+$")
    )
    passes.nth(1).locator("summary").click()
    expect(passes.nth(1).get_by_role("heading", level=4)).to_have_text(["Forward", "Loss", "Backward"])
    gradients = part(page, "3 Update").locator(".tensor")
    assert names(gradients) == [f"{name}.grad" for name in loops["accumulated"][2].parameters]


def test_an_address_opens_the_pass_of_its_operation(show):
    number = 25
    page = show("accumulated", 2, f"&operation={number}")
    expect(toggle(page, number)).to_be_in_viewport()
    expect(page.locator(".pass[open]")).to_have_count(1)
    page = show("accumulated", 2, "&phase=backward-3")
    expect(part(page, "Backward, pass 3")).to_be_in_viewport()


@pytest.mark.sweep
def test_everybody_can_read_it_on_a_small_screen(show):
    page = show("accumulated", 2, viewport={"width": 360, "height": 780}, color_scheme="dark")
    expect_no_sideways_scrolling(page)
    expect_axe_finds_nothing_serious(page)
