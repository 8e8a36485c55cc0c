import math

import pytest
import sklearn.datasets
import torch
from tests.descent import descend, trained
from torch import nn

import everystep
from everystep.errors import UsageError
from everystep.page.about import about_data
from everystep.page.columns import Columns
from everystep.page.table_rows import Wanted, page_of
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.opened_step import statistics
from everystep.views.loss_table import loss_table
from everystep.views.report import report_html
from everystep.views.step_data import tensor_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("opened")
    everystep.train_experiment("two-layer", {"steps": 20}, run=directory / "chapter", progress=False)
    everystep.train_experiment("digits", {"steps": 4}, run=directory / "digits", progress=False)
    return {path.name: everystep.open(path) for path in directory.iterdir()}


@pytest.fixture(params=["chapter", "digits"])
def opened(runs, request):
    run = runs[request.param]
    step = run[3]
    return run, step, step.data()


def test_every_tensor_is_there_with_its_own_statistics(opened):
    run, step, content = opened
    assert len(content["tensors"]) > 40
    for id, given in content["tensors"].items():
        if "unset" in given:
            continue
        tensor = tensor_of(step, id, run.facts)
        assert given["shape"] == list(tensor.shape), id
        assert f"torch.{given['dtype']}" == str(tensor.dtype)
        expected = statistics(tensor)._asdict()
        assert {name: given[name] for name in expected} == expected, id
        norm = torch.linalg.vector_norm(tensor.double())
        assert given["norm"] == pytest.approx(float(norm), rel=1e-12)


def test_every_id_that_is_spoken_of_is_there(opened):
    _, _, content = opened
    spoken = [each["tensor"] for each in content["batch"]["tensors"]]
    assert spoken == ["batch.x", "batch.y"]
    spoken += [content["batch"]["images"]] if content["batch"]["images"] else []
    for layer in content["network"]:
        spoken += [layer["activation"], *layer["parameters"].values()]
    for operation in content["operations"]:
        spoken += [each["tensor"] for each in (*operation["inputs"], *operation["results"])]
    for update in content["updates"]:
        spoken += [update["before"], update["after"], update["change"]]
    spoken += [each["tensor"] for each in (*content["gradients"], *content["dropped"])]
    assert set(spoken) == content["tensors"].keys()


def test_the_chapter(runs):
    run = runs["chapter"]
    step = run[3]
    content = step.data()
    assert (content["run"], content["step"], content["steps"]) == ("chapter", 3, 20)
    assert content["loss"] == step.loss and float(content["loss_text"]) == pytest.approx(step.loss)
    assert content["is_exact"] and content["problems"] == []
    assert content["hyperparameters"] == {"lr": 1e-4}
    assert content["optimizer"] == {"name": "GradientDescent", "settings": {"lr": "0.0001"}}
    assert content["loss_function"] == {"name": "MSELoss", "text": "MSELoss(reduction='sum')"}
    assert content["batch"]["rows"] is None and not content["batch"]["images"]
    assert content["batch"]["targets"] is None
    first, relu, second = content["network"]
    assert (first["path"], first["type"], first["operations"]) == ("0", "Linear", [0])
    assert first["text"] == "Linear(in_features=1000, out_features=100, bias=True)"
    assert first["arguments"] == "in_features=1000, out_features=100, bias=True"
    assert (first["input"], first["output"]) == ([64, 1000], [64, 100])
    assert first["parameters"] == {"weight": "parameters/0.weight", "bias": "parameters/0.bias"}
    assert (relu["type"], relu["parameters"], second["type"]) == ("ReLU", {}, "Linear")
    assert [each["parameter"] for each in content["gradients"]] == [
        "2.weight",
        "2.bias",
        "0.weight",
        "0.bias",
    ]
    arguments = content["operations"][0]["arguments"]
    assert [list(each) for each in arguments][:2] == [["self", "0.bias", False], ["mat1", "x", False]]
    assert run[1].data()["dropped"] == []


def test_images_and_classes(runs):
    run = runs["digits"]
    step = run[3]
    content = step.data()
    images = tensor_of(step, content["batch"]["images"], run.facts)
    pixels = sklearn.datasets.load_digits().images[:, None]
    # They were scaled for training; images show the original values.
    assert all((torch.tensor(pixels) - image).abs().amax((1, 2, 3)).min() < 1e-4 for image in images)
    assert content["batch"]["rows"] == step.batch.rows.tolist()
    assert content["batch"]["targets"] == [str(n) for n in step.batch.y.tolist()]
    kinds = [layer["type"] for layer in content["network"]]
    expected = ["Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Dropout", "Linear"]
    assert kinds == expected
    flatten = content["network"][5]
    assert (flatten["operations"], flatten["output"]) == ([], [64, 512])


class Nested(nn.Module):
    """Modules within modules, one used twice, and operations of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.again = nn.ReLU()
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.again(self.again(self.inner(x)) + x))


def test_modules_within_modules(small):
    _, x, y = small
    model = Nested()
    run = trained(model, (x, y), steps=2)
    step = run[2]
    content = step.data()
    layers = {layer["path"]: layer for layer in content["network"]}
    assert list(layers)[:3] == ["inner.0", "inner.1", "again"] and "inner" not in layers
    assert layers["inner.0"]["depth"] == 1 and layers["inner.0"]["type"] == "Linear"
    assert len(layers["again"]["operations"]) == 2
    own = [each for each in content["operations"] if each["module"] == ""]
    assert ("" in layers) == bool(own)


def test_statistics_of_what_is_not_finite_or_empty():
    found = statistics(torch.tensor([1.0, math.nan, 3.0, math.inf, 0.0, -0.0]))
    assert found == (1.0, pytest.approx(1.2247448713915890), 0.0, 3.0, 2 / 6, 2)
    assert all(map(math.isnan, statistics(torch.tensor([math.nan, math.inf]))[:4]))
    assert all(map(math.isnan, statistics(torch.empty(0))[:5]))
    assert statistics(torch.tensor([True, False]))[:4] == (0.5, 0.5, 0.0, 1.0)
    transposed = torch.arange(6.0).reshape(2, 3)
    assert statistics(transposed) == statistics(transposed.T)


def test_memory_that_nothing_was_written_to_is_not_shown(tmp_path):
    # Dropout draws into memory as it finds it.
    run = everystep.train_experiment("digits", {"steps": 2}, run=tmp_path / "run", progress=False)
    step = run[1]
    content = step.data()
    unset = [id for id, seen in content["tensors"].items() if "unset" in seen]
    assert [id.rpartition("/")[2] for id in unset] == ["bernoulli_"]
    for id in unset:
        assert content["tensors"][id].keys() == {"shape", "dtype", "unset"}
        with pytest.raises(UsageError, match="nothing was written"):
            tensor_of(step, id, run.facts)
    drawn = next(n for n, seen in enumerate(step.operations) if "bernoulli_" in seen.operation.operator)
    result = f"operations/{drawn}/results/" + next(iter(step.operations[drawn].results))
    assert "unset" not in content["tensors"][result]


def test_a_model_that_is_a_layer_is_a_network_of_one():
    model = nn.Linear(4, 2)
    run = trained(model, (torch.randn(8, 4), torch.randn(8, 2)), steps=2)
    [layer] = run[2].data()["network"]
    assert (layer["type"], layer["path"], layer["operations"]) == ("Linear", "", [0])
    assert layer["parameters"] == {"weight": "parameters/weight", "bias": "parameters/bias"}


class Branches(nn.Module):
    """Two layers read the input, a third what both give; the first is used once more at the end."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.one(self.both(torch.cat([self.one(x), self.other(x)], 1)))


def test_a_layer_follows_the_one_before_only_where_it_uses_it(runs):
    model = Branches()
    run = trained(model, (torch.randn(5, 4), torch.randn(5, 4)), steps=2)
    layers = run[2].data()["network"]
    assert [(layer["path"], layer.get("follows")) for layer in layers] == [
        ("one", None),
        ("other", False),
        ("both", True),
    ]
    for name in ("chapter", "digits"):
        _, *later = runs[name][3].data()["network"]
        assert all(layer["follows"] for layer in later)


def test_a_loop_that_logs_no_loss_has_none(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = tmp_path / "silent"
    with everystep.record(run=run, model=model, optimizer=optimizer) as recording:
        for x in recording.steps([torch.randn(4, 3)] * 3):
            descend(optimizer, model(x).square().mean())
    summary = everystep.open(run).summary()
    assert (summary.first_loss, summary.last_loss, summary.nonfinite_step) == (None, None, None)
    assert repr(everystep.open(run)).endswith(": finished, 3 steps>")
    columns = Columns().of(RecordedRun(run))
    about = about_data("silent", RecordedRun(run), columns, [])
    assert (about["has_loss"], about["landmarks"], about["nonfinite"]) == (False, [], None)
    assert page_of(columns, Wanted(), 0, 10, None)["columns"] == ["step", "lr"]
    assert Columns().sparkline(RecordedRun(run)).marks == []
    assert loss_table(RecordedRun(run)).frame.columns == ["step", "lr"]
    html = report_html(RecordedRun(run))
    assert "finished · 3 steps" in html and "first that is not finite" not in html
    assert '"titles":["step","lr"]' in html
    x, *others = everystep.open(run)[2].batch
    assert x.shape == (4, 3) and not others
