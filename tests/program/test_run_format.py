"""docs/run-format.md describes a run completely, and its code returns the recorded loss."""

import json
import re
import sqlite3
from pathlib import Path

import pytest

import everystep
from everystep.program.step_program import Program

PAGE = (Path(__file__).parents[2] / "docs" / "run-format.md").read_text(encoding="utf-8")
RUN = Path("runs/two-layer-1")


@pytest.fixture
def run():
    """The run of the page: the chapter's network, where the page has it."""
    return everystep.train_experiment("two-layer", {"steps": 3}, run=RUN, progress=False)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_its_python_takes_a_step_with_the_bits_of_the_recorded_one(run):
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["losses"] == dict(zip([1, 2, 3], run.losses["loss"].to_list(), strict=True))
    assert names["loss"] == names["losses"][1]
    # The step was a whole one, with its update: another gives the second loss.
    step = blocks("python")[-1].partition("\nfor operation in")
    exec("".join(step[1:]), names)
    assert names["loss"] == names["losses"][2]


def test_its_example_is_the_beginning_of_the_program(run):
    (example,) = [block for block in blocks("json") if "addmm" in block]
    shown = [json.loads(line) for line in example.splitlines()]
    program = json.loads((RUN / "programs/1.json").read_text())
    assert shown == program["operations"][: len(shown)]


def test_it_names_every_fact_table_and_column(run):
    with sqlite3.connect(RUN / "run.sqlite") as database:
        facts = dict(database.execute("SELECT key, value FROM facts"))
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE sql != ''")]
        columns = {
            column[1] for table in tables for column in database.execute(f"PRAGMA table_info({table})")
        }
        (identity,) = database.execute("PRAGMA application_id").fetchone()
    assert f"{identity:#x}" in PAGE
    missing = {name for name in (*facts, *tables, *columns) if f"`{name}`" not in PAGE}
    assert not missing
    (example,) = [json.loads(block) for block in blocks("json") if '"asked"' in block]
    assert example.keys() == json.loads(facts["engine"]).keys()


def test_it_names_every_file(run):
    names = {path.relative_to(RUN) for path in RUN.rglob("*") if path.is_file()}
    for name in names:
        assert name.name.removesuffix("-wal").removesuffix("-shm") in PAGE


def test_it_names_every_key_of_a_program(run):
    program = Program.from_json((RUN / "programs/1.json").read_text())
    parts = (program, program.operations[0], program.tensors["x"], program.storages["x"])
    keys = {key for part in parts for key in type(part).model_fields}
    assert {key for key in keys if f"`{key}`" not in PAGE} == set()
    for kind in ("input", "state", "temporary"):
        assert f"`{kind}`" in PAGE
