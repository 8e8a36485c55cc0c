"""The list of runs, printed while the runs are read."""

import io
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from tests.page.serving import written

from everystep.recording.database import Database
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.summary import Summary
from everystep.views import lists as run_list


def summary(name, **others):
    fields = {"status": "finished", "steps": 5, "planned": 5, "first_loss": 1.0, "last_loss": 0.5}
    started = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    return Summary(**{"name": name, "directory": Path(name), "started": started} | fields | others)


def lines_of(runs, width=None):
    file = io.StringIO()
    console = Console(file=file, width=width or 1000)
    for table in run_list.runs_tables(runs, width):
        console.print(table, end="")
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_rows_are_there_before_all_runs_are_read(monkeypatch):
    monkeypatch.setattr(run_list, "_MOMENT", 0.0)
    read = []

    def runs():
        for number in range(3):
            read.append(number)
            yield summary(f"run-{number}")

    tables = run_list.runs_tables(runs())
    next(tables)
    assert read == [0]
    pieces = run_list.runs_json(runs())
    assert "run-0" in next(pieces)
    assert read == [0, 0]


def test_the_parts_of_a_list_are_one_table(monkeypatch):
    runs = [summary(f"run-{number}") for number in (100, 20, 3)]
    whole = lines_of(runs)
    monkeypatch.setattr(run_list, "_MOMENT", 0.0)
    assert lines_of(runs) == whole
    assert [line.split()[0] for line in whole] == ["run", "run-100", "run-20", "run-3"]


def test_headings_come_again_where_a_column_is_added(monkeypatch):
    monkeypatch.setattr(run_list, "_MOMENT", 0.0)
    lines = lines_of([summary("a"), summary("b", parent=("a", 2)), summary("c")])
    assert [line.split()[0] for line in lines] == ["run", "a", "run", "b", "c"]
    assert lines[2].endswith("fork of") and lines[3].endswith("a, step 2")
    assert lines[4].index("2026") == lines[3].index("2026")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_pieces_of_json_are_an_array(count):
    text = "".join(run_list.runs_json(summary(f"run-{number}") for number in range(count)))
    assert [run["name"] for run in json.loads(text)] == [f"run-{number}" for number in range(count)]


def test_the_list_leaves_nothing_beside_a_run_that_nobody_writes(tmp_path):
    run = written(tmp_path / "run", [2.0, 1.0])
    before = sorted(path.name for path in run.iterdir())
    assert RecordedRun(run, may_be_cut=True).summary().last_loss == 1.0
    assert sorted(path.name for path in run.iterdir()) == before


def test_steps_that_are_only_in_the_log_are_listed(tmp_path):
    run = written(tmp_path / "run", [2.0, 1.0])
    database = Database.change(run / "run.sqlite")
    with database.transaction():
        database.write_losses(3, [0.5])
    shutil.copytree(run, tmp_path / "copy")  # as a killed process leaves it
    database.close()
    assert RecordedRun(tmp_path / "copy", may_be_cut=True).summary().last_loss == 0.5
