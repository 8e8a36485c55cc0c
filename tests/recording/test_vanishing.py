"""A run that is removed, or replaced, while it is being read."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import everystep
from everystep.errors import RunError
from everystep.page import columns
from everystep.page.run_index import RunIndex
from everystep.recording import connection, recorded_run
from everystep.recording.recorded_run import RecordedRun

#: Functions by which a list reads a run, in the order of their calls.
LOOKS = [
    (connection, "_statuses"),
    (connection, "_check_size"),
    (connection, "_connect"),
    (connection, "_check_identity"),
    (recorded_run, "structure_findings"),
    (recorded_run, "is_locked"),
]


@pytest.fixture
def recorded(tmp_path):
    kept = tmp_path / "runs" / "two-layer"
    everystep.train_experiment("two-layer", {"steps": 3}, run=kept, progress=False)
    return kept


def before(monkeypatch, module, name, act):
    original = getattr(module, name)

    def look(*arguments, **options):
        act()
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, look)


@pytest.mark.parametrize(("module", "name"), LOOKS, ids=lambda value: getattr(value, "__name__", value))
def test_a_run_removed_while_a_list_reads_it_is_a_problem_of_that_run(
    recorded, monkeypatch, module, name
):
    before(monkeypatch, module, name, lambda: shutil.rmtree(recorded, ignore_errors=True))
    [line] = RunIndex(recorded.parent).summaries().runs.values()
    assert line["problem"] is None or "two-layer" in line["problem"]


def test_a_run_replaced_by_another_file_while_it_is_opened_is_refused(recorded, monkeypatch):
    database = recorded / "run.sqlite"
    before(monkeypatch, connection, "_check_identity", lambda: database.write_bytes(b"x" * 8192))
    with pytest.raises(RunError, match=r"run\.sqlite"):
        everystep.open(recorded)


def test_a_file_that_another_rank_removes_meanwhile_does_not_end_a_training(recorded, monkeypatch):
    passing = recorded / "ranks/1/.passing.tmp"
    passing.mkdir(parents=True)
    look, seen = Path.lstat, []

    def removed_before(path):
        if path == passing:
            seen.append(path)
            passing.rmdir()
        return look(path)

    monkeypatch.setattr(Path, "lstat", removed_before)
    assert len(everystep.open(recorded).resume(5, progress=False)) == 5
    assert seen == [passing]


def test_a_list_with_a_run_that_was_removed_can_be_printed(recorded):
    runs = everystep.runs(recorded.parent)
    shutil.rmtree(recorded)
    assert re.fullmatch(r"\[<everystep run '.*': .*two-layer is not a run: .*>\]", repr(runs))


def test_a_run_removed_before_its_newest_losses_are_read_is_refused(recorded, monkeypatch):
    before(monkeypatch, columns, "reading", lambda: shutil.rmtree(recorded))
    with pytest.raises(RunError, match="is not a run"):
        columns.Columns().of(RecordedRun(recorded))


def test_a_program_with_a_file_that_is_gone_keeps_its_number(tmp_path):
    def trained(steps):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        with everystep.record(run=tmp_path / "run", resume=True, model=model) as recording:
            for x in recording.steps([torch.ones(2, 3), torch.ones(3, 3), torch.ones(4, 3)][:steps]):
                recording.log(loss=model(x).sum() if len(x) < 4 else model(x).prod())
        return recording.run

    trained(2)
    (tmp_path / "run" / "programs" / "1.json").unlink()
    run = trained(3)
    assert run[3].is_exact
    assert "programs/1.json" in str(run.doctor()) + repr(run.verify(progress=False))
