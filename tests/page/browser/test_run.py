"""One run in the browser: its description, and stepping through it."""

import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.page.browser.places import at, changed, expect_step, heading, part, plot, press, row
from tests.page.serving import remove

import everystep


def test_what_a_run_is_in_the_chapters_order(visit, recorded):
    page = visit("/runs/chapter")
    losses = everystep.open(recorded / "chapter").losses["loss"]
    expect(page.get_by_text(f"finished · 500 steps · loss {losses[-1]:.4g}")).to_be_visible()
    labels = page.locator("dl.facts > dt").all_inner_texts()
    chapters = ["data", "model", "loss", "update", "steps"]
    assert [label for label in labels if label in chapters] == chapters
    expect(page.locator("dl.facts")).to_contain_text(
        "GradientDescent(lr=0.0001): parameter - gradient * 0.0001"
    )
    expect(page.get_by_text("forked at 137:")).to_be_visible()
    landmarks = page.locator("dl.landmarks")
    expect(landmarks).to_contain_text(f"{losses[0]:.4g}")
    landmarks.get_by_role("link", name="step 500").first.click()
    expect_step(page, 500)


@pytest.mark.sweep
def test_forks_appear_once_the_other_runs_are_read(visit):
    page = visit("/")
    left = [3, 1]

    def answer(route):
        about = route.fetch().json()
        hidden = {"forks": [], "unread": left.pop(0)} if left else {}
        route.fulfill(json=about | hidden)

    page.route("**/api/runs/chapter", answer)
    row(page, "chapter").get_by_role("link", name="chapter", exact=True).click()
    expect(page.get_by_text("3 runs are not read yet")).to_be_visible()
    expect(page.get_by_text("forked at 137:")).to_be_visible()
    expect(page.get_by_text("not read yet")).to_be_hidden()
    page.unroute("**/api/runs/chapter")


def test_keys_step_jump_and_leave_and_back_works(visit):
    page = visit("/runs/chapter")
    plot(page)
    for key, number in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("Shift+ArrowRight", 12),
        ("ArrowLeft", 11),
        ("End", 500),
        ("Home", 1),
    ):
        page.keyboard.press(key)
        expect_step(page, number)
        assert page.url.endswith(f"?step={number}")
    for typed, number in (("137", 137), ("-10", 127), ("+1", 128), ("9999", 500), ("137", 137)):
        page.keyboard.press("/")
        page.keyboard.type(typed)
        page.keyboard.press("Enter")
        expect_step(page, number)
    expect(page).to_have_title(re.compile("^chapter · step 137 "))
    page.go_back()
    expect_step(page, 500)
    page.go_forward()
    expect_step(page, 137)
    page.keyboard.press("Escape")
    expect(page.locator(".step")).to_be_hidden()
    page.go_back()
    expect_step(page, 137)


def test_what_is_typed_into_a_field_goes_nowhere_else(visit):
    page = visit("/runs/chapter?step=137")
    expect_step(page, 137)
    page.get_by_role("textbox", name="Measure").press_sequentially("p/f?l")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    expect(page.get_by_role("textbox", name="Measure")).to_have_value("p/f?l")
    expect(page.get_by_role("dialog")).to_have_count(0)
    field = page.get_by_role("textbox", name="step", exact=True)
    field.fill("many")
    field.press("Enter")
    expect(field).to_have_attribute("aria-invalid", "")
    expect_step(page, 137)


def test_a_question_mark_shows_the_keys(visit):
    page = visit("/runs/chapter")
    plot(page)
    page.keyboard.press("?")
    help = page.get_by_role("dialog", name="Keys")
    for words in (
        "the previous step; ten with Shift",
        "the last step",
        "go to a step",
        "play through the run",
    ):
        expect(help).to_contain_text(words)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    expect(help).to_be_hidden()
    expect(page.locator(".step")).to_be_hidden()
    page.get_by_role("button", name="keys").click()
    expect(help).to_be_visible()
    help.get_by_role("button", name="Close").click()
    expect(help).to_be_hidden()


def test_a_run_has_two_ends(visit):
    page = visit("/runs/chapter?step=1")
    expect_step(page, 1)
    expect(part(page, "Zero grad")).to_contain_text("no gradients yet")
    for name in ("first step (Home)", "\N{MINUS SIGN}10", "the previous step (←)"):
        expect(page.get_by_role("button", name=name)).to_be_disabled()
    page.keyboard.press("Shift+ArrowLeft")
    expect_step(page, 1)
    page.get_by_role("button", name="last step (End)").click()
    expect_step(page, 500)
    expect(part(page, "Zero grad")).to_contain_text("drops the gradients of step 499")
    for name in ("the next step (→)", "+10", "last step (End)", "play (p)"):
        expect(page.get_by_role("button", name=name)).to_be_disabled()
    page.keyboard.press("ArrowRight")
    expect_step(page, 500)
    page.keyboard.press("Shift+ArrowLeft")
    expect_step(page, 490)


def test_quick_stepping_ends_at_the_step_that_was_asked_for_last(visit):
    page = visit("/runs/chapter?step=137")
    expect_step(page, 137)
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    expect_step(page, 177)
    expect(page.locator("tr[aria-selected=true]")).to_have_attribute("data-step", "177")
    page.go_back()
    expect_step(page, 137)


def test_play_goes_through_the_run_and_stops(visit):
    page = visit("/runs/chapter?step=480")
    expect_step(page, 480)
    page.keyboard.press("p")
    expect(page.get_by_role("button", name="pause (p)")).to_be_visible()
    expect(heading(page)).not_to_have_text("Step 480 of 500")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="play (p)")).to_be_visible()
    expect(heading(page)).to_be_visible()
    page.get_by_label("speed").select_option(label="at full speed")
    page.get_by_role("button", name="play (p)").click()
    expect_step(page, 500)
    expect(page.get_by_role("button", name="play (p)")).to_be_disabled()
    page.go_back()
    expect_step(page, 480)


@pytest.mark.sweep
def test_two_tabs_walk_by_themselves(visit):
    one = visit("/runs/chapter?step=137")
    expect_step(one, 137)
    other = one.context.new_page()
    other.goto(one.url)
    expect_step(other, 137)
    for _ in range(5):
        one.keyboard.press("ArrowRight")
        other.keyboard.press("ArrowLeft")
    expect_step(one, 142)
    expect_step(other, 132)
    other.close()


@pytest.mark.parametrize(
    ("status", "said"), [("failed", "failed: no memory left."), ("running", "killed after step 30, 20")]
)
def test_a_run_that_ended_too_early_says_so(copied, visit, status, said):
    run = copied("diverged")
    with changed(run) as database:
        database.write_facts({"status": status, "reason": "no memory left"})
    page = visit(f"/runs/{run.name}")
    expect(page.locator(".run-head .state")).to_have_text(re.match("[a-z]+", said)[0])
    expect(page.locator(".banner p").first).to_contain_text(said)
    expect(page.locator(".banner code")).to_contain_text(f"everystep resume {run}")
    page.keyboard.press("Home")
    expect_step(page, 1, of=30)


def test_a_step_that_cannot_be_opened_says_why(copied, visit):
    run = copied("diverged")
    shutil.rmtree(run / "snapshots")
    page = visit(f"/runs/{run.name}", expected=["404", "409", "502"])
    plot(page)
    page.keyboard.press("Home")
    expect(part(page, "Step").get_by_role("alert")).not_to_be_empty()
    expect(page.locator(".step")).to_be_hidden()


def test_a_long_replay_is_announced_until_the_step_is_open(copied, visit):
    run, held = copied("chapter"), []
    with changed(run) as database:
        database.write_facts({"seconds": 1e6})
    page = visit(f"/runs/{run.name}")
    plot(page)
    page.route(re.compile(r"/steps/\d+$"), lambda route: held.append(route))
    waiting = part(page, "Step").locator("p[role=status]").first
    last = max(state for state in everystep.open(run).snapshots if state < 400)
    for step in (last + 5, 5):
        page.keyboard.press("/")
        page.keyboard.type(f"{step}\n")
        expect(waiting).to_contain_text(f"Steps {step - 4} to {step - 1} are replayed first: about 2 h.")
        while held:
            held.pop().continue_()
        expect_step(page, step)
        expect(waiting).to_be_hidden()
    page.unroute_all()


def test_a_step_that_was_left_before_it_opened_does_not_replace_the_one_returned_to(visit):
    # No test opens the step before: the page would prefetch the one after.
    page, held = visit("/runs/chapter?step=263"), []
    expect_step(page, 263)
    page.route("**/steps/264", lambda route: held.append(route))
    page.keyboard.press("ArrowRight")
    expect(page.locator(".step")).to_have_attribute("aria-busy", "true")
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/264")):
        page.keyboard.press("ArrowLeft")
    expect(page).to_have_url(re.compile("step=263$"))
    expect_step(page, 263)
    expect(page.locator(".step")).not_to_have_attribute("aria-busy", "true")
    page.unroute_all()


def test_no_replay_is_announced_for_a_run_without_steps(copied, visit):
    run, held = copied("chapter"), []
    with changed(run) as database:
        database.forget_after(0)
    page = visit("/", expected=["404"])
    page.route("**/steps/5", lambda route: held.append(route))
    with page.expect_request("**/steps/5"):
        page.evaluate(
            "path => (history.pushState(null, '', path), dispatchEvent(new PopStateEvent('popstate')))",
            f"/runs/{run.name}?step=5",
        )
    expect(part(page, "Step").locator("p[role=status]").first).to_have_text("Opening step 5.")
    held.pop().continue_()
    expect(part(page, "Step").get_by_role("alert")).not_to_be_empty()
    page.unroute_all()


@pytest.mark.sweep
def test_a_dialog_stays_open_while_the_run_plays_behind_it(visit):
    page = visit("/runs/chapter?step=1")
    expect_step(page, 1)
    page.keyboard.press("p")
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keys")
    expect(dialog).to_be_visible()
    expect(page).to_have_url(re.compile(r"step=\d\d"))
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("p")
    expect(page.get_by_role("button", name="play (p)")).to_be_visible()


def test_numbers_measured_by_another_process_come_into_the_table_and_a_hidden_curve(copied, visit):
    run = copied("digits")
    page = visit(f"/runs/{run.name}")
    plot(page)
    shown = page.get_by_role("group", name="what the plot shows")
    button = shown.get_by_role("button", name="validation_accuracy")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    with changed(run) as database:
        database.write_measurements([("validation_accuracy", 3, 0.125)])
    expect(page.locator("tr[data-step='3']")).to_contain_text("0.125")
    button.click()
    page.get_by_role("slider", name="step").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".loss-part .readout")).to_contain_text("validation_accuracy 0.125")


def test_losses_that_a_curve_lacks_before_the_newest_are_asked_for(visit):
    asks = visit("/").evaluate(
        """async () => {
            const { Curve } = await import("/static/plot/curves.js");
            const curve = new Curve("run", async () => ({ steps: [1, 2], values: [3, 4], total: 2 }));
            await curve.load();
            return [curve.extend([3], [5]), curve.extend([5, 6], [7, 8]), curve.extend([7], [9])];
        }"""
    )
    assert asks == [False, True, False]


def test_losses_that_are_not_finite_are_said(visit, recorded):
    page = visit("/runs/diverged")
    alarm = page.locator(".run-head .alarm")
    expect(alarm).to_contain_text(
        re.compile("The loss is (inf|NaN) at step [0-9]+, the first that is not finite.")
    )
    expect(page.get_by_text("Marked at the bottom: losses that are not finite.")).to_be_visible()
    step = int(re.search(r"step (\d+)", alarm.inner_text())[1])
    alarm.get_by_role("button", name="Where did it come from?").click()
    found = everystep.open(recorded / "diverged").first_nonfinite()
    origin = alarm.locator(".origin")
    expect(origin).to_contain_text(f"Step {found.step.number}, {found.operation.operation.phase}")
    expect(alarm.locator(".inputs li")).to_have_count(len(found.operation.inputs))
    origin.get_by_role("link", name="Open").click()
    expect_step(page, found.step.number, of=30)
    expect(page.locator(f"[data-number='{found.index}'].marked")).to_be_visible()
    alarm.get_by_role("link", name=f"step {step}").click()
    expect_step(page, step, of=30)
    expect(page.locator(".step-heading .loss-full")).to_have_text("not finite")


def test_a_step_or_a_run_that_is_not_there_is_said(visit):
    page = visit("/runs/chapter?step=501", expected=["404"])
    expect(part(page, "Step").get_by_role("alert")).to_contain_text("501")
    page.keyboard.press("ArrowLeft")
    expect_step(page, 500)
    expect(part(page, "Step").get_by_role("alert")).to_be_hidden()
    page.goto(page.url.replace("chapter", "nothing"))
    expect(page.get_by_role("alert")).to_contain_text("nothing")
    page.locator("main").get_by_role("link", name="All runs").click()
    expect(row(page, "chapter")).to_be_visible()


def test_a_run_that_is_deleted_while_it_is_shown_stays_on_the_screen(copied, visit, tmp_path):
    run = copied("digits")
    page = visit(f"/runs/{run.name}?step=7", expected=["404", "no run", "no longer exists"])
    expect(heading(page)).to_have_text(re.compile("^Step 7 of"))
    # At once, as a file manager does: the server may be reading within.
    remove(run.rename(tmp_path / run.name))
    expect(page.get_by_text("This run was deleted")).to_be_visible()
    expect(heading(page)).to_be_visible()
    page.get_by_role("link", name="All runs").click()
    expect(row(page, "chapter")).to_be_visible()
    expect(row(page, run.name)).to_have_count(0)


def free_port():
    """Return a port that no other `everystep view` takes, which begin with 8140."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
@pytest.mark.sweep
def test_the_page_goes_on_after_the_server_or_the_process_that_opens_steps_has_ended(
    view, recorded, open_page
):
    served = view(recorded, port=free_port())
    page = open_page(
        at(served, "/runs/chapter?step=137"),
        expected=[
            "ERR_CONNECTION_REFUSED",
            "ERR_INCOMPLETE",
            "502",
            "being stopped",
            "does not respond",
        ],
    )
    expect_step(page, 137)
    [worker] = workers_of(served.process.pid)
    os.kill(worker, signal.SIGKILL)
    page.keyboard.press("ArrowRight")
    expect(heading(page).or_(part(page, "Step").get_by_role("alert")).first).not_to_have_text(
        "Step 137 of 500"
    )
    page.keyboard.press("ArrowRight")
    expect_step(page, 139)
    expect(part(page, "Step").get_by_role("alert")).to_be_hidden()
    served.stop()
    away = page.locator(".away")
    expect(away).to_have_text("The server does not respond; trying again.")
    page.keyboard.press("Home")
    expect(part(page, "Step").get_by_role("alert")).to_contain_text("the server does not respond")
    press(page, "Compare")
    expect(page.locator("main > .alarm")).to_contain_text("the server does not respond")
    view(recorded, port=served.port)
    expect(away).to_be_empty()
    expect_step(page, 1)
    page.keyboard.press("ArrowRight")
    expect_step(page, 2)
    expect(page.locator("main > .alarm")).to_have_count(0)


def workers_of(pid):
    """Return the processes that were started by a process to open steps."""
    started = [
        int(each)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for each in (task / "children").read_text().split()
    ]
    return [
        each
        for each in started
        if b"everystep.page.worker" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]


def test_the_numerics_have_room_in_the_column_next_to_the_plot(visit):
    page = visit("/runs/chapter", viewport={"width": 1400, "height": 900})
    page.get_by_text("MKL_CBWR").click()
    value = page.locator(".is-column .pairs dd").first
    expect(value).to_be_visible()
    assert value.bounding_box()["width"] > 100
