"""A run with a flipped bit, or a file cut off, is refused, reported, or shown as recorded.

`python -m benchmarks.torture_files` does this at every byte; here it is a sample.
"""

import shutil

import pytest
from benchmarks.torture_files import alterations, killed_run, outcome, shown, small_run

from everystep.recording.recorded_run import RecordedRun


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
    for alteration in alterations(run, most=2, seed=2):
        copy = shutil.copytree(run, tmp_path / "altered")
        alteration.apply(copy)
        found[alteration] = outcome(copy, expected)
        shutil.rmtree(copy)
    allowed = ("refused", "said", "sound")
    assert not {each: what for each, what in found.items() if what[0] not in allowed}
    assert {what for what, _ in found.values()} >= {"said", "sound"}
