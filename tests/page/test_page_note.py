"""A note on a run, written by the page."""

import pytest
from filelock import FileLock

from everystep.recording.recorded_run import RecordedRun


@pytest.fixture
def run(write_run):
    return write_run("one", [1.0, 0.5])


def write(page, note, name="one", **options):
    return page.ask(f"/api/runs/{name}/note", "POST", json={"note": note}, **options)


def test_the_answer_is_the_note_as_it_was_written(page, run):
    assert write(page, " half\nthe rate ").json() == {"note": "half the rate"}
    assert write(page, "").json() == {"note": None}


def test_a_run_that_cannot_be_written_says_so(page, run):
    with FileLock(run / "run.lock"):
        answer = write(page, "while it trains")
    assert answer.status_code == 409
    assert "is being written (by its training" in answer.json()["error"]
    (run / "run.lock").unlink()
    (run / "run.lock").mkdir()  # as in a place that can only be read, which root could write to
    answer = write(page, "in a strange place")
    assert answer.status_code == 409
    assert "cannot be written to" in answer.json()["error"]


def test_what_is_no_note_is_refused(page, run):
    assert "at most 1,000" in write(page, "x" * 1001).json()["error"]
    for wrong in (None, 3, ["a"], "x" * 100_000):
        assert write(page, wrong).status_code == 400
    run.rename(run.parent.parent / "secret")
    for name in ("two", "one", "..%2fsecret", "%2e%2e", "secret"):
        assert write(page, "text", name=name).status_code == 404
    run = run.parent.parent / "secret"
    assert RecordedRun(run).facts.note is None
