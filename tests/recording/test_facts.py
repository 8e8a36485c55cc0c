"""The facts of a run are as everystep writes them, or are reported as changed."""

import json
import os
import shutil
import sqlite3
from contextlib import closing

import pytest
from tests.sealing import seal_tables, sql
from tests.training.by_hand import by_train, new_training

import everystep
from everystep.errors import RunError
from everystep.recording.texts import model_text
from everystep.views.facts_text import header

CHANGED = [
    ("steps", "NaN"),
    ("steps", "[1, 2]"),
    ("steps", "1e999"),
    ("steps", "9" * 40),
    ("status", '"\\ud800"'),
    ("status", "3"),
    ("started", '"0001-01-01T00:00:00+14:00"'),
    ("started", '"2026-11-25T12:00:00"'),
    ("started", "5"),
    ("fork", '{"parent": "x", "directory": "x", "at": NaN, "changed": {}}'),
    ("fork", "[1, 2]"),
    ("fork", "{}"),
    ("earlier", '[{"last": 2, "fact": {}}]'),
    ("modules", '"text"'),
    ("modules", '{"": {"class_name": 3}}'),
    ("modules", '{"": {"class_name": "Linear", "arguments": ["in_features=4"]}}'),
    ("optimizers", '{"optimizer": {"class_name": "SGD", "is_torchs": 1, "groups": []}}'),
    ("optimizers", '{"optimizer": {"class_name": "SGD", "is_torchs": true, "groups": {"lr": 0.1}}}'),
    ("schedulers", '{"scheduler": "StepLR, every step"}'),
    ("loss", '{"text": "MSELoss()"}'),
    ("engine", '{"asked": "auto"}'),
    ("data_file", '{"file": "data.safetensors", "stored": true, "bytes": 1, "digest": ""}'),
    ("loop", '{"parts": {}, "programs": 4611686018427387904, "unseen": [], "has_loss": true}'),
    ("versions", '{"torch": 2.9}'),
    ("data", '{"source": "random", "rows": 1.5}'),
    ("numerics", "{}"),
    ("anything", "[" * 100_000),
    ("anything", "no JSON"),
    ("anything", b"\xff"),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run that no test may change."""
    return by_train(new_training(), steps=3, run=tmp_path_factory.mktemp("recorded") / "run").directory


@pytest.fixture
def runs(recorded, tmp_path):
    """A directory of a copy, `right`."""
    return shutil.copytree(recorded, tmp_path / "runs" / "right").parent


def change(directory, key, text):
    """Change a fact and its digest, as in a stranger's run."""
    sql(directory, ("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, text)))
    seal_tables(directory)


@pytest.mark.parametrize(("key", "text"), CHANGED)
def test_a_fact_of_another_shape_is_a_run_that_was_changed(runs, key, text):
    altered = shutil.copytree(runs / "right", runs / "altered")
    change(altered, key, text)
    with pytest.raises(RunError, match=rf"has an invalid value for '{key}'"):
        everystep.open(altered).summary()


def test_texts_beyond_the_basic_plane_are_texts(runs):
    change(runs / "right", "name", json.dumps("😀"))
    assert everystep.open(runs / "right").facts.name == "😀"


HOSTILE = [
    {},
    {"a.b.c": {"class_name": "Linear"}},
    {"": {"class_name": "<img src=x>", "arguments": "\n\n"}, ".": {"class_name": ""}},
    {"b": {"class_name": "B"}, "": {"class_name": "A"}, "b.c": {"class_name": "C"}},
    {".".join("a" * n): {"class_name": "ModuleList"} for n in range(1500)},
]


@pytest.mark.parametrize("modules", HOSTILE)
def test_modules_that_no_model_has_are_shown_all_the_same(runs, everystep_command, modules):
    change(runs / "right", "modules", json.dumps(modules))
    run = everystep.open(runs / "right")
    assert "parameters" in header(run.facts)
    assert len(model_text(run.facts.training.modules)) < 20_000_000
    assert everystep_command("step", runs / "right", 2)[0] == 0


def test_a_run_that_has_just_begun_has_few_facts(runs):
    sql(runs / "right", "DELETE FROM facts WHERE key NOT IN ('status', 'started')")
    seal_tables(runs / "right")
    run = everystep.open(runs / "right")
    assert (run.status, run.facts.trained, run.summary().planned) == ("finished", None, 3)
    for ask in (lambda: run.facts.training, lambda: run[1], run.verify, run.report):
        with pytest.raises(RunError, match="has no record of how it was trained"):
            ask()


def test_facts_of_a_later_everystep_are_left_out(runs):
    before = everystep.open(runs / "right").facts
    change(runs / "right", "invented", '{"later": true}')
    engine = before.training.engine.model_dump(mode="json") | {"invented": [1]}
    change(runs / "right", "engine", json.dumps(engine))
    assert everystep.open(runs / "right").facts == before


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE steps RENAME TO others",
        "DROP TABLE measurements; CREATE VIEW measurements AS WITH RECURSIVE c(x) AS "
        "(SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT 'a' AS name, x AS step, x AS value FROM c",
        "CREATE TABLE more (x)",
        "CREATE TRIGGER t AFTER INSERT ON facts BEGIN DELETE FROM facts; END",
    ],
)
def test_a_database_with_other_tables_is_not_read(runs, statement):
    with closing(sqlite3.connect(runs / "right" / "run.sqlite")) as database:
        database.executescript(statement)
    with pytest.raises(RunError, match="tables that everystep does not create"):
        everystep.open(runs / "right")


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_a_pipe_beside_the_database_is_not_waited_for(runs, suffix):
    pipe = runs / "right" / f"run.sqlite{suffix}"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with pytest.raises(RunError, match="is not a regular file"):
        everystep.open(runs / "right")


def test_a_run_of_a_generator_that_nobody_seeded_is_read(runs):
    batches = everystep.open(runs / "right").facts.training.batches.model_dump()
    change(runs / "right", "batches", json.dumps(batches | {"seed": 2**64 - 1}))
    assert everystep.open(runs / "right").facts.training.batches.seed == 2**64 - 1
