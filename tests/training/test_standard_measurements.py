"""Metrics by name, compared with scikit-learn's: those of validation rows, and those asked for."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, r2_score
from torch import nn
from torch.nn import functional

import everystep
from everystep.training.measurements import evaluation_of
from everystep.training.objects import Objects

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=GENERATOR)


def standard(loss, rows):
    return evaluation_of(Objects(nn.Identity(), loss), rows, is_validation=True).standard


def measured(loss, prediction, target, name):
    value = standard(loss, (prediction, target))[name](prediction, target)
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
    # Three times 0.1 in float64 is more than 0.3, and its third more than 0.1.
    target = torch.full((3, 1), 0.1, dtype=torch.float64)
    assert measured(nn.MSELoss(), target + 0.1, target, "validation_r2") == 0.0
    target[1] = math.nan
    assert math.isnan(measured(nn.MSELoss(), target + 0.1, target, "validation_r2"))


@pytest.mark.parametrize(
    ("loss", "rates"),
    [
        (nn.PoissonNLLLoss(), torch.exp),
        (functional.poisson_nll_loss, torch.exp),
        (partial(functional.poisson_nll_loss, full=True), torch.exp),
        (nn.PoissonNLLLoss(log_input=False), torch.abs),
        (partial(functional.poisson_nll_loss, log_input=False), torch.abs),
    ],
)
def test_r2_of_counts_is_that_of_the_predicted_rates(loss, rates):
    prediction = randn(80, 2)
    counts = torch.poisson(rates(prediction), generator=GENERATOR)
    given = prediction if rates is torch.exp else rates(prediction)
    found = measured(loss, given, counts, "validation_r2")
    assert found == pytest.approx(r2_score(counts, rates(prediction)), rel=1e-5)


class OfMine(nn.MSELoss):
    pass


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (nn.HuberLoss(), ["validation_r2"]),
        (functional.smooth_l1_loss, ["validation_r2"]),
        (partial(functional.huber_loss, delta=0.5), ["validation_r2"]),
        (OfMine(), ["validation_r2"]),
        (lambda prediction, target: (prediction - target).square().sum(), ["validation_r2"]),
        (functional.binary_cross_entropy_with_logits, ["validation_accuracy"]),
        (functional.binary_cross_entropy, ["validation_accuracy"]),
        (nn.KLDivLoss(), []),
        (functional.kl_div, []),
        (nn.CrossEntropyLoss(), []),
        (nn.MultiLabelSoftMarginLoss(), []),
        (nn.SoftMarginLoss(), []),
        (nn.HingeEmbeddingLoss(), []),
    ],
)
def test_r2_only_where_predictions_are_on_the_scale_of_their_targets(loss, names):
    target = randn(8, 3).softmax(1)
    assert list(standard(loss, (target, target))) == ["validation_loss", *names]


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


def trained(x, y, outputs, loss, **options):
    model = nn.Linear(x.shape[1], outputs)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return everystep.train(
        model, (x, y), loss=loss, optimizer=optimizer, steps=3, progress=False, **options
    )


def test_metrics_by_name_are_measured_on_the_data_or_on_validation_rows():
    x, y = randn(60, 4), torch.randint(0, 3, (60,), generator=GENERATOR)
    run = trained(x, y, 3, nn.CrossEntropyLoss(), metrics=["accuracy"], evaluate_every=1)
    predicted = (x @ run.parameters(3)["weight"].T + run.parameters(3)["bias"]).argmax(1)
    assert run.measured("accuracy")[3] == pytest.approx(accuracy_score(y, predicted), abs=1e-7)
    assert len(run.measured("accuracy")) == 3 and run.verify(progress=False).is_exact
    held_out = trained(x, y, 3, nn.CrossEntropyLoss(), metrics=["accuracy"], validation=0.2)
    assert set(held_out.measurements["name"]) == {"validation_accuracy", "validation_loss"}


def test_the_newest_value_of_a_metric_may_be_nan():
    x = randn(60, 4)
    run = trained(x * math.nan, x[:, :1], 1, nn.MSELoss(), validation=(x, x[:, :1]))
    name, value = run.summary().validation
    assert (name, math.isnan(value)) == ("r2", True)


def test_an_experiment_names_metrics(tmp_path):
    settings = {"metrics": ["accuracy"], "data.validation": None, "epochs": 2}
    run = everystep.train_experiment("wine", settings, run=tmp_path / "run", progress=False)
    assert set(run.measurements["name"]) == {"accuracy", "lr"}
    fork = run.fork(12, steps=24, run=tmp_path / "fork", progress=False)
    assert fork.measured("accuracy") == run.measured("accuracy")


def test_a_metric_that_is_unknown_or_does_not_fit_is_an_error():
    x, y = randn(6, 4), randn(6, 2)
    with pytest.raises(
        everystep.ExperimentError, match=r"metrics\[0\]: unknown metric 'acuracy'; did you"
    ):
        trained(x, y, 2, nn.MSELoss(), metrics=["acuracy"])
    with pytest.raises(everystep.ExperimentError, match=r"metrics\[1\]: unknown metric 'top'"):
        everystep.train_experiment("wine", {"metrics": ["accuracy", "top"]})
    with pytest.raises(
        everystep.ExperimentError, match="accuracy needs targets that are classes or two"
    ):
        trained(x, y, 2, nn.MSELoss(), metrics=["accuracy"])
    labels = torch.zeros(6, dtype=torch.int64)
    model = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)))
    with pytest.raises(everystep.ExperimentError, match="accuracy cannot compare the model's output"):
        everystep.train(
            model, (x, labels), loss=lambda p, t: p.sum(), metrics=["accuracy"], steps=1,
            optimizer=torch.optim.SGD(model.parameters(), 0.1), progress=False,
        )  # fmt: skip
