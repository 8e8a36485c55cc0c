"""A tensor in the browser: its numbers, the histogram, and where a number comes from."""

import io
import re
from math import isfinite

import numpy as np
import pytest
import torch
from playwright.sync_api import expect
from tests.page.browser.places import (
    across,
    expect_another_picture,
    expect_step,
    part,
    picture,
    plot,
    row,
    unfold,
    value,
)

import everystep
from everystep.views.formatting import number


@pytest.fixture
def tensor(visit):
    """Unfold a tensor of a step; return its panel's heat map, what that says, and the histogram."""

    def show(run, step, phase, name, **options):
        page = visit(f"/runs/{run}?step={step}", **options)
        panel = unfold(part(page, phase), name).locator(".panel")
        found = [
            panel.locator(place)
            for place in (".heat-map canvas[role=img]", ".heat-map .readout", ".histogram")
        ]
        expect(found[0]).to_have_attribute("aria-label", re.compile("^Heat map"))
        expect(found[0]).to_be_visible()
        return found

    return show


def gradient(recorded, name):
    return everystep.open(recorded / "chapter")[137].gradients[name]


def test_the_number_under_the_pointer_or_the_cursor_is_that_of_the_tensor(tensor, recorded):
    heat, readout, _ = tensor("chapter", 137, "Backward", "2.weight.grad")
    heat.page.mouse.move(*across(heat, 0.42))
    shown = value(readout)
    row, column = (int(each) for each in re.findall(r"\d+", readout.inner_text())[:2])
    assert row == 5 and 40 <= column <= 44
    assert shown == pytest.approx(gradient(recorded, "2.weight")[row, column].item(), rel=1e-6)
    heat.page.mouse.move(0, 0)
    expect(readout).to_be_empty()
    numbers = gradient(recorded, "2.weight")
    heat.focus()
    for key, place in (
        ("Home", (0, 0)),
        ("ArrowDown", (1, 0)),
        ("Shift+ArrowRight", (1, 10)),
        ("ArrowLeft", (1, 9)),
        ("End", (1, 99)),
        ("ArrowRight", (1, 99)),
        ("Shift+ArrowDown", (9, 99)),
    ):
        heat.press(key)
        shown = value(readout, re.escape(f"[{place[0]}, {place[1]}]"))
        assert shown == pytest.approx(numbers[place].item(), rel=1e-6)
    expect_step(heat.page, 137)


def test_it_is_zoomed_by_keys_buttons_and_wheel_shown_whole_again_and_coloured_by_the_root(tensor):
    heat, _, _ = tensor("chapter", 137, "Backward", "2.weight.grad")
    page = heat.page
    near, far, whole = [
        page.get_by_role("button", name=name, exact=True) for name in ("zoom in", "zoom out", "all")
    ]
    before = picture(heat)
    expect(whole).to_be_disabled()
    near.click()
    expect(whole).to_be_enabled()
    expect_another_picture(heat, before)
    far.click()
    expect(whole).to_be_disabled()
    heat.focus()
    heat.press("+")
    expect(whole).to_be_enabled()
    heat.press("0")
    expect(whole).to_be_disabled()
    page.mouse.move(*across(heat, 0.5))
    page.mouse.wheel(0, -300)
    expect(whole).to_be_enabled()
    heat.dblclick()
    expect(whole).to_be_disabled()
    before = picture(heat)
    scale = page.get_by_role("button", name="square root scale")
    scale.click()
    expect(scale).to_have_attribute("aria-pressed", "true")
    expect_another_picture(heat, before)


def test_near_enough_every_number_of_a_large_tensor_is_told(tensor, recorded):
    heat, readout, _ = tensor("chapter", 137, "Update", "0.weight")
    expect(heat).to_have_attribute("aria-label", re.compile("100.1,000 float32"))
    heat.focus()
    heat.press("End")
    for _ in range(10):
        heat.press("+")
    step = everystep.open(recorded / "chapter")[137]
    assert value(readout, re.escape("[0, 999]")) == pytest.approx(
        step.updates["0.weight"].change[0, 999].item(), rel=1e-6
    )


@pytest.mark.sweep
def test_tensors_of_more_dimensions_are_seen_in_slices(tensor, recorded):
    heat, readout, _ = tensor("digits", 7, "Backward", "2.weight.grad")
    numbers = everystep.open(recorded / "digits")[7].gradients["2.weight"]
    page = heat.page
    expect(page.get_by_text("of 512 slices: [0, 0, :, :]")).to_be_visible()
    page.get_by_role("button", name="next slice").click()
    expect(page.get_by_text("of 512 slices: [0, 1, :, :]")).to_be_visible()
    page.get_by_role("spinbutton", name="slice").fill("35")
    page.get_by_role("spinbutton", name="slice").press("Enter")
    expect(page.get_by_text("of 512 slices: [2, 3, :, :]")).to_be_visible()
    heat.focus()
    heat.press("Home")
    heat.press("ArrowDown")
    assert value(readout, re.escape("[2, 3, 1, 0]")) == pytest.approx(
        numbers[2, 3, 1, 0].item(), rel=1e-6
    )
    heat.press("PageDown")
    assert value(readout, re.escape("[2, 4, 1, 0]")) == pytest.approx(
        numbers[2, 4, 1, 0].item(), rel=1e-6
    )


def test_a_number_has_the_index_of_its_own_slice_until_another_slice_is_there(tensor, recorded):
    heat, readout, _ = tensor("digits", 7, "Backward", "2.weight.grad", expected=["400"])
    numbers = everystep.open(recorded / "digits")[7].gradients["2.weight"]
    page, held = heat.page, []
    page.route(re.compile(r"/tensor\?.*index=1&"), lambda route: held.append(route))
    with page.expect_request(re.compile(r"/tensor\?.*index=1&")):
        page.get_by_role("button", name="next slice").click()
    heat.press("Home")
    first = pytest.approx(numbers[0, 0, 0, 0].item(), rel=1e-6)
    assert value(readout, re.escape("[0, 0, 0, 0]")) == first
    held.pop().fulfill(status=400, json={"error": "there is no such slice"})
    expect(readout).to_have_text("there is no such slice")
    expect(page.get_by_text("of 512 slices: [0, 0, :, :]")).to_be_visible()
    heat.press("Home")
    assert value(readout, re.escape("[0, 0, 0, 0]")) == first
    page.unroute_all()


def test_a_vector_is_one_row_and_a_number_is_told(visit, recorded):
    page = visit("/runs/chapter?step=137&operation=3")
    panel = page.locator("[data-number='3'] .panel").first
    heat = panel.get_by_role("img", name=re.compile("^Heat map of"))
    heat.focus()
    heat.press("Home")
    loss = everystep.open(recorded / "chapter")[137].loss
    expect(panel.locator(".heat-map .readout")).to_have_text(
        re.compile(rf"^{re.escape(f'{loss:.5f}'[:6])}")
    )
    expect(panel.locator(".histogram")).to_be_hidden()
    bias = unfold(part(page, "Backward"), "2.bias.grad")
    bias.get_by_role("img", name=re.compile("^Heat map of 2.bias.grad")).press("End")
    assert value(bias.locator(".heat-map .readout"), re.escape("[9]")) == pytest.approx(
        gradient(recorded, "2.bias")[9].item(), rel=1e-6
    )


def test_numbers_that_are_not_finite_are_marked_and_counted(tensor, recorded):
    run = everystep.open(recorded / "diverged")
    number = next(n for n in range(1, 31) if run[n].gradients["2.weight"].isnan().all())
    heat, readout, histogram = tensor("diverged", number, "Backward", "2.weight.grad")
    expect(heat).to_have_attribute("aria-label", re.compile("1,000 not finite$"))
    expect(heat.page.locator(".legend .not-finite").filter(visible=True)).to_have_text("nan")
    expect(histogram.locator(".readout")).to_have_text("0 numbers, 1,000 not finite")
    heat.press("Home")
    expect(readout).to_have_text("[0, 0] = nan")


def test_the_histogram_counts_each_number(tensor, recorded):
    _, _, histogram = tensor("chapter", 137, "Backward", "2.weight.grad")
    numbers = gradient(recorded, "2.weight").flatten()
    assert all(map(isfinite, numbers.tolist()))
    counts = torch.histc(numbers, 64).int().tolist()
    readout, bars = histogram.locator(".readout"), histogram.get_by_role("img")
    expect(readout).to_have_text("1,000 numbers")
    expect(bars).to_have_attribute("aria-label", re.compile(f"most, {max(counts)}, between "))
    bars.press("Home")
    expect(readout).to_have_text(re.compile(rf"^{counts[0]} from {numbers.min():.4g} to "))
    bars.press("End")
    expect(readout).to_have_text(re.compile(rf"^{counts[-1]} from .* to {numbers.max():.4g}$"))
    bars.press("ArrowLeft")
    expect(readout).to_have_text(re.compile(rf"^{counts[-2]} from "))
    bars.page.mouse.move(*across(bars, 0.001))
    expect(readout).to_have_text(re.compile(rf"^{counts[0]} from "))
    heights = "bars => bars.querySelectorAll('rect')[0].getAttribute('height')"
    before = float(bars.evaluate(heights))
    histogram.get_by_role("button", name="log").click()
    expect(histogram.get_by_role("button", name="log")).to_have_attribute("aria-pressed", "true")
    assert float(bars.evaluate(heights)) > before


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("phase", "name", "python"),
    [
        ("Backward", "2.weight.grad", 'gradients["2.weight"]'),
        ("Update", "0.bias", 'updates["0.bias"].change'),
    ],
)
def test_a_tensor_is_taken_along_as_python_and_as_a_file(visit, recorded, phase, name, python):
    page = visit("/runs/chapter?step=137", permissions=["clipboard-read", "clipboard-write"])
    expect_step(page, 137)
    panel = unfold(part(page, phase), name).locator(".panel")
    panel.get_by_role("button", name="Copy as Python").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f'everystep.open("chapter")[137].{python}'
    link = panel.get_by_role("link", name=".npy")
    assert link.get_attribute("download").endswith(".npy")
    content = page.request.get(f"{page.url.partition('/runs')[0]}{link.get_attribute('href')}").body()
    step = everystep.open(recorded / "chapter")[137]
    expected = eval(f"step.{python}", {"step": step})
    assert torch.equal(torch.from_numpy(np.load(io.BytesIO(content))), expected)


def test_the_line_of_python_opens_the_run_that_is_shown(visit):
    """The name alone would open one in runs/."""
    page = visit("/", permissions=["clipboard-read", "clipboard-write"])
    moved = {"directory": "other/chapter"}
    page.route("**/api/runs/chapter", lambda route: route.fulfill(json=route.fetch().json() | moved))
    row(page, "chapter").get_by_role("link", name="chapter", exact=True).click()
    plot(page)
    page.keyboard.press("Home")
    expect_step(page, 1)
    page.unroute("**/api/runs/chapter")
    panel = unfold(part(page, "Backward"), "2.weight.grad").locator(".panel")
    panel.get_by_role("button", name="Copy as Python").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == 'everystep.open("other/chapter")[1].gradients["2.weight"]'


def test_the_number_that_is_pointed_at_is_copied(visit, recorded):
    page = visit(
        "/runs/chapter?step=137&open=gradients/2.weight",
        permissions=["clipboard-read", "clipboard-write"],
    )
    panel = part(page, "Backward").locator(".panel")
    heat = panel.get_by_role("img", name=re.compile("^Heat map of"))
    expect(heat).to_be_visible()
    copying = panel.get_by_role("button", name="copy this number in full precision")
    expect(copying).to_be_hidden()
    expected = everystep.open(recorded / "chapter")[137].gradients["2.weight"]
    heat.focus()
    heat.press("Home")
    heat.press("ArrowDown")
    copying.focus()  # the cell stays
    page.keyboard.press("Enter")
    expect(panel.get_by_role("status").filter(has_text="Copied")).to_have_count(1)
    assert page.evaluate("navigator.clipboard.readText()") == str(expected[1, 0].numpy())
    page.evaluate("document.activeElement.blur()")
    expect(copying).to_be_hidden()
    page.mouse.move(*across(heat, 0.5))
    copying.click()
    expect(panel.locator(".readout").first).to_have_text(re.compile(r"^\["))
    told = panel.locator(".readout").first.inner_text()
    page.wait_for_function(
        "text => navigator.clipboard.readText().then((copied) => text.endsWith(copied))", arg=told
    )


def test_a_click_on_a_number_says_where_it_comes_from(visit, recorded):
    page = visit("/runs/chapter?step=137")
    panel = unfold(part(page, "Backward"), "2.weight.grad").locator(".panel")
    heat = panel.locator(".heat-map canvas[role=img]")
    expect(heat).to_have_attribute("aria-label", re.compile("^Heat map"))
    place = across(heat, 0.42)
    page.mouse.move(*place)
    said = panel.locator(".heat-map .readout").inner_text()
    row, column = (int(each) for each in re.findall(r"\d+", said)[:2])
    page.mouse.click(*place)
    reasons = panel.locator(".reasons")
    answer = everystep.open(recorded / "chapter").why(137, f"gradients['2.weight'][{row}, {column}]")
    expect(reasons.locator(".reason-of")).to_contain_text(f"{answer.number.name} = ")
    expect(reasons.locator(".terms tr")).to_have_count(9)
    factor = answer.groups[0].terms[0].numbers["self"]
    reasons.get_by_role("button", name=factor.name, exact=True).first.click()
    expect(reasons.locator(".reason-of")).to_contain_text(f"{factor.name} = ")
    reasons.locator(".trail button").click()
    expect(reasons.locator(".reason-of")).to_contain_text(f"{answer.number.name} = ")


def test_numbers_are_rounded_as_in_the_terminal(visit):
    numbers = [each / 64 for each in range(1, 300)] + [
        -2.0625,
        0.15625,
        1234.5,
        1235.5,
        1e-7,
        2.5e-9,
        9999.4,
        9999.6,
        12345.0,
        7e5,
        1e6,
    ]
    shown = visit("/").evaluate(
        """async (numbers) => {
            const { short } = await import("/static/shared/format.js");
            return numbers.map((each) => short(each));
        }""",
        numbers,
    )
    assert shown == [number(each) for each in numbers]


def test_whole_numbers_that_are_not_exact_are_said_to_be_about(visit):
    texts = visit("/").evaluate(
        """async () => {
            const { Patch } = await import("/static/tensor/patch.js");
            const cells = { block: [1, 1], rows: [0, 1], columns: [0, 2], height: 1, width: 2 };
            const numbers = new Float64Array([2 ** 53 - 1, -(2 ** 53)]);
            const patch = new Patch({ ...cells, numbers, dtype: "int64", format: "float64" });
            return [0, 1].map((column) => patch.text([0, column]));
        }"""
    )
    assert texts == ["9007199254740991", "about -9007199254740992"]


def test_what_is_different_never_looks_the_same_by_rounding(visit):
    texts = visit("/").evaluate(
        """async () => {
            const { distinct, percent } = await import("/static/shared/format.js");
            const scales = [[0.99987, 1.00012], [0, 1.5], [1, 1], [-1e-45, 1e38], [1e6, 1e6 + 0.5]];
            const shares = [0.9999, 1, 0.99999999, 0.5, 1.5, 1e-9];
            return [...scales.map((each) => distinct(each, 3)), shares.map(percent)];
        }"""
    )
    assert texts == [
        ["0.99987", "1.0001"],
        ["0", "1.5"],
        ["1", "1"],
        ["-1e-45", "1e+38"],
        ["1000000", "1000000.5"],
        ["99.99%", "100%", "99.999999%", "50%", "150%", "1e-07%"],
    ]
