"""The number of a row is that of the file, or of the tensors given, wherever a row has one."""

import csv
import json
import random

import pytest
import torch
from tests.descent import of_table, trained
from torch import nn

import everystep
from everystep import UsageError

#: Numbers of the table's rows: one that stands out, one without a value, one after an empty line.
BAD, MISSING, EMPTY = 81, 20, 50


def write_table(path, bad=500.0):
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["a", "b", "c", "y"])
        for number in range(120):
            values = [draw.gauss(0, 1) for _ in range(3)]
            target = bad if number == BAD else sum(values)
            row = [*values[:2], "" if number == MISSING else values[2], target]
            table.writerow([] if number == EMPTY else row)


def train(directory, name, **changed):
    data = {"validation": 0.3, "missing": "drop"}
    settings = {"steps": 22, "batch_size": 8, "optimizer": {"name": "SGD", "lr": 1e-4}} | changed
    experiment = of_table(directory / f"{name}.csv", "y", "Linear(3, 1)", data=data, **settings)
    return everystep.train_experiment(experiment, run=directory / name, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    write_table(directory / "good.csv")
    return train(directory, "good")


def step_of(run, row):
    return next(step for step in range(1, len(run) + 1) if row in run[step].batch.rows.tolist())


def test_a_row_of_a_file_has_its_number_in_every_answer(run, everystep_command):
    number = step_of(run, BAD)
    step, asked = run[number], (str(run.directory), str(number))
    place = step.batch.rows.tolist().index(BAD)
    assert step.batch.y[place].item() == 500
    assert {EMPTY, MISSING}.isdisjoint(
        n for s in range(1, len(run) + 1) for n in run[s].batch.rows.tolist()
    )

    _, out, _ = everystep_command("rows", *asked, "--first", "1")
    assert f"\n {BAD}  " in out and "row: its number in good.csv, counted from 0\n" in out
    _, out, _ = everystep_command("rows", *asked, "--json")
    answer = json.loads(out)
    worst = answer["rows"][str(answer["orders"]["loss"][0])]
    assert (worst["row"], answer["rows_of"]) == (BAD, "good.csv")
    _, out, _ = everystep_command("why", *asked, "loss", "--terms", "1")
    assert f"row {BAD}\n" in out and out.endswith("row: its number in good.csv, counted from 0\n")
    assert step.why(f"batch.y[{place}, 0]").note == f"row {BAD} of good.csv"
    _, out, _ = everystep_command("step", *asked)
    assert " of good.csv (8 of " in out


def test_rows_are_left_out_and_relabelled_by_the_numbers_that_are_shown(run, everystep_command):
    number = step_of(run, BAD)
    at = (str(run.directory), "--at", str(number - 1), "--without-rows")
    _, out, _ = everystep_command("what-if", *at, str(BAD))
    assert f"\n{BAD} " in out and "row: its number in good.csv, counted from 0" in out
    code, _, err = everystep_command("what-if", *at, str(MISSING))
    assert code == 2 and f"row {MISSING} of good.csv is not trained on" in err
    code, _, err = everystep_command("what-if", *at, "500")
    assert code == 2 and "there is no row 500; the training rows are 0 to 119" in err

    others = run[number + 1].batch.rows.tolist()
    fork = run.fork(number - 1, without_rows=[BAD], relabel={others[0]: 7.0}, progress=False)
    assert BAD not in fork[number].batch.rows.tolist()
    batch = fork[number + 1].batch
    assert (batch.rows.tolist(), batch.y[0].item()) == (others, 7)
    with pytest.raises(UsageError, match=f"row {EMPTY} of good.csv is not trained on"):
        run.fork(number - 1, relabel={EMPTY: 7.0}, progress=False)
    assert fork.verify(progress=False).is_exact


def test_diff_names_the_row_of_the_file_that_differs(run, everystep_command):
    directory = run.directory.parent
    write_table(directory / "bad.csv", bad=499.0)
    other = train(directory, "bad")
    (difference,) = run.diff(other).data_tensors
    assert difference.rows == [BAD]
    _, out, _ = everystep_command("diff", run.directory, other.directory)
    assert f"y[{BAD}, 0]" in out


def test_a_seed_of_a_fork_does_not_change_what_rows_are_called(run):
    fork = run.fork(0, seed=7, progress=False)
    step = fork[step_of(fork, BAD)]
    assert step.batch.y[step.batch.rows.tolist().index(BAD)].item() == 500


def test_rows_of_tensors_are_those_that_were_given(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.randn(40, 1)
    model = nn.Linear(3, 1)
    options = {"batch_size": 7, "validation": 0.25, "seed": 3, "run": tmp_path / "run"}
    run = trained(model, (x, y), steps=6, **options)
    for opened in (run, everystep.open(tmp_path / "run")):
        for step in (1, 6):
            batch = opened[step].batch
            assert torch.equal(batch.x, x[batch.rows]) and torch.equal(batch.y, y[batch.rows])


def test_a_batch_of_all_rows_has_their_numbers(run):
    directory = run.directory.parent
    write_table(directory / "whole.csv")
    step = train(directory, "whole", batch_size=None)[1]
    assert step.batch.y[step.batch.rows.tolist().index(BAD)].item() == 500


def test_a_fault_in_a_file_is_at_the_number_that_its_row_has(tmp_path):
    write_table(tmp_path / "wrong.csv", bad="many")
    with pytest.raises(UsageError, match=rf"'many' in row {BAD} \(counted from 0\)"):
        train(tmp_path, "wrong")
