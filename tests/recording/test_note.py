"""The user's note on a run."""

import io
import json
import os

import pytest
from filelock import FileLock
from rich.console import Console

import everystep
from everystep.errors import RunError, UsageError
from everystep.views.lists import runs_text


@pytest.fixture
def run():
    """A run of the chapter's, of three steps, in its own directory."""
    return everystep.train_experiment("two-layer", {"steps": 3}, progress=False)


def test_a_note_is_kept_in_the_run_in_one_line(run):
    losses = run.losses
    assert run.note is None
    run.note = "  tried with\nhalf the rate — better  "
    again = everystep.open(run.directory)
    assert again.note == again.facts.note == again.summary().note == "tried with half the rate — better"
    assert again.losses.equals(losses)
    assert again.verify(progress=False).is_exact
    for empty in ("", " \n", None):
        run.note = "something"
        run.note = empty
        assert everystep.open(run.directory).note is None


def test_facts_are_read_again_when_they_have_changed(run):
    for file in run.directory.glob("run.sqlite*"):
        os.utime(file, (1e9, 1e9))  # not within a tick of the clock
    opened = everystep.open(run.directory)
    known = opened.facts
    assert opened.facts is known
    run.note = "new"
    assert opened.facts.note == "new"


def test_a_fork_has_no_note_of_its_parents_and_a_measurement_leaves_it(run):
    run.note = "the parent"
    fork = run.fork(2, lr=1e-3, progress=False)
    assert fork.note is None
    run.measure("loss * 2", name="double", progress=False)
    assert run.note == "the parent"


def test_what_cannot_be_a_note_is_refused(run):
    run.note = "stays"
    with pytest.raises(UsageError, match="1,001 characters; write at most 1,000"):
        run.note = "x" * 1001
    with pytest.raises(UsageError, match="a note is a text, or None to remove it; this is int"):
        run.note = 3
    with FileLock(run.directory / "run.lock"), pytest.raises(RunError, match="is being written"):
        run.note = "while it trains"
    assert everystep.open(run.directory).note == "stays"


def test_the_list_of_runs_shows_notes_where_there_is_width(run, everystep_command):
    assert "note" not in everystep_command("runs")[1]
    run.note = "lr \x1b[31m is the chapter's " + "and more " * 40
    out = everystep_command("runs")[1]
    heading, line = out.splitlines()
    assert line[heading.index("note") :].startswith("lr  [31m is the chapter's and more")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 200
    narrow = Console(width=70, file=io.StringIO())
    narrow.print(runs_text([run.summary()], narrow.width))
    assert "note" not in narrow.file.getvalue() and run.name in narrow.file.getvalue()
    [listed] = json.loads(everystep_command("runs", "--json")[1])
    assert listed["note"] == run.note
