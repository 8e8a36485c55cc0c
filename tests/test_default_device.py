"""A default device that the caller has set changes neither an experiment nor an answer about a run.

It is `meta` here, on which nothing can be computed: what lies there by mistake raises an error.
"""

import pytest
import torch
from torch import nn

import everystep


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    return everystep.train(
        model, (torch.randn(20, 4), torch.randn(20, 2)), loss=nn.MSELoss(), optimizer=optimizer,
        steps=12, run=tmp_path_factory.mktemp("default") / "run", progress=False,
    )  # fmt: skip


QUESTIONS = {
    "step": lambda run: str(run[7].gradients["0.weight"]),
    "rows": lambda run: str(run.rows(7)),
    "why": lambda run: str(run.why(7, "gradients['0.weight'][3, 1]", depth=3)),
    "measure": lambda run: run.measure("max(abs(gradients['0.weight']))", progress=False).values,
    "when": lambda run: run.when("loss < 1", progress=False).steps,
    "nonfinite": lambda run: run.first_nonfinite(progress=False),
    "diff": lambda run: str(run.diff(run, thorough=True, progress=False)),
    "verify": lambda run: run.verify(progress=False).is_exact,
    "rerun": lambda run: run.rerun(precision="float64", progress=False).losses.tolist(),
}


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_have_the_same_answers(run, name):
    expected = QUESTIONS[name](everystep.open(run.directory))
    with torch.device("meta"):
        assert QUESTIONS[name](everystep.open(run.directory)) == expected


def test_an_experiment_has_the_same_losses(tmp_path):
    def losses(name):
        settings = {"steps": 5}
        return everystep.train_experiment(
            "two-layer", settings, run=tmp_path / name, progress=False
        ).losses

    expected = losses("expected")
    with torch.device("meta"):
        assert losses("found").equals(expected)


def test_code_that_may_rely_on_it_is_refused_with_a_cure():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters())
    data = torch.randn(8, 4), torch.randn(8, 1)
    refused = pytest.raises(everystep.UsageError, match=r'call torch.set_default_device\("cpu"\)')
    with torch.device("meta"), refused:
        everystep.train(model, data, loss=nn.MSELoss(), optimizer=optimizer, steps=3)
