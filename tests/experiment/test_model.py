from contextlib import nullcontext

import numpy as np
import pytest
import torch

from everystep.device import select
from everystep.errors import DataError, DeviceError, ModelError
from everystep.experiment.catalogue import build
from everystep.experiment.data import Data
from everystep.experiment.loss import check_loss
from everystep.experiment.model import build_model, try_model
from everystep.experiment.preparation import ArrayPreparation
from everystep.experiment.specification import Model


def tried(layers, x):
    return try_model(build_model(Model(layers=layers), x), x, layers)


def test_trying_a_model_touches_neither_it_nor_the_generator():
    layers = ["Linear(3, 4)", "BatchNorm1d(4)", "Dropout(0.5)", "Linear(4, 1)"]
    model = build_model(Model(layers=layers), torch.zeros(2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert try_model(model, torch.randn(2, 3, generator=torch.Generator()), layers).shape == (2, 1)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_lazy_layers_take_their_sizes_from_the_data():
    model = build_model(Model(layers=["LazyLinear(4)", "ReLU()"]), torch.zeros(2, 3))
    assert model[0].weight.shape == (4, 3)
    assert model.training


@pytest.mark.parametrize(
    ("layers", "shape", "problem"),
    [
        (["Linear(3, 4)", "Linear(5, 1)"], (2, 3),
         r"layers\[1\]: Linear\(5, 1\) expects 5 features in the"),
        (["Linear(3, 4)", "Linear(5, 1)"], (2, 3), r"layers\[0\] \(Linear\(3, 4\)\) has shape \(2, 4\)"),
        (["Conv2d(3, 4, 3)"], (2, 1, 8, 8),
         r"expects 3 channels in dimension 1, but the data has shape"),
        (["Conv2d(1, 4, 3)"], (2, 1, 2, 2), r"layers\[0\]: Conv2d\(1, 4, 3\) fails on \(2, 1, 2, 2\)"),
        (["LSTM(3, 4)"], (2, 3), "returns a tuple, not one tensor"),
        (["BatchNorm1d(3)"], (1, 3), "more than 1 value per channel"),
        (["Unflatten(1, (2, 2))"], (2, 3), r"layers\[0\]: Unflatten\(1, \(2, 2\)\) fails on"),
    ],
)  # fmt: skip
def test_shape_errors_name_the_layer_and_what_it_gets(layers, shape, problem):
    with pytest.raises(ModelError, match=problem):
        tried(layers, torch.zeros(*shape))


def check(name, prediction, y):
    check_loss(build("loss", name, {}), prediction, Data(torch.zeros(len(y), 1), y))


def test_a_loss_that_does_not_fit_is_explained():
    with pytest.raises(ModelError, match="set the last layer to 10 outputs"):
        check("MSELoss", torch.zeros(2, 1), torch.zeros(5, 10))
    with pytest.raises(DataError, match="6 classes, but the model has 3 outputs"):
        check("CrossEntropyLoss", torch.zeros(2, 3), torch.tensor([1, 5, 2]))
    with pytest.raises(ModelError, match="BCELoss cannot compare"):
        check("BCELoss", torch.full((2, 1), 3.0), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("labels", "ignored", "is_refused"),
    [([1, 2, 3], 3, True), ([1, 2, 3], 0, True), ([-100, 0, 1], -100, True), ([0, 1, 2], 1, False)],
)
def test_a_loss_cannot_ignore_a_class_that_gets_another_number(labels, ignored, is_refused):
    y = np.array(labels)
    known = ArrayPreparation.fit(
        lambda: iter([y]), lambda: iter([y]), y, scale=False, classes=True, indices=False
    )
    data = Data(torch.zeros(3, 1), torch.from_numpy(known.targets(y)), preparation=known)
    loss = build("loss", "CrossEntropyLoss", {"ignore_index": ignored})
    with pytest.raises(DataError, match="numbered again from 0") if is_refused else nullcontext():
        check_loss(loss, torch.zeros(3, 3), data)


def test_class_weights_are_a_list_of_numbers():
    loss = build("loss", "CrossEntropyLoss", {"weight": [1.0, 2.0]})
    assert loss.weight.tolist() == [1, 2]


def test_a_device_that_is_not_there_lists_those_that_are():
    assert select("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"'cuda:99' is not available; this machine has: .*cpu"):
        select("cuda:99")
    with pytest.raises(DeviceError, match="did you mean cuda"):
        select("cudda")
    assert select("auto").type in ("cpu", "cuda", "mps")
