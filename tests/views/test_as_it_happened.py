import torch
from torch import nn

import everystep
from everystep.views.segments import as_it_happened


def test_an_update_has_its_own_parameters_and_the_last_of_several_has_them(tmp_path):
    torch.manual_seed(0)
    parts = {"critic": nn.Linear(3, 1), "actor": nn.Linear(3, 3)}
    optimizers = {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in parts.items()}
    named = {f"optimizer_{name}": optimizer for name, optimizer in optimizers.items()}
    scale = nn.Parameter(torch.ones(()))
    with everystep.record(run=tmp_path / "run", **parts, **named, scale=scale) as recording:
        for x in recording.steps(torch.randn(4, 5, 3)):
            for name in ("critic", "critic", "actor"):
                optimizers[name].zero_grad()
                loss = parts["critic"](parts["actor"](x)).square().mean()
                loss.backward()
                optimizers[name].step()
            with torch.no_grad():
                scale.mul_(0.5)
            recording.log(loss=loss)
    run = everystep.open(tmp_path / "run")
    training = run.facts.training
    happened = as_it_happened(run[2], training, training.loop)
    updates = [seen for seen in happened.segments if seen.segment.phase == "update"]
    assert [(seen.optimizer, list(seen.formulas)) for seen in updates] == [
        ("optimizer_critic", []),
        ("optimizer_critic", ["critic.weight", "critic.bias"]),
        ("optimizer_actor", ["actor.weight", "actor.bias"]),
    ]
    assert all(seen.settings == {"lr": 0.1} for seen in updates)
    firsts = [seen.segment.first for seen in happened.segments]
    assert firsts == sorted(firsts)
    assert happened.changed_otherwise in ([], ["scale"])
