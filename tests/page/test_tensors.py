import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import everystep
from everystep.errors import UsageError
from everystep.page.regions import histogram, matrix, npy, region
from everystep.recording.facts import Facts
from everystep.views.step_data import tensor_of


def numbers_of(found):
    about, content = found
    values = np.frombuffer(content, dtype="<f8" if about["format"] == "float64" else "<f4")
    return values.reshape(about["height"], about["width"])


def by_hand(numbers, height, width):
    """Reduce blocks one by one: NaN first, then the largest absolute value."""
    rows = []
    for top in range(0, numbers.shape[0], height):
        row = []
        for left in range(0, numbers.shape[1], width):
            block = numbers[top : top + height, left : left + width].ravel()
            row.append(math.nan if np.isnan(block).any() else max(block, key=lambda n: (abs(n), n)))
        rows.append(row)
    return np.array(rows)


floats = st.one_of(
    st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0])
)


@given(st.data(), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_a_region_is_what_numpy_makes_of_it(data, height, width, most):
    values = data.draw(st.lists(floats, min_size=height * width, max_size=height * width))
    tensor = torch.tensor(values).reshape(height, width)
    top = data.draw(st.integers(0, height - 1))
    bottom = data.draw(st.integers(top + 1, height))
    left = data.draw(st.integers(0, width - 1))
    right = data.draw(st.integers(left + 1, width))
    found = region(tensor, rows=(top, bottom), columns=(left, right), most=most)
    block = math.ceil((bottom - top) / most), math.ceil((right - left) / most)
    assert found.about["block"] == list(block)
    assert max(found.about["height"], found.about["width"]) <= most
    expected = by_hand(tensor.numpy()[top:bottom, left:right], *block)
    assert np.array_equal(numbers_of(found), expected, equal_nan=True)
    finite = tensor[torch.isfinite(tensor)]
    ends = (finite.min().item(), finite.max().item()) if len(finite) else (None, None)
    assert (found.about["lowest"], found.about["highest"]) == ends


@given(st.lists(floats | st.floats(), max_size=200))
def test_a_histogram_counts_every_number_once(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    found = histogram(tensor)
    finite = tensor[torch.isfinite(tensor)]
    assert sum(found["counts"]) == len(finite)
    assert found["nonfinite"] == len(values) - len(finite)
    assert len(found["counts"]) == 64 and len(found["edges"]) == 65
    assert found["edges"] == sorted(found["edges"]) and all(map(math.isfinite, found["edges"]))
    if len(finite) and finite.min() < finite.max():
        assert found["edges"][0] == finite.min() and found["edges"][-1] == finite.max()


def test_the_buckets_of_a_histogram():
    found = histogram(torch.arange(64))
    assert found["counts"] == [1] * 64  # also the largest number has its place
    equal = histogram(torch.full((5,), 3.0))
    assert equal["counts"][32] == 5 and equal["edges"][32] == 3.0
    huge = histogram(torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64))
    assert huge["counts"][0] == huge["counts"][-1] == 1 and huge["edges"][-1] == 1.7e308
    assert histogram(torch.empty(0))["counts"] == [0] * 64
    assert histogram(torch.tensor([math.nan, math.inf]))["nonfinite"] == 2


@pytest.mark.parametrize(
    ("tensor", "expected", "form"),
    [
        (torch.tensor([True, False]), [[1, 0]], "float32"),
        (torch.tensor([1, -(2**24)]), [[1, -(2**24)]], "float32"),
        (torch.tensor([1, 2**24 + 1]), [[1, 2**24 + 1]], "float64"),
        (torch.tensor([1.5, 2.25]).bfloat16(), [[1.5, 2.25]], "float32"),
        (torch.tensor([1.5, -2.25]).half(), [[1.5, -2.25]], "float32"),
        (torch.tensor([1.5, -2.0]).to(torch.float8_e5m2), [[1.5, -2]], "float32"),
        (torch.tensor([3 + 4j, -1j]), [[5, 1]], "float32"),
        (torch.tensor([0.1], dtype=torch.float64), [[0.1]], "float64"),
        (torch.tensor([7], dtype=torch.uint8), [[7]], "float32"),
        (torch.tensor(2.5), [[2.5]], "float32"),
        (torch.arange(6.0).reshape(2, 3).T, [[0, 3], [1, 4], [2, 5]], "float32"),
    ],
)
def test_every_kind_of_number(tensor, expected, form):
    found = region(tensor)
    assert numbers_of(found).tolist() == expected
    assert found.about["format"] == form
    assert found.about["shape"] == list(tensor.shape)
    assert f"torch.{found.about['dtype']}" == str(tensor.dtype)
    saved = np.load(io.BytesIO(npy(tensor)))
    assert np.abs(np.atleast_2d(saved)).tolist() == np.abs(expected).tolist()


def test_an_empty_tensor():
    found = region(torch.empty(3, 0))
    assert found.numbers == b"" and found.about["lowest"] is None
    assert (found.about["height"], found.about["width"], found.about["slices"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"index": 6}, "slice 6 of 6"),
        ({"index": -1}, "slice -1"),
        ({"rows": (2, 2)}, "rows 2:2"),
        ({"rows": (0, 5)}, "at most 4"),
        ({"columns": (-1, 3)}, "columns -1:3"),
        ({"most": 0}, "most is 0"),
        ({"most": 10**9}, "most is 1000000000"),
    ],
)
def test_a_region_that_is_not_there(asked, message):
    with pytest.raises(UsageError, match=message):
        region(torch.zeros(2, 3, 4, 5), **asked)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tensors") / "run"
    run = everystep.train_experiment("two-layer", {"steps": 3}, run=directory, progress=False)
    return run[3]


@pytest.mark.parametrize(
    "id",
    [
        "",
        "/",
        "batch.z",
        "batch.x/",
        "__class__/x",
        "parameters/../0.weight",
        "updates/0.weight/relative_size",
        "updates/before",
        "operations/-1/results/loss",
        "operations/99999999999999999999/results/loss",
        "operations/0/operation/operator",
        "operations/0/results",
        "hyperparameters/lr",
        "<img src=x>" * 1000,
    ],
)
def test_ids_that_are_none(step, id):
    with pytest.raises(UsageError, match="has no tensor") as raised:
        tensor_of(step, id, Facts())
    assert len(str(raised.value)) < 400


def test_several_slices_come_one_after_the_other():
    tensor = torch.arange(120.0).reshape(2, 3, 4, 5)
    about, numbers = region(tensor, index=1, count=3)
    assert (about["count"], about["index"], about["slices"]) == (3, 1, 6)
    found = torch.frombuffer(bytearray(numbers), dtype=torch.float32).reshape(3, 4, 5)
    assert found.equal(tensor.flatten(0, 1)[1:4])
    assert matrix(tensor.transpose(0, 1), 1)[0].equal(tensor[1, 0])
    for index, count in ((0, 0), (0, 7), (5, 2), (0, 10**9)):
        with pytest.raises(UsageError):
            region(tensor, index, count=count)
