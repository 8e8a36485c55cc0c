"""A fork is its parent up to a step, bit for bit, and then a loop by hand with the changed rules."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.descent import descend, files_of, unrecorded
from tests.sealing import sql
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import Made, bits, by_train, contents, mlp, momentum, new_training
from tests.training.by_hand import by_hand as steps_by_hand
from tests.training.engine_cases import made_case
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

import everystep
from everystep.errors import DamageWarning, ExperimentError, RunError, UsageError
from everystep.experiment.specification import load
from everystep.training.from_experiment import experiment_job

AT = 20
STEPS = 40


# A fork that changes nothing.


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(("experiment", "steps"), [("wine", 50), ("digits", 26), ("two-layer", 40)])
def test_a_fork_of_an_experiment_that_changes_nothing_has_the_parents_bits(experiment, steps):
    parent = everystep.train_experiment(experiment, {"steps": steps}, progress=False)
    fork = parent.fork(AT, progress=False)
    assert_same_run(parent, fork)
    assert fork.measurements.rows() == parent.measurements.rows()


CASES_OF_FORKS = [
    "GradientDescent of two groups",
    "SGD momentum",
    "AdamW fused",
    "max_grad_norm of batches",
    "dropout in batches",
    "ReduceLROnPlateau of SGD",
    "StepLR every epoch",
    "channels_last in batches",
]


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("name", CASES_OF_FORKS)
def test_a_fork_of_a_run_from_objects_that_changes_nothing_has_the_parents_bits(name):
    made, options = made_case(name, STEPS)
    parent = by_train(made, **options)
    left = contents(made)
    assert_same_run(parent, parent.fork(AT, progress=False))
    assert contents(made) == left
    new, _ = made_case(name, STEPS)
    every = {} if new.scheduler is None else {"scheduler_every": options["scheduler_every"]}
    fork = everystep.open(parent.directory).fork(AT, **objects_of(new), **every, progress=False)
    assert_same_run(parent, fork)
    trained = contents(new)
    left["generator"] = trained["generator"] = "the caller's own"
    assert trained == left


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run that no test changes."""
    run = tmp_path_factory.mktemp("parent") / "run"
    return by_train(with_dropout(), steps=STEPS, batch_size=6, run=run)


def test_a_fork_may_begin_anywhere_and_go_on_from_the_last_step(parent):
    for at in (0, STEPS - 1):
        assert_same_run(parent, parent.fork(at, progress=False))
    shorter = by_train(with_dropout(), steps=AT, batch_size=6)
    assert_same_run(parent, shorter.fork(AT, steps=STEPS, progress=False))


# A fork that changes something, against a loop by hand.


@dataclass
class Rules:
    """By what steps are taken by hand."""

    made: Made
    batch_size: int | None = None
    seed: int = 0
    scheduler_every: str = "step"


Change = Callable[[Rules], Any]


def by_hand(rules: Rules, steps: int, changes: dict[int, Change]) -> "ByHand":
    """Take steps; `changes` are made after the steps that they are filed under."""
    losses, states = [], {0: state_of(rules.made.model)}

    def keep(step: int) -> None:
        states[step] = state_of(rules.made.model)

    for last in (*changes, steps):
        first, own = len(losses) + 1, vars(rules) | {"after_step": keep}
        losses += steps_by_hand(own.pop("made"), first=first, steps=last, **own)
        changes.get(last, lambda rules: None)(rules)
    return ByHand(losses, states)


@dataclass
class ByHand:
    losses: list[float]
    states: list[dict[str, Any]]

    def assert_is(self, run: everystep.Run, *steps: int) -> None:
        assert run.losses["loss"].to_list() == self.losses
        for step in (0, *steps, len(self.losses)):
            assert {n: bits(t) for n, t in run.parameters(step).items()} == self.states[step], step


def set_lr(lr: float, has_scheduler: bool = False) -> Change:
    """Set the learning rate; a scheduler goes on from it."""

    def change(rules: Rules) -> None:
        set_group(lr=lr)(rules)
        if has_scheduler:
            rules.made.scheduler.base_lrs = [lr]

    return change


def set_group(**settings: Any) -> Change:
    def change(rules: Rules) -> None:
        for group in rules.made.optimizer.param_groups:
            group.update(settings)

    return change


def set_rule(**values: Any) -> Change:
    return lambda rules: vars(rules).update(values)


def set_made(**makers: Callable[[Made], Any]) -> Change:
    def change(rules: Rules) -> None:
        for name, make in makers.items():
            setattr(rules.made, name, make(rules.made))

    return change


def reseed(seed: int) -> Change:
    def change(rules: Rules) -> None:
        rules.seed = seed
        torch.manual_seed(seed)

    return change


def in_turn(*changes: Change) -> Change:
    return lambda rules: [change(rules) for change in changes]


def other_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(20, 4, generator=generator), torch.randn(20, 2, generator=generator)


halving = partial(StepLR, step_size=6, gamma=0.5)
faster = partial(momentum, lr=0.1)


@pytest.mark.parametrize(
    ("changed", "change"),
    [
        ({"seed": 9}, reseed(9)),
        ({"lr": 0.1, "batch_size": 20, "steps": 30}, in_turn(set_lr(0.1), set_rule(batch_size=20))),
        (
            {"data": other_data()},
            set_made(x=lambda made: other_data()[0], y=lambda made: other_data()[1]),
        ),
    ],
    ids=["seed", "several", "data"],
)
def test_a_fork_with_its_own_objects_has_the_bits_of_a_loop_whose_rules_change(changed, change, parent):
    fork = parent.fork(AT, **changed, progress=False)
    expected = by_hand(Rules(with_dropout(), 6), changed.get("steps", STEPS), {AT: change})
    expected.assert_is(fork, 7, AT, AT + 1, AT + 5)
    assert fork.losses["loss"][:AT].equals(parent.losses["loss"][:AT])
    assert "steps" in changed or not fork.losses["loss"].equals(parent.losses["loss"])


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize(
    ("new", "change"),
    [
        (lambda: with_dropout(faster), set_lr(0.1)),
        (lambda: with_dropout(partial(torch.optim.Adam, lr=0.01)),
         set_made(optimizer=lambda made: torch.optim.Adam(made.model.parameters(), lr=0.01))),
        (lambda: with_dropout(scheduler=halving),
         set_made(scheduler=lambda made: halving(made.optimizer))),
        (lambda: with_dropout(activation=nn.ReLU),
         set_made(model=lambda made: with_activation(made.model, nn.ReLU()))),
    ],
    ids=["settings of the optimizer", "optimizer", "scheduler", "model"],
)  # fmt: skip
def test_a_fork_with_new_objects_has_the_bits_of_a_loop_whose_rules_change(new, change, parent):
    made = new()
    fork = everystep.open(parent.directory).fork(AT, **objects_of(made), progress=False)
    expected = by_hand(Rules(with_dropout(), 6), STEPS, {AT: change})
    expected.assert_is(fork, 7, AT, AT + 1, AT + 5)
    assert {n: bits(t) for n, t in made.model.state_dict().items()} == expected.states[STEPS]


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize(
    ("experiment", "settings", "change"),
    [
        ("two-layer", {"loss.name": "L1Loss"}, set_made(loss=lambda made: nn.L1Loss(reduction="sum"))),
        ("two-layer", {"optimizer.name": "Adam"}, None),
        (
            "digits",
            {"seed": 4, "batch_size": 32, "steps": 28},
            in_turn(reseed(4), set_rule(batch_size=32)),
        ),
        (
            "wine",
            {"scheduler": {"name": "StepLR", "every": "step", "step_size": 6, "gamma": 0.5}},
            in_turn(
                set_lr(0.1),
                set_made(scheduler=lambda made: StepLR(made.optimizer, 6, 0.5)),
                set_rule(scheduler_every="step"),
            ),
        ),
        ("wine", {"optimizer.lr": 0.01}, set_lr(0.01, has_scheduler=True)),
    ],
    ids=lambda given: json.dumps(given) if isinstance(given, dict) else "" if callable(given) else given,
)
def test_a_fork_of_an_experiment_has_the_bits_of_a_loop_whose_rules_change(experiment, settings, change):
    parent = everystep.train_experiment(experiment, {"steps": STEPS}, progress=False)
    fork = parent.fork(AT, settings, progress=False)
    change = change or set_made_as(experiment, settings)
    rules = rules_of(experiment, {"steps": STEPS})
    expected = by_hand(rules, settings.get("steps", STEPS), {AT: change})
    expected.assert_is(fork, 3, AT, AT + 1, AT + 7)
    assert fork.facts.fork.model_dump() == {
        "parent": parent.name,
        "directory": str(parent.directory),
        "at": AT,
        "changed": {key: value for key, value in settings.items() if not isinstance(value, dict)},
    }
    assert_complete(parent, fork)


def set_made_as(experiment: str, settings: dict[str, Any]) -> Change:
    """Put in what the changed experiment makes, on the parameters as they are."""

    def change(rules: Rules) -> None:
        new = rules_of(experiment, settings).made
        new.model.load_state_dict(rules.made.model.state_dict())
        rules.made = new

    return change


def rules_of(experiment: str, settings: dict[str, Any]) -> Rules:
    read = load(experiment, settings)
    job = experiment_job(read, torch.device("cpu"))
    training, data = job.training, job.data
    made = Made(
        training.model, data.x, data.y, training.loss, training.optimizer, scheduler=training.scheduler
    )
    return Rules(made, read.batch_size, read.seed, training.scheduler_every)


# A fork is a complete run of its own.


def test_a_fork_of_a_fork():
    parent = by_train(with_dropout(), steps=STEPS, batch_size=6)
    fork = everystep.open(parent.directory).fork(
        10, **objects_of(with_dropout()), lr=0.1, progress=False
    )
    opened = everystep.open(fork.directory)
    last = opened.fork(25, **objects_of(with_dropout(faster)), batch_size=4, progress=False)
    early = opened.fork(5, **objects_of(with_dropout()), batch_size=4, progress=False)
    changes = {10: set_lr(0.1), 25: set_rule(batch_size=4)}
    expected = by_hand(Rules(with_dropout(), 6), STEPS, changes)
    shutil.rmtree(parent.directory)
    shutil.rmtree(fork.directory)
    expected.assert_is(last, 5, 10, 11, 25, 26)
    assert [stretch.first for stretch in last.stretches] == [1, 11, 26]
    assert len(last[3].batch.x) == len(last[11].batch.x) == 6 and len(last[26].batch.x) == 4
    assert last[10].hyperparameters == {"lr": 0.02}
    assert last[11].hyperparameters == {"lr": 0.1} == last[40].hyperparameters
    assert last.verify(processes=1, progress=False).is_exact
    expected = by_hand(Rules(with_dropout(), 6), STEPS, {5: set_rule(batch_size=4)})
    expected.assert_is(early, 3, 5, 6)


def test_a_fork_of_a_fork_of_an_experiment_where_that_begins_goes_on_as_it_did():
    parent = everystep.train_experiment("two-layer", {"steps": 12}, progress=False)
    fork = parent.fork(4, {"optimizer.lr": 1e-5, "batch_size": 16, "seed": 3}, progress=False)
    same = fork.fork(4, progress=False)
    assert same.losses.equals(fork.losses)
    assert not same.diff(fork, progress=False).experiments
    assert same.verify(processes=1, progress=False).is_exact
    adam = parent.fork(4, {"optimizer.name": "Adam"}, progress=False)
    assert adam.fork(4, progress=False).losses.equals(adam.losses)


def test_what_a_fork_shares_with_its_parent_are_the_same_files():
    parent = by_train(new_training(), steps=STEPS)
    before = files_of(parent.directory)
    fork = parent.fork(AT, lr=0.1, progress=False)
    assert files_of(parent.directory) == before
    shared = [*parent.directory.glob("programs/*.json"), *parent.directory.glob("snapshots/000000/*")]
    shared += parent.directory.glob("data.safetensors")
    assert len(shared) > 3
    for path in shared:
        assert path.samefile(fork.directory / path.relative_to(parent.directory))
    assert not (parent.directory / "run.sqlite").samefile(fork.directory / "run.sqlite")


def test_where_files_cannot_be_linked_they_are_copied(monkeypatch):
    def refuse(*paths):
        raise OSError("no hard links here")

    parent = by_train(new_training(), steps=STEPS)
    monkeypatch.setattr(os, "link", refuse)
    fork = parent.fork(AT, lr=0.1, progress=False)
    data = "data.safetensors"
    assert (fork.directory / data).read_bytes() == (parent.directory / data).read_bytes()
    assert not (fork.directory / data).samefile(parent.directory / data)
    assert_complete(parent, fork)


def test_other_data_are_stored_beside_the_parents():
    parent = by_train(new_training(), steps=STEPS)
    fork = parent.fork(AT, data=other_data(), progress=False)
    assert torch.equal(fork[AT].batch.x, new_training().x)
    assert torch.equal(fork[AT + 1].batch.x, other_data()[0])
    again = fork.fork(30, **objects_of(new_training()), progress=False)
    assert torch.equal(again[31].batch.x, other_data()[0])


def test_measurements_up_to_the_fork_are_the_parents():
    made = new_training()
    options = {"validation": (made.x, made.y), "evaluate_every": 4, "metrics": {"mean": mean_of}}
    parent = by_train(made, steps=STEPS, **options)
    parent.measure("norm(gradients['0.weight'])", name="size", every=3, progress=False)
    fork = parent.fork(AT, lr=0.1, progress=False)
    rows = fork.measurements.rows()
    assert [row for row in rows if row[1] <= AT] == [
        row for row in parent.measurements.rows() if row[1] <= AT
    ]
    later = [(name, step) for name, step, _ in rows if step > AT]
    measured = ("mean", "validation_loss", "validation_r2")
    expected = [(name, step) for name in measured for step in range(24, 41, 4)]
    assert sorted(later) == sorted([*expected, ("lr", 21)])
    assert fork.measured("lr") == {21: 0.1}
    whole = by_hand(Rules(new_training()), STEPS, {AT: set_lr(0.1)})
    fresh = mlp()
    fresh.load_state_dict(fork.parameters(24))
    assert state_of(fresh) == whole.states[24]
    with torch.no_grad():
        assert fork.measured("mean")[24] == fresh(made.x).mean().item()


def mean_of(prediction, target):
    return prediction.mean()


# What a user reads.


def test_the_command_forks_and_the_lineage_shows(everystep_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    everystep.train_experiment("two-layer", {"steps": 10}, progress=False)
    options = ("--at", 6, "--set", "optimizer.lr=1e-5", "--steps", 12, "--run", "runs/slow", "-q")
    assert everystep_command("fork", "two-layer-1", *options) == (0, "", "")
    expected = by_hand(rules_of("two-layer", {}), 12, {6: set_lr(1e-5)})
    expected.assert_is(everystep.open("slow"), 6, 7)
    code, out, _ = everystep_command("runs")
    assert code == 0
    heading, own, parent = out.splitlines()
    assert heading.rstrip().endswith("fork of")
    assert own.split()[:3] == ["slow", "finished", "12"] and own.endswith("two-layer-1, step 6")
    assert parent.split()[0] == "two-layer-1" and "step" not in parent
    listed = {run["name"]: run["parent"] for run in json.loads(everystep_command("runs", "--json")[1])}
    assert listed == {"slow": ["two-layer-1", 6], "two-layer-1": None}
    assert everystep.open("slow").summary().parent == ("two-layer-1", 6)
    assert everystep_command("verify", "slow")[0] == 0
    code, out, err = everystep_command("fork", "two-layer-1", "--at", 6)
    assert (code, out) == (0, "") and "runs/two-layer-1-fork-1" in err
    assert everystep_command("diff", "two-layer-1", "two-layer-1-fork-1")[0] == 0


def test_a_command_that_cannot_fork_says_why_and_leaves_nothing(everystep_command):
    everystep.train_experiment("two-layer", {"steps": 10}, progress=False)
    for said, *options in (
        ("two-layer-1 has no step 11: it has steps 1 to 10", 11),
        ("the fork starts after step 6 but would end at step 6", 6, "--steps", 6),
        ("set more steps", 10),
        ("optimizer", 6, "--set", "optimizer.lr=fast"),
        ("did you mean optimizer?", 6, "--set", "optimiser.lr=1"),
        ("runs/two-layer-1", 6, "--run", "runs/two-layer-1"),
        ("the parent's parameters do not fit", 6, "--set", 'model.layers=["Linear(1000, 10)"]'),
    ):
        code, out, err = everystep_command("fork", "two-layer-1", "--at", *options)
        assert (code, out) == (2, "") and said in err
        assert [path.name for path in Path("runs").iterdir()] == ["two-layer-1"]


def test_what_a_run_does_not_hold_must_be_given():
    parent = everystep.open(by_train(new_training(), steps=10).directory)
    with pytest.raises(RunError, match=r"pass the objects: fork\(\.\.\., model=\.\.\."):
        parent.fork(6, batch_size=3, progress=False)
    with pytest.raises(RunError, match="pass loss and optimizer as well"):
        parent.fork(6, model=mlp(), progress=False)
    # Each of these was ignored, and the fork continued with what the run has.
    by_name = everystep.train_experiment("two-layer", {"steps": 3}, progress=False)
    for given in (
        {"loss": nn.L1Loss()},
        {"data": (torch.zeros(2, 4), torch.zeros(2, 2))},
        {"metrics": ["accuracy"]},
    ):
        for run in (parent, by_name):
            with pytest.raises(RunError, match=r"pass model and .* as well"):
                run.fork(2, **given, progress=False)
            with pytest.raises(RunError, match=r"pass model and .* as well"):
                run.resume(20, **given, progress=False)
    new = new_training(lambda: nn.Linear(4, 2))
    with pytest.raises(RunError, match="do not fit the run's state"):
        parent.fork(6, **objects_of(new), progress=False)
    with pytest.raises(ExperimentError, match="unknown key"):
        parent.fork(6, {"nonsense": 1}, **objects_of(new_training()), progress=False)


def test_a_state_that_cannot_be_reached_as_it_was_is_not_forked():
    parent = by_train(new_training(), steps=10)
    sql(parent.directory, "UPDATE steps SET loss = 1.5 WHERE step = 5")
    with pytest.raises(RunError, match=r"state 6 .* the loss of step 5 differs from the recording"):
        parent.fork(6, progress=False)
    # One digest for all these losses does not show which one is altered.
    with pytest.warns(DamageWarning, match="fork-1 is damaged: .* losses of steps 1 to 10"):
        assert parent.fork(4, progress=False).losses["loss"].len() == 10


# What the tests above share.


def with_dropout(optimizer=momentum, *, loss=None, scheduler=None, activation=nn.Tanh):
    def model():
        return nn.Sequential(nn.Linear(4, 8), activation(), nn.Dropout(0.2), nn.Linear(8, 2))

    return new_training(model, loss, optimizer, scheduler)


def with_activation(model, activation):
    model[1] = activation
    return model


def objects_of(made: Made) -> dict[str, Any]:
    names = ("model", "loss", "optimizer", "scheduler")
    return {name: getattr(made, name) for name in names if getattr(made, name) is not None}


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def assert_same_run(parent: everystep.Run, fork: everystep.Run) -> None:
    assert fork.losses.rows() == parent.losses.rows()
    last = len(parent)
    for step in (0, 7, AT, AT + 1, last):
        if step <= last:
            one, other = parent.parameters(step), fork.parameters(step)
            assert {n: bits(t) for n, t in other.items()} == {n: bits(t) for n, t in one.items()}
    found = parent.diff(fork, progress=False)
    assert found.is_same and found.common_state == last and not found.problems, found
    one, other = parent[-1], fork[-1]
    assert [each.operation for each in other.operations] == [each.operation for each in one.operations]
    gradients = ({n: bits(t) for n, t in step.gradients.items()} for step in (one, other))
    assert next(gradients) == next(gradients)


def assert_complete(parent: everystep.Run, fork: everystep.Run) -> None:
    """Assert that a fork can be taken again, bit for bit, when its parent is gone."""
    shutil.rmtree(parent.directory)
    fork = everystep.open(fork.directory)
    found = fork.verify(processes=1, progress=False)
    assert found.is_exact, found
    assert found.steps == len(fork)
    assert found.snapshots == len(fork.snapshots) - 1
    for number in (1, AT - 3, AT, AT + 1, len(fork)):
        step = fork[number]
        assert step.number == number and step.is_exact
        assert step.loss == step.recorded_loss


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_fork_begins_with_what_a_metric_has_drawn(engine):
    def options():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
        return {
            "model": model,
            "loss": nn.MSELoss(),
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
            "metrics": {"mine": lambda prediction, target: float(torch.rand(()))},
        }

    data = torch.linspace(0, 1, 48).reshape(12, 4), torch.ones(12, 2)
    given = {"evaluate_every": 5, "steps": 20, "engine": engine, "progress": False}
    parent = everystep.train(data=data, **options(), **given)
    for at in (5, 7):
        fork = everystep.open(parent.directory).fork(at, **options(), progress=False)
        assert fork.losses.equals(parent.losses)


# Forks of loops and step functions.


def tuned(record, steps=24, rate=None, at=0):
    """A loop with dropout, shuffled batches and a scheduler, which may set a rate after step `at`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, 2, gamma=0.9)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(20, 6, generator=generator), torch.randn(20, 1, generator=generator)
    batches = DataLoader(TensorDataset(*rows), batch_size=5, shuffle=True)
    with record(model=model, optimizer=optimizer, scheduler=scheduler) as recording:
        for _ in range(steps // 4):
            for x, y in recording.steps(batches):
                if rate is not None and recording.step_count >= at:
                    optimizer.param_groups[0]["lr"] = rate
                recording.log(loss=descend(optimizer, nn.functional.mse_loss(model(x), y)))
            scheduler.step()
    return recording, [value.detach() for value in model.state_dict().values()]


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("at", [0, 13, 24])
def test_a_fork_of_a_loop_that_changes_nothing_has_the_parents_bits(at, capfd):
    _, by_hand = tuned(unrecorded, 28)
    parent = tuned(partial(everystep.record, run="runs/parent"))[0].run
    recording, state = tuned(partial(everystep.record, fork="parent", at=at), 28)
    fork = recording.run
    assert fork.name == "parent-fork-1" and fork.facts.fork.at == at and len(fork) == 28
    assert fork.losses["loss"][:24].equals(parent.losses["loss"])
    assert all(map(torch.equal, state, by_hand))
    assert fork.verify(progress=False).is_exact
    assert "no loss" not in capfd.readouterr().err


@pytest.mark.parametrize("at", [0, 13])
def test_a_fork_of_a_loop_has_the_bits_of_a_loop_that_changes_there(at):
    _, by_hand = tuned(unrecorded, rate=0.1, at=at)
    parent = tuned(partial(everystep.record, run="runs/parent"))[0].run
    before = files_of(parent.directory)
    recording, state = tuned(partial(everystep.record, fork="parent", at=at), rate=0.1, at=at)
    assert all(map(torch.equal, state, by_hand))
    assert recording.run.verify(progress=False).is_exact
    assert recording.run[at + 1].gradients and files_of(parent.directory) == before


@pytest.mark.parametrize("make", [torch.Generator, random.Random, np.random.default_rng])
def test_a_fork_has_the_generators_of_its_parent_although_no_one_seeds_them(make):
    def record(**settings):
        torch.manual_seed(0)
        model, generator = nn.Linear(4, 1), make()
        if make is torch.Generator:
            generator.seed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with everystep.record(model=model, generator=generator, optimizer=optimizer, **settings) as r:
            for _ in r.steps(range(8)):
                drawn = torch.rand(1, generator=generator) if make is torch.Generator else None
                x = torch.full((2, 4), float(generator.random() if drawn is None else drawn))
                r.log(loss=descend(optimizer, model(x).square().mean()))
        return r.run

    parent = record(run="runs/parent")
    assert record(fork="parent", at=5).losses.equals(parent.losses)


def test_a_fork_of_a_loop_with_other_settings_is_refused():
    tuned(partial(everystep.record, run="runs/parent"))

    def fork(make=None, freezes=False):
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        model[0].requires_grad_(not freezes)
        optimizer = torch.optim.Adam(make(model) if make else model.parameters(), lr=0.01)
        scheduler = StepLR(optimizer, 2, gamma=0.5 if make is None and not freezes else 0.9)
        with everystep.record(
            fork="parent", at=8, model=model, optimizer=optimizer, scheduler=scheduler
        ):
            pass

    cure = (
        "pass the parts as they were then, and change what should differ once recording.step_count is 8"
    )
    with pytest.raises(RunError, match=rf"scheduler\.gamma: other settings .*{cure}"):
        fork()
    with pytest.raises(RunError, match=rf"optimizer\.param_groups\.params: other settings .*{cure}"):
        fork(lambda model: model[2].parameters())
    with pytest.raises(RunError, match=f"which parameters are trained: other settings .*{cure}"):
        fork(freezes=True)
    with pytest.raises(RunError, match="the loop ends after step 0, before the fork at step 8"):
        tuned(partial(everystep.record, fork="parent", at=8), steps=0)
    with pytest.raises(UsageError, match="a fork needs a run and a step"):
        everystep.record(fork="parent", at=-1, model=nn.Linear(1, 1))
    with pytest.raises(UsageError, match="parent exists, and is not the fork of parent at step 8"):
        everystep.record(run="runs/parent", resume=True, fork="parent", at=8, model=nn.Linear(1, 1))
    assert [path.name for path in Path("runs").iterdir()] == ["parent"]


def test_a_loop_that_marks_its_steps_makes_forks_of_its_beginning_alone():
    def record(**settings):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with everystep.record(model=model, optimizer=optimizer, **settings) as recording:
            while recording.step_count < 6:
                with recording.step():
                    recording.log(loss=descend(optimizer, model(torch.ones(2, 4)).square().mean()))
                optimizer.param_groups[0]["lr"] *= 0.5
        return recording.run

    parent = record(run="runs/parent")
    fork = record(fork="parent", at=0)
    assert fork.losses.equals(parent.losses) and fork.verify(progress=False).is_exact
    with pytest.raises(RunError, match=r"marks its steps .* at step 0, with the change once .* is 3"):
        record(fork="parent", at=3)


def test_objects_with_other_settings_are_those_of_the_fork():
    def train(weight, gamma, **settings):
        torch.manual_seed(0)
        model = mlp()
        optimizer = momentum(model.parameters(), **settings)
        objects = {
            "model": model,
            "optimizer": optimizer,
            "loss": nn.CrossEntropyLoss(torch.tensor(weight)),
        }
        return objects | {"scheduler": StepLR(optimizer, 1, gamma=gamma)}

    data = torch.randn(8, 4), torch.tensor([0, 1] * 4)
    settings = {"steps": 6, "progress": False}
    made = train([1.0, 1.0], 0.5)
    parent = everystep.train(made.pop("model"), data, **made, **settings)
    same = parent.fork(3, **train([1.0, 1.0], 0.5), progress=False)
    assert same.losses.equals(parent.losses) and same.measured("lr") == parent.measured("lr")
    other = parent.fork(3, **train([1.0, 5.0], 0.1), progress=False)
    assert other.losses["loss"][3] != parent.losses["loss"][3]
    rates = other.measured("lr")
    assert rates[5] == pytest.approx(0.1 * rates[4]) and other.verify(progress=False).is_exact
    # Where the scheduler is the parent's, it continues from another rate.
    for settings in ({"lr": 0.5}, {"momentum": 0.1}):
        other = parent.fork(3, **train([1.0, 1.0], 0.5, **settings), progress=False)
        assert other.losses["loss"][4] != parent.losses["loss"][4]
        assert other.measured("lr")[4] == settings.get("lr", parent.measured("lr")[4])
        assert other.verify(progress=False).is_exact


def slower(count):
    return 1 - 0.1 * count


def warmed_up(optimizer, last=StepLR):
    options = {"step_size": 2, "gamma": 0.5} if last is StepLR else {"lr_lambda": slower}
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.5, 1.0, 3), last(optimizer, **options)], [3])


def scheduled(schedule):
    """A run with rates that follow a schedule."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = momentum(model.parameters())
    options = {"loss": nn.MSELoss(), "optimizer": optimizer, "scheduler": schedule(optimizer)}
    data = torch.randn(8, 4), torch.randn(8, 2)
    return everystep.train(model, data, **options, steps=10, progress=False)


# torch knows the copies of schedulers in a scheduler by no step of the copied optimizer.
@pytest.mark.filterwarnings("ignore:Seems like:UserWarning")
@pytest.mark.parametrize("last", [StepLR, LambdaLR])
def test_all_schedulers_within_one_continue_from_a_different_rate(last):
    parent = scheduled(partial(warmed_up, last=last))
    fork = parent.fork(2, lr=0.001, progress=False)
    # The second scheduler begins at step 4 with the rate, not with that of the parent.
    for step in range(4, 11):
        before, after = (run[step].hyperparameters["lr"] for run in (parent, fork))
        assert after == pytest.approx(before * 0.001 / 0.02), step


def test_a_different_rate_after_a_warm_up_is_the_rate_of_the_next_step():
    warm_up = {"name": "LinearLR", "start_factor": 0.1, "total_iters": 3}
    settings = {"scheduler": warm_up, "steps": 8, "optimizer.lr": 1e-5}
    parent = everystep.train_experiment("two-layer", settings, progress=False)
    fork = parent.fork(5, lr=1e-6, progress=False)
    assert [step.hyperparameters["lr"] for step in fork[6:]] == [1e-6] * 3


@pytest.mark.parametrize(
    "schedule",
    [
        partial(OneCycleLR, max_lr=0.1, total_steps=12, cycle_momentum=False),
        lambda optimizer: ChainedScheduler([CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False)]),
    ],
)
def test_a_different_rate_that_a_scheduler_would_end_is_refused(schedule):
    parent = scheduled(schedule)
    with pytest.raises(RunError, match=r"LR has rates of its own, .* change its max_lr instead"):
        parent.fork(2, lr=0.001, progress=False)
    assert not Path("runs/sequential-1-fork-1").exists()


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("name", "setting"), [("Adam", "amsgrad"), ("RMSprop", "centered"), ("RMSprop", "momentum")]
)
def test_what_an_optimizer_keeps_from_its_first_step_on_is_not_turned_on_later(name, setting):
    changes = {"optimizer.name": name, "steps": 6}
    run = everystep.train_experiment("two-layer", changes, progress=False)
    turned_on = {f"optimizer.{setting}": 0.5 if setting == "momentum" else True}
    with pytest.raises(ExperimentError, match=f"optimizer.{setting}: cannot be turned on.*at step 0"):
        run.fork(3, turned_on, progress=False)
    assert len(run.fork(0, turned_on, progress=False)) == 6


def test_a_fork_with_an_optimizer_of_fewer_parameters_is_refused():
    model = mlp()
    optimizer = momentum(model.parameters())
    data = torch.randn(8, 4), torch.randn(8, 2)
    settings = {"loss": nn.functional.mse_loss, "steps": 6, "progress": False}
    parent = everystep.train(model, data, optimizer=optimizer, **settings)
    other = mlp()
    with pytest.raises(RunError, match="different param groups"):
        parent.fork(3, model=other, loss=nn.MSELoss(), optimizer=momentum(other[2].parameters()))
    fork = parent.fork(3, model=other, loss=nn.L1Loss(), optimizer=momentum(other.parameters()))
    assert len(fork) == 6 and fork.verify(progress=False).is_exact


def test_a_fork_of_a_loop_that_differs_too_early_is_refused_and_leaves_nothing():
    tuned(partial(everystep.record, run="runs/parent"))
    with pytest.raises(RunError, match=r"parent cannot be forked at step 13: .*step_count is 13"):
        tuned(partial(everystep.record, fork="parent", at=13), rate=0.1)
    with pytest.raises(RunError, match=r"parent cannot be forked at step 13: .*step_count is 13"):
        tuned(partial(everystep.record, fork="parent", at=13, force=True), rate=0.1)
    with pytest.raises(RunError, match="parent has no step 25"):
        tuned(partial(everystep.record, fork="parent", at=25))
    with pytest.raises(UsageError, match="a fork needs a run and a step"):
        everystep.record(fork="parent", model=nn.Linear(1, 1))
    with pytest.raises(RunError, match=r"recorded from your own code.*record\(fork='runs/parent', at=7"):
        everystep.open("parent").fork(7)
    with (
        pytest.raises(RunError, match="recorded with the parts model, optimizer, scheduler, not model"),
        everystep.record(fork="parent", at=13, model=nn.Linear(6, 1)),
    ):
        pass
    assert [path.name for path in Path("runs").iterdir()] == ["parent"]


def test_a_fork_of_a_loop_that_lacks_what_its_loss_does_not_show_is_refused(monkeypatch):
    take_snapshots_every(monkeypatch, 4)

    def record(**settings):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        average, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
        steps = 0  # in no part
        with everystep.record(model=model, average=average, optimizer=optimizer, **settings) as r:
            for x in r.steps(torch.ones(20, 2, 4)):
                steps += 1
                r.log(loss=descend(optimizer, model(x).square().mean()))
                with torch.no_grad():
                    average.weight.lerp_(model.weight, 1 / (1 + steps))
        return r.run

    record(run="runs/parent")
    with pytest.raises(RunError, match=r"parent cannot be forked at step 14: .*average\.weight"):
        record(fork="parent", at=14)


@pytest.mark.parametrize("engine", ["auto", "program"])
def test_a_fork_of_a_step_function_has_the_parents_bits(engine):
    def train(steps, **settings):
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        rows = torch.randn(20, 4), torch.randn(20, 2)
        batches = DataLoader(TensorDataset(*rows), batch_size=5, shuffle=True)

        def step(batch):
            x, y = batch
            return descend(optimizer, nn.functional.mse_loss(model(x), y))

        parts = {"model": model, "optimizer": optimizer}
        settings = {"parts": parts, "engine": engine, "progress": False} | settings
        return everystep.train(step, batches, steps=steps, **settings)

    whole, parent = train(30), train(20, run="runs/parent")
    fork = train(30, fork="parent", at=11)
    assert fork.losses.equals(whole.losses) and fork.facts.fork.parent == parent.name
    assert fork.verify(progress=False).is_exact
