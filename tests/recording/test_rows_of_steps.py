"""Rows of the table `repeats`; one row may be of many steps."""

import math

import pytest
import torch
from tests.sealing import sql

import everystep


class Custom(torch.nn.Module):
    """A model that is not one of torch's own, so that Python runs each step of its training."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture(scope="module")
def by_rule(tmp_path_factory):
    """Return a run of 50 watched steps."""
    torch.manual_seed(0)
    model = Custom()
    data = torch.randn(20, 4), torch.randn(20, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"loss": torch.nn.MSELoss(), "optimizer": optimizer, "progress": False}
    place = tmp_path_factory.mktemp("rows") / "run"
    with pytest.MonkeyPatch.context() as patch:  # all are written at once
        patch.setattr("everystep.training.writer.FLUSH_SECONDS", math.inf)
        return everystep.train(model, data, steps=50, run=place, **options)


def _rows(run):
    return sql(run.directory, "SELECT step, count FROM repeats ORDER BY step")


def test_watched_steps_with_batches_by_rule_share_rows(by_rule):
    assert len(_rows(by_rule)) < 25 and sum(count for _, count in _rows(by_rule)) == 50
    assert by_rule.verify(processes=1, progress=False).is_exact
    steps = [by_rule[number] for number in (40, 33, 50, 49)]
    assert [float(step.loss) for step in steps] == [
        by_rule.losses["loss"][n - 1] for n in (40, 33, 50, 49)
    ]


def test_a_fork_ends_the_row_of_its_parent_at_its_state(by_rule, tmp_path):
    step, count = max(_rows(by_rule), key=lambda row: row[1])
    at = step + count // 2
    fork = by_rule.fork(at, lr=0.02, run=tmp_path / "fork", progress=False)
    assert (step, count // 2 + 1) in _rows(fork) and sum(count for _, count in _rows(fork)) == 50
    assert fork.verify(processes=1, progress=False).is_exact
    assert float(fork[at].loss) == by_rule.losses["loss"][at - 1]
