"""Accuracy and R² of a validation part, compared with scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, r2_score
from torch import nn

from everystep.training.measurements import standard_measurements

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=GENERATOR)


def measured(loss, prediction, target, name):
    value = standard_measurements(loss, target)[name](prediction, target)
    return None if value is None else float(value)


def test_accuracy_of_classes():
    prediction, target = randn(50, 4), torch.randint(0, 4, (50,), generator=GENERATOR)
    expected = accuracy_score(target, prediction.argmax(1))
    assert measured(nn.CrossEntropyLoss(), prediction, target, "validation_accuracy") == pytest.approx(
        expected, abs=1e-7
    )


def test_accuracy_of_images_of_classes():
    prediction, target = randn(5, 3, 4, 4), torch.randint(0, 3, (5, 4, 4), generator=GENERATOR)
    expected = accuracy_score(target.flatten(), prediction.argmax(1).flatten())
    found = measured(nn.CrossEntropyLoss(), prediction, target, "validation_accuracy")
    assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("loss", "threshold"), [(nn.BCEWithLogitsLoss(), 0.0), (nn.BCELoss(), 0.5)], ids=["logits", "shares"]
)
def test_accuracy_of_two_classes(loss, threshold):
    prediction = randn(60, 2).sigmoid() if threshold else randn(60, 2)
    target = (randn(60, 2) > 0).float()
    expected = np.mean((prediction > threshold).numpy() == (target > 0.5).numpy())
    assert measured(loss, prediction, target, "validation_accuracy") == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_r2(offset):
    target = randn(80, 3) + offset
    prediction = target + 0.3 * randn(80, 3)
    expected = r2_score(target.double(), prediction.double())
    found = measured(nn.MSELoss(), prediction, target, "validation_r2")
    assert found == pytest.approx(expected, rel=1e-6)


def test_r2_of_equal_targets():
    target = torch.ones(10, 1)
    assert measured(nn.MSELoss(), target.clone(), target, "validation_r2") == 1.0
    assert measured(nn.MSELoss(), target + 0.1, target, "validation_r2") == 0.0


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "name"),
    [
        (nn.CrossEntropyLoss(), randn(8, 3, 2), torch.zeros(8).long(), "validation_accuracy"),
        (nn.CrossEntropyLoss(), randn(8, 3), torch.full((8,), -100), "validation_accuracy"),
        (nn.BCELoss(), randn(8), torch.zeros(8, 1), "validation_accuracy"),
        (nn.MSELoss(), randn(8), torch.zeros(8, 1), "validation_r2"),
    ],
)
def test_nothing_where_shapes_do_not_fit(loss, prediction, target, name):
    assert measured(loss, prediction, target, name) is None
