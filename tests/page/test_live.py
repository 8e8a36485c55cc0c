"""What changes on disk reaches all listeners of a real server, and nothing is lost on the way."""

import asyncio
import contextlib
import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tests.page.serving import PATIENCE, events, remove, written

import everystep
from everystep.page import live
from everystep.page.columns import Columns
from everystep.page.live import Live
from everystep.page.run_index import RunIndex
from everystep.recording.database import Database


def change(run, first, losses, **facts):
    """Take the steps from `first` on (again)."""
    database = Database.change(run / "run.sqlite")
    with database.transaction():
        database.forget_after(first - 1)
        database.write_losses(first, losses)
        database.write_facts(facts)
    database.close()


def next_of(stream, name):
    return next((content, id) for each, content, id in stream if each == name)


def test_a_training_is_followed_and_every_loss_arrives(server):
    losses, sizes = {}, []

    def follow(stream):
        for name, content, id in stream:
            if name == "state":
                state = content
            else:
                assert content["steps"][0] == len(losses) + 1
                losses.update(zip(content["steps"], content["losses"], strict=True))
                assert id == str(len(losses))
                sizes.append(len(content["steps"]))
            if state["status"] == "finished" and state["steps"] == len(losses):
                return state
        raise AssertionError("the stream has ended")

    with ThreadPoolExecutor() as pool, events(server.client, "/api/runs/followed/events") as stream:
        assert next(stream) == ("gone", {}, "0")
        followed = pool.submit(follow, stream)
        run = everystep.train_experiment("two-layer", run=server.directory / "followed")
        state = followed.result(PATIENCE)
    recorded = run.losses["loss"].to_numpy()
    assert np.array_equal(np.array(list(losses.values()), np.float32), recorded)
    assert sum(sizes) == 500
    assert len(sizes) > 1
    assert (state["planned"], state["ending"], state["measurements"]) == (500, None, [])
    assert state["seconds"] > 0
    assert np.float32(state["landmarks"][1]["full"]) == recorded[-1]


def test_a_run_that_is_killed_is_told_although_no_file_changes(server):
    run = written(server.directory / "killed", [1.0], status="running")
    lock = FileLock(run / "run.lock")  # as its process holds it until its end, whatever that is
    lock.acquire()
    with events(server.client, "/api/runs/killed/events") as stream:
        assert next_of(stream, "state")[0]["status"] == "running"
        lock.release()
        assert next_of(stream, "state")[0]["status"] == "killed"


def test_a_browser_that_connects_again_goes_on_where_it_was(server):
    written(server.directory / "resumed", [3.0, 2.0, 1.0])
    address = "/api/runs/resumed/events"
    for path, headers in [(address, {"Last-Event-ID": "2"}), (f"{address}?after=2", {})]:
        with events(server.client, path, **headers) as stream:
            assert next(stream)[::2] == ("state", "2")
            assert next(stream) == ("losses", {"steps": [3], "losses": [1.0]}, "3")
    with events(server.client, f"{address}?after=3") as stream:
        assert next(stream)[::2] == ("state", "3")
    # What it saw was another run of that name, or nonsense.
    for after in ("4", "x", "-1", "9" * 30):
        with events(server.client, address, **{"Last-Event-ID": after}) as stream:
            assert next_of(stream, "losses") == ({"steps": [1, 2, 3], "losses": [3.0, 2.0, 1.0]}, "3")


def test_steps_that_are_taken_again_are_told_again(server):
    run = written(server.directory / "again", [5.0, 4.0, 3.0, 2.0], status="stopped")
    with events(server.client, "/api/runs/again/events") as stream:
        assert len(next_of(stream, "losses")[0]["steps"]) == 4
        change(run, 3, [9.0, float("nan"), 7.0])
        assert next_of(stream, "losses") == ({"steps": [3, 4, 5], "losses": [9.0, "nan", 7.0]}, "5")
        change(run, 2, [])
        state, id = next_of(stream, "state")
        assert (state["steps"], id) == (1, "1")
        change(run, 2, [4.0], reason="because")
        assert next_of(stream, "losses") == ({"steps": [2], "losses": [4.0]}, "2")


def test_many_new_losses_are_reduced_without_losing_the_largest(server):
    losses = np.ones(50_000)
    losses[31_415] = 7.0
    written(server.directory / "long", losses.tolist())
    with events(server.client, "/api/runs/long/events") as stream:
        content, id = next_of(stream, "losses")
    assert id == "50000"
    assert len(content["steps"]) <= 3002
    assert content["losses"][content["steps"].index(31_416)] == 7.0


def test_a_deleted_run_is_gone_and_may_come_back(server):
    run = written(server.directory / "deleted", [1.0])
    with events(server.client, "/api/runs/deleted/events") as stream:
        next_of(stream, "losses")
        remove(run)
        assert next(stream) == ("gone", {}, "0")
        written(run, [2.0, 3.0], started="2026-03-03T00:00:00+00:00")
        assert next_of(stream, "losses") == ({"steps": [1, 2], "losses": [2.0, 3.0]}, "2")
        run.rename(server.directory / "renamed")
        assert next_of(stream, "gone") == ({}, "0")


def test_the_list_tells_what_begins_changes_and_goes(server):
    written(server.directory / "listed", [1.0])
    with events(server.client, "/api/events") as stream:
        first = next(stream)[1]
        assert "listed" in {run["name"] for run in first["runs"]}
        assert first["gone"] == []
        new = written(server.directory / "new", [1.0], status="finished")
        found = next(content for _, content, _ in stream if content["runs"])
        assert [run["name"] for run in found["runs"]] == ["new"]
        remove(new)
        assert next(stream)[1] == {
            "runs": [], "gone": ["new"], "begins": False, "unread": 0,
        }  # fmt: skip


def test_a_training_whose_database_is_still_empty_is_running(server):
    run = server.directory / "begun"
    run.mkdir()
    with FileLock(run / "run.lock"):
        Database.create(run / "run.sqlite").close()
        with events(server.client, "/api/events") as stream:
            sights = {each["name"]: each["status"] for each in next(stream)[1]["runs"]}
    assert sights["begun"] == "running"


def listen(shelf, is_enough):
    """Listen to the list of runs, until it is enough of what comes."""
    sights = Live(RunIndex(shelf), Columns())

    async def listening():
        async for each in sights.list_events():
            if "data: " in each and is_enough(json.loads(each.partition("data: ")[2])):
                return

    try:
        asyncio.run(asyncio.wait_for(listening(), PATIENCE))
    finally:
        sights.close()


def test_a_killed_run_that_is_continued_is_running_in_the_list(shelf, monkeypatch):
    run = written(shelf / "continued", [1.0], status="running")
    monkeypatch.setattr(live, "SELDOM", 0.1)
    statuses = []

    def heard(content):
        statuses.append(content["runs"][0]["status"])
        if len(statuses) == 1:
            writing.enter_context(FileLock(run / "run.lock"))
            change(run, 2, [2.0])
        return len(statuses) == 2

    with contextlib.ExitStack() as writing:
        listen(shelf, heard)
    assert statuses == ["killed", "running"]


@pytest.mark.sweep
def test_a_page_that_is_opened_before_the_first_run_shows_it_as_it_starts(tmp_path):
    shelf, said = tmp_path / "runs", []

    def heard(content):
        said.append(content)
        if not content["runs"]:
            shelf.mkdir()
            written(shelf / "first", [1.0])
        return content["runs"]

    listen(shelf, heard)
    assert said[0] == {"runs": [], "gone": [], "begins": True, "unread": 0}
    assert [run["name"] for run in said[-1]["runs"]] == ["first"]


def test_a_name_from_outside_is_followed_nowhere(server):
    written(server.directory.parent / "outside", [1.0])
    for name in ("%2e%2e", "..%2foutside", "outside", "%00", "x" * 1000):
        with server.client.stream("GET", f"/api/runs/{name}/events") as response:
            if response.status_code == 200:
                lines = response.iter_lines()
                assert next(line for line in lines if line.startswith("event")) == "event: gone"
            else:
                assert response.status_code == 404


@pytest.mark.sweep
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_nothing_is_done_while_nothing_happens(server):
    run = written(server.directory / "still", [1.0])

    def wakings():
        texts = []
        for task in Path(f"/proc/{server.process.pid}/task").iterdir():
            texts.append((task / "status").read_text())
        return sum(int(re.search(r"\nvoluntary_ctxt_switches:\s+(\d+)", text)[1]) for text in texts)

    with (
        events(server.client, "/api/runs/still/events") as one,
        events(server.client, "/api/events") as other,
    ):
        next(one), next(other)
        woken = math.inf
        while woken > 5:  # a server that polls never has such a second
            before = wakings()
            time.sleep(1)
            woken = wakings() - before
        change(run, 2, [2.0])
        assert next_of(one, "losses")[0]["steps"] in ([1], [2])


def test_whoever_leaves_is_forgotten(server):
    written(server.directory / "left", [1.0])

    def watched():
        count = 0
        for text in Path(f"/proc/{server.process.pid}/fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                count += text.read_text().count("inotify wd")
        return count

    if not Path("/proc/self/fdinfo").is_dir():
        pytest.skip("needs Linux's /proc")

    def comes_true(condition):
        deadline = time.monotonic() + PATIENCE
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        return condition()

    # Those of tests before this one may still be leaving.
    counts = [watched()]
    while len(counts) < 20 or len(set(counts[-20:])) > 1:
        time.sleep(0.05)
        counts.append(watched())
    before = counts[-1]
    for _ in range(3):
        with events(server.client, "/api/runs/left/events") as stream:
            next(stream)
            assert comes_true(lambda: watched() > before)
        assert comes_true(lambda: watched() == before)


def test_a_look_that_fails_ends_the_stream(shelf, monkeypatch):
    """The browser connects again; it does not wait for ever."""
    monkeypatch.setattr(RunIndex, "summaries", lambda self, seconds: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        listen(shelf, lambda content: False)


def test_a_long_list_comes_in_parts(shelf, monkeypatch):
    for number in range(5):
        written(shelf / f"run-{number}", [1.0])
    monkeypatch.setattr(live, "LONGER", 0.0)
    found = []
    listen(shelf, lambda content: found.append(content) or not content["unread"])
    assert [each["begins"] for each in found] == [True] + [False] * (len(found) - 1)
    assert [run["name"] for each in found for run in each["runs"]] == [f"run-{n}" for n in range(5)]
    assert found[0]["unread"] == 4
    assert all(each["gone"] == [] for each in found)
