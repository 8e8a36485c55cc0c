"""Processes end with the one that started them, however that one was ended."""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from tests.page.serving import served

import everystep

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")


def below(process):
    """Return the ids of all processes that a process has started, and those that these have started."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *below(child)]
    return found


def has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def is_replaying(process):
    try:
        return b"popen_loky" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def has_torch(process):
    """Tell whether a process has begun: it has read what its parent sent first."""
    try:
        return "libtorch" in Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return False


def until(is_so):
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end_all_by_ending(process, others):
    """Kill a process, and wait until those that it has started have ended by themselves."""
    process.kill()
    process.wait()
    until(lambda: all(has_ended(each) for each in others))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "run"
    settings = {"steps": 3000, "threads": 1}
    everystep.train_experiment("two-layer", settings, directory=directory, progress=False)
    return directory


@pytest.fixture
def run(trained):
    return shutil.copytree(trained, Path("run"))


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "everystep", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("arguments", "count"),
    [(("verify", "run", "--processes", "2"), 2), (("rerun", "run", "--mkl", "COMPATIBLE"), 1)],
)
def test_what_a_command_has_started_ends_with_it(run, arguments, count):
    process = command(*arguments)
    until(lambda: sum(map(has_torch, below(process.pid))) >= count or process.poll() is not None)
    end_all_by_ending(process, below(process.pid))


def test_what_a_page_has_started_ends_with_it(run):
    with closing(sqlite3.connect(run / "run.sqlite")) as database, database:
        (text,) = database.execute("SELECT value FROM facts WHERE key = 'numerics'").fetchone()
        numerics = json.dumps(json.loads(text) | {"mkl_cbwr": "COMPATIBLE"})  # replayed by a process
        database.execute("UPDATE facts SET value = ? WHERE key = 'numerics'", [numerics])
        database.execute("DELETE FROM blocks WHERE name = 'facts'")
    with served(Path(), "--port", "8237") as server:
        assert server.client.get("/api/runs/run/steps/3", timeout=120).status_code == 200
        opening = below(server.process.pid)
        assert server.client.post("/api/runs/run/verify", json={}).status_code == 200
        until(lambda: any(is_replaying(each) for each in set(below(server.process.pid)) - {*opening}))
        end_all_by_ending(server.process, below(server.process.pid))
