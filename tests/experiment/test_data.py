import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import sklearn.datasets
import torch
from safetensors.torch import save_file
from sklearn.preprocessing import StandardScaler

from everystep.errors import DataError
from everystep.experiment.data import make_data, split_rows
from everystep.experiment.preparation import TablePreparation
from everystep.experiment.specification import load


def experiment(data, **others):
    base = {
        "steps": 1,
        "model": {"layers": ["Linear(2, 1)"]},
        "loss": {"name": "MSELoss"},
        "optimizer": {"name": "SGD"},
    }
    return load(base | {"data": data} | others)


def table(frame, target="y", classes=False, name="t.csv", **data):
    pl.DataFrame(frame).write_csv(name)
    made = experiment({"source": "table", "path": name, "target": target} | data)
    return make_data(made, "classes" if classes else "values")


def test_digits_are_images_with_classes_and_need_no_other_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    data = make_data(load("digits"), "classes")
    assert data.x.shape == (1438, 1, 8, 8)
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64
    assert len(data.validation[0]) == 359


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "digits", "iris", "wine"])
def test_bundled_data_is_that_of_scikit_learn_bit_for_bit(name):
    theirs = getattr(sklearn.datasets, f"load_{name}")()
    target = "values" if name == "diabetes" else "classes"
    data = make_data(experiment({"source": "bundled", "name": name}), target)
    x = theirs.data.astype(np.float32).reshape(data.x.shape)
    assert np.array_equal(data.x.numpy(), x)
    assert np.array_equal(data.y.numpy().ravel(), theirs.target.astype(data.y.numpy().dtype))


def test_a_table_becomes_numbers_and_its_preparation_survives_json():
    frame = {"size": [1.0, 2.0, 3.0], "colour": ["red", "blue", "red"], "y": [10, 20, 30]}
    data = table(frame)
    assert data.preparation.x_names == ["size", "colour=blue", "colour=red"]
    assert data.x.tolist() == [[1, 0, 1], [2, 1, 0], [3, 0, 1]]
    assert data.y.tolist() == [[10], [20], [30]]
    again = TablePreparation.model_validate_json(data.preparation.model_dump_json())
    assert again == data.preparation


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "arrow"])
def test_every_kind_of_table_is_read(suffix):
    frame = pl.DataFrame({"a": [1.5, 2.5], "b": [3, 4], "y": ["no", "yes"]})
    path = f"t.{suffix}"
    {
        "csv": frame.write_csv,
        "tsv": lambda p: frame.write_csv(p, separator="\t"),
        "parquet": frame.write_parquet,
        "arrow": frame.write_ipc,
    }[suffix](path)
    data = make_data(experiment({"source": "table", "path": path, "target": "y"}), "classes")
    assert data.x.tolist() == [[1.5, 3], [2.5, 4]]
    assert data.y.tolist() == [0, 1]
    assert data.preparation.classes == ["no", "yes"]


def test_scaling_is_fitted_on_the_training_rows_as_scikit_learn_does():
    values = np.random.default_rng(0).normal(5, 3, size=(40, 2))
    frame = {"a": values[:, 0], "b": values[:, 1], "y": range(40)}
    data = table(frame, scale="standard", validation=0.25)
    training, validation = split_rows(40, 0.25, seed=0)
    scaler = StandardScaler().fit(values[training])
    np.testing.assert_allclose(data.x, scaler.transform(values[training]), rtol=1e-6)
    np.testing.assert_allclose(data.validation[0], scaler.transform(values[validation]), rtol=1e-6)


@pytest.mark.parametrize(
    "source",
    [
        {"source": "arrays", "x": "x.npy", "y": "y.npy"},
        {"source": "bundled", "name": "digits"},
        {"source": "random", "N": 8, "D_in": 4, "D_out": 3},
    ],
)
def test_data_of_any_source_is_scaled_without_validation(source):
    values = np.random.default_rng(0).normal(5, 3, size=(20, 2, 3))
    np.save("x.npy", values)
    np.save("y.npy", np.zeros(20, np.float32))
    torch.manual_seed(0)
    plain = make_data(experiment(source), "values")
    torch.manual_seed(0)
    data = make_data(experiment(source | {"scale": "standard"}), "values")
    assert data.validation is None
    flat = StandardScaler().fit_transform(plain.x.flatten(1).double())
    np.testing.assert_allclose(data.x, flat.reshape(plain.x.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.3, 1.1, 7.0, 98.6, -2.2])
def test_a_constant_column_is_scaled_to_zero_and_its_unit_is_kept(value):
    _, validation = split_rows(30, 0.2, seed=0)
    a = [value] * 30
    a[int(validation[0])] = value + 0.5
    data = table({"a": a, "y": range(30)}, scale="standard", validation=0.2)
    assert set(data.x.flatten().tolist()) == {0}
    assert data.validation[0].flatten().tolist() == pytest.approx([0.5, 0, 0, 0, 0, 0])
    data = table({"a": [value] * 12 + [None], "y": range(13)}, scale="standard", missing="mean")
    assert set(data.x.flatten().tolist()) == {0}


def test_missing_values_are_an_error_dropped_or_filled_with_the_mean():
    frame = {"a": [1.0, None, 3.0], "y": [1, 2, 3]}
    with pytest.raises(DataError, match=r"column 'a': 1 of 3 values are missing; set data\.missing"):
        table(frame)
    assert table(frame, missing="drop").x.tolist() == [[1], [3]]
    assert table(frame | {"y": [None, 2, 3]}, missing="drop").x.tolist() == [[3]]
    assert table(frame, missing="mean").x.tolist() == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("frame", "options", "problem"),
    [
        ({"a": [1], "y": [1]}, {"target": "z"}, "no column 'z' in t.csv"),
        ({"age": [1], "y": [1]}, {"features": ["agee"]}, "did you mean age"),
        ({"a": [1, 2], "y": [1, None]}, {}, "'y' is missing in 1 of 2 rows"),
        ({"a": ["1", "2", "x", "4"], "y": [1, 2, 3, 4]}, {}, "text in a numeric column .'x' in row 2"),
        ({"a": [" 1", "2"], "y": [1, 2]}, {}, "text in a numeric column .' 1' in row 0"),
        ({"a": [1, 2, 3], "y": ["u", "v", "w"]}, {}, "CrossEntropyLoss"),
        ({"a": [], "y": []}, {}, "no rows"),
        ({"y": [1, 2]}, {}, "no column other than the target"),
        ({"a": [1, 2], "y": [1, 2]}, {"features": ["a", "y"]}, "'y' is the target"),
        ({"a": [1, 2], "y": [1, 2]}, {"validation": 0.1}, "both need at least one row"),
        ({"a": [None, None], "y": [1, 2]}, {"missing": "mean"}, "has no values"),
        ({"a": [None, 1], "y": [1, None]}, {"missing": "drop"}, "every row has a missing value"),
        ({"a;b;y": ["1;2;3"]}, {}, "has one column, 'a;b;y'; .*set data.separator = \";\""),
        ({"a;y": ["1,5;2"]}, {}, 'set data.separator = ";"'),
        ({"age": [1], "y": [1]}, {"target": "aeg"}, "did you mean age. the columns are age, y"),
        ({f"c{n}": [1] for n in range(30)}, {},
         r"no column 'y' .*; the columns are c0, .*c19, and 10 more"),
        ({"on": ["2024-03-17", "2024-03-18 10:00"], "y": [1, 2]}, {},
         "days since the first date, or leave"),
        ({"on": ["17.3.24", "3/18/2024"], "y": [1, 2]}, {}, "column 'on': contains dates .'17.3.24'"),
        ({"a": [1, 2], "y": ["2024-03-17", None]}, {"missing": "drop"}, "'y' contains dates"),
        ({"a": [1, 2], "y": ["1,5", "2,5"]}, {}, "numbers with commas .*'1,5' in row 0.*write 1234.5"),
        ({"a": ["x", "1,5", "1.234,5"], "y": [1, 2, 3]}, {}, "'1,5' in row 1"),
        ({"a": [None, 3.0, 1e39], "y": [1, 2, 3]}, {"missing": "drop"}, r"float32 .1e\+39 in row 2"),
        ({"a": [1, 2], "y": [1.0, -1e39]}, {}, "'y' has a number too large for float32"),
        ({"a": [1, 2], " a": [1, 2], "y": [1, 2]}, {}, "2 columns named 'a'; give each its own name"),
    ],
)  # fmt: skip
def test_bad_tables_are_told_with_the_cure(frame, options, problem):
    with pytest.raises(DataError, match=problem):
        table(frame, **options)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.csv", "a,y\ntä,1\n".encode("latin-1"), r"t\.csv is not UTF-8 text \(line 2, .* save it as"),
        ("t.csv", "a,y\n1,2\n".encode("utf-16"), r"UTF-8 text \(line 1, .*; save it as UTF-8"),
        ("t.csv", b"a,y\n1,\0\n", r"UTF-8 text \(line 2, .*; save it as UTF-8"),
        ("t.csv", b'a,y\n1,2\n"3,5",4\n5,6,7\n', r"row 2 .* more values than the heading has .*\(2\)"),
        ("t.csv", b"\n\r\na,a,y\n1,2,3\n4,5,6\n", "has 2 columns named 'a'; give each its own name"),
        ("t.csv", b"\na,y\n1,2\n5,6,7\n", r"row 1 .* more values than the heading has .*\(2\)"),
        ("t.csv", b"[" + b"1" * 200_000 + b"]", r"t\.csv cannot be read as csv: field larger than"),
        ("t.csv", b'a,y\n"1","2"\n"3","1234', "is not closed; the file may be cut off"),
        ("t.csv", None, r"t\.csv does not exist"),
        ("t.parquet", b"no parquet", "cannot be read as parquet"),
        ("t.xlsx", b"", r"has an unknown format; supported: \.csv"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_file_that_is_missing_or_no_table_is_named(name, content, problem):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        make_data(experiment({"source": "table", "path": name, "target": "y"}), "values")


def test_a_column_of_bytes_is_named():
    pl.DataFrame({"a": [1, 2], "y": [b"u", b"v"]}).write_parquet("bytes.parquet")
    with pytest.raises(DataError, match="'y' is Binary, neither numbers nor text"):
        make_data(experiment({"source": "table", "path": "bytes.parquet", "target": "y"}), "classes")


def test_decimals_are_classes():
    pl.DataFrame({"a": [1, 2], "y": [Decimal("0.2"), Decimal("0.1")]}).write_parquet("t.parquet")
    made = experiment({"source": "table", "path": "t.parquet", "target": "y"})
    assert make_data(made, "classes").y.tolist() == [1, 0]


def test_all_missing_columns_are_told_at_once():
    with pytest.raises(DataError) as caught:
        table({"a": [1], "y": [1]}, features=["b", "c"], target="z")
    assert len(caught.value.faults) == 3


def test_words_and_classes_never_seen_in_training_are_an_error():
    colours = ["red"] * 9 + ["blue"]
    seed = next(s for s in range(100) if 9 in split_rows(10, 0.2, s)[1].tolist())
    pl.DataFrame({"colour": colours, "y": range(10)}).write_csv("t.csv")
    source = {"source": "table", "path": "t.csv", "target": "y", "validation": 0.2}
    with pytest.raises(DataError, match=r"'blue' is not in the training rows.* data\.unseen"):
        make_data(experiment(source, seed=seed), "values")
    data = make_data(experiment(source | {"unseen": "zeros"}, seed=seed), "values")
    assert 0 in data.validation[0].sum(dim=1)
    with pytest.raises(DataError, match="class 'blue' is not in the training rows"):
        make_data(experiment(source | {"target": "colour"}, seed=seed), "classes")


def test_arrays_come_from_npy_npz_and_safetensors():
    x, y = np.arange(6.0).reshape(3, 2), np.array([5, 3, 5])
    np.save("x.npy", x)
    np.save("y.npy", y)
    # Other arrays in a file need not be numbers that NumPy reads.
    np.savez("both.npz", x=x, y=y, names=np.array([None]))
    given = {"inputs": torch.from_numpy(x), "y": torch.from_numpy(y)}
    save_file(given | {"others": torch.zeros(2, dtype=torch.bfloat16)}, "both.safetensors")
    for source in (
        {"x": "x.npy", "y": "y.npy"},
        {"path": "both.npz"},
        {"path": "both.safetensors", "x": "inputs"},
    ):
        data = make_data(experiment({"source": "arrays"} | source), "classes")
        assert data.x.tolist() == x.tolist()
        assert data.y.tolist() == [1, 0, 1]
        assert data.preparation.classes == [3, 5]
    np.save("y.npy", np.array([2**60, 2**60 + 1, 2**60], np.uint64))
    data = make_data(experiment({"source": "arrays", "x": "x.npy", "y": "y.npy"}), "classes")
    assert data.y.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "x has 3 rows and y has 4"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "has no rows"),
        ({"x": np.array([["a"]]), "y": np.zeros(1)}, "numbers with rows"),
        ({"x": np.array([[np.nan]]), "y": np.zeros(1)}, "1 of 1 rows have NaN"),
        ({"x": np.ones((2, 1)), "y": np.array([1, 1e39])}, "too large for float32 .first: row 1"),
        ({"z": np.zeros(1), "y": np.zeros(1)}, "has no array 'x'"),
    ],
)
def test_bad_arrays_are_told(arrays, problem):
    np.savez("a.npz", **arrays)
    with pytest.raises(DataError, match=problem):
        make_data(experiment({"source": "arrays", "path": "a.npz"}), "values")


@pytest.mark.parametrize("is_held_out", [False, True])
def test_rows_are_checked_whether_or_not_they_are_held_out(is_held_out):
    row = int(split_rows(8, 0.25, seed=0)[is_held_out][-1])
    source = {"source": "arrays", "path": "a.npz", "validation": 0.25}
    x = np.arange(16.0).reshape(8, 2)
    x[row, 1] = 1.5
    np.savez("a.npz", x=x, y=np.zeros(8))
    # It would cut the index.
    with pytest.raises(DataError, match="an embedding needs integer inputs"):
        make_data(experiment(source, model={"layers": ["Embedding(16, 2)", "Flatten()"]}), "values")
    x[row, 1] = np.nan
    np.savez("a.npz", x=x, y=np.zeros(8))
    with pytest.raises(DataError, match=f"1 of 8 rows have NaN.*first: row {row}"):
        make_data(experiment(source), "values")


def test_no_pickle_is_opened():
    np.save("x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        make_data(experiment({"source": "arrays", "x": "x.npy", "y": "x.npy"}), "values")


def test_the_split_is_a_function_of_the_seed_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    training, validation = split_rows(100, 0.2, seed=4)
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(100))
    assert torch.equal(validation, split_rows(100, 0.2, seed=4)[1])
    assert not torch.equal(validation, split_rows(100, 0.2, seed=5)[1])
    assert torch.equal(before, torch.get_rng_state())
