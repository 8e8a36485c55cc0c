"""A run from a stranger names no file but its own."""

import json
import os
import shutil
import sqlite3
from contextlib import closing

import pytest
from tests.training.by_hand import by_train, new_training

import everystep
from everystep.errors import RunError
from everystep.recording.files import own_path


@pytest.fixture
def run():
    return everystep.open(by_train(new_training(), steps=5).directory)


def change(run, statement, *arguments):
    with closing(sqlite3.connect(run.directory / "run.sqlite")) as database, database:
        database.execute(statement, arguments)


def change_fact(run, key, change_value):
    value = getattr(run.facts.training, key).model_dump(mode="json")
    change_value(value)
    change(run, "UPDATE facts SET value = ? WHERE key = ?", json.dumps(value), key)


@pytest.mark.parametrize("name", ["../other", "/dev/zero", "a/../../b", "link", "pipe", "a\0b", "loop"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "link").symlink_to("/dev/zero")
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "pipe")
    with pytest.raises(RunError, match="outside the run or not a regular file"):
        own_path(directory, name)


def test_files_of_its_own_are_found_also_through_a_link_to_the_run(tmp_path):
    directory = tmp_path / "run"
    (directory / "snapshots").mkdir(parents=True)
    (tmp_path / "link").symlink_to(directory)
    assert own_path(tmp_path / "link", "snapshots/000000") == tmp_path / "link" / "snapshots/000000"
    assert own_path(directory, "not there yet") == directory / "not there yet"


def test_a_run_that_names_foreign_data_programs_or_snapshots_is_not_replayed_from_them(run, tmp_path):
    elsewhere = shutil.copytree(run.directory, tmp_path / "elsewhere")
    for key, alter in (
        ("data_file", lambda fact: fact.update(file=str(elsewhere / "data.safetensors"))),
        ("engine", lambda fact: fact["programs"][0].update(file="../elsewhere/programs/1.json")),
    ):
        altered = everystep.open(shutil.copytree(run.directory, tmp_path / key))
        change_fact(altered, key, alter)
        with pytest.raises(RunError, match="outside the run or not a regular file"):
            altered[1]
    change(run, "UPDATE snapshots SET directory = ? WHERE step = 0", "../elsewhere/snapshots/000000")
    with pytest.raises(RunError, match="outside the run or not a regular file"):
        run[1]


def test_a_fork_writes_nothing_outside_its_directory(tmp_path):
    run = everystep.train_experiment("two-layer", {"steps": 5}, directory=tmp_path / "a", progress=False)
    change(run, "UPDATE snapshots SET directory = '../outside' WHERE step = 0")
    with pytest.raises(RunError, match="outside the run or not a regular file"):
        everystep.open(run.directory).fork(3, directory=tmp_path / "b", progress=False)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("threads", [10**9, 0, -1])
def test_a_run_that_says_it_had_impossibly_many_threads_is_not_replayed(run, threads):
    change_fact(run, "numerics", lambda fact: fact.update(threads=threads))
    with pytest.raises(RunError, match="threads: the database was changed"):
        everystep.open(run.directory)[1]
