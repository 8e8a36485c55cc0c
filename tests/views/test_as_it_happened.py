import torch
from tests.descent import looped
from torch import nn

import everystep
from everystep.recording.texts import optimizers_text
from everystep.views.step_data import as_it_happened
from everystep.views.step_text import step_text


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
    segments, changed_outside = as_it_happened(run[2], training)
    updates = [seen for seen in segments if seen.segment.phase == "update"]
    assert [(seen.optimizer, list(seen.parameters)) for seen in updates] == [
        ("optimizer_critic", []),
        ("optimizer_critic", ["critic.weight", "critic.bias"]),
        ("optimizer_actor", ["actor.weight", "actor.bias"]),
    ]
    assert all(seen.settings == {"lr": 0.1} for seen in updates)
    page = step_text(run[2], run.facts).plain.splitlines()
    headings = [line for line in page if line.startswith("update")]
    critic, actor = (f"update    optimizer_{name}: SGD, lr = 0.1" for name in ("critic", "actor"))
    assert headings == [critic, critic, actor]
    alone = step_text(run[2], run.facts, phase="update").plain
    assert [line for line in alone.splitlines() if line[:1].isalpha()][-3:] == [critic, critic, actor]
    assert "aten." in alone and "  change" in alone
    # Gradients stand after the backward passes, before the last update.
    order = [line.split()[0] for line in page if line[:1].isalpha()]
    assert order.index("grads") == len(order) - order[::-1].index("backward") < len(order) - 1
    values = step_text(run[2], run.facts, values=True).plain
    assert values.count("[[") > sum(tensor.dim() > 1 for tensor in run[2].gradients.values())
    firsts = [seen.segment.first for seen in segments]
    assert firsts == sorted(firsts)
    assert changed_outside in ([], ["scale"])


def test_the_only_optimizer_is_named_and_statistics_of_complex_numbers_say_what_they_are_of(tmp_path):
    weight = nn.Parameter(torch.tensor([3 + 4j, 1j, 0j]))
    optimizer = torch.optim.Adam([weight], lr=0.5)
    with everystep.record(run=tmp_path / "run", weight=weight, optimizer=optimizer) as recording:
        for x in recording.steps([torch.tensor([1.0, 2.0, 3.0])] * 2):
            optimizer.zero_grad()
            loss = (weight * x).abs().sum()
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
    run = everystep.open(tmp_path / "run")
    page = step_text(run[1], run.facts).plain
    assert "update    Adam, lr = 0.5, betas" in page
    assert "outside the updates" not in page
    product = next(line.split() for line in page.splitlines() if line.split()[:1] == ["#0"])
    assert product[4:7] == ["3,", "|z|", "2.333"]  # the mean of 5, 2 and 0
    alone = step_text(run[1], run.facts, operation=0).plain
    assert "3 complex64  absolute values:  mean 2.333" in alone
    assert "[                3+4j                 0+2j                 0+0j]" in alone


def test_an_operation_of_the_model_itself_names_no_module():
    class Model(nn.Sequential):
        def forward(self, x):
            return super().forward(x).relu()

    model = Model(nn.Linear(2, 1))
    run = looped(model, [torch.ones(3, 2)], lambda model, x: model(x).sum(), optimizer=None)
    lines = step_text(run[1], run.facts, phase="forward").plain.splitlines()
    ends = [line.split("  ")[-2:] for line in lines if "aten." in line]
    assert ends == [["module 0", "aten.addmm.default"], [" relu(#0)", "aten.relu.default"]]


class Decayed(torch.optim.Optimizer):
    """An optimizer of a user, with a setting that no operation has as its argument."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1, "decay": 0.5})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["decay"]).sub_(parameter.grad, alpha=group["lr"])


def test_settings_that_a_loop_may_have_changed_are_named_as_those_of_the_beginning():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = Decayed(
        [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.2}]
    )
    with everystep.record(model=model, optimizer=optimizer, run="./run") as recording:
        for x in recording.steps(torch.randn(2, 5, 3)):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
            for group in optimizer.param_groups:
                group["lr"] /= 2
                group["decay"] = 0.0
    step = recording.run[2]
    assert "Decayed, lr = 0.05, lr[1] = 0.1, decay (as the run began) = 0.5\n" in step.to_text()
    shown = {"lr": "0.05", "lr[1]": "0.1", "decay (as the run began)": "0.5"}
    assert step.data()["optimizer"] == {"name": "Decayed", "settings": shown}


def test_settings_of_all_param_groups_are_shown(small):
    model, x, y = small
    groups = [
        {"params": [each], "weight_decay": decay}
        for each, decay in zip(model.parameters(), (0.1, 0, 0.1, 0.2), strict=True)
    ]
    given = {"loss": nn.MSELoss(), "steps": 2, "progress": False}
    run = everystep.train(model, (x, y), optimizer=torch.optim.SGD(groups, lr=0.1), **given)
    whole = "SGD(weight_decay=0.1, lr=0.1, weight_decay[1]=0, weight_decay[3]=0.2)"
    assert optimizers_text(run.facts.training.optimizers) == whole
    assert "weight_decay = 0.1, weight_decay[1] = 0, weight_decay[3] = 0.2\n" in run[2].to_text()
