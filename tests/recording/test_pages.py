"""Losses that are read from the pages of a run's file are those that SQL returns, or are left to SQL."""

import os
import random
import shutil
import sqlite3
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everystep.errors import EverystepError
from everystep.recording import database as database_module
from everystep.recording.blocks import BLOCK
from everystep.recording.database import FILE_NAME, Database, reading
from everystep.recording.health import number_findings
from everystep.recording.pages import _varints, losses_in_pages

ROWS = 3 * BLOCK + 100
floats = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(width=32),
    st.integers(-(2**53), 2**53).map(float),
    st.sampled_from([0.0, -0.0, 1.0, 127.0, -128.0, 32768.0, 2.0**23, 2.0**47, 2.0**48, 5e-324]),
)


def losses_like_a_training(count, seed=0):
    """Return float32 losses, among them NaN, infinities and whole numbers."""
    rng = np.random.default_rng(seed)
    losses = rng.random(count, np.float32).astype(np.float64)
    for value in (np.nan, np.inf, -np.inf, 0.0, 1.0, 2.0, -300.0, 70_000.0, 2.0**30):
        losses[rng.integers(0, count, 5)] = value
    return losses


def write(folder, losses, close=True):
    folder.mkdir()
    database = Database.create(folder / FILE_NAME)
    for begin in range(0, len(losses), 1000):
        with database.transaction():
            database.write_losses(begin + 1, losses[begin : begin + 1000].tolist())
            database.seal_blocks()
    if close:
        database.close()
    return database


def same(one, other):
    return np.array_equal(one, other, equal_nan=True)


def by_sql(path):
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT loss FROM steps ORDER BY step").fetchall()
    return np.array([loss for (loss,) in rows], np.float64)


def outcome(folder):
    """Return what a reader gets: steps, losses and findings; or the error."""
    try:
        with reading(folder / FILE_NAME) as database, database.one_moment():
            steps, losses = database.losses()
            later = database.losses_after(5000)
            found = number_findings(database, (steps, losses))
            return steps.tobytes(), losses.tobytes(), later.tobytes(), [str(each) for each in found]
    except EverystepError as error:
        return type(error), str(error)


@pytest.fixture
def from_pages(monkeypatch):
    monkeypatch.setattr(database_module, "MANY", 0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "run"
    write(folder, losses_like_a_training(ROWS))
    return folder


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(floats, max_size=400), page=st.sampled_from([512, 1024, 4096, 65_536]))
def test_any_losses_are_read_as_sql_reads_them(tmp_path_factory, losses, page):
    path = tmp_path_factory.mktemp("any") / "run.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"PRAGMA page_size = {page}")
        database.execute("CREATE TABLE steps (step INTEGER PRIMARY KEY, loss REAL)")
        database.execute("BEGIN")
        database.executemany("INSERT INTO steps VALUES (?, ?)", enumerate(losses, 1))
        database.execute("COMMIT")
    found = losses_in_pages(path, 2)
    assert len(found) == len(losses)
    assert same(found, by_sql(path))


def test_steps_as_varints():
    steps = np.array([1, 127, 128, 16_383, 16_384, 2**21 - 1, 2**21, 2**28 - 1])
    for step, number, length in zip(
        steps.tolist(), *map(np.ndarray.tolist, _varints(steps)), strict=True
    ):
        assert [*number.to_bytes(length, "big")] == varint(step)


def varint(number):
    """Return the bytes of a number as SQLite writes it, by the definition in its file format, 1.6."""
    groups = [number & 127]
    while number := number >> 7:
        groups.insert(0, number & 127 | 128)
    return groups


def test_a_run_is_read_from_pages(recorded, from_pages, monkeypatch):
    queries = []
    floats_by_sql = Database.floats
    monkeypatch.setattr(
        Database, "floats", lambda self, *a, **k: queries.append(a) or floats_by_sql(self, *a, **k)
    )
    with reading(recorded / FILE_NAME) as database, database.one_moment():
        steps, losses = database.losses()
    assert steps.tolist() == [*range(1, ROWS + 1)]
    assert same(losses, losses_like_a_training(ROWS))
    assert [arguments[1:] for arguments in queries] == [(ROWS,)]  # and there is nothing after them


def test_the_newest_steps_of_a_killed_run_are_read_from_its_log(tmp_path, from_pages):
    losses = losses_like_a_training(2 * ROWS)
    writer = write(tmp_path / "run", losses[:ROWS], close=False)
    writer.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for begin in range(ROWS, ROWS + 3000, 100):
        with writer.transaction():
            writer.write_losses(begin + 1, losses[begin : begin + 100].tolist())
            writer.seal_blocks()
    killed = shutil.copytree(tmp_path / "run", tmp_path / "killed")
    os.truncate(killed / f"{FILE_NAME}-wal", (killed / f"{FILE_NAME}-wal").stat().st_size - 100)
    writer.close()
    with reading(killed / FILE_NAME) as database, database.one_moment():
        known = database.losses_in_pages(database.newest_step())
        found = database.losses()[1]
    assert 2 * BLOCK <= len(known) <= ROWS
    assert len(found) == ROWS + 2900  # the last transaction was cut off
    assert same(found, losses[: ROWS + 2900])


def test_the_file_of_a_run_that_may_be_written_is_not_opened(tmp_path, from_pages, monkeypatch):
    writer = write(tmp_path / "run", losses_like_a_training(ROWS), close=False)
    monkeypatch.setattr(Database, "losses_in_pages", lambda *arguments: pytest.fail("it was opened"))
    with reading(tmp_path / "run" / FILE_NAME) as database:
        assert len(database.losses()[1]) == ROWS
    writer.close()


@pytest.mark.parametrize("content", [b"", bytes(100), bytes(16) + b"\0\1" + bytes(4096)])
def test_a_file_that_is_not_a_database_has_no_losses(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    assert len(losses_in_pages(tmp_path / FILE_NAME, 2)) == 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE steps SET loss = loss * 1.0000001 WHERE step = 5001",
        "UPDATE steps SET loss = NULL WHERE step = 9000",
        "DELETE FROM steps WHERE step = 7000",
        f"DELETE FROM steps WHERE step = {ROWS}",
        "DELETE FROM steps WHERE step < 10",
        "INSERT INTO steps VALUES (0, 1.0)",
        "INSERT INTO steps VALUES (-7, 1.0)",
        "INSERT INTO steps VALUES (20000, 1.0)",
        f"INSERT INTO steps VALUES ({ROWS + 1}, 1.0)",
        "UPDATE steps SET loss = 'text' WHERE step = 6000",
        "DELETE FROM blocks WHERE first = 4096",
        "UPDATE blocks SET digest = x'00' WHERE first = 8192",
        "INSERT INTO blocks VALUES ('loss', 40960, x'00')",
        "DELETE FROM blocks",
    ],
)
def test_an_altered_run_is_reported_as_by_sql(recorded, tmp_path, monkeypatch, statement):
    run = shutil.copytree(recorded, tmp_path / "run")
    with closing(sqlite3.connect(run / FILE_NAME)) as database, database:
        assert database.execute(statement).rowcount
    expected = outcome(run)
    monkeypatch.setattr(database_module, "MANY", 0)
    assert outcome(run) == expected
    # A run that was closed must have all digests; that is for `structure_findings`.
    assert expected != outcome(recorded) or statement.startswith("DELETE FROM blocks")


@pytest.mark.parametrize("step", [-7, 0, ROWS + 2])
def test_each_step_has_its_loss_where_steps_were_added(recorded, tmp_path, from_pages, step):
    run = shutil.copytree(recorded, tmp_path / "run")
    with closing(sqlite3.connect(run / FILE_NAME)) as database, database:
        database.execute("INSERT INTO steps VALUES (?, 0.125)", (step,))
    with reading(run / FILE_NAME) as database, database.one_moment():
        steps, losses = database.losses()
    known = dict(zip(range(1, ROWS + 1), losses_like_a_training(ROWS).tolist(), strict=True))
    known[step] = 0.125
    assert steps.tolist() == sorted(known)
    assert same(losses, np.array([known[each] for each in sorted(known)]))


def test_a_flipped_bit_is_reported_as_by_sql(recorded, tmp_path, monkeypatch):
    """Anywhere in the file; where SQLite does not see it, the losses are as they were recorded."""
    whole, chance = (recorded / FILE_NAME).read_bytes(), random.Random(1)
    run = tmp_path / "run"
    run.mkdir()
    sound = outcome(recorded)
    differences = 0
    for _ in range(150):
        content = bytearray(whole)
        content[chance.randrange(100, len(whole))] ^= 1 << chance.randrange(8)
        (run / FILE_NAME).write_bytes(content)
        monkeypatch.setattr(database_module, "MANY", 50_000)
        expected = outcome(run)
        monkeypatch.setattr(database_module, "MANY", 0)
        found = outcome(run)
        differences += expected != sound
        assert found == expected or found[:3] == sound[:3]
    assert differences > 50


def test_random_pages_are_no_losses(recorded, tmp_path):
    whole, chance = (recorded / FILE_NAME).read_bytes(), random.Random(2)
    path = tmp_path / FILE_NAME
    expected = losses_like_a_training(ROWS)
    for _ in range(100):
        content = bytearray(whole)
        ends = sorted(chance.sample(range(len(whole)), 2))
        content[slice(*ends)] = chance.randbytes(ends[1] - ends[0])
        path.write_bytes(content[: chance.randrange(len(content))])
        assert len(losses_in_pages(path, chance.choice([2, 2, 0, 1, 99, 2**40]))) <= len(expected)


def test_a_tree_that_refers_to_itself_ends(recorded, tmp_path):
    content = bytearray((recorded / FILE_NAME).read_bytes())
    root = content[4096:8192]
    assert root[0] == 5
    count = int.from_bytes(root[3:5], "big")
    for begin, end in pairwise(range(12, 14 + 2 * count, 2)):
        cell = 4096 + int.from_bytes(root[begin:end], "big")
        content[cell : cell + 4] = (2).to_bytes(4, "big")
    (tmp_path / FILE_NAME).write_bytes(content)
    assert len(losses_in_pages(tmp_path / FILE_NAME, 2)) == 0
