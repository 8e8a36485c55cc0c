"""`train` refuses invalid arguments: the message names them, the problem, and a fix."""

import warnings

import numpy as np
import pytest
import torch
from tests.training.test_ranks import launched
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

import everystep
from everystep import DataError, DeviceError, ExperimentError, UsageError
from everystep.recording.texts import optimizers_text
from everystep.step.hyperparameters import hyperparameters
from everystep.training import agreement
from everystep.training.description import optimizer_facts


class Rows(Dataset):
    """Twenty rows, made by a function of their number."""

    def __init__(self, row):
        self.row = row

    def __len__(self):
        return 20

    def __getitem__(self, number):
        return self.row(number)


class Descent(torch.optim.Optimizer):
    """Gradient descent with any settings, and with its own rate."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= 1e-3 * parameter.grad


class WithClosure(Descent):
    def step(self, closure):
        closure()


def image():
    """Return an object of a class that is called as Pillow's is."""
    return type("Image", (), {"__module__": "PIL.Image"})()


def in_rows(tensor):
    """Return a tensor as one of compressed sparse rows, of which torch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tensor.to_sparse_csr()


def refused(small, *, data=None, **options):
    """Train with one thing that is wrong, and return the faults that are reported."""
    model, x, y = small
    settings = {"loss": nn.MSELoss(), "steps": 2, "progress": False} | options
    settings.setdefault("model", model)
    settings.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(everystep.UsageError) as caught:
        everystep.train(settings.pop("model"), (x, y) if data is None else data, **settings)
    return [str(fault) for fault in caught.value.faults]


X, Y = torch.zeros(20, 4), torch.zeros(20, 2)


@pytest.mark.parametrize(
    ("data", "what", "cure"),
    [
        (((X, X), Y),
         "x must be a tensor with rows along the first dimension, not a tuple of 2 tensors",
         "torch.cat"),
        (({"a": X, "b": X}, Y), "not a dict of 'a', 'b'", "in the model's forward"),
        ((["one", "two"], Y),
         "x must be a tensor with rows along the first dimension, not a list of 2", "a number"),
        ((np.array(["one", "two"]), Y), "not an array of text", "map each text or class to a number"),
        ((np.array([None, 1]), Y), "not an array of object", "astype('float32')"),
        ((X.numpy().astype(">f4"), Y), "not an array of >f4", "astype('float32')"),
        ((np.ma.array(X.numpy()), Y), "not a masked array", "pass x.filled(0.0)"),
        ((X, X[0, 0]), "y must be a tensor with rows along the first dimension, not a single number",
         ""),
        ((in_rows(X), Y), "not a sparse tensor", "pass x.to_dense()"),
        ((X.to("meta"), Y), "not a tensor on the meta device", "it has no values"),
        (("one", "two", "three"), "a pair of tensors (x, y) or a Dataset, not a tuple of 3", ""),
        ([(X[0], Y[0])] * 3, "not a list of 3", "torch.stack"),
        ({"x": X, "y": Y}, "not a dict of 'x', 'y'", "pass its tensors as (x, y)"),
        (iter([(X, Y)]), "not a list_iterator", "can be iterated only once"),
        (RandomSampler(X), "not a RandomSampler", "yields row numbers, not rows"),
        (BatchSampler(RandomSampler(X), 5, False), "not a BatchSampler", "Dataset, batch_size=5"),
    ],
)  # fmt: skip
def test_data_that_is_no_pair_of_tensors(small, data, what, cure):
    (fault,) = refused(small, data=data)
    assert fault.startswith("data: ") and what in fault and cure in fault


@pytest.mark.parametrize(
    ("row", "what", "cure"),
    [
        (
            ((X[0], X[0]), Y[0]),
            "x must be a tensor, an array or a number, not a tuple of 2",
            "torch.cat",
        ),
        (("text", Y[0]), "x must be a tensor, an array or a number, not text", "a number"),
        ((X[0], None), "y must be a tensor, an array or a number, not None", "both x and y"),
        ((image(), 1), "not an Image", "torch.from_numpy(numpy.array(x))"),
        (([1.0, 2.0], 1), "not a list of 2", "torch.tensor(x)"),
        ((in_rows(torch.eye(4)), 1), "not a sparse tensor", "x.to_dense()"),
        (None, "is None", "a pair (x, y)"),
        ({"x": X[0]}, "is a dict of 'x'", "a pair (x, y)"),
    ],
)
def test_rows_that_are_no_pair_of_tensors(small, row, what, cure):
    (fault,) = refused(small, data=Rows(lambda number: row))
    assert fault.startswith("row 0 of Rows") and what in fault and cure in fault


def test_rows_that_torch_cannot_stack_are_refused(small):
    (fault,) = refused(small, data=Rows(lambda number: (np.zeros(4)[::-1], 1)))
    assert fault.startswith("the rows of the Dataset cannot be stacked: ") and "negative" in fault


def test_a_row_that_is_wrong_further_on_is_named(small):
    (fault,) = refused(small, data=Rows(lambda number: (X[0], None if number == 13 else Y[0])))
    assert fault.startswith("row 13 of Rows: y must be")


def test_rows_that_differ_each_time_are_looked_at_too(small):
    (fault,) = refused(small, data=Rows(lambda number: (torch.rand(4), "text")))
    assert "y must be a tensor" in fault


def test_numbers_and_arrays_are_rows(small):
    _, x, _ = small
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"loss": lambda p, t: (p[:, 0] - t).square().mean(), "optimizer": optimizer}
    data = Rows(lambda number: (x[number].numpy(), np.float32(number)))
    assert len(everystep.train(model, data, steps=2, progress=False, **options).losses) == 2


def test_a_loader_is_refused_with_what_to_give_instead(small):
    dataset = TensorDataset(X, Y)
    (fault,) = refused(small, data=DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True))
    assert "pass its Dataset instead: data=loader.dataset, batch_size=5, drop_last=True" in fault
    sampler = BatchSampler(RandomSampler(dataset), 4, False)
    (fault,) = refused(small, data=DataLoader(dataset, batch_sampler=sampler))
    assert "batch_size=4 (without its batch sampler: everystep shuffles rows by the seed" in fault
    (fault,) = refused(small, data=DataLoader(dataset, batch_size=2, collate_fn=lambda rows: rows))
    assert "without its collate_fn" in fault
    (fault,) = refused(small, validation=DataLoader(dataset))
    assert fault.startswith("validation: ") and "x, y = next(iter(DataLoader(" in fault
    (fault,) = refused(small, batch_size=sampler)
    assert fault == "batch_size: must be an integer or None, not a BatchSampler"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("model", None, "model: must be an nn.Module, not None"),
        ("model", nn.Linear, "not the class Linear; create an instance: Linear(...)"),
        ("model", [nn.Linear(4, 2)], "not a list of 1; wrap the layers: nn.Sequential"),
        ("model", nn.Sequential(nn.LazyLinear(2)), "0.weight, 0.bias: lazy layers infer their sizes"),
        ("loss", None, "loss: must be a callable of (prediction, target), not None"),
        ("loss", "mse", "loss: must be a loss, such as torch.nn.MSELoss() or None, not 'mse'"),
        ("optimizer", None, "optimizer: must be an optimizer over the model's parameters"),
        ("optimizer", torch.optim.Adam,
         "is the class Adam; create an instance: Adam(model.parameters(), lr=1e-3)"),
        ("optimizer", [1, 2],
         "must be one optimizer, not a list of 2; for different settings per layer, use param groups"),
        ("scheduler", [1, 2], "not a list of 2; combine several with SequentialLR or ChainedScheduler"),
        ("metrics", 3, "metrics: must map names to callables"),
        ("validation", 1.5, "or a fraction of the rows such as 0.2, not 1.5"),
        ("validation", ((X, X), Y),
         "validation: x must be a tensor with rows along the first dimension"),
        ("dataset_limit", "1 GB", "dataset_limit: must be a number of bytes, such as 2e9"),
    ],
)  # fmt: skip
def test_arguments_of_another_kind(small, name, value, what):
    options = {name: value}
    if name == "model":
        options["optimizer"] = torch.optim.SGD(small[0].parameters(), lr=0.1)
    assert any(what in fault for fault in refused(small, **options))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("options", "kind", "what"),
    [
        ({"data": TensorDataset(X, Y), "dataset_limit": 100}, DataError, "pass dataset_limit=480"),
        ({"data": Stream()}, DataError, "map-style Dataset"),
        ({"data": TensorDataset(X)}, DataError, r"not a pair \(x, y\)"),
        ({"data": TensorDataset(X[:0], Y[:0])}, DataError, "no rows"),
        ({"data": (X, Y[:19])}, DataError, "x has 20 rows and y has 19"),
        ({"validation": (X[:, :2], Y)}, DataError, r"validation: x is \(20, 2\), but"),
        ({"epochs": 1}, ExperimentError, "either steps or epochs"),
        ({"model": nn.Linear(4, 2, device="meta")}, DeviceError, "meta device"),
        ({"model": nn.Linear(4, 2, dtype=torch.complex128)}, UsageError, "weight: is complex128, which"),
        ({"loss": nn.MSELoss}, ExperimentError, "MSELoss; create an instance: add parentheses"),
        ({"loss": lambda p, y: torch.tensor(1.0)}, UsageError, "does not depend on any parameter"),
        ({"optimizer": Descent(nn.Linear(2, 2).parameters())}, ExperimentError, "none of the model's"),
        (
            {"metrics": {"step": print, "loss": print}},
            ExperimentError,
            "loss, step: reserved for columns",
        ),
        *(
            ({"metrics": {"mine": wrong}}, ExperimentError, r"metrics\['mine'\]: must return one number")
            for wrong in (lambda p, t: None, lambda p, t: p, lambda p, t: "x")
        ),
    ],
)
def test_what_cannot_be_trained_says_why(small, options, kind, what):
    model, x, y = small
    settings = {"model": model, "data": (x, y), "loss": nn.MSELoss(), "steps": 2} | options
    settings.setdefault("optimizer", Descent(settings["model"].parameters()))
    with pytest.raises(kind, match=what):
        everystep.train(**settings, progress=False)


def test_all_that_is_wrong_is_reported_at_once(small):
    faults = refused(small, model=None, data=(None, "text"), loss=None, optimizer=[], metrics=3)
    paths = [fault.partition(":")[0] for fault in faults]
    assert paths == ["model", "data", "data", "loss", "optimizer", "metrics"]
    both = refused(small, data=Rows(lambda number: (None, "text")))
    assert ["x must" in both[0], "y must" in both[1]] == [True, True]


def test_an_optimizer_that_demands_a_closure(small):
    model, _, _ = small
    for optimizer in (
        WithClosure(model.parameters(), lr=0.1),  # torch wraps its step
        torch.optim.LBFGS(model.parameters()),
    ):
        (fault,) = refused(small, optimizer=optimizer)
        assert f"the step of {type(optimizer).__name__} requires a closure" in fault


@pytest.mark.parametrize("key", ["count", torch.zeros(3)])
def test_state_of_the_optimizer_that_belongs_to_no_parameter_is_in_nobodys_way(small, key):
    model, x, y = small
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[key] = 3
    run = everystep.train(model, (x, y), loss=nn.MSELoss(), optimizer=optimizer, steps=5, progress=False)
    assert optimizer.state[key] == 3
    assert everystep.open(run.directory).verify().is_exact


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (lambda loss: None, "None; does the function end with a return?"),
        (
            lambda loss: {"data": loss, "more": loss},
            "dict of 'data', 'more'; return the one to minimize",
        ),
        (lambda loss: (loss, loss), "tuple; return the one to minimize, or their sum"),
        (lambda loss: loss.item(), "float; return a tensor with a gradient"),
        (lambda loss: loss.detach().numpy(), "ndarray; return a tensor"),
        (lambda loss: loss * 1j, "a complex one; use its .real or .abs()"),
        (lambda loss: in_rows(loss[None, None]), "a sparse tensor; use its .to_dense()"),
        (lambda loss: loss.expand(2), 'shape (2,); use reduction="mean" or "sum"'),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_loss_that_gives_no_number(small, engine, value, what):
    loss = nn.MSELoss()
    (fault,) = refused(small, loss=lambda p, t: value(loss(p, t)), engine=engine)
    assert fault.startswith("loss: must return one ") and what in fault


def test_settings_of_an_optimizer_that_are_no_numbers(small):
    """Such an optimizer has no learning rate that could be recorded; the run says of it what it has."""
    parameters = list(small[0].parameters())
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5, "momentum": None}]
    optimizer = Descent(groups, table=torch.ones(3), levels=np.zeros((2, 2)), name="mine", count=0)
    assert hyperparameters(optimizer.param_groups) == {
        "optimizer.count": 0,
        "lr[1]": 0.5,
        "optimizer.count[1]": 0,
    }
    assert optimizers_text({"optimizer": optimizer_facts(optimizer)}) == (
        "Descent(table=Tensor of shape (3,), levels=ndarray of shape (2, 2), name=mine, lr[1]=0.5)"
    )
    other = Descent(parameters, lr=None, betas=0.9, momentum=torch.tensor(0.5))
    assert hyperparameters(other.param_groups) == {"optimizer.betas": 0.9, "momentum": 0.5}


@pytest.mark.parametrize("settings", [{}, {"lr": None}])
@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_an_optimizer_without_a_learning_rate_trains(small, engine, settings):
    model, x, y = small
    optimizer = Descent(model.parameters(), **settings)
    options = {"loss": nn.MSELoss(), "optimizer": optimizer, "engine": engine, "progress": False}
    run = everystep.train(model, (x, y), steps=4, **options)
    assert len(run.losses) == 4
    assert "lr" not in run.measurements["name"].to_list()
    assert run[2].hyperparameters == {}


@pytest.mark.filterwarnings("ignore:.* use of fork")  # no other thread holds anything here
def test_several_processes_need_a_torch_that_shows_their_reductions(tmp_path, monkeypatch):
    """As torch 2.9 does not, under which the tests of ranks are skipped."""
    monkeypatch.setattr(agreement, "shows_reductions", lambda: False)
    found, errors = launched(tmp_path, ["plain"])
    assert None not in found, errors
    assert all("install a newer torch" in each["plain"] for each in found)
    assert not (tmp_path / "runs").exists()
