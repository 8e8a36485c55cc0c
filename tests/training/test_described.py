"""What the facts of a run hold of models, losses, optimizers and schedules; the texts made of them."""

from collections import Counter

import pytest
import torch
from tests.training.by_hand import by_train, new_training
from torch import nn

import everystep
from everystep.recording.facts import LossFacts, ModuleFacts, SchedulerFacts
from everystep.recording.texts import model_text, optimizers_text
from everystep.training.description import modules_of


class Own(nn.Module):
    """A user's module, of which no code may run."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.end = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.end(x)

    def extra_repr(self):
        raise AssertionError("the user's code was run for a text")

    def __repr__(self):
        raise AssertionError("the user's code was run for a text")


class OwnLoss(nn.Module):
    """A user's loss, with a layer and attributes of many kinds."""

    def __init__(self):
        super().__init__()
        self.share, self.name, self.sizes, self.none = 0.25, "mine", (1, 2), None
        self.counts = Counter({3: 2})
        self.weight, self.history, self.given = torch.ones(2), [0.0] * 1000, object()
        self._private = 3
        self.inner = nn.MSELoss()

    def forward(self, prediction, target):
        return self.share * self.inner(prediction, target)

    def extra_repr(self):
        raise AssertionError("the user's code was run for a text")


TRAINING = {"training": True}


def test_a_nested_model_is_known_module_by_module():
    run = by_train(new_training(Own), steps=2)
    assert model_text(run.facts.training.modules) == (
        "Own(\n"
        "  (blocks): ModuleList(\n"
        "    (0-2): 3 x Linear(in_features=4, out_features=4, bias=True)\n"
        "  )\n"
        "  (end): Sequential(\n"
        "    (0): Dropout(p=0.1, inplace=False)\n"
        "    (1): Linear(in_features=4, out_features=2, bias=True)\n"
        "  )\n"
        ")"
    )


MODELS = [
    lambda: nn.Linear(3, 2),
    lambda: nn.Sequential(),
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())),
    lambda: nn.ModuleList(),
    lambda: nn.ModuleList([*(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)) for _ in range(3)), nn.ReLU()]),
    lambda: nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.ParameterList([torch.ones(2), torch.ones(3)])}),
    lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
]


@pytest.mark.parametrize("make", MODELS)
def test_torchs_modules_read_as_torch_prints_them(make):
    model = make()
    modules = modules_of(model)
    named = dict(model.named_modules())
    assert {path: each.class_name for path, each in modules.items()} == {
        path: type(module).__name__ for path, module in named.items()
    }
    assert model_text(modules) == repr(model)


def test_a_module_within_itself_is_listed_once():
    model = nn.Sequential(nn.ReLU())
    model.add_module("again", model)
    assert list(modules_of(model)) == ["", "0"]


def test_a_loss_of_ones_own_has_the_attributes_that_are_plain():
    run = by_train(new_training(loss=OwnLoss), steps=2)
    settings = {"share": 0.25, "name": "mine", "sizes": [1, 2], "none": None, "counts": {"3": 2}}
    inner = ModuleFacts(class_name="MSELoss", settings=TRAINING | {"reduction": "mean"}, is_torchs=True)
    assert run.facts.training.loss == LossFacts(
        class_name="OwnLoss",
        is_torchs=False,
        settings=settings,
        modules={"": ModuleFacts(class_name="OwnLoss", settings=TRAINING | settings), "inner": inner},
    )


def test_a_loss_that_is_a_function_has_its_name():
    run = by_train(new_training(loss=lambda: nn.functional.mse_loss), steps=2)
    assert run.facts.training.loss == LossFacts(
        class_name="mse_loss", is_torchs=True, settings={}, modules={}
    )


def test_the_settings_of_a_second_group_differ():
    def in_groups(lr):
        def make(parameters):
            first, *others = parameters
            groups = [{"params": [first]}, {"params": others, "lr": lr}]
            return torch.optim.SGD(groups, lr=0.1)

        return make

    one, other = (by_train(new_training(optimizer=in_groups(lr)), steps=2) for lr in (0.2, 0.3))
    assert [group["lr"] for group in one.facts.training.optimizers["optimizer"].groups] == [0.1, 0.2]
    assert one.diff(other).experiments == {"optimizer SGD.lr[1]": (0.2, 0.3)}


def test_several_models_optimizers_and_schedulers_of_a_loop(tmp_path):
    generator, discriminator = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    optimizers = {
        "optimizer_g": torch.optim.Adam(generator.parameters(), lr=0.01),
        "optimizer_d": torch.optim.SGD(discriminator.parameters(), lr=0.1),
    }
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizers["optimizer_g"], [2, 4])
    parts = {"generator": generator, "discriminator": discriminator, "scheduler": scheduler} | optimizers
    with everystep.record(run=tmp_path / "run", **parts) as recording:
        for x in recording.steps([torch.randn(4, 2) for _ in range(3)]):
            loss = -discriminator(generator(x)).log().mean()
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            recording.log(loss=loss)
    training = recording.run.facts.training
    assert {path: each.class_name for path, each in training.modules.items()} == {
        "": "ModuleDict",
        "generator": "Linear",
        "discriminator": "Sequential",
        "discriminator.0": "Linear",
        "discriminator.1": "Sigmoid",
    }
    assert (training.loss, training.loop.programs, training.loop.has_loss) == (None, 2, True)
    assert all(each.is_torchs for each in training.optimizers.values())
    assert optimizers_text(training.optimizers) == (
        "optimizer_g: Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08)\noptimizer_d: SGD(lr=0.1)"
    )
    assert training.schedulers["scheduler"] == SchedulerFacts(
        class_name="MultiStepLR",
        is_torchs=True,
        settings={"milestones": {"2": 1, "4": 1}, "gamma": 0.1},
        every=None,
    )
