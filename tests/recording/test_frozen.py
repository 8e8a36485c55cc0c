"""Snapshots of a model that is mostly frozen: they hold what is trained, and open as whole states."""

import json

import pytest
import torch
from tests.descent import descend
from tests.snapshots import take_snapshots_every
from torch import nn

import everystep

STEPS, AT = 12, 6


class Adapted(nn.Module):
    """A large frozen layer, with a small one that is trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(600, 600).requires_grad_(False)
        self.adapter = nn.Linear(600, 2)

    def forward(self, x):
        return self.adapter(self.frozen(x).relu())


def train(run, *, steps=STEPS, changed_at=None, rate=1e-3, **options):
    """Train by a loop; `changed_at`: after which step the code changes a number of the frozen layer."""
    model = Adapted()
    optimizer = torch.optim.Adam(model.adapter.parameters(), lr=1e-3)
    batches = [torch.randn(4, 600, generator=torch.Generator().manual_seed(n)) for n in range(steps)]
    states = []
    with everystep.record(model=model, optimizer=optimizer, run=run, **options) as recording:
        for x in recording.steps(batches):
            if recording.step_count >= AT:
                optimizer.param_groups[0]["lr"] = rate
            recording.log(loss=descend(optimizer, model(x).square().mean()))
            if recording.step_count == changed_at:
                with torch.no_grad():
                    model.frozen.weight[5, 7] += 1
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return recording.run, states


@pytest.fixture(autouse=True)
def snapshots_every_three(monkeypatch):
    take_snapshots_every(monkeypatch, 3)


def sizes(run):
    return {int(f.parent.name): f.stat().st_size for f in run.glob("snapshots/*/parameters.safetensors")}


def assert_opens(run, states):
    for step, state in enumerate(states, start=1):
        found = run.parameters(step)
        assert all(torch.equal(found[name], value) for name, value in state.items())
    assert run.verify().is_exact


def test_only_what_is_trained_is_written_again(tmp_path):
    _, states = train(tmp_path / "run")
    written = sizes(tmp_path / "run")
    assert written.pop(0) > 600 * 600 * 4
    assert STEPS in written
    assert max(written.values()) < 10_000
    assert_opens(everystep.open(tmp_path / "run"), states)


def test_a_frozen_layer_that_changes_is_written_again(tmp_path):
    run, states = train(tmp_path / "run", changed_at=7)
    written = sizes(tmp_path / "run")
    assert max((size for step, size in written.items() if 0 < step < 7), default=0) < 10_000
    assert min(size for step, size in written.items() if step >= 7) > 600 * 600 * 4
    assert_opens(run, states)


def test_forks_resumed_and_pruned_runs_have_it_too(tmp_path, everystep_command):
    _, whole = train(tmp_path / "whole")
    train(tmp_path / "run", steps=7)
    train(tmp_path / "run", resume=True)
    assert max(size for step, size in sizes(tmp_path / "run").items() if step) < 10_000
    assert_opens(everystep.open(tmp_path / "run"), whole)
    _, forked = train(tmp_path / "fork", fork=tmp_path / "run", at=AT, rate=1e-2)
    assert max(size for step, size in sizes(tmp_path / "fork").items() if step) < 10_000
    everystep_command("rm", str(tmp_path / "run"), "--force")
    assert_opens(everystep.open(tmp_path / "fork"), whole[:AT] + forked[-AT:])
    assert everystep_command("prune", str(tmp_path / "fork"), "--snapshots", "0", "--force")[0] == 0
    assert sorted(sizes(tmp_path / "fork")) == [0, AT, STEPS]
    assert_opens(everystep.open(tmp_path / "fork"), whole[:AT] + forked[-AT:])


def test_an_altered_first_state_is_never_taken_for_another(tmp_path, everystep_command):
    train(tmp_path / "run")
    first = tmp_path / "run" / "snapshots" / "000000" / "parameters.safetensors"
    content = bytearray(first.read_bytes())
    content[-9] ^= 1
    first.write_bytes(content)
    run = everystep.open(tmp_path / "run")
    with pytest.raises(everystep.RunError, match="changed after recording"):
        run.parameters(9)
    code, out, _ = everystep_command("doctor", str(tmp_path / "run"), "--json")
    assert code == 1
    assert "000000" in json.dumps(json.loads(out))
