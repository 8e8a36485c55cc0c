"""A run with a flipped bit, or a file cut off, is refused, says so, or is shown as it was recorded.

`python -m benchmarks.torture_files` does this at every byte; here it is a sample.
"""

import shutil

import pytest
from benchmarks.torture_files import alterations, killed_run, outcome, shown, small_run

from everystep.errors import DamageWarning
from everystep.recording.run import RecordedRun


@pytest.fixture(scope="module", params=["finished", "killed"])
def recorded(request, tmp_path_factory):
    """A run that no test may change, and what is shown of it."""
    folder = tmp_path_factory.mktemp("recorded")
    run = small_run(folder / "finished")
    if request.param == "killed":
        run = killed_run(run, folder / "killed")
        assert RecordedRun(run).status == "killed"
    expected, said = shown(shutil.copytree(run, folder / "copy"))
    assert not said
    return run, expected


def test_nothing_wrong_is_passed_off_as_right(recorded, tmp_path):
    run, expected = recorded
    found = {}
    for alteration in alterations(run, most=2, seed=1):
        copy = shutil.copytree(run, tmp_path / "altered")
        alteration.apply(copy)
        found[alteration] = outcome(copy, expected)
        shutil.rmtree(copy)
    assert not {
        each: what for each, what in found.items() if what[0] not in ("refused", "said", "sound")
    }
    assert {what for what, _ in found.values()} >= {"said", "sound"}


def test_the_write_ahead_log_of_a_killed_run_loses_nothing_without_a_word(recorded, tmp_path):
    run, _ = recorded
    if run.name != "killed":
        pytest.skip("a finished run has no log")
    log = (run / "run.sqlite-wal").read_bytes()
    for place in range(5, len(log), len(log) // 12):
        copy = shutil.copytree(run, tmp_path / "altered")
        content = bytearray(log)
        content[place] ^= 8
        (copy / "run.sqlite-wal").write_bytes(content)
        with pytest.warns(DamageWarning, match=r"run\.sqlite-wal: "):
            assert "run.sqlite-wal: " in (RecordedRun(copy).summary().damage or "")
        shutil.rmtree(copy)
