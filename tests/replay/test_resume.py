"""A killed training continues to the bits of an uninterrupted one, for all ways to train."""

import enum
import errno
import inspect
import itertools
import json
import math
import re
import shutil
from collections import Counter, defaultdict, deque
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Final, NamedTuple

import numpy as np
import pytest
import torch
from pytorch_optimizer import Prodigy
from safetensors import safe_open
from safetensors.torch import save_file
from tests.descent import descend, seeded, unrecorded
from tests.sealing import seal, seal_files, sql
from tests.snapshots import take_snapshots_every
from tests.training import step_functions
from tests.training.by_hand import by_train, contents, new_training
from tests.training.engine_cases import made_case
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

import everystep
from everystep.errors import RunError, UsageError
from everystep.recording import recorder
from everystep.recording.recorder import Recorder
from everystep.recording.snapshots import SnapshotPlan
from everystep.training import loop
from everystep.training.loop_writer import LoopWriter
from everystep.views.progress import Silent

STEPS = 30


class Killed(BaseException):
    """What stands for the end of the process."""


@pytest.fixture
def dying(monkeypatch):
    """Let a training end at once as `Killed` is raised: nothing that is not on disk gets there."""

    def end(recorder):
        recorder._queue.put(None)
        recorder._thread.join()
        recorder._closing.close()

    def put(recorder, job):  # a step is on disk before the next one
        try:
            if recorder._error is None:
                job()
        except BaseException as error:
            recorder._error = error

    def finish(writer, status, reason):
        end(writer.recorder) if Dying.is_dead else finished(writer, status, reason)

    def finish_failed(writer, error):
        end(writer.recorder) if isinstance(error, Killed) else failed(writer, error)

    failed, finished = loop._ModelWriter.close_failed, LoopWriter.finish
    monkeypatch.setattr(loop._ModelWriter, "close_failed", finish_failed)
    monkeypatch.setattr(LoopWriter, "finish", finish)
    monkeypatch.setattr("everystep.training.writer.STRETCH_SECONDS", 0.0)
    monkeypatch.setattr("everystep.training.writer.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(Recorder, "_put", put)
    take_snapshots_every(monkeypatch, 2)
    Dying.is_dead = False
    return Dying


class Dying(Silent):
    """Watches a training until a step, and kills it there."""

    is_dead = False

    def __init__(self, step):
        self._step = step

    def advance(self, first_step, losses):
        if first_step + len(losses) > self._step:
            raise Killed


def assert_same_run(one, other):
    assert other.losses.equals(one.losses)
    assert sorted(other.measurements.rows()) == sorted(one.measurements.rows())
    last = len(one)
    pair = [run.state_near(last, after=last - 1) for run in (one, other)]
    assert pair[0].named().keys() == pair[1].named().keys()
    for name, tensor in pair[0].named().items():
        assert torch.equal(tensor.nan_to_num(7), pair[1].named()[name].nan_to_num(7)), name
    assert other.facts.status == "finished"
    assert everystep.open(other.directory).verify(progress=False).is_exact


# Experiments.

OWN = {
    "steps": STEPS,
    "batch_size": 9,
    "max_grad_norm": 1.0,
    "data": {"source": "random", "N": 40, "D_in": 6, "D_out": 3, "validation": 0.2},
    "model": {"layers": ["Linear(6, 8)", "BatchNorm1d(8)", "ReLU()", "Dropout(0.2)", "Linear(8, 3)"]},
    "loss": {"name": "MSELoss"},
    "optimizer": {"name": "Adam", "lr": 1e-2},
    "scheduler": {"name": "ReduceLROnPlateau", "patience": 0},
}


def killed_experiment(dying, experiment, settings, deaths):
    for death in deaths:
        with pytest.raises(Killed):
            everystep.train_experiment(
                experiment, settings, run="runs/killed", resume=True, progress=dying(death)
            )
    return everystep.open("runs/killed")


@pytest.mark.parametrize(
    ("experiment", "settings", "deaths"), [("digits", {"steps": 26}, (24,)), (OWN, {}, (2, 22))]
)
def test_an_experiment_that_was_killed_ends_in_the_bits_of_one_that_was_not(
    experiment, settings, deaths, dying
):
    whole = everystep.train_experiment(experiment, settings, progress=False)
    killed = killed_experiment(dying, experiment, settings, deaths)
    assert killed.status == "killed" and 0 < len(killed) < len(whole)
    resumed = everystep.open(killed.directory).resume(progress=False)
    assert_same_run(whole, resumed)
    assert len(resumed.facts.resumed) == len(deaths)
    assert everystep.open("runs/killed")[len(whole)].is_exact


def test_a_finished_run_is_trained_further(everystep_command):
    everystep_command("train", "two-layer", "--steps", "30", "--run", "runs/a", "-q")
    assert everystep_command("resume", "a", "--steps", "50", "-q")[0] == 0
    whole = everystep.train_experiment("two-layer", {"steps": 50}, progress=False)
    assert everystep.open("a").losses.equals(whole.losses)
    assert everystep.open("a").facts.steps == 50
    code, _, said = everystep_command("resume", "a")
    assert code == 2 and "a is finished: it has all its 50 steps" in said
    code, _, said = everystep_command("resume", "a", "--steps", "20")
    assert code == 2 and "everystep fork a --at 20" in said


def test_train_with_resume_begins_a_run_goes_on_with_it_and_leaves_a_finished_one(
    dying, everystep_command
):
    killed_experiment(dying, "two-layer", {"steps": 20}, (12,))
    command = ("train", "two-layer", "--steps", "20", "--run", "runs/killed", "--resume", "-q")
    assert everystep_command(*command)[0] == 0
    run = everystep.open("killed")
    assert len(run) == 20 and run.facts.status == "finished"
    assert everystep_command(*command)[0] == 0
    code, _, said = everystep_command(*command, "--set", "optimizer.lr=1e-3")
    assert code == 2
    assert "optimizer.lr: 0.0001 | 0.001" in said and "fork" in said
    assert "needs the run: --run NAME" in everystep_command("train", "--resume")[2]


def test_a_killed_run_says_so_and_how_to_go_on(dying, everystep_command):
    run = killed_experiment(dying, "two-layer", {"steps": 20}, (12,))
    words = rf"killed after step {len(run)} of 20, 20\d\d-"
    _, _, said = everystep_command("runs")
    assert re.search(words, said) and "resume with everystep resume killed" in said
    report = run.report()
    assert re.search(words, report) and "everystep resume killed" in report
    assert "everystep resume killed" in run._repr_html_()


def test_steps_that_are_taken_again_must_give_the_recorded_losses(dying):
    run = killed_experiment(dying, "two-layer", {"steps": 20}, (12,))
    snapshots = [row for row in run.snapshot_rows() if row.step >= len(run) - 2]
    for row in snapshots:
        shutil.rmtree(run.directory / row.directory)
    sql(run.directory, f"UPDATE steps SET loss = loss + 1 WHERE step = {len(run)}")
    seal(run.directory)
    count = len(run)
    with pytest.raises(RunError, match=rf"when step {count} is repeated, the loss is"):
        everystep.open(run.directory).resume(progress=False)
    assert everystep.open(run.directory).facts.status == "running"  # as it was
    assert len(everystep.open(run.directory)) == count
    accepted = everystep.open(run.directory).resume(force=True, progress=False)
    whole = everystep.train_experiment("two-layer", {"steps": 20}, progress=False)
    assert accepted.losses.equals(whole.losses)


def test_a_snapshot_that_cannot_be_read_is_left_out_and_removed(dying):
    run = killed_experiment(dying, "two-layer", {"steps": 20}, (12,))
    newest = run.snapshot_rows()[-1]
    file = run.directory / newest.directory / "parameters.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    resumed = everystep.open(run.directory).resume(progress=False)
    whole = everystep.train_experiment("two-layer", {"steps": 20}, progress=False)
    assert_same_run(whole, resumed)
    assert len(resumed.verify(progress=False).problems) == 0


def test_a_run_that_is_being_trained_names_its_process(dying, everystep_command):
    run = killed_experiment(dying, "two-layer", {"steps": 20}, (12,))
    recorder = Recorder(run.directory, run.facts, 10**9, at=0, is_resumed=True)
    try:
        code, _, said = everystep_command("resume", "killed")
        assert code == 2
        assert re.search(r"is being written .*: process \d+ on \S+, since 20", said)
    finally:
        recorder.finish({})


# Python objects.

CASES_OF_OBJECTS = [
    *("GradientDescent of two groups", "SGD momentum", "AdamW fused", "max_grad_norm of batches"),
    *("dropout in batches", "ReduceLROnPlateau of SGD", "StepLR every epoch", "x transposed"),
]


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("name", CASES_OF_OBJECTS)
def test_a_run_from_objects_that_was_killed_ends_in_the_bits_of_one_that_was_not(name, dying):
    made, options = made_case(name, STEPS)
    whole = by_train(made, **options)
    for death in (7, 22):
        again, _ = made_case(name, STEPS)
        with pytest.raises(Killed):
            by_train(again, **options, run="runs/killed", resume=True, progress=dying(death))
    new, _ = made_case(name, STEPS)
    resumed = by_train(new, **options, run="runs/killed", resume=True)
    assert_same_run(whole, resumed)
    left, trained = contents(made), contents(new)
    left["generator"] = trained["generator"] = "the caller's own"
    assert trained == left


def diverging():
    made = new_training(optimizer=lambda p: torch.optim.SGD(p, lr=1e7))
    return {
        "model": made.model,
        "loss": made.loss,
        "optimizer": made.optimizer,
        "data": (made.x, made.y),
    }


@pytest.mark.parametrize("goes_on", ["its own objects", "new ones", "its programs alone"])
def test_a_resumed_or_forked_run_from_objects_stops_at_nan_if_it_was_asked_to(goes_on):
    options = {"steps": 2, "stop_on_nan": True, "progress": False}
    begun = everystep.train(**diverging(), **options)
    given = diverging() if goes_on == "new ones" else {}
    run = begun if goes_on == "its own objects" else everystep.open(begun.directory)
    fork = run.fork(2, steps=30, **given, progress=False)
    given = diverging() if goes_on == "new ones" else {}
    for each in (fork, run.resume(30, **given, progress=False)):
        *finite, last = each.losses["loss"].to_list()
        assert all(map(math.isfinite, finite)) and not math.isfinite(last)
        assert (each.status, each.facts.reason) == (
            "stopped",
            f"the loss is {last} at step {len(each)} (stop_on_nan)",
        )


def with_metric():
    made = new_training()
    made.metrics = {"mean": lambda prediction, target: prediction.mean()}
    return made


def test_metrics_without_a_validation_part_are_measured_at_the_same_steps():
    whole = by_train(with_metric(), steps=STEPS, evaluate_every=5)
    begun = by_train(with_metric(), steps=STEPS // 2, evaluate_every=5)
    resumed = begun.resume(STEPS, progress=False)
    assert list(resumed.measured("mean")) == list(range(5, STEPS + 1, 5))
    assert_same_run(whole, resumed)


def test_a_resumed_run_may_have_other_metrics():
    begun = by_train(with_metric(), steps=10, evaluate_every=5)
    new = new_training()
    objects = {"model": new.model, "loss": new.loss, "optimizer": new.optimizer}
    without = everystep.open(begun.directory).resume(20, **objects, progress=False)
    assert list(without.measured("mean")) == [5, 10]
    assert without.facts.training.evaluate_every is None
    more = without.resume(STEPS, metrics={"largest": lambda p, t: p.max()}, progress=False)
    assert len(more.measured("largest")) == STEPS - 20


ROWS = torch.linspace(-1, 1, 40).reshape(8, 5), torch.linspace(0, 1, 8).reshape(8, 1)


def train_linear(steps, **validation):
    torch.manual_seed(3)
    model, loss = torch.nn.Linear(5, 1), torch.nn.MSELoss()
    objects = {"model": model, "loss": loss, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    training = {"data": ROWS, "steps": steps, "evaluate_every": 2, "progress": False}
    return everystep.train(**objects, **training, **validation), objects


@pytest.mark.parametrize(("same", "other"), [(0.25, 0.5), (ROWS, (ROWS[0] + 1, ROWS[1]))])
def test_a_run_is_resumed_with_its_own_validation_rows_or_not_at_all(same, other):
    whole, _ = train_linear(8, validation=same)
    begun, _ = train_linear(4, validation=same)
    _, objects = train_linear(1)
    with pytest.raises(RunError, match=r"not what .* was trained with|not the data that the run"):
        begun.resume(8, **objects, validation=other, progress=False)
    assert len(begun) == 4
    _, objects = train_linear(1)
    resumed = everystep.open(begun.directory).resume(8, **objects, validation=same, progress=False)
    assert_same_run(whole, resumed)


def test_other_objects_are_named_before_anything_runs(dying):
    made, options = made_case("Adam", STEPS)
    with pytest.raises(Killed):
        by_train(made, **options, run="runs/killed", progress=dying(20))
    other, _ = made_case("Adam", STEPS)
    for group in other.optimizer.param_groups:
        group["lr"] = 0.5
    run = everystep.open("runs/killed")
    objects = {"model": other.model, "loss": other.loss, "optimizer": other.optimizer}
    count = len(run)
    for force in (False, True):  # the state restores the rate, which the run must not call changed
        with pytest.raises(RunError, match=r"optimizer Adam.lr: 0.0\d+ \| 0.5"):
            run.resume(**objects, force=force, progress=False)
    same, _ = made_case("Adam", STEPS)
    objects = {"model": same.model, "loss": torch.nn.L1Loss(), "optimizer": same.optimizer}
    with pytest.raises(RunError, match=r"loss: .* \| L1Loss\(\)") as raised:
        run.resume(**objects, progress=False)
    assert "--force" in str(raised.value)
    resumed = run.resume(**objects, force=True, progress=False)
    assert len(resumed) == STEPS
    (fact,) = resumed.facts.resumed
    assert fact.at <= count and any(each.startswith("loss") for each in fact.changed)
    assert "changed: loss" in resumed.report()


# Loops.


class Mortal:
    """A recording that kills its loop as it logs in a step."""

    def __init__(self, recording, death):
        self._recording, self._death = recording, death

    def __enter__(self):
        self._recording.__enter__()
        self._count = self._recording.step_count
        return self

    def __exit__(self, *error):
        return self._recording.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._recording, name)

    def log(self, **values):
        self._recording.log(**values)
        self._count += 1
        if self._count == self._death:
            Dying.is_dead = True
            raise Killed


def by_loop(body, deaths, place="runs/killed"):
    """Run a loop, killed at some steps and resumed each time; return what it returns."""
    for death in (*deaths, None):
        seeded()
        Dying.is_dead = False

        def record(death=death, **parts):
            return Mortal(everystep.record(run=place, resume=True, **parts), death)

        if death is None:
            return body(record)
        with pytest.raises(Killed):
            body(record)
    raise AssertionError


def assert_resumes(body, *deaths):
    """A loop that was killed at some steps ends with the tensors of a whole one, by the same steps."""
    seeded()
    whole = body(lambda **parts: everystep.record(run="runs/whole", **parts))
    resumed = by_loop(body, deaths)
    assert len(whole) == len(resumed) and all(map(torch.equal, whole, resumed))
    assert_same_run(everystep.open("whole"), everystep.open("killed"))


def resumes(*deaths):
    """Make a test of a loop, which is killed at some steps."""

    def test_of(body):
        return lambda dying: assert_resumes(body, *deaths)

    return test_of


def descending(record, optimizer, loss_of, after=lambda: None, /, **parts):
    """A loop over single rows; loss_of: makes a loss of x and y; after: is called after each step."""
    with record(**parts) as recording:
        for x, y in recording.steps(DataLoader(tensors(), batch_size=1)):
            recording.log(loss=descend(optimizer, loss_of(x, y)))
            after()


class Noisy(Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, row):
        return torch.full((6,), row / 23) + 0.1 * torch.randn(6), torch.tensor([row / 23])


def by_epochs(record, *, dataset, epochs=3, workers=0, wrap=None, loader=DataLoader):
    """A loop of epochs with something after each: its batches draw from torch's generator, or do not."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    batches = loader(dataset, batch_size=5, shuffle=True, num_workers=workers)
    with record(model=model, optimizer=optimizer, scheduler=scheduler) as recording:
        for _ in range(epochs):
            for batch in wrap(recording, batches) if wrap else recording.steps(batches):
                number, (x, y) = batch if wrap else (0, batch)
                recording.log(
                    loss=descend(
                        optimizer,
                        (functional.l1_loss if number % 2 else functional.mse_loss)(model(x), y),
                    )
                )
            scheduler.step()
    return [value.detach() for value in model.state_dict().values()]


def tensors():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(23, 6, generator=generator), torch.randn(23, 1, generator=generator)
    )


def counted_within(recording, batches):
    return recording.steps(enumerate(batches))


def counted_around(recording, batches):
    return shown(enumerate(recording.steps(batches), 1))


def counted_from_the_place(recording, batches):
    return enumerate(recording.steps(batches), recording.step_count % 5)


def shown(items):
    """As a progress bar does."""
    yield from items


def of_its_own_generator(dataset, **options):
    return DataLoader(dataset, generator=torch.Generator().manual_seed(5), **options)


def weighted(dataset, *, shuffle, **options):
    return DataLoader(dataset, sampler=WeightedRandomSampler(torch.arange(23.0), 23), **options)


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        *[(tensors, {}), (Noisy, {}), (Noisy, {"workers": 1}), (Noisy, {"wrap": counted_within})],
        *[(tensors, {"wrap": counted_around}), (tensors, {"wrap": counted_from_the_place})],
        *[(tensors, {"loader": each}) for each in (of_its_own_generator, weighted)],
    ],
    ids=[
        *("quiet", "augmented", "by a worker", "counted within", "counted around", "from the place"),
        *("of its own generator", "weighted"),
    ],
)
def test_a_loop_goes_on_in_the_middle_of_an_epoch(make, options, dying):
    assert_resumes(partial(by_epochs, dataset=make(), **options), 3, 13)


class Drawing(Noisy):
    """Draws from a generator of its own, which is deep in it."""

    def __init__(self):
        self.transforms = [math.sin, SimpleNamespace(chance=np.random.default_rng(3))]

    def __getitem__(self, row):
        x, y = torch.full((6,), row / 23), torch.tensor([row / 23])
        return x + self.transforms[1].chance.random(), y


class DrawingInTurn(IterableDataset):
    """Counts its epochs, and draws their rows from a generator of its own."""

    def __init__(self):
        self.chance, self.epochs = np.random.default_rng(3), torch.zeros(6)

    def __iter__(self):
        self.epochs += 1
        for row in self.chance.permutation(23):
            yield self.epochs + row / 23, torch.tensor([float(row)]) / 23


class Shuffling:
    """Samples batches in the order of a list, which it shuffles in each epoch."""

    def __init__(self):
        self.rows, self.chance = [*range(23)], Random(5)

    def __iter__(self):
        self.chance.shuffle(self.rows)
        return (self.rows[first : first + 5] for first in range(0, 23, 5))


class OwnLoader:
    """A loader without torch's."""

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        for rows in torch.full((23, 6), self.epoch / 10).split(5):
            yield rows, rows[:, :1]


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize(
    "make",
    [
        OwnLoader,
        lambda: DataLoader(Drawing(), batch_size=5, shuffle=True),
        lambda: DataLoader(Subset(Drawing(), [*range(9)]), batch_size=2),
        lambda: DataLoader(tensors(), batch_sampler=Shuffling()),
        lambda: DataLoader(tensors(), batch_sampler=Shuffling(), num_workers=1, persistent_workers=True),
        lambda: DataLoader(DrawingInTurn(), batch_size=5),
    ],
    ids=["loader", "dataset", "subset", "batches", "workers", "iterable"],
)
def test_what_samplers_and_data_sets_carry_goes_on(make, dying, capsys):
    """Deaths in two epochs, the last one at the end of an epoch of some loaders."""

    def body(record):
        model, loader = nn.Linear(6, 1), make()
        _sampler, _data = (getattr(loader, name, None) for name in ("batch_sampler", "dataset"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with record(model=model, optimizer=optimizer) as recording:
            for epoch in recording.epochs(4):
                for x, y in recording.steps(loader):
                    recording.log(loss=descend(optimizer, functional.mse_loss(model(x), y)))
                recording.log(epoch=epoch)
        return [*model.parameters()]

    assert_resumes(body, 8, 15)
    named = capsys.readouterr().err
    assert not any(f"{name}." in named for name in ("loader", "_sampler", "_data"))


def alternating(*loaders):
    return lambda epoch: loaders[epoch % len(loaders)]


def made_anew(generator):
    def loader(epoch):
        data = Subset(tensors(), range(epoch, 20))
        return DataLoader(data, batch_size=5, shuffle=True, generator=generator)

    return loader


def in_turns(*seeds, kind=DataLoader):
    """Loaders with generators of their own; kind: of the first."""
    kinds = [kind, *[DataLoader] * (len(seeds) - 1)]
    return alternating(
        *(
            each(tensors(), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(seed))
            for each, seed in zip(kinds, seeds, strict=True)
        )
    )


def by_turns(record, make, is_changed_between=False):
    """A loop with a loader for each epoch; something may follow an epoch."""
    model, loader = nn.Linear(6, 1), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model=model, optimizer=optimizer) as recording:
        for epoch in recording.epochs(6):
            for x, y in recording.steps(loader(epoch)):
                recording.log(loss=descend(optimizer, functional.mse_loss(model(x), y)))
            if is_changed_between and epoch < 5:
                with torch.no_grad():
                    model.bias.mul_(0.5)
    return [*model.parameters()]


@pytest.mark.sweep(every=6)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize(
    "make",
    [
        lambda: made_anew(torch.Generator().manual_seed(3)),
        lambda: in_turns(3, 5),
        lambda: in_turns(3, kind=StatefulDataLoader),
        lambda: in_turns(3, 5, kind=StatefulDataLoader),
        lambda: alternating(DataLoader(tensors(), batch_sampler=Shuffling()), OwnLoader()),
    ],
    ids=["new ones", "two", "a state", "one of two with a state", "by attributes"],
)
@pytest.mark.parametrize("is_changed_between", [True, False])
def test_each_epoch_has_a_loader_of_its_own(make, is_changed_between, dying):
    """Deaths in an epoch of each loader, the last one twice in the same epoch."""
    assert_resumes(partial(by_turns, make=make, is_changed_between=is_changed_between), 5, 8, 13, 14, 17)


def test_loaders_that_are_alike_at_first(dying):
    assert_resumes(partial(by_turns, make=partial(in_turns, 3, 3)), 5, 8, 13, 14, 17)
    # In the fifth epoch, the first of three has drawn two, and the third one.
    with pytest.raises(RunError, match=r"alike at first.*different seeds"):
        by_loop(partial(by_turns, make=partial(in_turns, 3, 3, 3)), [18, 20], "runs/three")


def test_a_loader_in_another_order_is_refused_in_the_middle_of_an_epoch(dying):
    with pytest.raises(Killed):
        by_turns(lambda **parts: Mortal(everystep.record(run="./run", **parts), 7), partial(in_turns, 3))
    for seed in (4, 3):
        refused = pytest.raises(RunError, match=r"the batch of step \d is not the recorded one")
        with refused if seed == 4 else nullcontext():
            by_turns(
                lambda **parts: everystep.record(run="./run", resume=True, **parts),
                partial(in_turns, seed),
            )


@resumes(10)
def test_what_a_loop_remembers_goes_on(record):
    """What an LSTM remembers of the window before, which nothing does at the first of an epoch."""
    model = nn.LSTM(1, 3, num_layers=2, dropout=0.2, batch_first=True)
    optimizer, carried = torch.optim.Adam(model.parameters()), {"memory": None}
    series = torch.sin(torch.arange(60.0)).view(1, 60, 1)
    with record(model=model, optimizer=optimizer, carried=carried) as recording:
        for _ in recording.epochs(3):
            carried["memory"] = None
            for window in recording.steps(series[:, start : start + 10] for start in range(0, 60, 10)):
                memory = carried["memory"] and tuple(each.detach() for each in carried["memory"])
                found, carried["memory"] = model(window, memory)
                recording.log(loss=descend(optimizer, (found - window).square().mean()))
    return [*model.parameters(), *carried["memory"]]


def in_no_place(place):
    def change(about):
        about["shared"], about["buffers"] = {"part/a": place}, place

    return change


def of_a_fraction(node):
    def change(about):
        about["held"]["c"]["object"]["dict"][0][1] = node

    return change


@pytest.mark.parametrize(
    "change",
    [
        *map(in_no_place, [5, ["part/b", 0, [-1]], ["part/b", 2, [1]], ["part/b", 10**9, [1]]]),
        *map(of_a_fraction, [{"fraction": [1, 0]}, {"duration": [10**12, 0, 0]}, {"decimal": ["a"]}]),
    ],
)
def test_a_state_that_everystep_did_not_write_is_refused(change, tmp_path):
    def begun(**options):
        parts = {"model": nn.Linear(1, 1), "a": torch.zeros(2), "b": torch.zeros(4)}
        parts["c"] = {"share": Fraction(1, 2)}
        return everystep.record(run=tmp_path / "run", **parts, **options)

    with begun() as recording:
        for _ in recording.steps(range(3)):
            recording.log(loss=0.0)
    for file in tmp_path.glob("run/snapshots/*/rest.safetensors"):
        with safe_open(file, "pt") as known:
            about = json.loads(known.metadata()["everystep"])
            tensors = {name: known.get_tensor(name).clone() for name in known.keys()}  # noqa: SIM118
        change(about)
        save_file(tensors, file, {"everystep": json.dumps(about)})
    seal_files(tmp_path / "run")
    with pytest.raises(RunError, match=r"fit the snapshot|views of the same memory"):
        begun(resume=True).__enter__()


@resumes(13)
def test_schedulers_that_share_their_last_rate_go_on(record):
    """The last rate of all is the list of the scheduler in turn."""
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm, late = lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 3)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warm, late], [3])
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def loss_of(x, y):
        return functional.mse_loss(model(x), y)

    descending(record, optimizer, loss_of, scheduler.step, **parts)
    return [*model.parameters(), torch.tensor(scheduler.get_last_lr())]


@resumes(3, 5)
def test_random_generators_of_every_kind_are_parts(record):
    x, model = torch.linspace(-1, 1, 12).reshape(12, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numbers = {
        "pcg": np.random.default_rng(3),
        "twister": np.random.RandomState(3),
        "philox": np.random.Generator(np.random.Philox(3)),
        "pythons": Random(3),
    }
    generator = torch.Generator().manual_seed(3)
    with record(model=model, generator=generator, **numbers) as recording:
        for _ in recording.steps(range(6)):
            rows = [int(12 * each.random()) for each in numbers.values()]
            rows += torch.randperm(12, generator=generator)[:2].tolist()
            recording.log(loss=descend(optimizer, functional.mse_loss(model(x[rows]), x[rows])))
    return [value.detach() for value in model.state_dict().values()]


def test_the_gradient_of_a_tensor_is_part_of_the_state(dying, capsys):
    """As in a first tutorial: no modules, and gradients that are zeroed in place, or not at all."""
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))

    def body(record):
        weight, others = torch.zeros(4, 1, requires_grad=True), [torch.zeros(1, requires_grad=True)]
        with record(weight=weight, others=others) as recording:
            for rows in recording.steps(x.split(8)):
                loss = functional.mse_loss(rows @ weight + others[0], rows[:, :1])
                loss.backward()
                with torch.no_grad():
                    weight -= weight.grad * 0.1
                    others[0] -= others[0].grad * 0.01
                    weight.grad.zero_()
                recording.log(loss=loss)
        return [weight.detach(), others[0].detach(), others[0].grad]

    assert_resumes(body, 3, 5)
    assert "not among the tensors" not in capsys.readouterr().err
    gradients = everystep.open("whole")[4].gradients
    assert gradients.keys() == {"weight", "others.0"} and gradients["weight"].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_loader_with_a_state_goes_to_its_place_by_itself(dying):
    assert_resumes(partial(by_epochs, dataset=Noisy(), loader=StatefulDataLoader), 8, 13)


@pytest.mark.parametrize(
    ("around", "cure"),
    [
        (lambda steps, epochs: enumerate(shown(steps)), "steps(enumerate(...))"),
        (lambda steps, epochs: enumerate(map(id, steps)), "steps(enumerate(...))"),
        (lambda steps, epochs: itertools.islice(enumerate(steps), 2), "steps(islice(...))"),
        (lambda steps, epochs: zip(itertools.count(), steps, strict=False), "steps(zip(...))"),
        (lambda steps, epochs: zip(epochs, [0.1], strict=False), "rates[epoch]"),
        (lambda steps, epochs: enumerate(epochs), "rates[epoch]"),
    ],
)
def test_what_would_count_from_the_start_again_is_refused_before_the_first_step(around, cure):
    with (
        pytest.raises(UsageError, match=re.escape(cure)),
        everystep.record(run="runs/counted", state=torch.zeros(1)) as recording,
    ):
        next(around(recording.steps([torch.zeros(1)] * 3), recording.epochs(2)))
    assert len(recording.run) == 0


def test_what_holds_the_steps_and_counts_something_else_is_not_refused():
    with everystep.record(run="runs/several", state=torch.zeros(1)) as recording:
        for _, steps in enumerate([recording.steps([torch.zeros(1)] * 3)]):
            assert len([*steps]) == 3


def test_what_a_loop_carries_besides_its_parts_is_found(dying):
    """A counter of the loop begins again: the state at a snapshot is then another."""

    def body(record, parts):
        model = nn.Linear(6, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        counter = parts.get("counter", {"count": 0})

        def loss_of(x, y):
            counter["count"] += 1
            return functional.mse_loss(model(x), y) / counter["count"]

        descending(record, optimizer, loss_of, model=model, optimizer=optimizer, **parts)
        return counter["count"]

    with pytest.raises(RunError, match="pass what the loop carries from step to step"):
        by_loop(lambda record: body(record, {}), (17,), "runs/lost")
    assert by_loop(lambda record: body(record, {"counter": {"count": 0}}), (17,), "runs/kept") == 23


class Stage(enum.Enum):
    WARM, MAIN = "warm", "main"


class Corner(enum.Enum):
    NEAR, FAR = (0, 0), (1, 1)


class Transition(NamedTuple):
    number: int
    state: torch.Tensor


@dataclass
class Entry:
    number: int = 0
    best: torch.Tensor | None = None


@dataclass(frozen=True)
class Settings:
    number: int = 0


class Attributes(dict):
    """A dict with attributes, as many packages have one."""

    def __getattr__(self, name):
        return self[name]


class Counting(nn.Module):
    """A model that counts in attributes of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.seen, self.by_number, self.mean = [], Counter(), torch.zeros(6)
        self.recent, self.entry, self.stage = deque(maxlen=3), Entry(), Stage.WARM
        self.layer.means, self.layer.best = {"x": torch.zeros(6)}, Path("none")  # in one of torch's
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        if self.training:
            self.seen.append(len(self.seen))
            self.by_number[len(self.seen) % 3] += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.recent.append(x[0] * 2)
            self.entry.number += 1
            self.layer.means["x"] = 0.9 * self.layer.means["x"] + 0.1 * x.mean(0)
            self.layer.best = Path(f"best-{len(self.seen)}")
            self.stage = Stage.MAIN if len(self.seen) > 12 else Stage.WARM
        # Only late does anything depend on them.
        scale = len(self.seen) + self.by_number[0] if self.stage is Stage.MAIN else 1.0
        noise = torch.rand(1, generator=self.generator) if len(self.seen) > 19 else 0.0
        return self.layer(x - self.layer.means["x"]) / scale + noise


def as_text(value):
    """Return all that a value holds as text, tensors with their strides."""
    if isinstance(value, torch.Tensor):
        return f"{value.tolist()} {value.stride()} {value.requires_grad and value.is_leaf}"
    if isinstance(value, dict):
        return f"{type(value)} {[(key, as_text(each)) for key, each in value.items()]}"
    if isinstance(value, list | tuple | deque):
        return f"{type(value)} {getattr(value, 'maxlen', None)} {[*map(as_text, value)]}"
    if isinstance(value, set):
        return f"{sorted(value)}"
    if isinstance(value, Entry):
        return as_text(dict(sorted(vars(value).items())))
    is_member = isinstance(value, enum.Enum) and type(value)(value.value) is value
    return f"{value!r} {is_member}"


def with_state(kept):
    """A loop with a model that counts, and a state of many kinds; kept: gets them at each step."""

    def body(record):
        seeded()
        model = Counting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        default = Entry()
        state = {
            "counts": Counter(), "memory": deque(maxlen=4), "stage": Stage.WARM, "entries": [],
            "settings": Settings(), "named": Attributes(number=0), "pairs": set(), "gap": 0j, "raw": b"",
            "wide": np.zeros(2, complex), "text": np.array(["a"]), "turned": None, "latent": [],
            "first": default, "second": default, "by_key": defaultdict(list), "by_pair": {},
            "corner": Corner.NEAR, "repeated": torch.zeros(1).expand(3), "best": Path("none"),
            "share": Fraction(1, 2), "exact": Decimal(1), "span": range(1), "part": slice(None),
            "size": torch.Size([1]), "begun": datetime(2026, 1, 1), "took": timedelta(0),
        }  # fmt: skip
        pairs, place = state["pairs"], {"last": torch.zeros(6)}
        with record(model=model, optimizer=optimizer, state=state, place=place) as recording:
            for number, (x, y) in enumerate(recording.steps(DataLoader(tensors(), batch_size=1)), 1):
                loss = descend(optimizer, functional.mse_loss(model(x), y))
                place["last"] += 1  # which the newest of the memory is, too
                state["counts"][number % 3] += 1
                place["last"] = x[0].clone()
                state["memory"].append(Transition(number, place["last"]))
                state["stage"] = Stage.MAIN if number > 5 else Stage.WARM
                state["corner"] = Corner.FAR if number > 5 else Corner.NEAR
                state["repeated"] = torch.full((1,), float(number)).expand(3)
                state["entries"].append(Entry(number, x.clone() if number % 2 else None))
                state["settings"] = Settings(number)
                state["named"]["number"] += 1
                pairs.add((number, -number))
                state["gap"] += 1j
                state["best"], state["size"] = Path(f"best-{number}"), torch.Size([number])
                state["share"], state["exact"] = state["share"] / 3, state["exact"] / 3
                state["span"], state["part"] = range(number), slice(None, number)
                state["took"] += timedelta(seconds=number)
                state["begun"] += state["took"]
                state["raw"] += b"x"
                state["wide"] += 1j * number
                state["text"] = np.array(["a" * number])
                state["turned"] = torch.arange(6.0).reshape(2, 3).T * number
                state["latent"].append(torch.ones(2, requires_grad=True))
                state["first"] = state["entries"][-1]
                state["by_key"][number % 2].append(number)
                state["by_pair"][number, "a"] = Counter([number])
                recording.log(loss=loss)
                own = {n: vars(model)[n] for n in ("seen", "by_number", "mean", "recent", "entry")}
                own |= {n: vars(model.layer)[n] for n in ("means", "best")}
                kept[number] = as_text(state), as_text(own), repr(model.stage)
        return model.state_dict()["layer.weight"]

    return body


def test_what_parts_hold_besides_tensors_is_as_in_an_uninterrupted_loop(dying):
    whole, resumed = {}, {}
    weight = with_state(whole)(lambda **parts: everystep.record(run="runs/whole", **parts))
    assert torch.equal(weight, by_loop(with_state(resumed), (13, 18)))
    assert resumed == whole
    assert (Stage.WARM.value, Corner.NEAR.value) == ("warm", (0, 0))
    assert_same_run(everystep.open("whole"), everystep.open("killed"))


@resumes(17)
def test_gradients_that_add_up_over_steps_are_as_in_an_uninterrupted_loop(record):
    """Also sparse ones, and those of tensors that are not parameters, or that are used only late."""
    seeded()
    table, model = nn.Embedding(5, 6, sparse=True), nn.Linear(6, 1)
    model.register_buffer("shift", torch.zeros(6, requires_grad=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for_table = torch.optim.SGD(table.parameters(), lr=0.1)
    parts = {"model": model, "table": table, "optimizer": optimizer, "for_table": for_table}
    state = {"latent": torch.zeros(6, requires_grad=True), "count": 0}
    with record(state=state, **parts) as recording:
        for x, y in recording.steps(DataLoader(tensors(), batch_size=1)):
            rows = torch.arange(5)[state["count"] % 5 :]
            loss = (model(x + table(rows).mean(0) + state["latent"] + model.shift) - y).square()
            recording.log(loss=descend(optimizer, loss.mean()))
            state["count"] += 1
            if state["count"] == 20:
                for_table.step()
                for leaf in (state["latent"], model.shift):
                    with torch.no_grad():
                        leaf -= 0.01 * leaf.grad
    gradients = state["latent"].grad, model.shift.grad, table.weight.grad.to_dense()
    return [each.detach() for each in (*gradients, *model.parameters(), table.weight)]


class Running:
    """Numbers that a model keeps in an object of a class of its own."""

    def __init__(self):
        self.count, self.mean = 0, torch.zeros(6)
        # They stay as the model makes them.
        self.kind, self.scheme, self.after = torch.float32, torch.per_tensor_affine, lambda x: x


class WithObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.running, self.latest = nn.Linear(6, 1), Running(), None
        self.described = [inspect.signature(self.forward), Final, torch.__version__]

    def forward(self, x):
        self.running.count += 1
        self.running.mean = 0.9 * self.running.mean + x.mean(0)
        self.latest = Running()  # only the code of the model makes it
        late = self.running.mean * self.running.count if self.running.count > 19 else 0.0
        return self.layer(x + late)


class Flat(torch.optim.Optimizer):
    """Its state is views of one tensor, made in its first step, and tensors in a list in a dict."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.flat, self.of = None, {}

    @torch.no_grad()
    def step(self):
        parameters = self.param_groups[0]["params"]
        if self.flat is None:
            self.flat = torch.zeros(sum(each.numel() for each in parameters))
            pieces = self.flat.split([each.numel() for each in parameters])
            for each, piece in zip(parameters, pieces, strict=True):
                self.state[each]["momentum"] = piece.view_as(each)
        self.flat.mul_(0.9)
        for each in parameters:
            self.state[each]["momentum"].add_(each.grad)
            (sums,) = self.state[each].setdefault("inner", {"sums": [torch.ones_like(each)]})["sums"]
            sums.add_(each.grad.square())
            each.sub_(self.state[each]["momentum"] / sums.sqrt(), alpha=self.param_groups[0]["lr"])
        norms = torch.stack([each.norm() for each in parameters])
        for each, norm in zip(parameters, norms, strict=True):
            self.state[each]["norm"] = norm  # of one memory, which nothing else has
            self.of[id(each)] = {"sum": self.of.get(id(each), {"sum": 0.0})["sum"] + norm}
            each.sub_(self.of[id(each)]["sum"], alpha=1e-3)


def with_views(record):
    """A loop with objects and views that it makes on its way, some of which matter only late."""
    seeded()
    model, state = WithObject(), {"count": 0, "ring": torch.zeros(5, 6), "pool": []}
    state |= {"newest": state["ring"][0], "spread": torch.zeros(9, 4)}
    optimizer = Flat(model.parameters())
    with record(model=model, optimizer=optimizer, state=state) as recording:
        for x, y in recording.steps(DataLoader(tensors(), batch_size=1)):
            state["count"] += 1
            if state["count"] == 1:
                state["all"] = torch.zeros(4)
                state["bias"], state["some"] = model.layer.bias.detach(), state["all"][1:3]
                state["spread"] = state["all"].expand(9, 4)  # has more numbers than its memory
            state["ring"][state["count"] % 5] = x[0]
            state["newest"] = state["ring"][state["count"] % 5] if state["count"] % 2 else x[0].clone()
            state["pool"] = [*(x + torch.arange(3.0)[:, None]).split(1), *state["pool"][:4]]
            views = state["some"].sum() + state["spread"].mean()
            late = views + sum(state["pool"]).sum() if state["count"] > 18 else 0.0
            recording.log(loss=descend(optimizer, functional.mse_loss(model(x), y) + late * y.mean()))
            optimizer.param_groups[0]["lr"] = np.float32(0.1 / state["count"])
            state["all"].add_(0.1)
            if state["count"] > 18:
                state["bias"].mul_(0.9)
    return [each.detach() for each in (*model.parameters(), optimizer.flat, state["all"], state["ring"])]


def test_views_and_objects_are_as_in_an_uninterrupted_loop(dying, capfd):
    assert_resumes(with_views, 13, 17)
    said = capfd.readouterr().err
    assert "not among the tensors" not in said and "a run cannot keep" not in said
    whole = with_views(unrecorded)
    forked = with_views(partial(everystep.record, run="runs/fork", fork="runs/whole", at=11))
    assert all(map(torch.equal, whole, forked))


class Agent:
    """A network, its copy, and what trains it, as people write reinforcement learning."""

    def __init__(self):
        self.network, self.target, self.count = nn.Linear(6, 1), nn.Linear(6, 1), 0
        self.optimizer = torch.optim.Adam(self.network.parameters())

    def learn(self, x, y):
        with torch.no_grad():
            y = y + self.target(x)
        loss = descend(self.optimizer, functional.mse_loss(self.network(x), y))
        self.count += 1
        if self.count % 5 == 0:
            self.target.load_state_dict(self.network.state_dict())
        return loss


class Warmup:
    """Sets the rate of the optimizer that it has, before each of its steps."""

    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0

    def __call__(self):
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 * min(self.count**-0.5, self.count / 8)
        self.optimizer.step()


class Learner(nn.Module):
    """A network that has its optimizer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.layers = [self.layer]
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def learn(self, x, y):
        return descend(self.optimizer, functional.mse_loss(self.layer(x), y))


def with_agent(record):
    seeded()
    agent, models = Agent(), {"first": nn.Linear(6, 1), "second": Learner()}
    steps = [Warmup(torch.optim.SGD(models["first"].parameters()))]
    with record(agent=agent, models=models, steps=steps) as recording:
        for x, y in recording.steps(DataLoader(tensors(), batch_size=1)):
            models["first"].zero_grad()
            loss = functional.mse_loss(models["first"](x), y)
            loss.backward()
            steps[0]()
            recording.log(loss=loss + agent.learn(x, y) + models["second"].learn(x, y))
    networks = (agent.network, agent.target, *models.values())
    return [parameter.detach() for network in networks for parameter in network.parameters()]


def test_models_and_optimizers_within_other_parts_are_parts(dying, capfd):
    assert_resumes(with_agent, 17)
    run = everystep.open("killed")
    assert not re.search("not among the tensors|cannot keep", capfd.readouterr().err)
    names = ("agent_network", "agent_target", "models_first", "models_second.layer")
    assert {f"{name}.{own}" for name in names for own in ("weight", "bias")} == {*run[20].parameters}
    optimizers = ("agent_optimizer", "steps_0_optimizer", "models_second_optimizer")
    assert {f"{name}.lr" for name in optimizers} <= {*run[20].hyperparameters}


class Sharp(torch.optim.Optimizer):
    """Lets another optimizer take its steps, which has a state of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

    def step(self):
        self.base.step()


def with_state_by_parameter(record):
    seeded()
    model, other = nn.Linear(6, 1), nn.Linear(6, 1)
    optimizer = Sharp(model.parameters())
    velocity = {parameter: torch.zeros_like(parameter) for parameter in other.parameters()}
    parts = {"velocity": velocity, "averages": SimpleNamespace(of={}), "memory": deque(maxlen=3)}
    averages, memory = parts["averages"], parts["memory"]
    with record(model=model, other=other, optimizer=optimizer, **parts) as recording:
        for x, y in recording.steps(DataLoader(tensors(), batch_size=1)):
            memory.append(x)
            past = torch.cat([*memory]).mean(0)
            loss = functional.mse_loss(model(x), y) + functional.mse_loss(other(past), y[0])
            other.zero_grad()
            recording.log(loss=descend(optimizer, loss))
            with torch.no_grad():
                for parameter, each in velocity.items():
                    parameter.sub_(each.mul_(0.9).add_(parameter.grad), alpha=0.1)
                    averages.of.setdefault(parameter, torch.zeros_like(parameter)).lerp_(parameter, 0.1)
    return [*velocity.values(), *averages.of.values(), *map(torch.Tensor.detach, model.parameters())]


def test_state_that_objects_keep_by_parameter_is_restored(dying, capfd):
    assert_resumes(with_state_by_parameter, 17)
    assert not re.search("not among the tensors|cannot keep", capfd.readouterr().err)


class Around(torch.optim.Optimizer):
    """Has the param groups of another optimizer, which is a part, too."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base, self.param_groups, self.state = base, base.param_groups, base.state
        self.closure = None

    def step(self):
        self.base.step()


@pytest.mark.parametrize("is_code", [False, True])
def test_two_optimizers_may_have_one_list_of_param_groups(is_code, dying):
    def body(record):
        model = nn.Linear(6, 1)
        base = torch.optim.Adam(model.parameters(), betas=(0.8, 0.9))
        optimizer = Around(base)

        def after():
            optimizer.closure = model.zero_grad if is_code else None

        parts = {"model": model, "optimizer": optimizer, "base": base}
        descending(record, optimizer, lambda x, y: functional.mse_loss(model(x), y), after, **parts)
        return [value.detach() for value in model.state_dict().values()]

    if is_code:
        with pytest.raises(RunError, match=r"optimizer\.closure: cannot be made again"):
            by_loop(body, (13,))
    else:
        assert_resumes(body, 3, 13)


@resumes(3)
def test_parameters_that_are_set_from_one_vector_go_on(record):
    """As evolution strategies do, by torch's own function: they are views of the last vector."""
    model = nn.Linear(1, 1).requires_grad_(False)
    with record(model=model) as recording:
        for rows in recording.steps(torch.linspace(-1, 1, 12).reshape(12, 1).split(2)):
            vector = nn.utils.parameters_to_vector(model.parameters())
            loss = functional.mse_loss(model(rows), rows)
            moved = vector - 0.1 * loss * torch.randn(2)
            nn.utils.vector_to_parameters(moved, model.parameters())
            recording.log(loss=loss)
    return [value.clone() for value in model.state_dict().values()]


class Order(tuple):
    """A pair that is a number to those who use it."""

    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        raise NotImplementedError


class WithBuffers(nn.Module):
    """Makes buffers in its first step, and one with another shape in each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.register_buffer("bank", torch.zeros(0, 6))
        self.register_buffer("count", None, persistent=False)
        self.begun, self.orders, self.scale = torch.zeros(()), [Order((1, 2))], 0.5
        self.register_buffer("latest", self.begun)  # until it is another tensor

    def forward(self, x):
        if not hasattr(self, "first"):
            self.register_buffer("first", x.double())
            scale = vars(self).pop("scale")
            self.register_buffer("scale", torch.tensor(scale))
        self.bank = torch.cat((self.bank, x))[-15:]
        self.count = torch.tensor(1) if self.count is None else self.count + 1
        self.latest = x.mean()
        self.orders = [Order((1, 3)), *self.orders[:2]]
        late = self.bank.mean(0) + self.first.float() if self.count > 18 else self.begun
        return self.layer(self.scale * x + late)


@resumes(17)
def test_buffers_that_a_loop_makes_are_as_in_an_uninterrupted_loop(record):
    seeded()
    model = WithBuffers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"inner": nn.ModuleList([model]), "optimizer": optimizer}
    descending(record, optimizer, lambda x, y: functional.mse_loss(model(x), y), **parts)
    assert {*model.state_dict()} == {
        *("layer.weight", "layer.bias", "bank", "latest", "first", "scale"),
    }
    return [value.detach() for _, value in sorted(model.state_dict().items())]


def test_a_buffer_of_another_shape_than_the_run_began_with_is_named(dying):
    def begun(size):
        model = nn.Linear(1, 1)
        model.register_buffer("bank", torch.zeros(size))
        return everystep.record(run="runs/one", resume=True, model=model)

    with begun(2) as recording:
        for _ in recording.steps(range(3)):
            recording.log(loss=0.0)
    with pytest.raises(RunError, match=r"bank: is float32 \(3,\), but float32 \(2,\) was recorded"):
        begun(3).__enter__()


@resumes(13, 16)
def test_gradients_in_a_buffer_of_all_are_as_in_an_uninterrupted_loop(record):
    seeded()
    model = nn.Linear(6, 1)
    buffer = torch.zeros(7)
    model.weight.grad, model.bias.grad = buffer[:6].view(1, 6), buffer[6:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(recording.steps(DataLoader(tensors(), batch_size=1))):
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            recording.log(loss=loss)
            if number % 2 == 0:  # states of even steps have gradients
                optimizer.step()
                buffer.zero_()
    return [each.detach() for each in model.parameters()]


@resumes(13)
def test_layers_that_are_unfrozen_and_groups_that_are_added_stay_so(record):
    model = nn.Sequential(nn.Linear(6, 3).requires_grad_(False), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    with record(model=model, optimizer=optimizer) as recording:
        for x, y in recording.steps(DataLoader(tensors(), batch_size=1)):
            if recording.step_count == 5:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": [*model[0].parameters()], "lr": 0.01})
            recording.log(loss=descend(optimizer, functional.mse_loss(model(x), y)))
    return [each.detach() for each in model.parameters()]


@resumes(4, 13)
def test_what_a_loop_keeps_in_an_optimizer_of_torchs_goes_on(record):
    model = nn.Linear(6, 1)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.last, (group,) = {"sizes": [1.0]}, optimizer.param_groups
    group |= {"phase": "warm", "turn": 1j, "recent": deque(maxlen=3), "seen": {0}}
    scheduler = lr_scheduler.StepLR(optimizer, 7)
    scheduler.began = np.datetime64("2026-01-01")
    with record(model=model, optimizer=optimizer, scheduler=scheduler) as recording:
        for x, y in recording.steps(DataLoader(tensors(), batch_size=1)):
            scale = len(group["seen"]) + sum(group["recent"]) + group["turn"].real
            scale *= optimizer.last["sizes"][0] * (2 if group["phase"] == "cold" else 1)
            recording.log(loss=descend(optimizer, functional.mse_loss(model(x) * scale, y)))
            group["phase"] = "cold" if len(group["seen"]) % 7 > 3 else "warm"
            group["turn"] *= 1j
            group["recent"].append(recording.step_count)
            group["seen"] = group["seen"] | {recording.step_count}
            optimizer.last = {"sizes": [optimizer.last["sizes"][0] / 2 + 1]}
    return [each.detach() for each in model.parameters()]


@resumes(13)
def test_batches_of_conjugated_views_are_found_again(record):
    seeded()
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pairs = [(torch.complex(x, y).conj(), y) for x, y in DataLoader(tensors(), batch_size=1)]
    with record(model=model, optimizer=optimizer) as recording:
        for x, y in recording.steps(pairs):
            recording.log(loss=descend(optimizer, functional.mse_loss(model(x.imag), y)))
    return model.weight.detach()


def test_a_tensor_with_a_graph_in_a_part_is_named(tmp_path, capfd):
    state = {"penalty": torch.zeros(())}
    model = nn.Linear(6, 1)
    with everystep.record(run=tmp_path / "run", model=model, state=state) as recording:
        for x, _ in recording.steps(DataLoader(tensors(), batch_size=8)):
            state["penalty"] = state["penalty"] + model(x).sum()
            recording.log(loss=state["penalty"])
    assert "the part state has values of Tensor with a graph, which a run" in capfd.readouterr().err


class Average:
    """An object that the loop makes as it needs it."""

    def __init__(self):
        self.value = 0.0


def test_what_only_the_code_of_a_loop_can_make_is_named(dying, capfd):
    """A state that was restored is read again: what differs is refused, not trained with."""

    def body(record, key):
        model = nn.Linear(6, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        state = {"averages": [], "iterator": iter([]), "kind": np.dtype("f4")}
        state["loss"] = functional.mse_loss
        with record(model=model, optimizer=optimizer, state=state) as recording:
            for x, y in recording.steps(DataLoader(tensors(), batch_size=1)):
                made = {
                    "averages": lambda: [*state["averages"], Average()],
                    "kind": lambda: np.dtype("f8"),
                    "iterator": lambda: iter([1, 2]),
                    "loss": lambda: functional.l1_loss,
                }
                state[key] = made[key]()
                recording.log(loss=descend(optimizer, functional.mse_loss(model(x), y)))

    for key, message in (
        ("averages", r"a Average, which only your code can make: make it before everystep\.record"),
        ("kind", r"state\.kind: cannot be made again as after step \d+; keep numbers, texts"),
        ("loss", r"state\.loss: cannot be made again as after step \d+; keep numbers, texts"),
    ):
        with pytest.raises(RunError, match=message):
            by_loop(lambda record, key=key: body(record, key), (13,), f"runs/{key}")
    said = capfd.readouterr().err
    assert "the part state has values of Average, list_iterator, which a run cannot keep" in said
    by_loop(lambda record: body(record, "iterator"), (13,), "runs/iterator")
    said = capfd.readouterr().err
    assert "the part state has values of list_iterator, which a run cannot keep" in said


class Count(int):
    """A number that is in no attribute."""


class Holding(nn.Module):
    """A model with numbers that no run keeps."""

    def __init__(self):
        super().__init__()
        self.layer, self.numbers = nn.Linear(6, 1), iter([1])
        self.held = {"count": Count(3), "function": functional.relu}


class Slotted:
    __slots__ = ("number",)


class WithSlot(Slotted):
    """An object with attributes, and one in a slot."""


@pytest.mark.parametrize(
    "value", [Count(3), type("Own", (Random,), {})(3), WithSlot(), np.ma.array([1.0, 2.0])]
)
def test_what_an_object_holds_besides_its_attributes_is_named(value, tmp_path, capfd):
    """A part would lose it in a resumed loop without a word."""
    with everystep.record(run=tmp_path / "run", model=nn.Linear(6, 1), state={"value": value}):
        pass
    said = capfd.readouterr().err
    assert f"the part state has values of {type(value).__name__}, which a run cannot keep" in said


def test_what_an_attribute_of_a_model_holds_and_no_run_keeps_is_named(tmp_path, capfd):
    with everystep.record(run=tmp_path / "run", model=WithObject()):
        pass
    assert "cannot keep" not in capfd.readouterr().err
    with everystep.record(run=tmp_path / "other", model=Holding()):
        pass
    said = capfd.readouterr().err
    assert "the part model has values of Count, list_iterator, which a run cannot keep" in said


@resumes(6)
def test_a_loop_that_marks_its_steps_goes_on_by_their_count(record):
    x, y = tensors().tensors
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    with record(model=model, optimizer=optimizer) as recording:
        for _ in range(recording.step_count, 9):
            with recording.step({"x": x, "y": y}):

                def closure():
                    optimizer.zero_grad()
                    loss = functional.mse_loss(model(x), y)
                    loss.backward()
                    return loss

                recording.log(loss=optimizer.step(closure))
    return model.state_dict()["0.weight"]


class Remembering(nn.Linear):
    """Keeps what it was last asked to do, as some libraries do: a name, and objects."""

    last = None

    def forward(self, x):
        self.last = "forward", (nn.Identity(), {"into": self})
        return super().forward(x)


def test_objects_that_a_forward_pass_makes_may_be_made_before_the_loop(tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 3)

    def trained(last, *, is_asked_before):
        seeded()
        model = Remembering(4, 2)
        model.last = None
        if is_asked_before:
            model(torch.zeros(1, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with everystep.record(
            run=tmp_path / "run", resume=True, model=model, optimizer=optimizer
        ) as recording:
            for x in recording.steps(torch.arange(last * 8.0).view(last, 2, 4) / 50):
                recording.log(loss=descend(optimizer, model(x).square().mean()))

    trained(8, is_asked_before=False)
    with pytest.raises(RunError, match=r"before everystep\.record, such as by a forward pass"):
        trained(9, is_asked_before=False)
    trained(9, is_asked_before=True)
    assert everystep.open(tmp_path / "run").verify(processes=1, progress=False).is_exact


def test_what_the_first_step_makes_for_all_later_ones_is_made_again(tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 3)

    def trained(last, scale=1.0):
        seeded()
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks = {}  # as `functools.cache` has them
        with everystep.record(
            run=tmp_path / "run", resume=True, model=model, optimizer=optimizer
        ) as recording:
            for x in recording.steps(torch.arange(last * 8.0).view(last, 2, 4) / 50):
                if "mask" not in masks:
                    masks["mask"] = torch.ones(4, 4).tril()
                noise = torch.from_numpy(np.full(4, scale + float(x[0, 0]), np.float32))
                loss = ((model(x) @ masks["mask"] + noise) ** 2).mean()
                recording.log(loss=descend(optimizer, loss))
        return recording.run

    trained(8)
    with pytest.raises(RunError, match="step 7 is repeated, the loss is"):
        trained(11, scale=2.0)
    run = trained(11)
    assert len(run) == 11 and run.verify(processes=1, progress=False).is_exact


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_resume_that_differs_names_functions_of_torchscript(tmp_path):
    scripted = torch.jit.script(of_scripted)

    def trained(last, scale):
        model = nn.Linear(3, 1)
        with everystep.record(run=tmp_path / "run", resume=True, model=model) as recording:
            for x in recording.steps(torch.ones(last, 2, 3)):
                recording.log(loss=scripted(model(x), scale).sum())

    trained(4, 1.0)
    with pytest.raises(RunError, match=r"functions of torch\.jit\.script compute .*: set PYTORCH_JIT=0"):
        trained(6, 2.0)


def of_scripted(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x * scale


def test_a_loop_over_numbers_that_skips_those_that_are_past_itself_is_refused(tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 3)

    def trained(last):
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with everystep.record(
            run=tmp_path / "run", resume=True, model=model, optimizer=optimizer
        ) as recording:
            for number in recording.steps(range(recording.step_count, 12)):
                recording.log(loss=descend(optimizer, model(torch.ones(2, 3)).square().sum()))
                if number + 1 == last:
                    break

    trained(8)
    with pytest.raises(
        RunError, match=r"step 1 is not the recorded one.*steps skips those that are past"
    ):
        trained(12)
    assert len(everystep.open(tmp_path / "run")) == 8


def test_other_parts_are_named():
    model = nn.Linear(6, 1)
    with everystep.record(run="runs/a", model=model) as recording:
        for x, _ in recording.steps(DataLoader(tensors(), batch_size=5)):
            model(x)
    with (
        pytest.raises(RunError, match="recorded with the parts model, not model, optimizer"),
        everystep.record(
            resume="a", model=model, optimizer=torch.optim.SGD(model.parameters()), force=True
        ),
    ):
        pass
    with (
        pytest.raises(RunError, match=r"model Linear.in_features: 6 \| 7"),
        everystep.record(resume="a", model=nn.Linear(7, 1)),
    ):
        pass
    with pytest.raises(RunError, match="no run 'b'"):
        everystep.record(resume="b", model=model)
    with pytest.raises(UsageError, match="resume=True needs the run: run"):
        everystep.record(resume=True, model=model)
    assert len(everystep.open("a")) == 5


# Step functions.


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("name", ["dropout_and_noise", "gan", "branched_by_chance"])
def test_a_step_function_that_was_killed_ends_in_the_bits_of_one_that_was_not(name, dying):
    def trained(place, **options):
        seeded()
        Dying.is_dead = False
        case = step_functions.CASES[name]()
        run = everystep.train(
            case.step, case.batches, parts=case.parts, steps=STEPS, run=place, **options
        )
        return run, case

    whole, made = trained("runs/whole", progress=False)
    for death in (9, 25):

        class Fatal(Dying):
            def advance(self, first_step, losses):
                if first_step + len(losses) > self._step:
                    Dying.is_dead = True
                    raise Killed

        with pytest.raises(Killed):
            trained("runs/killed", resume=True, progress=Fatal(death))
    resumed, again = trained("runs/killed", resume=True, progress=False)
    assert_same_run(whole, resumed)
    for part, other in zip(made.parts.values(), again.parts.values(), strict=True):
        if isinstance(part, nn.Module):
            assert all(map(torch.equal, part.parameters(), other.parameters()))
    assert len(list(itertools.islice(resumed.facts.resumed, 5))) == 2


def test_an_optimizer_with_an_infinite_setting_is_the_same_again(dying):
    def body(record):
        model = nn.Linear(6, 1)
        optimizer = Prodigy(model.parameters())
        assert optimizer.param_groups[0]["growth_rate"] == float("inf")

        def loss_of(x, y):
            return functional.mse_loss(model(x), y)

        descending(record, optimizer, loss_of, model=model, optimizer=optimizer)
        return model.weight.detach()

    assert_resumes(body, 12)
    (group,) = everystep.open("killed").facts.training.optimizers["optimizer"].groups
    assert group["growth_rate"] == float("inf")


# Programs alone.


def mlp_case(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    x, y = tensors().tensors
    return {
        "model": model,
        "data": (x, y),
        "loss": nn.MSELoss(),
        "optimizer": optimizer(model.parameters()),
        "batch_size": 5,
        "seed": 3,
        "progress": False,
    }


ALONE = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("name", ALONE)
def test_programs_alone_go_on_without_the_objects(name, capfd):
    whole = everystep.train(**mlp_case(ALONE[name]), steps=STEPS, run="runs/whole")
    everystep.train(**mlp_case(ALONE[name]), steps=20, run="runs/part")
    resumed = everystep.open("part").resume(STEPS)
    assert_same_run(whole, resumed)
    assert "nothing checks them against Python" in capfd.readouterr().err
    assert resumed.facts.training.engine.stands_behind == "alone"
    assert "not checked against Python" in resumed.report()
    again = everystep.open("part").resume(STEPS + 9, progress=False)
    assert len(again) == STEPS + 9 and again.verify(progress=False).is_exact
    fork = everystep.open("whole").fork(15, progress=False)
    assert fork.losses.equals(whole.losses)
    assert fork.verify(progress=False).is_exact
    first = everystep.open("whole").fork(0, progress=False)
    assert first.losses.equals(whole.losses)
    assert first.verify(progress=False).is_exact and first[5].loss == whole[5].loss


def test_what_was_opened_before_knows_the_steps_of_a_resume():
    everystep.train_experiment("two-layer", {"steps": 10}, run="runs/part", progress=False)
    by_epochs(partial(everystep.record, run="runs/loop"), dataset=tensors(), epochs=2)
    part, loop = everystep.open("part"), everystep.open("loop")
    assert part[10].number == loop[10].number == 10
    everystep.open("part").resume(20, progress=False)
    by_epochs(partial(everystep.record, resume="loop"), dataset=tensors(), epochs=4)
    for opened in (part, loop):
        assert opened[20].loss == opened.losses["loss"][-1]


def test_programs_alone_note_the_first_loss_that_is_not_finite():
    everystep.train(**mlp_case(ALONE["Adam"]), steps=STEPS, run="runs/whole")
    fork = everystep.open("whole").fork(15, lr=1e30, progress=False)
    first = next(n for n, loss in fork.losses.rows() if not math.isfinite(loss))
    assert fork.facts.nonfinite_step == first > 15
    again = everystep.open(fork.directory).resume(STEPS + 3, progress=False)
    assert again.facts.nonfinite_step == first
    assert fork.first_nonfinite(progress=False).step.number <= first


def test_a_fork_by_programs_alone_may_have_another_learning_rate():
    everystep.train(**mlp_case(ALONE["Adam"]), steps=STEPS, run="runs/whole")
    fork = everystep.open("whole").fork(15, lr=0.001, progress=False)
    cases = [mlp_case(ALONE["Adam"]) for _ in range(3)]
    own, again, last = ({n: case[n] for n in ("model", "loss", "optimizer")} for case in cases)
    assert fork.losses.equals(everystep.open("whole").fork(15, lr=0.001, **own, progress=False).losses)
    assert fork.facts.fork.changed == {"lr": 0.001}
    with pytest.raises(RunError, match=r"optimizer Adam.lr: 0.001 \| 0.01"):
        everystep.open(fork.directory).resume(STEPS + 3, **again, progress=False)
    # Its programs have made a state from that of the parent before the first step.
    same = everystep.open("whole").fork(15, progress=False)
    longer = everystep.open(same.directory).resume(STEPS + 3, **last, progress=False)
    whole = everystep.train(**mlp_case(ALONE["Adam"]), steps=STEPS + 3, run="runs/longer")
    assert longer.losses.equals(whole.losses)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("change", [{"seed": 9}, {"batch_size": 4}, {"lr": 0.001}])
def test_a_fork_of_a_fork_by_programs_alone_has_the_rules_of_the_steps_that_follow(change):
    parent = everystep.train(**mlp_case(ALONE["Adam"]), steps=STEPS, run="runs/whole")
    other = parent.fork(10, **change, progress=False)
    for at, same in ((7, parent), (10, other), (13, other)):
        fork = everystep.open(other.directory).fork(at, progress=False)
        assert fork.losses.equals(same.losses) and fork.verify(progress=False).is_exact


def test_programs_alone_may_end_at_a_state_that_is_kept_anyway(monkeypatch):
    everystep.train(**mlp_case(ALONE["Adam"]), steps=STEPS, run="runs/whole")
    monkeypatch.setattr(SnapshotPlan, "is_due", lambda self, step: True)
    monkeypatch.setattr(Recorder, "is_behind", False)
    fork = everystep.open("whole").fork(15, progress=False)
    assert fork.status == "finished"
    assert fork.snapshots[-1] == STEPS


def test_programs_alone_are_refused_where_code_had_a_part():
    case = mlp_case(ALONE["SGD"])
    scheduler = lr_scheduler.StepLR(case["optimizer"], 2)
    everystep.train(**case, scheduler=scheduler, steps=10, run="runs/scheduled")
    with pytest.raises(RunError, match=r"cannot continue it alone: it has a scheduler \(StepLR\); pass"):
        everystep.open("scheduled").resume(20)
    everystep.train(**mlp_case(ALONE["SGD"]), engine="eager", steps=10, run="runs/eager")
    with pytest.raises(RunError, match="Python ran its steps"):
        everystep.open("eager").fork(5, steps=20)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model[0].weight.data.mul_(0.9), "code after step 5 changed 0.weight"),
        (lambda model: torch.rand(1), "code between the steps drew random numbers"),
    ],
)
def test_programs_alone_are_refused_where_code_changed_something_between_steps(change, reason):
    def metric(prediction, target):
        change(case["model"])
        return 0.0

    case = mlp_case(ALONE["SGD"])
    options = {"metrics": {"m": metric}, "evaluate_every": 5, "steps": 20}
    run = everystep.train(**case, **options, run="runs/changed")
    with pytest.raises(RunError, match=reason):
        everystep.open("changed").fork(10, steps=30)
    case = mlp_case(ALONE["SGD"])
    own = {name: case[name] for name in ("model", "loss", "optimizer")}
    fork = run.fork(20, **own, metrics={"m": metric}, steps=30, progress=False)
    assert everystep.open(fork.directory).verify(progress=False).is_exact


def test_programs_alone_go_on_with_gradients_that_add_up():
    case = mlp_case(ALONE["SGD"])
    case["optimizer"] = ALONE["SGD"](case["model"][0].parameters())
    everystep.train(**case, steps=20, run="runs/whole")
    for at in (1, 20):
        fork = everystep.open("whole").fork(at, steps=25, progress=False)
        assert fork.verify(progress=False).is_exact


def test_objects_that_were_stopped_before_their_first_state_begin_with_the_same_draws(monkeypatch):
    data = torch.ones(12, 4), torch.ones(12, 1)

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {"model": model, "loss": nn.MSELoss(), "optimizer": optimizer}

    def trained(directory):
        objects = made()
        return everystep.train(
            objects.pop("model"), data, **objects, steps=9, batch_size=4, run=directory,
            progress=False,
        )  # fmt: skip

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "write_snapshot", full)
        with pytest.raises(everystep.RecordingError):
            trained("run")
    resumed = everystep.open("run").resume(**made(), data=data, progress=False)
    assert resumed.losses.equals(trained("whole").losses)
