"""Data that stays in its files: the same numbers as in memory, and files as strangers leave them."""

import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.sealing import seal, sql

import everystep
from everystep.experiment import converted_table, data, prepared_rows, table
from everystep.experiment.preparation import Scaling
from everystep.experiment.source_files import source_file

ROWS = 900


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EVERYSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(monkeypatch):
    """From now on, take all files for large ones."""

    def begin():
        monkeypatch.setattr(data, "IN_MEMORY", 0)
        monkeypatch.setattr(prepared_rows, "_PIECE", 5000)
        monkeypatch.setattr(prepared_rows, "_RELEASED", 20_000)
        monkeypatch.setattr(table, "_COLUMNS", 20_000)
        monkeypatch.setattr(converted_table, "_ROWS", 5000)

    return begin


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    x = (random.standard_normal((ROWS, 6)) * 3 + 5).astype(np.float32)
    y = x.sum(1) + random.standard_normal(ROWS)
    np.save("x.npy", x)
    np.save("y.npy", y)
    return x, y


def trained(run, source=None, **settings):
    source = source or {"source": "arrays", "x": "x.npy", "y": "y.npy"}
    experiment = {
        "steps": 12,
        "batch_size": 64,
        "data": {"validation": 0.2, "scale": "standard"} | source,
        "model": {"layers": ["LazyLinear(8)", "ReLU()", "Linear(8, 1)"]},
        "loss": {"name": "MSELoss"},
        "optimizer": {"name": "AdamW", "lr": 1e-2},
    }
    return everystep.train_experiment(experiment | settings, run=run, progress=False)


def same(one, other):
    assert one.facts.training.preparation == other.facts.training.preparation
    assert one.measurements.equals(other.measurements)
    return one.losses.equals(other.losses)


@given(st.integers(1, 300), st.integers(1, 3), st.integers(1, 200))
def test_rows_in_parts_are_scaled_as_numpy_scales_all_of_them(count, columns, size):
    values = np.random.default_rng(count).standard_normal((count, columns)) * 10 + 3
    scaling = Scaling.fit(lambda: (values[begin : begin + size] for begin in range(0, count, size)))
    mean = np.clip(values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    deviation = np.sqrt(np.square(values - mean).mean(axis=0))
    assert scaling.mean == mean.tolist()
    assert scaling.deviation == np.where(deviation == 0, 1, deviation).tolist()


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("kind", ["safetensors", "npy", "big-endian", "float64", "int16", "float16"])
def test_data_in_its_files_trains_to_the_bits_of_data_in_memory(arrays, large, kind):
    x, y = arrays
    source = None
    if kind == "safetensors":
        save_file({"other": y[:7], "x": x, "y": y}, "data.safetensors")
        source = {"source": "arrays", "path": "data.safetensors"}
    elif kind != "npy":
        np.save("x.npy", x.astype({"big-endian": ">f4"}.get(kind, kind)))
    in_memory = trained("memory", source)
    large()
    run = trained("files", source)
    assert same(run, in_memory)
    assert not Path("runs/files/data.safetensors").exists()
    opened = everystep.open("files")
    assert opened.verify().is_exact
    assert torch.equal(opened[7].batch.x, in_memory[7].batch.x)
    fork = opened.fork(5, lr=1e-3, progress=False)
    assert same(fork, in_memory.fork(5, lr=1e-3, progress=False))
    assert fork.verify().is_exact
    assert same(opened.resume(20, progress=False), in_memory.resume(20, progress=False))


def test_classes_and_a_single_column_are_found_part_by_part(arrays, large):
    x, _ = arrays
    np.save("x.npy", x[:, 0])
    np.save("y.npy", np.arange(ROWS) % 3 + 4)
    settings = {"loss": {"name": "CrossEntropyLoss"}, "model": {"layers": ["Unflatten(0, (-1, 1))"]}}
    settings["model"]["layers"] += ["LazyLinear(3)"]
    in_memory = trained("memory", **settings)
    large()
    assert same(trained("files", **settings), in_memory)


def test_files_as_strangers_leave_them(arrays, large):
    x, _ = arrays
    large()
    content = Path("x.npy").read_bytes()
    Path("x.npy").write_bytes(content[:-100])
    with pytest.raises(everystep.DataError, match=r"x\.npy cannot be read as npy: mmap length"):
        trained("cut off")
    np.save("x.npy", np.full((ROWS, 2), None))
    with pytest.raises(everystep.DataError, match=r"x\.npy cannot be read as npy: .*Python objects"):
        trained("objects")
    save_file({"x": x}, "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-9])
    with pytest.raises(everystep.DataError, match=r"cut\.safetensors cannot be read as safetensors"):
        trained("cut", {"source": "arrays", "path": "cut.safetensors"})


def test_rows_that_do_not_lie_together_are_read_into_memory_as_before(arrays, large, monkeypatch):
    x, _ = arrays
    np.save("x.npy", np.asfortranarray(x))
    in_memory = trained("memory")
    large()
    run = trained("run")
    assert same(run, in_memory)
    assert Path("runs/run/data.safetensors").exists()
    monkeypatch.setattr(data, "MEMORY", 1000)
    with pytest.raises(everystep.DataError, match=r"larger than memory.*in C order"):
        trained("too large")
    with pytest.raises(everystep.DataError, match=r"more than this machine has memory.*set batch_size"):
        trained("no batches", batch_size=None)


def test_a_file_that_has_changed_or_is_gone_is_reported_and_a_link_to_it_is_read(
    arrays, large, monkeypatch, everystep_command
):
    large()
    run = trained("run")
    x = Path("x.npy")
    old = x.stat()
    x.write_bytes(x.read_bytes()[:-1] + b"\0")
    os.utime(x, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    with pytest.raises(everystep.EverystepError, match=r"x\.npy has changed since the run was trained"):
        everystep.open("run")[3]
    with pytest.raises(everystep.EverystepError, match=r"x\.npy has changed since"):
        everystep.open("run").verify()
    with pytest.raises(everystep.UsageError, match="stays in its files: to relabel"):
        np.save("x.npy", arrays[0])
        everystep.open("run").fork(3, relabel={0: 1.0}, progress=False)
    Path("elsewhere").mkdir()
    x.rename("elsewhere/x.npy")
    opened = everystep.open("run")
    assert opened.losses.equals(run.losses)
    assert opened.parameters(12).keys() == run.parameters(12).keys()
    code, _, error = everystep_command("step", "run", "3")
    assert code == 2
    assert "x.npy does not exist" in error
    assert "the states on the disk: 0, " in error
    x.symlink_to("elsewhere/x.npy")
    named = map(str, (x.resolve(), Path("y.npy").absolute()))
    monkeypatch.setenv("EVERYSTEP_DATA", os.pathsep.join(named))
    assert everystep.open("run")[3].is_exact
    with pytest.raises(everystep.RunError, match="checked by its files"):
        everystep.open("run", data=arrays)[3]


def test_a_digest_is_computed_again_only_where_a_file_may_have_changed(cache, monkeypatch):
    def file():
        read = []
        found = source_file(Path("x.npy").absolute(), read.append)
        return found.digest, bool(read)

    Path("x.npy").write_bytes(b"some rows")
    first, is_read = file()
    assert is_read
    assert file() == (first, True)  # it was changed just now, and may be again at the same time
    monkeypatch.setattr("everystep.experiment.source_files._RECENT", -(10**18))
    assert [file(), file()] == [(first, True), (first, False)]
    times = Path("x.npy").stat()
    Path("x.npy").write_bytes(b"new rows!")
    os.utime("x.npy", ns=(times.st_atime_ns, times.st_mtime_ns))  # only its size and time are as before
    assert file()[0] != first
    shutil.rmtree(cache)
    assert file()[1]


def test_the_preparation_of_a_stranger_is_checked(arrays, large):
    large()
    trained("run")
    longer = "UPDATE facts SET value = replace(value, '[', '[1.5,') WHERE key = 'preparation'"
    sql("runs/run", longer)
    seal(Path("runs/run"))
    with pytest.raises(everystep.RunError, match="preparation of the data of run was changed"):
        everystep.open("run")[3]


def frame(**columns):
    random = np.random.default_rng(1)
    made = {
        "a": random.standard_normal(ROWS) * 3,
        "b": random.integers(0, 90, ROWS),
        "colour": random.choice(["red", "blue", "green"], ROWS).tolist(),
        "c": (random.standard_normal(ROWS) + 7).astype(np.float32),
        "y": random.standard_normal(ROWS),
    }
    return pl.DataFrame(made | columns)


def holed(values, *rows):
    return [None if place in rows else value for place, value in enumerate(values)]


def written(table, kind, parts=1):
    path = Path(f"table-{kind}" if parts > 1 else f"table.{kind}")
    if parts > 1:
        path.mkdir()
    for number, part in enumerate(table.iter_slices(-(-ROWS // parts))):
        file = path / f"{number}.{kind}" if parts > 1 else path
        part.write_csv(file) if kind == "csv" else part.write_parquet(file)
    return {"source": "table", "path": str(path), "target": "y"}


@pytest.mark.sweep(every=5)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("missing", ["mean", "drop", "error"])
def test_a_converted_table_trains_to_the_bits_of_one_in_memory(large, kind, parts, missing):
    columns = frame()
    if missing != "error":
        holes = {"a": holed(columns["a"], 3, 77, 899), "colour": holed(columns["colour"], 5)}
        columns = columns.with_columns(**{name: pl.Series(values) for name, values in holes.items()})
    source = written(columns, kind, parts) | {"missing": missing}
    in_memory = trained("memory", source)
    large()
    run = trained("files", source)
    assert same(run, in_memory)
    assert run.facts.training.data.dropped == in_memory.facts.training.data.dropped
    opened = everystep.open("files")
    assert opened.verify().is_exact
    assert torch.equal(opened[7].batch.x, in_memory[7].batch.x)
    assert opened.rows(7).numbers == in_memory.rows(7).numbers


@pytest.mark.parametrize("of", ["words", "numbers"])
def test_classes_of_a_converted_table(large, of):
    values = np.random.default_rng(0).choice([4, 7, 9], ROWS).tolist()
    source = written(frame(y=values if of == "numbers" else [f"kind {each}" for each in values]), "csv")
    settings = {"loss": {"name": "CrossEntropyLoss"}, "model": {"layers": ["LazyLinear(3)"]}}
    in_memory = trained("memory", source, **settings)
    large()
    assert same(trained("files", source, **settings), in_memory)
    no_scale = source | {"scale": None, "validation": None}
    assert trained("plain", no_scale, **settings).verify().is_exact


def test_a_table_is_converted_once_and_again_only_if_it_has_changed(large, cache):
    source = written(frame(), "csv")
    large()
    trained("one", source)
    (folder,) = (each for each in (cache / "tables").iterdir() if each.is_dir())
    first = (folder / "x.npy").stat().st_mtime_ns
    assert sorted(each.name for each in folder.iterdir()) == [
        "about.json",
        "table.parquet",
        "x.npy",
        "y.npy",
    ]
    trained("other seed", source, seed=3)
    assert (folder / "x.npy").stat().st_mtime_ns == first
    shutil.rmtree(cache)
    assert everystep.open("one")[3].is_exact
    written(frame(a=np.arange(ROWS)), "csv")
    trained("two", source)
    assert (folder / "x.npy").stat().st_mtime_ns != first
    with pytest.raises(everystep.RunError, match="has changed since the run was trained on it"):
        everystep.open("one")[3]


def test_an_interrupted_conversion_leaves_nothing_that_is_taken_for_whole(large, cache, monkeypatch):
    source = written(frame(), "parquet")
    large()

    def stopped(*arguments, **others):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converted_table, "_targets", stopped)
        with pytest.raises(KeyboardInterrupt):
            trained("stopped", source)
    assert not [each for each in (cache / "tables").iterdir() if each.is_dir()]
    killed = cache / "tables" / next((cache / "tables").iterdir()).name.removesuffix(".lock")
    killed.mkdir()
    (killed / "x.npy").write_bytes(b"")  # without what is written last
    assert trained("whole", source).verify().is_exact


def test_tables_as_strangers_leave_them(large, monkeypatch):
    table = frame()
    source = written(table, "csv", 3)
    other = Path("table-csv/1.csv")
    other.write_text(other.read_text().replace("colour", "color", 1))
    with pytest.raises(
        everystep.DataError, match=r"1\.csv does not have the columns of 0\.csv: it lacks 'c"
    ):
        trained("small", source)
    large()
    with pytest.raises(
        everystep.DataError, match=r"1\.csv does not have the columns of 0\.csv: it lacks 'c"
    ):
        trained("columns", source)
    Path("table-csv/notes.md").touch()
    with pytest.raises(everystep.DataError, match=r"files of several formats \(\.csv, \.md\)"):
        trained("formats", source)
    cut_off = written(table, "parquet")
    Path("table.parquet").write_bytes(Path("table.parquet").read_bytes()[:-9])
    with pytest.raises(everystep.DataError, match="cannot be read as parquet"):
        trained("cut off", cut_off)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 10))
    with pytest.raises(
        everystep.DataError, match=r"has 0\.0 GB free; EVERYSTEP_CACHE sets another place"
    ):
        trained("no room", written(frame(), "csv"))


def test_columns_and_files_with_similar_names(large):
    table = frame(**{"colour=red": np.arange(ROWS, dtype=float)})
    source = written(table, "csv")
    Path("table1.csv").write_text(Path("table.csv").read_text().replace("red", "reds"))
    Path("table.csv").rename("table[1].csv")  # not a pattern that the other file matches
    source["path"] = "table[1].csv"
    in_memory = trained("memory", source)
    large()
    assert same(trained("files", source), in_memory)


def test_a_cache_that_was_altered_is_converted_again(large, cache):
    source = written(frame(), "csv")
    large()
    first = trained("first", source)
    (folder,) = (each for each in (cache / "tables").iterdir() if each.is_dir())
    content = bytearray((folder / "x.npy").read_bytes())
    content[-5:] = b"12345"
    (folder / "x.npy").write_bytes(content)
    assert same(trained("second", source), first)
    (folder / "x.npy").write_bytes(content[:-9])
    assert everystep.open("first").verify().is_exact
