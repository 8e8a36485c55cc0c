"""The list of all runs in the browser."""

import math
import re
import shutil
from functools import partial
from urllib.parse import parse_qs, urlsplit

import pytest
from filelock import FileLock
from playwright.sync_api import expect
from tests.page.browser.conftest import GO, Window, start_view
from tests.page.browser.places import plot, row
from tests.page.serving import remove, written

import everystep
from everystep.views.lists import LISTED, VALUE_KINDS


@pytest.fixture(scope="module")
def listed(chromium, tmp_path_factory):
    """A server of runs that ended in every way there is."""
    shelf = tmp_path_factory.mktemp("listed") / "runs"
    shelf.mkdir()
    for number, loss in ((9, 0.5), (10, 0.25)):
        written(shelf / f"run-{number}", [1.0, loss], started=f"2026-01-{number:02}T03:04:05+00:00")
    written(shelf / "nan", [1.0, math.nan])
    written(shelf / "failed", [2.0], status="failed", reason="out of memory")
    written(shelf / "killed", [3.0, 4.0, 5.0], status="running", started="2026-01-01T00:00:00+00:00")
    written(shelf / "empty", status="stopped")
    (shelf / "broken").mkdir()
    (shelf / "broken" / "run.sqlite").write_bytes(b"no database at all")
    served = start_view(directory=shelf.parent)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def window(listed, browser):
    """A window with the list of these runs, which stays open."""
    window = Window(browser)
    window.page.goto(listed.address)
    yield window
    window.close()


@pytest.fixture
def listing(window):
    """The list of these runs."""
    window.page.evaluate(GO, "/")
    expect(window.page.locator("tbody tr")).to_have_count(7)
    yield window.page
    window.check(())


def names(page):
    return page.locator("tbody tr").evaluate_all("rows => rows.map(row => row.dataset.name)")


def test_all_runs_lead_to_one_and_the_token_leaves_the_address(visit):
    page = visit("/")
    expect(row(page, "chapter")).to_contain_text("finished")
    expect(row(page, "chapter")).to_contain_text("500")
    assert "token" not in page.url
    expect(
        row(page, "chapter").get_by_role("img", name="the loss of chapter, on a log axis")
    ).to_be_visible()
    expect(row(page, "diverged").locator("svg line.mark").first).to_be_attached()
    expect(row(page, "fork")).to_contain_text("fork of chapter at 137")
    row(page, "fork").get_by_role("link", name="chapter").click()
    expect(page.locator("h1")).to_have_text("chapter")
    assert page.url.endswith("/runs/chapter")
    page.go_back()
    expect(row(page, "chapter")).to_be_visible()


def test_how_each_run_stands_is_said(listing):
    page = listing
    for name, status in (("failed", "failed"), ("killed", "killed"), ("empty", "stopped")):
        expect(row(page, name).locator(".state")).to_have_text(status)
    expect(row(page, "nan")).to_contain_text("nan")
    expect(row(page, "broken")).to_contain_text("cannot be read")
    expect(row(page, "broken").get_by_role("checkbox")).to_be_disabled()
    expect(row(page, "broken").get_by_role("link")).to_have_count(0)


def test_runs_are_sorted_whatever_is_missing(listing):
    page = listing
    heading = page.get_by_role("columnheader", name="last loss")
    heading.get_by_role("button").click()
    expect(heading).to_have_attribute("aria-sort", "ascending")
    assert names(page)[:5] == ["run-10", "run-9", "failed", "killed", "nan"]
    assert set(names(page)[5:]) == {"empty", "broken"}
    heading.get_by_role("button").press("Enter")
    expect(heading).to_have_attribute("aria-sort", "descending")
    expect(heading.get_by_role("button")).to_be_focused()
    assert names(page)[:5] == ["nan", "killed", "failed", "run-9", "run-10"]
    assert set(names(page)[5:]) == {"empty", "broken"}
    page.get_by_role("columnheader", name="run").get_by_role("button").click()
    assert names(page) == sorted(names(page), key=lambda name: (name[:3], len(name), name))


def test_the_server_declares_the_columns(listed, open_page):
    page = open_page(listed.address)
    headings = page.get_by_role("columnheader").filter(visible=True)
    # Columns without a value are hidden: these runs have no validation, and no optimizer.
    shown = ["pick", "run", "status", "steps", "last loss", "loss", "started"]
    expect(headings).to_have_text([re.compile(rf"^{text}\W?$") for text in shown])
    more = [{"key": "first_loss", "header": "first", "kind": "loss", "rank": 1, "first": "descending"}]

    def declared(route):
        answer = route.fetch()
        found = answer.json()
        route.fulfill(response=answer, json=found | {"columns": found["columns"][:1] + more})

    page.route("**/api/runs?soon", declared)
    page.reload()
    expect(headings).to_have_text(["pick", re.compile("^run"), re.compile("^first")])
    headings.nth(2).get_by_role("button").click()
    assert names(page)[:4] == ["killed", "failed", "nan", "run-9"]
    expect(row(page, "killed").get_by_role("cell").nth(2)).to_have_text("3")
    kinds = page.evaluate("async () => Object.keys((await import('/static/runs/kinds.js')).KINDS)")
    assert kinds == [*VALUE_KINDS] and {each.kind for each in LISTED} <= VALUE_KINDS.keys()


def test_the_address_says_how_runs_are_sorted(listing):
    page = listing
    page.get_by_role("columnheader", name="last loss").get_by_role("button").click()
    expect(page).to_have_url(re.compile(r"/\?sort=last_loss&direction=ascending$"))
    order = names(page)
    page.reload()
    expect(page.locator("tbody tr")).to_have_count(7)
    assert names(page) == order
    page.goto(page.url.replace("last_loss", "nothing").replace("ascending", "upwards"))
    heading = page.get_by_role("columnheader", name="started")
    expect(heading).to_have_attribute("aria-sort", "descending")


def test_a_note_is_written_where_it_is_read(visit, copied):
    run = copied("digits")
    page = visit("/", expected=["409"])
    of_run = row(page, run.name)
    of_run.hover()
    of_run.get_by_role("button", name=f"add a note on {run.name}").click()
    field = of_run.get_by_role("textbox", name=f"note on {run.name}")
    field.fill("the first that works")
    field.press("Enter")
    expect(of_run.locator(".words")).to_have_text("the first that works")
    expect(of_run.get_by_role("button", name=f"change the note on {run.name}")).to_be_focused()
    assert everystep.open(run).note == "the first that works"
    of_run.get_by_role("link", name=run.name, exact=True).click()
    head = page.locator(".run-head")
    expect(head).to_contain_text("the first that works")
    head.get_by_role("button", name="change the note").click()
    field = head.get_by_role("textbox")
    field.fill("not this")
    field.press("Escape")
    expect(head.locator(".words")).to_have_text("the first that works")
    with FileLock(run / "run.lock"):
        head.get_by_role("button", name="change the note").click()
        field.fill("not now")
        head.get_by_role("button", name="Save", exact=True).click()
        expect(head.get_by_role("alert")).to_contain_text("is being written")
        expect(field).to_have_value("not now")
    everystep.open(run).note = "from Python"  # the open page hears of it
    head.get_by_role("button", name="Cancel").click()
    expect(head.locator(".words")).to_have_text("from Python")


def test_forks_stand_beneath_their_parents(visit):
    page = visit("/")
    page.get_by_role("columnheader", name="run").get_by_role("button").click()
    expect(page.locator("tr[data-name=chapter] + tr")).to_have_attribute("data-name", "fork")


def test_runs_that_are_each_others_parents_by_name_are_listed(visit):
    shown = visit("/").evaluate(
        """async () => {
            const { arranged } = await import("/static/runs/order.js");
            const runs = [["a", "b"], ["b", "a"], ["c", null]].map(
              ([name, parent]) => ({ name, parent: parent && [parent, 1] }),
            );
            const column = { key: "name", kind: "name" };
            return arranged(runs, column, "ascending", "").map(({ name }) => name);
        }"""
    )
    assert sorted(shown) == ["a", "b", "c"]


def test_runs_are_searched_by_name_and_status(listing):
    page = listing
    search = page.get_by_role("searchbox", name="search the runs")
    search.fill("RUN-")
    expect(page.locator("tbody tr")).to_have_count(2)
    search.fill("killed")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(row(page, "killed")).to_be_visible()
    search.fill("nothing like it")
    expect(page.get_by_text("No run matches “nothing like it”.")).to_be_visible()
    search.fill("")
    expect(page.locator("tbody tr")).to_have_count(7)


def test_several_runs_are_laid_over_each_other_and_taken_away_again(visit):
    page = visit("/")
    overlay, compare = (page.get_by_role("button", name=name) for name in ("Overlay", "Compare"))
    expect(overlay).to_be_disabled()
    for name in ("chapter", "fork", "digits"):
        page.get_by_label(f"pick {name}", exact=True).check()
    expect(page.get_by_text("3 picked")).to_be_visible()
    expect(compare).to_be_disabled()
    page.get_by_label("pick digits", exact=True).uncheck()
    expect(compare).to_be_enabled()
    overlay.click()
    plot(page)
    expect(page.locator("h1")).to_have_text("2 runs")
    first, other = parse_qs(urlsplit(page.url).query)["run"]
    assert {first, other} == {"chapter", "fork"}
    table = page.get_by_role("table")
    expect(table.get_by_role("columnheader", name="optimizer.lr")).to_be_visible()
    expect(table.get_by_role("row", name=re.compile("^fork"))).to_contain_text("0.0002")
    expect(table.get_by_role("row", name=re.compile("^chapter"))).to_contain_text("628.3 at 1")
    shown = page.get_by_role("group", name="what the plot shows")
    expect(shown.get_by_role("button", name=other, exact=True)).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name=f"remove {other} from the plot").click()
    expect(page.locator("h1")).to_have_text("1 run")
    assert page.url.endswith(f"/overlay?run={first}")
    page.go_back()
    expect(page.locator("h1")).to_have_text("2 runs")
    table.get_by_role("link", name="fork").click()
    expect(page.locator("h1")).to_have_text("fork")


def test_the_overlay_says_where_a_run_explodes_and_leads_there(visit, recorded):
    page = visit("/overlay?run=chapter&run=diverged")
    step = everystep.open(recorded / "diverged").summary().nonfinite_step
    of_run = page.get_by_role("table").get_by_role("row", name=re.compile("^diverged"))
    expect(
        page.get_by_role("table").get_by_role("row", name=re.compile("^chapter"))
    ).not_to_contain_text("step")
    of_run.get_by_role("link", name=re.compile(f"step {step}$")).click()
    expect(page.locator("h1")).to_have_text("diverged")
    assert re.search(rf"/runs/diverged\?step={step}&overlay=chapter$", page.url)


def test_settings_that_differ_look_different(visit, recorded, request):
    seeds = 1234567890, 1234567891
    for seed in seeds:
        run = recorded / f"of-{seed}"
        request.addfinalizer(partial(remove, run))
        everystep.train_experiment("two-layer", {"steps": 1, "seed": seed}, run=run, progress=False)
    page = visit(f"/overlay?run=of-{seeds[0]}&run=of-{seeds[1]}")
    for seed in seeds:
        expect(page.get_by_role("cell", name=str(seed), exact=True)).to_be_visible()


def test_a_run_that_loads_slowly_changes_nothing_once_another_is_shown(visit):
    page, held = visit("/"), []
    page.route("**/api/runs/digits", lambda route: held.append(route))
    row(page, "digits").get_by_role("link", name="digits", exact=True).click()
    expect(page.get_by_text("Loading the run.")).to_be_visible()
    page.go_back()
    row(page, "chapter").get_by_role("link", name="chapter", exact=True).click()
    plot(page)
    with page.expect_response("**/api/runs/digits") as answered:
        held.pop().continue_()
    answered.value.finished()
    page.wait_for_function("() => fetch('/api/runs').then((answer) => answer.ok)")
    expect(page).to_have_title("chapter \N{EN DASH} everystep")
    expect(page.locator("#trail")).to_have_text("All runs / chapter")
    page.unroute_all()


def test_the_picture_of_a_run_is_that_of_the_one_which_has_its_name_now(
    visit, recorded, copied, tmp_path
):
    run, new = copied("chapter"), shutil.copytree(recorded / "fork", tmp_path / "new")
    page = visit("/")
    line = row(page, run.name).locator(".sparkline path")
    expect(line).to_be_visible()
    before = line.get_attribute("d")
    run.rename(tmp_path / "old")
    new.rename(run)
    expect(line).not_to_have_attribute("d", before)


@pytest.mark.sweep
def test_an_empty_directory_says_how_a_run_is_made_and_the_list_follows(view, tmp_path, open_page):
    shelf = tmp_path / "runs"
    shelf.mkdir()
    served = view()
    page = open_page(served.address)
    expect(page.locator("main")).to_contain_text("everystep train")
    written(shelf / "first", [1.0])
    expect(row(page, "first")).to_be_visible()
    expect(page.locator("main")).not_to_contain_text("everystep train")
    written(shelf / "second", [1.0])
    expect(page.get_by_text("2 runs")).to_be_visible()
    remove(shelf / "first")
    expect(row(page, "first")).to_have_count(0)
    expect(page.get_by_text(re.compile("^1 run$"))).to_be_visible()
    # A long list is drawn as it is scrolled to.
    remove(shelf / "second")
    for number in range(130):
        written(shelf / f"run-{number}", [1.0])
    page.goto(f"{served.address}&sort=name&direction=ascending")
    expect(page.locator(".runs-head .lead")).to_have_text("130 runs")
    assert 100 <= page.locator("tbody tr").count() < 130
    while page.locator("tbody tr").count() < 130:
        page.mouse.wheel(0, 5000)
    assert names(page) == [f"run-{number}" for number in range(130)]
    page.get_by_label("search the runs").fill("run-129")
    assert names(page) == ["run-129"]
    page.goto("about:blank")  # it may still ask for pictures of the rows


def test_the_name_of_a_fork_has_one_line(visit):
    page = visit("/", viewport={"width": 1400, "height": 900})
    expect(page.locator("td.name > a").nth(1)).to_be_visible()
    heights = [name.bounding_box()["height"] for name in page.locator("td.name > a").all()]
    assert max(heights) < 1.5 * min(heights)
