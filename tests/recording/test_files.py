"""A run from a stranger names no file but its own."""

import json
import os
import shutil
import zlib

import pytest
import torch
from tests.descent import looped
from tests.recording.hostile import tensors
from tests.sealing import seal_repeats, seal_tables, sql
from tests.training.by_hand import by_train, new_training

import everystep
from everystep.errors import RunError
from everystep.recording.files import own_path


@pytest.fixture
def run():
    return everystep.open(by_train(new_training(), steps=5).directory)


def change_fact(run, key, change_value):
    value = getattr(run.facts.training, key).model_dump(mode="json")
    change_value(value)
    change = "UPDATE facts SET value = ? WHERE key = ?", (json.dumps(value), key)
    sql(run.directory, change)
    seal_tables(run.directory)


@pytest.mark.parametrize("name", ["../other", "/dev/zero", "a/../../b", "link", "pipe", "a\0b", "loop"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "link").symlink_to("/dev/zero")
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "pipe")
    with pytest.raises(RunError, match="outside the run, or what is not a regular file"):
        own_path(directory, name)


def test_files_of_its_own_are_found_also_through_a_link_to_the_run(tmp_path):
    directory = tmp_path / "run"
    (directory / "snapshots").mkdir(parents=True)
    (tmp_path / "link").symlink_to(directory)
    assert own_path(tmp_path / "link", "snapshots/000000") == tmp_path / "link" / "snapshots/000000"
    assert own_path(directory, "not there yet") == directory / "not there yet"


def test_a_run_that_names_foreign_data_programs_or_snapshots_is_not_replayed_from_them(run, tmp_path):
    elsewhere = shutil.copytree(run.directory, tmp_path / "elsewhere")
    altered = everystep.open(shutil.copytree(run.directory, tmp_path / "altered"))
    change_fact(altered, "data_file", lambda fact: fact.update(file=str(elsewhere / "data.safetensors")))
    with pytest.raises(RunError, match="outside the run, or what is not a regular file"):
        altered[1]
    linked = everystep.open(shutil.copytree(run.directory, tmp_path / "linked"))
    (linked.directory / "programs" / "1.json").unlink()
    (linked.directory / "programs" / "1.json").symlink_to(elsewhere / "programs" / "1.json")
    with pytest.raises(RunError, match="outside the run, or what is not a regular file"):
        linked[1]
    sql(run.directory, "UPDATE files SET name = replace(name, 's/0', 's/../../elsewhere/snapshots/0')")
    with pytest.raises(RunError, match="a state has other files than everystep writes"):
        run[1]


def test_a_fork_writes_nothing_outside_its_directory(tmp_path):
    run = everystep.train_experiment("two-layer", {"steps": 5}, run=tmp_path / "a", progress=False)
    sql(run.directory, "INSERT INTO files VALUES ('../outside', 1, x'00')")
    seal_tables(run.directory)
    with pytest.raises(RunError, match="outside the run, or what is not a regular file"):
        everystep.open(run.directory).fork(3, run=tmp_path / "b", progress=False)
    assert not (tmp_path / "outside").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of an experiment that no test may change."""
    place = tmp_path_factory.mktemp("trained") / "run"
    return everystep.train_experiment("two-layer", {"steps": 5}, run=place, progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "programs/9.json",
        "data-9.safetensors",
        "snapshots/000000/x",
        "programs/1.json",
        "data.safetensors",
        "snapshots/000000/rest.safetensors",
        "experiment.toml",
    ],
)
def test_nothing_is_taken_into_a_fork_through_a_link(trained, tmp_path, name, everystep_command):
    run = shutil.copytree(trained.directory, tmp_path / "run")
    private = tmp_path / "private"
    private.write_bytes((run / name).read_bytes() if (run / name).exists() else b"precious")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(private)
    code, out, err = everystep_command("fork", "run", "--at", "3", "--run", "./fork", "-q")
    assert code == (0 if name.endswith(("9.json", "9.safetensors", "x")) else code)
    assert code in (0, 1, 2) and (code == 0 or "link" in out + err)
    for path in (tmp_path / "fork").rglob("*"):
        assert not path.is_symlink() and not path.samefile(private), path
        assert path.is_dir() or path.read_bytes() != private.read_bytes(), path


def test_a_foreign_file_that_a_run_names_as_a_change_is_not_removed(
    trained, tmp_path, everystep_command
):
    (tmp_path / "precious").write_text("mine")
    run = shutil.copytree(trained.directory, tmp_path / "run")
    (run / "changes" / "000009").mkdir(parents=True)
    sql(run, "INSERT INTO files VALUES ('changes/000009/../../../precious', 1, x'00')")
    code, _, err = everystep_command("resume", run, "--steps", "9", "-q")
    assert code == 2 and "outside the run, or what is not a regular file" in err
    assert (tmp_path / "precious").read_text() == "mine"


GIGABYTES_7 = 7_000_000_000


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("programs/1.json", ["step", "run", "2"]),
        ("data.safetensors", ["step", "run", "2"]),
        ("snapshots/000000/rest.safetensors", ["step", "run", "2"]),
        ("experiment.toml", ["fork", "run", "--at", "3", "-q"]),
    ],
)
def test_a_larger_file_than_there_may_be_is_not_read(
    trained, tmp_path, name, command, everystep_command
):
    run = shutil.copytree(trained.directory, tmp_path / "run")
    os.truncate(run / name, GIGABYTES_7)  # which takes no place on the disk
    code, _, err = everystep_command(*command)
    assert code == 2
    assert f"{name} cannot be read: it has 7,000,000,000 bytes, more than the" in err


def test_a_size_that_the_database_claims_is_bound_by_the_memory(trained, tmp_path, everystep_command):
    run = shutil.copytree(trained.directory, tmp_path / "run")
    for name in ("programs/1.json", "snapshots/000000/rest.safetensors"):
        os.truncate(run / name, 2**43)
    sql(run, f"UPDATE files SET size = {2**43} WHERE name GLOB '*s/*[1t].*'")
    for command in (["step", "run", "2"], ["verify", "run", "--processes", "1"], ["doctor", "run"]):
        code, out, err = everystep_command(*command)
        assert code in (1, 2) and "it has 8,796,093,022,208 bytes, more than the" in out + err


def test_a_text_that_is_short_only_when_packed_is_not_unpacked(everystep_command):
    batches = [torch.ones(3, 2)] * 3
    looped(torch.nn.Linear(2, 1), batches, lambda model, x: model(x).sum(), run="./run")
    bomb = zlib.compress(b"[" + b"[]," * 6_000_000 + b"[]]", 9)
    for column in ("numbers", "inputs"):
        shutil.copytree("run", column)
        sql(column, (f"UPDATE repeats SET {column} = ?", (bomb,)))
        seal_repeats(column)
        for command in (["step", column, "2"], ["verify", column, "--processes", "1"]):
            code, out, err = everystep_command(*command)
            assert code in (1, 2) and "cannot be read: the database was changed" in out + err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (".".join(["a"] * 200_000) + "=1", "a line with more than 1,000 dots"),
        ("a." * 999 + "a=1", "a: unknown key"),
        ("optimizer." + "a." * 900 + "a=1", "optimizer"),
        ("a=" + "[" * 5000, "is nested too deep"),
        ("steps=" + "9" * 5000, "is not valid TOML"),
        ('name="\\u0000"', "name: unknown key"),
    ],
)
def test_an_experiment_that_is_costly_to_read_is_refused_soon(
    tmp_path, text, problem, everystep_command
):
    (tmp_path / "mine.toml").write_text(text)
    code, out, err = everystep_command("train", "mine.toml")
    assert (code, out) == (2, "") and problem in err


def test_a_class_that_there_is_not_is_named_by_the_step(tmp_path, everystep_command):
    everystep.train_experiment("digits", {"steps": 4}, run="./run", progress=False)
    change = tensors("data.safetensors", lambda found: found["y"].fill_(2**40))
    change(tmp_path / "run")
    for command in (["step", "run", "2"], ["rows", "run", "2"], ["verify", "run", "--processes", "1"]):
        code, out, err = everystep_command(*command)
        assert code in (1, 2), command
        assert "step 1 of run cannot be replayed" in out + err
        assert "Target 1099511627776 is out of bounds" in out + err


@pytest.mark.parametrize("threads", [10**9, 0, -1])
def test_a_run_that_says_it_had_impossibly_many_threads_is_not_opened(run, threads):
    change_fact(run, "numerics", lambda fact: fact.update(threads=threads))
    with pytest.raises(RunError, match="invalid value for 'numerics': the database was changed"):
        everystep.open(run.directory)
