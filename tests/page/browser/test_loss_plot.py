"""The plot of the losses in the browser: points and lines, axes, averages, measurements, zoom."""

import math
import re
from itertools import pairwise

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import (
    across,
    changed,
    expect_another_picture,
    expect_axe_finds_nothing_serious,
    expect_no_sideways_scrolling,
    expect_step,
    part,
    picture,
    plot,
)

import everystep


@pytest.fixture
def chapter(visit):
    """Show the chapter's run on a linear axis."""
    page = visit("/runs/chapter?log=0")
    plot(page)
    return page


def toggle(page, name):
    shown = page.get_by_role("group", name="what the plot shows")
    return shown.get_by_role("button", name=name, exact=True)


def readout(page):
    """Return the text of the plot."""
    return part(page, "loss of every step").locator(".readout")


def test_a_click_goes_to_the_step_under_the_pointer(chapter):
    at = across(plot(chapter), 0.5)
    chapter.mouse.move(*at)
    expect(readout(chapter)).to_have_text(re.compile(r"^step 2[45]\d\s*loss "))
    step = int(re.search(r"\d+", readout(chapter).inner_text())[0])
    chapter.mouse.click(*at)
    expect_step(chapter, step)
    expect(chapter.locator(".at-step")).to_contain_text(str(step))
    expect(chapter.get_by_role("slider", name="step")).to_have_attribute("aria-valuenow", str(step))
    expect(chapter.locator("tr[aria-selected=true]")).to_have_attribute("data-step", str(step))


def test_a_tap_goes_there_too(visit):
    page = visit("/runs/chapter", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.touchscreen.tap(*across(plot(page), 0.5))
    expect(page).to_have_url(re.compile(r"step=2\d\d$"))


def test_keys_walk_from_point_to_point_and_tell_every_digit(chapter, recorded):
    chapter.get_by_role("slider", name="step").focus()
    for key in ("Home", "Shift+ArrowRight", "ArrowRight", "ArrowLeft"):
        chapter.keyboard.press(key)
    losses = everystep.open(recorded / "chapter").losses["loss"]
    expect(readout(chapter)).to_have_text(re.compile(r"^step 11\s*loss"))
    assert float(readout(chapter).inner_text().split()[-1]) == pytest.approx(losses[10], rel=1e-6)
    chapter.keyboard.press("Enter")
    expect_step(chapter, 11)


@pytest.mark.parametrize("name", ["line", "log axis"])
def test_points_become_a_line_and_the_axis_logarithmic_and_back(chapter, name):
    canvas = chapter.locator(".plot canvas")
    before = picture(canvas)
    expect(toggle(chapter, name)).to_have_attribute("aria-pressed", "false")
    toggle(chapter, name).click()
    expect(toggle(chapter, name)).to_have_attribute("aria-pressed", "true")
    expect(toggle(chapter, name)).to_be_focused()
    expect_another_picture(canvas, before)
    toggle(chapter, name).press("Enter")
    chapter.wait_for_function(
        "before => document.querySelector('.plot canvas').toDataURL() === before", arg=before
    )


#: The numbers at the axis of the loss, which are written, not marked up, and their heights from the top.
WRITTEN = """() => {
  const { fillText } = CanvasRenderingContext2D.prototype;
  window.written = [];
  window.writeAsBefore = () => (CanvasRenderingContext2D.prototype.fillText = fillText);
  CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
    const isNumber = this.textAlign === "right" && /^[-+.e\\d]+$/.test(text);
    if (isNumber) window.written.push([text, y / devicePixelRatio]);
    return fillText.apply(this, arguments);
  };
}"""


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("most", "path", "height"), [(0.5, "", 900), (5e4, "&step=1", 700), (1e30, "&step=1", 700)]
)
def test_the_numbers_of_a_log_axis_can_be_read(copied, visit, most, path, height):
    run = copied("chapter")
    with changed(run) as database:
        database.connection.execute("DELETE FROM steps")
        database.forget_after(3)  # of which the page opens one
        database.write_losses(1, [most, most / 3, 0.2])
        database.write_facts({"steps": 3})
    page = visit(f"/runs/{run.name}?log=0{path}", viewport={"width": 1280, "height": height})
    plot(page)
    page.evaluate(WRITTEN)
    toggle(page, "log axis").click()
    page.wait_for_function("window.written.length > 0")
    heights = sorted({height for _, height in page.evaluate("window.written")})
    assert len(heights) > 1
    assert min(below - above for above, below in pairwise(heights)) >= 14
    page.evaluate("window.writeAsBefore() && null")


@pytest.mark.sweep
def test_many_measurements_leave_the_plot_on_the_first_screen(copied, visit):
    run = copied("chapter")
    names = [f"measured {number:03}" for number in range(150)]
    with changed(run) as database:
        database.write_measurements([(name, step, float(step)) for name in names for step in (1, 500)])
    page = visit(f"/runs/{run.name}", viewport={"width": 360, "height": 740})
    box = plot(page).bounding_box()
    assert box["y"] + box["height"] < 740
    more = page.get_by_role("button", name=re.compile(r"^\d+ more$"))
    more.press("Enter")
    panel = page.get_by_role("group", name="more measurements")
    expect(panel.get_by_role("searchbox")).to_be_focused()
    expect_no_sideways_scrolling(page)
    expect_axe_finds_nothing_serious(page)
    page.keyboard.type("D 14")
    expect(panel.get_by_role("button")).to_have_text(names[140:])
    panel.get_by_role("button", name=names[147]).click()
    expect(panel.get_by_role("button", name=names[147])).to_be_focused()
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    expect(more).to_be_focused()
    expect(toggle(page, names[147])).to_have_attribute("aria-pressed", "true")
    page.get_by_role("slider", name="step").focus()
    page.keyboard.press("End")
    expect(readout(page)).to_contain_text(names[147])
    toggle(page, names[147]).click()
    expect(toggle(page, names[147])).to_have_attribute("aria-pressed", "false")
    more.click()
    panel.get_by_role("searchbox").fill("nothing")
    expect(panel.get_by_text("no measurement matches")).to_be_visible()
    page.mouse.click(*across(plot(page), 0.9))
    expect(panel).to_be_hidden()


def test_losses_that_are_close_have_different_numbers_at_the_axis(copied, visit):
    run = copied("chapter")
    with changed(run) as database:
        database.forget_after(0)
        database.write_losses(1, [2.3025850, 2.3025853, 2.3025862])
        database.write_facts({"steps": 3, "loss_dtype": "float64"})
    page = visit(f"/runs/{run.name}?log=0")
    plot(page)
    page.evaluate(WRITTEN)
    toggle(page, "line").click()
    page.wait_for_function("window.written.length > 0")
    written = page.evaluate("window.written")
    page.evaluate("window.writeAsBefore() && null")
    assert len({text for text, _ in written}) == len({height for _, height in written}) > 2


@pytest.mark.parametrize("losses", [[1e-30, 1e-30], [-1e30, math.nan]])
def test_the_numbers_at_the_axis_are_near_the_losses(copied, visit, losses):
    run = copied("chapter")
    with changed(run) as database:
        database.forget_after(0)
        database.write_losses(1, losses)
        database.write_facts({"steps": 2, "loss_dtype": "float64"})
    page = visit(f"/runs/{run.name}?log=0")
    plot(page)
    page.evaluate(WRITTEN)
    toggle(page, "line").click()
    page.wait_for_function("window.written.length > 0")
    written = [float(text) for text, _ in page.evaluate("window.written")]
    page.evaluate("window.writeAsBefore() && null")
    assert 0 in written and all(abs(losses[0]) / 10 < abs(number) < 3e30 for number in written if number)
    assert max(written) <= 3 * abs(losses[0])


def test_losses_that_a_log_axis_cannot_show_are_said_but_not_counted(copied, visit):
    run = copied("chapter")
    with changed(run) as database:
        database.write_losses(501, [step % 7 for step in range(20_000)])  # the plot has some of them
    page = visit(f"/runs/{run.name}?log=1")
    expect(readout(page)).to_contain_text("Losses of 0 or less are not shown on a log axis.")


def test_the_axis_is_the_one_on_which_the_losses_can_be_read(visit, copied):
    def expect_log(page, is_log):
        plot(page)
        expect(toggle(page, "log axis")).to_have_attribute("aria-pressed", str(is_log).lower())

    page = visit("/runs/chapter")  # from 628 to 1.5e-05
    expect_log(page, True)
    page.keyboard.press("l")
    expect(page).to_have_url(re.compile(r"\?log=0$"))
    page.reload()
    expect_log(page, False)
    for losses, is_log in [
        ([1.0, 3e4, 2e9, 5e20, math.inf, math.nan], True),
        ([2.0, 0.5, 0.003], False),
        ([628.0, 1e-5, 0.0], False),  # a log axis would not show the last
    ]:
        run = copied("chapter")
        with changed(run) as database:
            database.forget_after(0)
            database.write_losses(1, losses)
            database.write_facts({"steps": len(losses)})
        expect_log(visit(f"/runs/{run.name}"), is_log)


def test_losses_are_smoothed_as_adam_would(chapter, recorded):
    before = picture(chapter.locator(".plot canvas"))
    chapter.get_by_role("slider", name="smoothing").fill("0.9")
    expect_another_picture(chapter.locator(".plot canvas"), before)
    chapter.get_by_role("slider", name="step").focus()
    chapter.keyboard.press("Home")
    chapter.keyboard.press("ArrowRight")
    first, second = everystep.open(recorded / "chapter").losses["loss"][:2]
    average = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    expect(readout(chapter)).to_contain_text(f"loss, smoothed {average:.6g}")


def test_dragging_zooms_and_the_whole_run_comes_back(chapter):
    whole = chapter.get_by_role("button", name="whole run")
    expect(whole).to_be_hidden()
    drag(chapter, 0.4, 0.6)
    expect(whole).to_be_visible()
    expect(chapter.locator(".step")).to_be_hidden()
    chapter.mouse.move(*across(plot(chapter), 0.01))
    expect(readout(chapter)).to_have_text(re.compile(r"^step (19\d|20\d)\s*loss"))
    whole.click()
    expect(whole).to_be_hidden()
    drag(chapter, 0.4, 0.6)
    expect(whole).to_be_visible()
    chapter.mouse.dblclick(*across(plot(chapter), 0.5))
    expect(whole).to_be_hidden()
    expect(chapter.locator(".step")).to_be_hidden()


def drag(page, start, end):
    page.mouse.move(*across(plot(page), start))
    page.mouse.down()
    page.mouse.move(*across(plot(page), end), steps=3)
    page.mouse.up()


def test_a_long_run_is_reduced_until_it_is_looked_at_closely(copied, visit):
    run = copied("chapter")
    with changed(run) as database:
        database.write_losses(501, [step % 7 for step in range(20_000)])
    page = visit(f"/runs/{run.name}")
    slider = page.get_by_role("slider", name="step")
    expect(slider).to_have_attribute("aria-valuemax", "20500")
    page.get_by_role("slider", name="smoothing").fill("0.9")
    slider.press("End")
    expect(readout(page)).to_contain_text("loss, points smoothed")
    page.get_by_role("slider", name="smoothing").fill("0")
    drag(page, 0.5, 0.52)
    page.mouse.move(0, 0)
    # Once all is there, the next point is the next step.
    page.wait_for_function(f"plot => {STRIDE}(plot) === 1", arg=slider.element_handle())


def test_a_line_has_a_gap_where_a_measurement_is_not_finite(copied, visit):
    run = copied("chapter")
    for middle in (math.nan, 0.5):
        values = [0.5] * 100 + [middle] * 300 + [0.5] * 100
        with changed(run) as database:
            database.write_measurements([("a", step, value) for step, value in enumerate(values, 1)])
        page = visit(f"/runs/{run.name}", expected=["willReadFrequently"])
        toggle(page, "loss").click()
        over = plot(page)
        page.wait_for_function(f"over => {DRAWN}(over, 0.02, 0.18)", arg=over.element_handle())
        assert over.evaluate(f"over => {DRAWN}(over, 0.25, 0.75)") is (middle == 0.5)


#: Whether pixels between two shares of the width of a plot have the colour of the second line.
DRAWN = """((over, from, to) => {
  const canvas = over.parentNode.querySelector("canvas");
  const [left, width] = [over.offsetLeft, over.offsetWidth].map((each) => each * devicePixelRatio);
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--series-1").trim();
  const wanted = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const part = [left + from * width, 0, (to - from) * width, canvas.height];
  const image = canvas.getContext("2d").getImageData(...part);
  for (let at = 0; at < image.data.length; at += 4)
    if (wanted.every((each, channel) => each === image.data[at + channel])) return true;
  return false;
})"""


STRIDE = """(plot => {
  const press = () => {
    plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
    return Number(plot.getAttribute("aria-valuenow"));
  };
  return -press() + press();
})"""


def test_a_click_on_runs_over_each_other_goes_to_the_first(visit, recorded):
    page = visit("/runs/fork?overlay=chapter")
    plot(page)
    page.get_by_role("slider", name="step").focus()
    page.keyboard.press("End")
    for name in ("fork", "chapter"):
        loss = everystep.open(recorded / name).losses["loss"][-1]
        expect(readout(page)).to_contain_text(re.compile(rf"{name} {re.escape(f'{loss:.4g}'[:4])}"))
    page.keyboard.press("Enter")
    expect_step(page, 500)
    expect(page).to_have_url(re.compile("/runs/fork.*overlay=chapter"))
    toggle(page, "fork").click()
    expect(toggle(page, "fork")).to_have_attribute("aria-pressed", "false")


@pytest.mark.sweep
def test_how_the_plot_is_drawn_is_in_the_address(visit):
    page = visit("/runs/chapter?log=0&smooth=-5")  # no weight of an average
    plot(page)
    expect(page.locator(".smoothing output")).to_have_text("0")
    for name in ("line", "log axis"):
        page.get_by_role("button", name=name, exact=True).click()
    page.get_by_role("slider", name="smoothing").fill("0.5")
    page.wait_for_url(re.compile(r"\?line=1&log=1&smooth=0\.5$"))
    page.keyboard.press("End")
    page.reload()
    plot(page)
    for name in ("line", "log axis"):
        button = page.get_by_role("button", name=name, exact=True)
        expect(button).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("slider", name="smoothing")).to_have_value("0.5")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="line", exact=True).click()
    page.go_back()
    expect(page).to_have_url(re.compile("line=1"))
    expect(page.get_by_role("button", name="line", exact=True)).to_have_attribute("aria-pressed", "true")


@pytest.mark.sweep
def test_a_loop_that_logs_no_loss_has_neither_points_nor_a_column_of_losses(visit, copied):
    run = copied("chapter")
    with changed(run) as database:
        database.forget_after(0)
        database.write_losses(1, [None] * 500)
        database.write_facts({"loop": {"parts": {}, "programs": 1, "unseen": [], "has_loss": False}})
    page = visit(f"/runs/{run.name}?step=137", expected=["404"])  # it is not the step of a loop
    expect(part(page, "table of every step").get_by_role("columnheader")).to_have_text(["step"])
    expect(page.get_by_role("textbox", name="losses from")).to_be_hidden()
    expect(readout(page)).to_have_text(re.compile(r"^step 137\s*$"))
    expect(page.locator(".at-step")).to_have_text("137")
    expect(toggle(page, "log axis")).to_have_count(0)
    page.mouse.move(*across(plot(page), 0.5))
    expect(readout(page)).to_have_text(re.compile(r"^step 2[45]\d\s*$"))
    page.goto(page.url.partition("?")[0])
    expect(readout(page)).to_have_text("This loop logs no loss. Click to open a step.")
    # Over the losses of another run, it has none either: no mark for losses that are not finite.
    page.goto(f"{page.url.partition('/runs/')[0]}/overlay?run=chapter&run={run.name}")
    plot(page)
    readouts = page.locator(".readout")
    expect(readouts).to_have_text(re.compile("whole run.$"))
    page.mouse.move(*across(plot(page), 0.6))
    expect(readouts).to_have_text(re.compile(r"^step (29|30)\d\s*chapter [\d.]+$"))
