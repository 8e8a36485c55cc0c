"""A run from a stranger ends each command in a clear message, soon; nothing outside it changes."""

import os
import shutil

import pytest
from tests.descent import files_of
from tests.recording.hostile import HOSTILE

import everystep

#: Commands that see every run.
ALWAYS = [["runs", "."], ["losses", "run"], ["step", "run", "2"], ["doctor", "run"]]
#: Each takes its turn; with EVERYSTEP_TORTURE=1, all of them see every run.
OTHERS = [
    ["losses", "run", "--json", "--last", "2"],
    ["table", "run", "-o", "../table.html"],
    ["plot", "run", "-o", "../plot.svg"],
    ["report", "run", "-o", "../report.html"],
    ["step", "run", "-1", "--json"],
    ["verify", "run", "--processes", "1"],
    ["doctor", "run", "--export", "../numbers.csv"],
    ["diff", "run", "good"],
    ["fork", "run", "--at", "2", "--steps", "4", "--run", "../fork", "-q"],
    ["resume", "run", "--steps", "7", "-q"],
    ["measure", "run", "loss + 1", "--name", "more"],
    ["when", "run", "loss < 0"],
    ["first-nonfinite", "run", "--processes", "1"],
]
COMMANDS = [*ALWAYS, *OTHERS]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run of five steps that no test may change."""
    directory = tmp_path_factory.mktemp("good") / "run"
    everystep.train_experiment("two-layer", {"steps": 5}, run=directory, progress=False)
    return directory


@pytest.mark.sweep(every=8)
@pytest.mark.parametrize("kind", HOSTILE)
def test_each_command_answers_in_words(kind, good, tmp_path, monkeypatch, everystep_command):
    shelf = tmp_path / "shelf"
    shutil.copytree(good, shelf / "run")
    shutil.copytree(good, shelf / "good")
    HOSTILE[kind](shelf / "run")
    outside = tmp_path / "outside"
    before = files_of(outside)
    monkeypatch.chdir(shelf)
    turn = [OTHERS[list(HOSTILE).index(kind) % len(OTHERS)]]
    for command in COMMANDS if os.environ.get("EVERYSTEP_TORTURE") else ALWAYS + turn:
        code, out, err = everystep_command(*command)
        assert code in (0, 1, 2), command
        assert code == 0 or out or err, command
        assert not set("\x1b\x07\x9b\u202e\u2066") & set(out + err), command
        if command[0] == "runs":
            assert "good" in out
    assert files_of(outside) == before


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if "link" in kind or "another name" in kind])
def test_a_run_with_a_link_is_not_written_into(kind, good, tmp_path, everystep_command):
    shutil.copytree(good, tmp_path / "shelf" / "run")
    HOSTILE[kind](tmp_path / "shelf" / "run")
    before = files_of(tmp_path)
    run = str(tmp_path / "shelf" / "run")
    for command in (["measure", run, "loss + 1"], ["resume", run, "--steps", "9", "-q"]):
        code, _, err = everystep_command(*command)
        assert code == 2
        assert "run" in err
    with pytest.raises(everystep.RunError):
        everystep.open(run).note = "mine"
    assert {path: files_of(tmp_path).get(path) for path in before} == before


def test_the_list_of_the_page_goes_on(good, tmp_path):
    from everystep.page.run_index import RunIndex

    for place, change in enumerate(HOSTILE.values()):
        change(shutil.copytree(good, tmp_path / "shelf" / f"run-{place}"))
    shutil.copytree(good, tmp_path / "shelf" / "good")
    found = RunIndex(tmp_path / "shelf").summaries().runs
    assert len(found) >= len(HOSTILE)
    assert found["good"]["status"] == "finished"
