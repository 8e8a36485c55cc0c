"""Numbers that views round: no digit misleads, and no exponent stands where a person expects none."""

import pytest
import torch
from torch import nn

import everystep
from everystep.views.formatting import measured_text, percent, seconds_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (12.34, "12.3 s"), (999.4, "999 s"), (999.6, "1,000 s"), (5400.2, "5,400 s")],
)
def test_durations_have_three_digits_and_no_exponent(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        *((0.0, "0%"), (0.12345, "12.3%"), (1e-6, "0.0001%"), (1.0, "100%"), (12.0, "1,200%")),
        *((0.9996, "99.96%"), (1 - 1e-7, "99.99999%"), (float("inf"), "inf%"), (float("nan"), "nan%")),
    ],
)
def test_only_what_is_whole_is_shown_as_100_percent(share, text):
    assert percent(share) == text


def test_an_accuracy_of_100_percent_has_no_wrong_prediction():
    values = (0.9722, 0.99999, 1.0)
    shown = [measured_text("validation_accuracy", value) for value in values]
    assert shown == ["97.22%", "99.999%", "100%"]


def test_a_gradient_of_few_rows_of_an_embedding_has_no_100_percent_zeros(tmp_path):
    model = nn.Embedding(5000, 2)
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for rows in recording.steps([torch.tensor([3])]):
            loss = model(rows).sum()
            loss.backward()
            recording.log(loss=loss)
    step = everystep.open(tmp_path / "run")[1]
    (line,) = [line for line in step.to_text().splitlines() if line.strip().startswith("weight.grad")]
    assert "99.98%" in line


def test_rates_that_differ_late_are_different_lines(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"loss": nn.MSELoss(), "optimizer": optimizer, "steps": 3, "progress": False}
    run = everystep.train(model, (torch.ones(4, 2), torch.ones(4, 1)), run=tmp_path / "run", **options)
    text = run.what_if(1, lr=[0.12345678, 0.12345679, 2, 1e-5], progress=False).to_text()
    rates = [line.split()[0] for line in text.splitlines()[3:8] if not line.startswith("as recorded")]
    assert sorted(rates) == ["0.12345678", "0.12345679", "1e-05", "2"]
    assert run.measure("2 * loss", every=3, progress=False).to_text().startswith("2 * loss: 1 value, ")


def test_an_excerpt_of_a_run_that_logs_nothing_names_its_steps(tmp_path):
    weight = torch.zeros(2)
    with everystep.record(run=tmp_path / "run", weight=weight) as recording:
        for x in recording.steps([torch.ones(2)] * 150):
            weight += x
    table = everystep.open(tmp_path / "run").table(100)
    assert table.frame.columns == ["step"]
    assert table.caption().startswith("75 of 150 rows: one step of each 2; all: ")
