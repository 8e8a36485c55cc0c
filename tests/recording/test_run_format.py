"""The document on the run's format says what is so: its code reads a run without everystep."""

import re
from pathlib import Path

import pytest

import everystep

DOCUMENT = Path(__file__).parents[2] / "docs" / "run-format.md"


@pytest.fixture
def blocks():
    everystep.train_experiment("two-layer", {"steps": 20}, directory="runs/two-layer-1", progress=False)
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def test_its_code_reads_the_losses_and_takes_the_first_step(blocks):
    names = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    run = everystep.open("two-layer-1")
    assert list(names["losses"].values()) == run.losses["loss"].to_list()
    assert names["loss"] == names["losses"][1]


def test_it_names_every_fact_table_and_file_of_a_run(blocks):
    text = DOCUMENT.read_text(encoding="utf-8")
    run = everystep.open("two-layer-1")
    unnamed = [key for key in run.facts if f"`{key}`" not in text and key != "preparation"]
    assert unnamed == []
    files = {path.name for path in run.directory.rglob("*") if path.is_file()}
    assert {name for name in files if name not in text and not name.endswith(("-wal", "-shm"))} == set()
