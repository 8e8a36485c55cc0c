"""Rows of the table `repeats`; one row may be of many steps."""

import math
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import everystep
from everystep.bounded import MOST_STEPS
from everystep.errors import RunError
from everystep.recording.contents import Repeats, Taken, packed
from everystep.recording.continuation import Continuation
from everystep.recording.database import FILE_NAME, Database, Repeat, cut


class Custom(torch.nn.Module):
    """A model that is not one of torch's own, so that Python runs each step of its training."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)


def _by_step(rows):
    """Return the content of rows by step."""
    return {row.step + n: row[1:4] for row in rows for n in range(row.count)}


def _between(by_step, first, last):
    return {step: each for step, each in by_step.items() if first <= step <= last}


@st.composite
def rows_of_steps(draw):
    """Draw rows in order."""
    rows, step = [], 1
    for _ in range(draw(st.integers(0, 6))):
        count = draw(st.integers(1, 5))
        inputs = packed({"nesting": draw(st.integers(0, 1)), "given": {}})
        rows.append(Repeat(step, draw(st.sampled_from([None, 1])), None, inputs, count))
        step += count
    return rows


@given(taken=rows_of_steps(), cuts=st.data())
def test_a_resumed_training_compares_recorded_steps_and_returns_the_others(taken, cuts):
    steps = sum(row.count for row in taken)
    recorded = cuts.draw(st.integers(0, steps))
    ends = sorted({0, recorded, *cuts.draw(st.lists(st.integers(0, recorded), max_size=3))})
    known = [row for a, b in pairwise(ends) for row in cut(taken, a + 1, b)]
    changed = cuts.draw(st.integers(1, recorded)) if recorded and cuts.draw(st.booleans()) else None
    with TemporaryDirectory() as folder:
        path = Path(folder)
        with closing(Database.create(path / FILE_NAME)) as database:
            with database.transaction():
                database.write_losses(1, [0.5] * recorded)
                database.write_repeats(known)
            continuation = Continuation(path, database, {})
            if changed is None:
                new = continuation.new_repeats(taken)
                assert _by_step(new) == _between(_by_step(taken), recorded + 1, steps)
                return
            other = Repeat(changed, 1, None, packed({"nesting": "another", "given": {}}))
            changed_rows = [*cut(taken, 1, changed - 1), other, *cut(taken, changed + 1, steps)]
            with pytest.raises(RunError, match=f"when step {changed} is repeated, the batch is not"):
                continuation.new_repeats(changed_rows)


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([None, [1.5]]), st.integers(0, 3))))
def test_equal_consecutive_steps_are_written_as_one_row(steps):
    """Unless they were given something, or have digests."""
    taken, at = [], 1
    for count, numbers, kind in steps:
        inputs = {"batch/x": torch.ones(2)} if kind == 1 else {}
        digests = {"parameter/w": "00"} if kind == 2 else {}
        taken.append(Taken(at, 1, numbers, inputs, None, 8, digests, 1 if digests else count))
        at += taken[-1].count
    with TemporaryDirectory() as folder, closing(Database.create(Path(folder, FILE_NAME))) as database:
        writer = Repeats(Path(folder), database, 1e6, 0)
        writer.write(taken, None)
        writer.close()
        rows = database.repeats(1, MOST_STEPS)
    contents = [(row.numbers, bool(row.inputs), bool(row.digests)) for row in taken]
    joined = sum(a == b and not any(b[1:]) for a, b in pairwise(contents))
    assert len(rows) == len(taken) - joined
    assert sorted(_by_step(rows)) == list(range(1, at))
    for row in taken:
        for each in cut(rows, row.step, row.step + row.count - 1):
            assert each.numbers == (packed(row.numbers) if row.numbers else None)


@pytest.fixture(scope="module")
def by_rule(tmp_path_factory):
    """Return a run of 50 watched steps."""
    torch.manual_seed(0)
    model = Custom()
    data = torch.randn(20, 4), torch.randn(20, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"loss": torch.nn.MSELoss(), "optimizer": optimizer, "progress": False}
    place = tmp_path_factory.mktemp("rows") / "run"
    with pytest.MonkeyPatch.context() as patch:  # all are written at once
        patch.setattr("everystep.training.writer.FLUSH_SECONDS", math.inf)
        return everystep.train(model, data, steps=50, directory=place, **options)


def _rows(run):
    with closing(sqlite3.connect(run.directory / FILE_NAME)) as database:
        return database.execute("SELECT step, count FROM repeats ORDER BY step").fetchall()


def test_watched_steps_with_batches_by_rule_share_rows(by_rule):
    assert len(_rows(by_rule)) < 25 and sum(count for _, count in _rows(by_rule)) == 50
    assert by_rule.verify(processes=1, progress=False).is_exact
    steps = [by_rule[number] for number in (40, 33, 50, 49)]
    assert [float(step.loss) for step in steps] == [
        by_rule.losses["loss"][n - 1] for n in (40, 33, 50, 49)
    ]


def test_a_fork_ends_the_row_of_its_parent_at_its_state(by_rule, tmp_path):
    step, count = max(_rows(by_rule), key=lambda row: row[1])
    at = step + count // 2
    fork = by_rule.fork(at, lr=0.02, directory=tmp_path / "fork", progress=False)
    assert (step, count // 2 + 1) in _rows(fork) and sum(count for _, count in _rows(fork)) == 50
    assert fork.verify(processes=1, progress=False).is_exact
    assert float(fork[at].loss) == by_rule.losses["loss"][at - 1]


@pytest.mark.parametrize(
    ("row", "count"),
    [("max", 0), ("max", -1), ("max", "many"), ("max", 1.5), ("max", 2**60), ("min", 3)],
)
def test_a_changed_number_of_steps_is_refused(by_rule, tmp_path, row, count):
    run = tmp_path / "run"
    with closing(sqlite3.connect(by_rule.directory / FILE_NAME)) as database:
        run.mkdir()
        with closing(sqlite3.connect(run / FILE_NAME)) as copy, copy:
            database.backup(copy)
            which = f"step = (SELECT {row}(step) FROM repeats)"
            copy.execute(f"UPDATE repeats SET count = ? WHERE {which}", (count,))
    with (
        pytest.raises(RunError, match="the database was changed"),
        closing(Database.change(run / FILE_NAME)) as database,
    ):
        database.repeats(1, 50)
