"""One step in the browser: its five phases, from the batch to the update."""

import re

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import (
    expect_another_picture,
    expect_step,
    heading,
    operation,
    part,
    picture,
    unfold,
)

import everystep

PHASES = ["Batch", "Forward", "Loss", "Zero grad", "Backward", "Update"]


@pytest.fixture
def chapter(visit):
    """The chapter's step 137."""

    def show(query="", **options):
        page = visit(f"/runs/chapter?step=137{query}", **options)
        expect_step(page, 137)
        return page

    return show


@pytest.fixture
def step(recorded):
    return everystep.open(recorded / "chapter")[137]


def test_a_step_shows_the_very_numbers_that_python_gives(chapter, step):
    page = chapter()
    shown = page.locator(".step")
    [loss, exact] = [page.locator(f".step-heading {place}") for place in (".loss-full", ".exactness")]
    assert float(loss.inner_text()) == pytest.approx(step.loss, rel=1e-7)
    expect(exact).to_have_text("Replayed without your code, bit-identical.")
    assert shown.get_by_role("heading", level=3).all_inner_texts() == [
        f"{number} {name}".strip() for number, name in zip(["", *range(1, 6)], PHASES, strict=True)
    ]
    gradients = part(page, "Backward").locator(".tensor")
    assert gradients.locator(".unfold").first.inner_text() == "Linear 2 · weight grad"
    names = gradients.locator(".unfold").evaluate_all("all => all.map(one => one.title)")
    assert names[0] == "2.weight.grad" and set(names) == {f"{name}.grad" for name in step.gradients}
    for row, name in zip(gradients.all(), names, strict=True):
        gradient = step.gradients[name.removesuffix(".grad")]
        expect(row).to_contain_text(f"norm {gradient.norm():.4g}".rstrip("0"))
    dropped = unfold(part(page, "Zero grad"), "0.weight.grad")
    expect(dropped).to_contain_text(f"norm {step.dropped['0.weight'].norm():.4g}".rstrip("0"))
    # Each operation is a line of mathematics, and of ATen.
    for number, line, operator in (
        (0, "x · 0.weightT + 0.bias", "aten.addmm.default"),
        (1, "relu(#0)", "aten.relu.default"),
        (3, "loss = sum((#2 \N{MINUS SIGN} y)2)", "aten.mse_loss.default"),
        (10, "0.weight.grad = ∂#0T · x", "aten.mm.default"),
    ):
        expect(operation(page, number).locator(".mathematics")).to_have_text(line)
        expect(operation(page, number).locator(".operator")).to_have_text(operator)
    operation(page, 1).get_by_role("link", name="#0").click()
    expect(operation(page, 0).get_by_role("button", expanded=True).first).to_be_visible()
    expect(operation(page, 0)).to_contain_text("Arguments")


def test_the_update_is_told_in_both_notations_with_its_relative_size(chapter, step):
    page = chapter()
    update = part(page, "Update")
    expect(update).to_contain_text("param - param.grad * 0.0001")
    expect(update).to_contain_text("torch.sub(param, torch.mul(param.grad, 0.0001))")
    row = update.locator(".update-row").first
    one = step.updates["0.weight"]
    expect(row.locator(".relative")).to_have_text(f"{100 * one.relative_size:.3g}%")
    expect(row).to_contain_text(
        re.compile(rf"before {one.before.norm():.4g}\s*after {one.after.norm():.4g}")
    )
    row.get_by_role("button", name="Linear 0 · weight").click()
    for name in ("change", "before", "after"):
        row.get_by_role("button", name=name, exact=True).click()
        expect(
            row.get_by_role("img", name=re.compile(f"^Heat map of 0.weight, {name}:"))
        ).to_be_visible()
    row.get_by_role("link", name="#12").click()
    expect(operation(page, 12)).to_be_visible()


def test_phase_and_operation_are_in_the_address_and_back_works(chapter):
    page = chapter()
    phases = page.get_by_role("navigation", name="phases of the step")
    phases.get_by_role("link", name="Backward").click()
    expect(page).to_have_url(re.compile(r"\?step=137&phase=backward$"))
    expect(part(page, "Backward")).to_be_in_viewport()
    expect(phases.get_by_role("link", name="Backward")).to_have_attribute("aria-current", "true")
    toggle = operation(page, 4).get_by_role("button", name=re.compile("^operation #4: "))
    toggle.click()
    expect(page).to_have_url(re.compile(r"\?step=137&phase=backward&operation=4$"))
    expect(toggle).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("ArrowRight")
    expect_step(page, 138)
    expect(page).to_have_url(re.compile(r"\?step=138&phase=backward&operation=4$"))
    expect(toggle).to_have_attribute("aria-expanded", "true")
    for _ in range(2):
        page.go_back()
    expect_step(page, 137)
    expect(page).to_have_url(re.compile(r"\?step=137&phase=backward$"))
    expect(toggle).to_have_attribute("aria-expanded", "false")
    page.go_back()
    expect(page).to_have_url(re.compile(r"\?step=137$"))


def test_the_network_is_drawn_layer_by_layer_and_each_tells_all_of_itself(chapter, step):
    page = chapter()
    layers = page.get_by_role("list", name="the network, layer by layer")
    told = layers.get_by_role("listitem").all_inner_texts()
    assert [each.replace("\N{MULTIPLICATION SIGN}", " ").split() for each in told] == [
        ["x", "64", "1,000"],
        ["Linear", "0", "1,000", "→", "100", "64", "100"],
        ["ReLU", "1", "64", "100"],
        ["Linear", "2", "100", "→", "10", "64", "10"],
        ["MSELoss"],
    ]
    layers.get_by_role("button", name=re.compile("^Linear 0")).click()
    detail = page.locator(".layer-detail")
    expect(detail).to_contain_text("Linear(in_features=1000, out_features=100, bias=True)")
    for name in ("output", "weight", "weight.grad", "bias", "bias.grad"):
        expect(detail.get_by_role("button", name=name, exact=True)).to_be_visible()
    expect(detail).to_contain_text(f"norm {step.activations['0'].norm():.4g}".rstrip("0"))
    detail.get_by_role("link", name="#10").click()
    expect(page).to_have_url(re.compile("operation=10"))


def test_images_are_shown_as_images_with_their_classes_and_rows(visit, recorded):
    page = visit("/runs/digits?step=7")
    expect(heading(page)).to_have_text(re.compile("^Step 7 of"))
    batch = part(page, "Batch")
    step = everystep.open(recorded / "digits")[7]
    images = batch.get_by_role("img", name=re.compile("^image of row"))
    expect(images).to_have_count(16)
    targets = step.batch.y.tolist()
    expect(batch.locator("figcaption")).to_have_text([str(target) for target in targets[:16]])
    # An ink stroke is lighter or darker than the paper, so that no image is of one colour.
    colours = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, 8, 8).data).size"
    assert images.first.evaluate(colours) > 5
    batch.get_by_role("button", name="Show more (16 of 64)").click()
    expect(images).to_have_count(32)
    expect(batch).to_contain_text("64 rows of the data:")
    batch.get_by_role("button", name="all", exact=True).click()
    rows = batch.locator("p.rows").inner_text().partition(": ")[2]
    assert len(rows.split(",")) == 64


def test_what_is_unfolded_stays_so_from_step_to_step(chapter, recorded):
    page = chapter()
    gradient = unfold(part(page, "Backward"), "2.bias.grad")
    expect(gradient.get_by_role("img", name=re.compile("^Heat map of 2.bias.grad:"))).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("End")
    expect_step(page, 500)
    norm = everystep.open(recorded / "chapter")[500].gradients["2.bias"].norm()
    expect(
        gradient.get_by_role("img", name=re.compile(f"^Heat map of 2.bias.grad:.*norm {norm:.4g}"))
    ).to_be_visible()


@pytest.mark.sweep
def test_every_row_with_a_tensor_has_a_picture_of_it(chapter):
    page = chapter()
    for name, count in (("Batch", 2), ("Forward", 3), ("Zero grad", 4), ("Update", 4)):
        shown = part(page, name)
        shown.scroll_into_view_if_needed()
        rows = shown.locator(".unfolding > .head:has(.thumbnail) canvas:not([width='1'])")
        expect(rows).to_have_count(count)
    expect(part(page, "Loss").locator(".thumbnail canvas")).to_be_hidden()  # of one number
    # They have the colours of the page.
    small = part(page, "Forward").locator(".thumbnail canvas:not([width='1'])").first
    small.scroll_into_view_if_needed()
    before = picture(small)
    page.emulate_media(color_scheme="dark")
    expect_another_picture(small, before)
    # A phone has them too.
    page.set_viewport_size({"width": 390, "height": 844})
    part(page, "Backward").scroll_into_view_if_needed()
    pictures = part(page, "Backward").locator(".thumbnail canvas:not([width='1'])")
    expect(pictures.first).to_be_visible()
    box, next_to = pictures.first.bounding_box(), part(page, "Backward").bounding_box()
    assert box["x"] + box["width"] <= next_to["x"] + next_to["width"]


@pytest.mark.sweep
def test_how_the_page_looks_is_remembered(visit):
    page = visit("/runs/chapter?step=137")
    expect_step(page, 137)
    operator = page.locator("[data-number='0'] .operator")
    expect(operator).to_be_hidden()
    before = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    page.get_by_role("button", name="appearance").click()
    choices = page.get_by_role("dialog")
    for name in ("dark", "large, for a projector"):
        choices.get_by_role("button", name=name, exact=True).click()
    operators = choices.get_by_role("group", name="Operator names (aten.mm)")
    operators.get_by_role("button", name="shown", exact=True).click()
    page.keyboard.press("Escape")
    expect(operator).to_have_text("aten.addmm.default")
    page.reload()
    expect_step(page, 137)
    expect(operator).to_be_visible()
    page.wait_for_function("getComputedStyle(document.documentElement).fontSize === '20px'")
    after = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert before != after
    page.evaluate("localStorage.clear()")  # the window is that of other tests, too
    page.reload()


@pytest.mark.sweep
def test_a_link_shows_the_same_tensors_unfolded(chapter, visit):
    page = chapter()
    page.locator(".layers").get_by_role("button").first.click()
    weight = unfold(part(page, "Forward").locator(".layer-detail"), "weight")
    expect(weight.locator(".panel canvas").first).to_be_visible()
    unfold(part(page, "Backward"), "2.weight.grad")
    operation(page, 3).locator("> .head .unfold").click()
    expect(operation(page, 3).locator(".panel")).to_have_count(1)
    expect(page).to_have_url(re.compile("operation=3"))
    shown = page.locator(".unfold[aria-expanded=true], .box[aria-expanded=true]")
    names = shown.all_inner_texts()
    assert len(names) == 5
    address = page.url
    assert "results" not in address  # the first result of an operation is always there
    visit("/runs/digits")
    linked = visit(address[address.index("/runs/") :])
    expect(shown).to_have_text([re.compile(re.escape(name.split("\n")[0])) for name in names])
    expect(operation(linked, 3)).to_be_in_viewport()
    page.keyboard.press("ArrowRight")
    expect_step(page, 138)
    expect(shown).to_have_count(5)
    page.go_back()
    expect_step(page, 137)


def test_back_folds_what_was_unfolded(chapter):
    page = chapter()
    first = unfold(part(page, "Backward"), "2.weight.grad")
    second = unfold(part(page, "Backward"), "0.weight.grad")
    expect(second.locator(".panel")).to_be_visible()
    operation(page, 3).locator("> .head .unfold").click()
    operation(page, 4).locator("> .head .unfold").click()
    expect(page).to_have_url(re.compile("operation=4"))
    page.go_back()
    expect(operation(page, 4).locator(".insides")).to_have_count(0)
    expect(operation(page, 3).locator(".insides")).to_have_count(1)
    page.go_back()
    expect(operation(page, 3).locator(".insides")).to_have_count(0)
    page.go_back()
    expect(second.locator(".panel")).to_have_count(0)
    expect(first.locator(".panel")).to_have_count(1)
    page.go_forward()
    expect(second.locator(".panel")).to_have_count(1)


CLIPBOARD = ["clipboard-read", "clipboard-write"]


@pytest.mark.sweep
def test_formula_and_link_of_an_operation_and_the_loss_are_copied(visit, step):
    page = visit("/runs/chapter?step=137", permissions=CLIPBOARD)
    expect_step(page, 137)
    row = operation(page, 0)
    formula, link = (
        row.get_by_role("button", name=f"copy the {what} #0") for what in ("formula of", "link to")
    )
    expect(formula).to_be_hidden()
    row.hover()
    formula.click()
    expect(row.get_by_role("status").first).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert f"operation #0: {copied}" == row.locator("> .head .unfold").get_attribute("aria-label")
    expect(row.locator(".insides")).to_have_count(0)  # the row is not unfolded by that
    page.mouse.move(0, 0)
    row.locator("> .head .unfold").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(link).to_be_focused()
    page.keyboard.press("Enter")
    expect(row.get_by_role("status").last).to_have_text("Copied")
    address = page.evaluate("navigator.clipboard.readText()")
    page.get_by_role("button", name="copy the loss in full precision").click()
    assert float(page.evaluate("navigator.clipboard.readText()")) == pytest.approx(step.loss, rel=1e-7)
    linked = visit(address[address.index("/runs/") :], permissions=CLIPBOARD)
    expect(operation(linked, 0).locator(".insides")).to_be_visible()


@pytest.mark.parametrize(("query", "says"), [
    ("operation=99", "Step 137 has no operation #99; it has #0 to #"),
    ("phase=sleeping", "Step 137 has no phase “sleeping”"),
])  # fmt: skip
def test_an_address_with_what_is_not_there_says_so(chapter, query, says):
    page = chapter(f"&{query}")
    alert = page.locator(".step").get_by_role("alert").first
    expect(alert).to_contain_text(says)
    operation(page, 3).locator("> .head .unfold").click()
    expect(alert).to_be_hidden()
