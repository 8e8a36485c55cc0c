"""Loops over epochs: what is past does not run again, and what is logged after an epoch is recorded."""

import copy
import logging
import math
import random
import re
import time
import warnings
from collections import defaultdict
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from tests.descent import descend, looped
from tests.snapshots import take_snapshots_every
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset
from tqdm import tqdm

import everystep

STEPS = 6  # of an epoch


class StopError(Exception):
    """The loop fails, at a chosen point."""


@pytest.fixture(autouse=True)
def snapshot_every_fourth_step(monkeypatch):
    take_snapshots_every(monkeypatch, 4)


def train(directory, epochs, stop=(None, None), workers=0, patience=math.inf):
    """Train with a validation after each epoch, which draws random numbers; return what it prints.

    stop: where the loop fails: `step`, `validation`, or `log` before it logs that, and how many steps it
    has taken by then.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    data = TensorDataset(torch.randn(4 * STEPS, 3), torch.randn(4 * STEPS, 1))
    several = {"num_workers": workers, "persistent_workers": True} if workers else {}
    loader = DataLoader(data, batch_size=4, shuffle=True, **several)
    best = {"loss": math.inf, "epoch": -1, "without": 0}
    printed = []
    with everystep.record(
        run=directory, resume=True, model=model, optimizer=optimizer, best=best
    ) as recording:
        for epoch in recording.epochs(epochs):
            model.train()
            for x, y in recording.steps(loader):
                if stop == ("step", recording.step_count):
                    raise StopError
                loss = descend(optimizer, nn.functional.mse_loss(model(x), y))
                recording.log(loss=loss)
            model.eval()
            with torch.no_grad():
                found = nn.functional.mse_loss(model(data.tensors[0]), data.tensors[1])
                found += 0.3 * torch.rand(())
            if stop == ("log", recording.step_count):
                raise StopError
            recording.log(validation=found)
            best["without"] += 1
            if found < best["loss"]:
                best |= {"loss": float(found), "epoch": epoch, "without": 0}
            if stop[0] == "validation" and recording.step_count >= stop[1]:
                raise StopError
            printed.append(f"{epoch} {float(found)} {best}")
            if best["without"] > patience:
                break
    return printed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        return train("run", 6), everystep.open("run").table_frame()


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    "stop", [("step", 1), ("step", 15), ("step", 18), ("validation", 18), ("log", 36)]
)
def test_a_resumed_loop_enters_no_epoch_that_is_past(stop, whole, tmp_path, capfd):
    lines, table = whole
    with pytest.raises(StopError):
        train(tmp_path / "run", 6, stop)
    capfd.readouterr()
    resumed = train(tmp_path / "run", 6)
    assert resumed == lines[-len(resumed) :]
    assert len(resumed) < 6 or stop[1] == 1
    run = everystep.open(tmp_path / "run")
    assert run.table_frame().equals(table)
    assert run.verify(progress=False).is_exact
    assert run[STEPS + 1].epoch is None
    assert "everystep: run continues after step " in capfd.readouterr().err


def test_a_loop_that_has_ended_is_trained_for_more_epochs(whole, tmp_path):
    lines, table = whole
    first = train(tmp_path / "run", 3)
    more = train(tmp_path / "run", 6)
    assert first == lines[:3]
    assert more == lines[-len(more) :] and len(more) <= 4
    assert everystep.open(tmp_path / "run").table_frame().equals(table)


@pytest.mark.parametrize("stop", [("step", 20), ("step", 33)])
def test_a_loop_that_ends_before_its_run_says_so(stop, tmp_path, capfd):
    with pytest.raises(StopError):
        train(tmp_path / "run", 6, stop)
    train(tmp_path / "run", 3)
    said = capfd.readouterr().err
    ended = "the loop ended after step 18, and the run has 20: the parts are not as after its last step"
    assert ended in said if stop[1] == 20 else "and the run has 33: the parts are not" in said
    train(tmp_path / "run", 6)
    assert "and the run has" not in capfd.readouterr().err


def test_an_early_stop_is_the_same_when_the_loop_is_resumed(tmp_path):
    lines = train("whole", 30, patience=2)
    assert 3 < len(lines) < 30
    with pytest.raises(StopError):
        train(tmp_path / "run", 30, ("validation", STEPS * len(lines)), patience=2)
    assert train(tmp_path / "run", 30, patience=2)[-1] == lines[-1]


class Raising(dict):
    def values(self):
        raise RuntimeError("not to be looked at")


def test_to_look_at_variables_changes_nothing(tmp_path):
    def trained(stop, is_asking):
        torch.manual_seed(0)
        model, rate, last, odd = nn.Linear(3, 1), 0.1, 0.0, Raising(a=1)
        with warnings.catch_warnings(action="ignore"):
            nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        settings = locals() if is_asking else {"rate": rate}
        rate, seen = 0.5, []
        with everystep.record(
            run=tmp_path / f"run-{is_asking}", resume=True, model=model, optimizer=optimizer
        ) as recording:
            for _ in recording.epochs(3):
                for x in recording.steps([torch.ones(2, 3)] * STEPS):
                    if recording.step_count == stop:
                        raise StopError
                    last = descend(optimizer, model(x).square().mean())
                    recording.log(loss=last)
                    seen.append(settings["rate"])
        return {*seen}, rate, odd, nested

    for is_asking in (False, True):
        with pytest.raises(StopError):
            trained(9, is_asking)
        rates, *_ = trained(None, is_asking)
        assert rates == {0.1}


COUNT = 0


class Counted:
    count = 0


class Counting:
    def __init__(self):
        self.count = 0


def counted_by_default(counts=[0]):  # noqa: B006
    counts[0] += 1


def counted_within(result=None):
    count = 0

    def counted(*_):
        nonlocal count
        count += 1
        return result

    return counted


@pytest.mark.parametrize("way", ["steps", "step", "function"])
def test_all_places_where_a_loop_counts_are_named(way, tmp_path, capfd, monkeypatch):
    """What begins again with the process, wherever the code of a loop keeps it."""
    take_snapshots_every(monkeypatch, 1)

    def trained(last):
        _, trainer = 0, SimpleNamespace(callbacks=[Counting()], inner=Counting())
        model, within = nn.Linear(3, 1), counted_within()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [torch.ones(2, 3)] * STEPS

        @torch.enable_grad()
        def take(x):
            global COUNT
            COUNT += 1
            Counted.count += 1
            take.count += 1
            counted_by_default()
            within()
            trainer.inner.count += 1
            for each in trainer.callbacks:
                each.count += 1
            loss = descend(optimizer, model(x).square().mean())
            schedule.step()
            return loss

        take.count = 0
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, counted_within(1.0))
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        options = {"run": tmp_path / "run", "resume": True}
        if way == "function":
            everystep.train(take, batches, parts=parts, steps=last, progress=False, **options)
            return
        with everystep.record(**parts, **options) as recording:
            if way == "step":
                for number in range(recording.step_count, last):
                    with recording.step(batches[number]):
                        recording.log(loss=take(batches[number]))
            else:
                for x in recording.steps(batches[:last]):
                    recording.log(loss=take(x))
                    _ = COUNT

    trained(3)
    assert "began again" not in capfd.readouterr().err
    trained(6)
    said = capfd.readouterr().err
    for name in ("COUNT", "Counted.count", "take.count", "counted_by_default.counts", "within.count"):
        assert name in said, name
    for name in ("trainer.inner.count", "trainer.callbacks[0].count", "schedule.lr_lambdas.0.count"):
        assert name in said, name
    assert "_" not in re.findall(r"\w+", said)


class Rows(Dataset):
    def __init__(self):
        self.rows = [torch.ones(3)] * 4


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_data_set_within_a_part_is_named_if_it_changes(is_changed, tmp_path, capfd):
    carried = SimpleNamespace(model=nn.Linear(3, 1), data=Rows())
    optimizer = torch.optim.SGD(carried.model.parameters(), lr=0.1)
    with everystep.record(run=tmp_path / "run", carried=carried, optimizer=optimizer) as recording:
        for x in recording.steps([torch.ones(2, 3)] * 9):
            recording.log(loss=descend(optimizer, carried.model(x).square().mean()))
            carried.data.rows += [x[0]] * is_changed
    said = capfd.readouterr().err
    assert ("the part carried has values of Rows, which a run cannot keep" in said) == is_changed


def test_an_object_with_a_data_set_and_a_sampler_is_not_a_loader(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.dataset, self.sampler, self.batch_sampler = nn.Linear(3, 1), "a", "b", "c"

    trainer = SimpleNamespace(model=Model(), dataset=Rows(), sampler=[3, 1], batch_sampler=None)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with everystep.record(run=tmp_path / "run", trainer=trainer, optimizer=optimizer) as recording:
        for x in recording.steps([torch.ones(2, 3)] * 3):
            recording.log(loss=descend(optimizer, trainer.model.layer(x).square().mean()))
    assert {*recording.run[2].parameters} == {"layer.weight", "layer.bias"}


class Link:
    def __init__(self, after):
        self.after = after


class Trainer:
    """A training as a class, with all that it carries in attributes, and its recording."""

    def __init__(self):
        torch.manual_seed(0)
        self.logger, self.start = logging.getLogger("trainer"), time.time()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.loss_function = nn.MSELoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 30)
        self.averaged = [each.detach().clone() for each in self.model.parameters()]
        self.meters, self.history = defaultdict(Meter), []
        self.lowest, self.best, self.steps, self.chain = math.inf, None, 0, None
        data = TensorDataset(torch.randn(4 * STEPS, 3))
        self.loader = DataLoader(data, batch_size=4, shuffle=True)
        for _ in range(2000):
            self.chain = Link(self.chain)

    def fit(self, directory, stop=None):
        with everystep.record(trainer=self, run=directory, resume=True) as self.recording:
            self.bar = tqdm(self.recording.epochs(4), disable=True)
            for epoch in self.bar:
                meter = self.meters[epoch % 2]
                meter.total = 0.0
                for (x,) in self.recording.steps(self.loader):
                    if self.steps == stop:
                        raise StopError
                    y = x.sum(1, keepdim=True)
                    loss = descend(self.optimizer, self.loss_function(self.model(x), y))
                    self.scheduler.step()
                    self.steps += 1
                    meter.update(loss.item())
                    for average, each in zip(self.averaged, self.model.parameters(), strict=True):
                        average.lerp_(each.detach(), 0.1)
                    self.recording.log(loss=loss)
                self.history.append(meter.total)
                if meter.total < self.lowest:
                    self.lowest, self.best = meter.total, copy.deepcopy(self.model.state_dict())
        return self


def test_a_trainer_with_all_that_it_has_may_be_a_part(tmp_path, capfd):
    whole = Trainer().fit(tmp_path / "whole")
    for stop in (9, 17):
        with pytest.raises(StopError):
            Trainer().fit(tmp_path / "run", stop)
    resumed = Trainer().fit(tmp_path / "run")
    assert resumed.history == whole.history and resumed.lowest == whole.lowest
    assert resumed.best.keys() == whole.best.keys()
    of = [[*each.model.parameters(), *each.averaged, *each.best.values()] for each in (resumed, whole)]
    assert all(torch.equal(one, two) for one, two in zip(*of, strict=True))
    run, said = everystep.open(tmp_path / "run"), capfd.readouterr().err
    assert run.verify(progress=False).is_exact
    assert run.losses.equals(everystep.open(tmp_path / "whole").losses)
    assert {*run[5].parameters} == {*whole.model.state_dict()}  # the loss has no tensors
    assert {*re.findall(r"values of (.*), which", said)} == {"Link"}
    assert "with this process" not in said


class Meter:
    def __init__(self):
        self.total, self.name = 0.0, "mean"

    def update(self, value):
        self.total += value


@pytest.mark.parametrize(("stop", "at"), [(1, 0), (9, 8), (15, 12)])
def test_variables_in_no_part_that_a_resumed_loop_changes_are_named(stop, at, tmp_path, capfd):
    def trained(stop):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(4 * STEPS, 3)
        loader = DataLoader(TensorDataset(x), batch_size=4)
        meter, counts, lowest, weight = Meter(), {"steps": 0}, math.inf, model.weight
        history, by_name, summed = [], {"loss": 0.0}, torch.zeros(())
        with everystep.record(
            run=tmp_path / "run", resume=True, model=model, optimizer=optimizer, counts=counts
        ) as recording:
            for _ in recording.epochs(5):
                running, added, last = 0.0, 0, None
                for i, (x,) in enumerate(recording.steps(loader)):
                    if recording.step_count == stop:
                        raise StopError
                    last = loss = descend(optimizer, (model(x) - i).square().mean())
                    recording.log(loss=loss)
                    running += loss.item()
                    added = added + loss.detach()
                    summed += loss.detach()
                    by_name["loss"] += loss.item()
                    counts["steps"] += 1
                    meter.update(loss.item())
                history.append(running)
                lowest = min(lowest, running)
        return last, weight, history

    with pytest.raises(StopError):
        trained(stop)
    capfd.readouterr()
    trained(None)
    said = capfd.readouterr().err
    found = re.findall(r"earlier (\w+), .* with this process: ([\w., ]+)\. If", said)
    in_step = ("steps", "meter.total, by_name, summed, running, added")
    in_epoch = ("epochs", "meter.total, lowest, history, by_name, summed")
    assert f"continues after step {at}" in said
    # After 12 steps, the loop continues with the code after the steps of an epoch.
    after = ("epochs", "lowest, history")
    assert found == {0: [], 8: [in_step, in_epoch], 12: [after]}[at]


def test_workers_that_stay_are_started_as_they_were(tmp_path):
    lines = train("whole", 4, workers=1)
    with pytest.raises(StopError):
        train(tmp_path / "run", 4, ("step", 3 * STEPS + 2), workers=1)
    resumed = train(tmp_path / "run", 4, workers=1)
    assert resumed == lines[-len(resumed) :] and len(resumed) < 4


def test_what_is_logged_after_a_step_belongs_to_it(whole):
    _, table = whole
    logged = table.filter(table["validation"].is_not_null())
    assert logged["step"].to_list() == [STEPS * n for n in range(1, 7)]


def test_what_cannot_be_logged_outside_of_a_step_is_reported():
    with everystep.record(run="./run", model=nn.Linear(2, 1)) as recording:
        with pytest.raises(everystep.UsageError, match="before the first step"):
            recording.log(validation=1.0)
        with recording.step():
            pass
        with pytest.raises(everystep.UsageError, match="another name, such as"):
            recording.log(loss=1.0)
        recording.log(validation=1.0)
    assert everystep.open("run").measured("validation") == {1: 1.0}


class Noisy(Dataset):
    """Draws a random number for each row."""

    def __len__(self):
        return 20

    def __getitem__(self, row):
        return torch.rand(3) + row


class Ordered(Sampler):
    """Has an order for each epoch, from one that it was set to, or from the one before."""

    def __init__(self):
        self.epoch, self.order = 0, [*range(8)]

    def __iter__(self):
        self.order = [self.order[(3 * n + self.epoch) % 8] for n in range(8)]
        return iter(self.order)


@pytest.mark.parametrize("of", ["seed", "parameters", "sampler", "generator", "more epochs"])
def test_a_loop_continues_between_epochs_as_the_code_before_them_left_it(of, tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 1000)

    def trained(directory, epochs, stop=None, force=False):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data, sampler = torch.arange(24.0).view(8, 3) / 9, Ordered() if of == "sampler" else None
        own = torch.Generator().manual_seed(1) if of == "generator" else None
        order = {"sampler": sampler} if sampler else {"shuffle": True, "generator": own}
        loader = DataLoader(data, batch_size=2, **order)
        parts = {"model": model, "optimizer": optimizer}
        with everystep.record(run=directory, resume=True, force=force, **parts) as recording:
            if of == "seed":
                torch.manual_seed(5)
            elif of == "parameters":
                nn.init.ones_(model.weight)
            for loop in range(1 + (of == "more epochs")):
                for epoch in recording.epochs(epochs):
                    if epoch == stop:
                        raise StopError
                    if sampler is not None:
                        sampler.epoch = epoch
                    if epoch:
                        recording.log(before=epoch + 10 * loop)
                    for x in recording.steps(loader):
                        loss = descend(optimizer, model(x).square().mean())
                        recording.log(loss=loss)
        return recording.run.table_frame()

    whole = trained(tmp_path / "whole", 3)
    if of == "more epochs":  # it ends between two loops
        with pytest.raises(StopError):
            trained(tmp_path / "run", 3, 2)
    else:
        trained(tmp_path / "run", 2)
    # By force, nothing is repeated and compared: it continues with the state between two epochs.
    assert trained(tmp_path / "run", 3, force=True).equals(whole)


class Warming(nn.Module):
    """A model that becomes another after some passes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.is_warm, self.passes = False, 0

    def forward(self, x):
        self.passes += self.training
        self.is_warm |= self.passes > 9
        return self.layers(x) / (1 + self.is_warm)


@pytest.mark.sweep(every=8)
@pytest.mark.parametrize("every", [1, 2, 1000])
@pytest.mark.parametrize("stop", [("step", 3), ("step", 10), ("validation", 1)])
@pytest.mark.parametrize("is_ordered", [True, False])
def test_a_cell_of_a_notebook_that_was_interrupted_continues_with_its_objects(
    is_ordered, stop, every, tmp_path, monkeypatch
):
    take_snapshots_every(monkeypatch, every)

    def trained(directory, stop):
        torch.manual_seed(0)
        model, ordered = Warming(), Ordered()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        order = {"shuffle": True, "generator": torch.Generator().manual_seed(1)}
        order = {"sampler": ordered} if is_ordered else order
        loader = DataLoader(torch.arange(24.0).view(8, 3) / 9, batch_size=2, **order)

        def cell(stop):
            with everystep.record(
                run=directory, resume=True, model=model, optimizer=optimizer
            ) as recording:
                for epoch in recording.epochs(4):
                    model.train()
                    ordered.epoch = epoch
                    for x in recording.steps(loader):
                        optimizer.param_groups[0]["lr"] = 0.1 / (1 + recording.step_count)
                        recording.log(loss=descend(optimizer, model(x).square().mean()))
                        if stop == ("step", recording.step_count):
                            raise KeyboardInterrupt
                    model.eval()
                    if stop == ("validation", epoch):
                        raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            cell(stop)
        if stop is not None:
            cell(None)
        return everystep.open(directory).table_frame(), model.passes

    (table, passes), (other, count) = trained(tmp_path / "whole", None), trained(tmp_path / "run", stop)
    assert other.equals(table) and passes == count


def test_a_loop_that_ends_at_once_by_force_says_so(capsys):
    """A generator that has ended is not begun again: its end may have drawn random numbers."""

    def looped_over(count, **options):
        batches = (torch.ones(2, 3) for _ in range(count))
        return looped(nn.Linear(3, 1), batches, lambda m, x: m(x).sum(), run="./run", **options)

    looped_over(3)
    assert len(looped_over(5, resume=True, force=True)) == 3
    assert (
        "no step was added: the recorded loop took its last batch at step 3" in capsys.readouterr().err
    )
    assert len(looped_over(5, resume=True)) == 5


class Chunked(Sampler):
    """Shuffles eight rows at a time, as it comes to them."""

    def __iter__(self):
        for begin in range(0, 24, 8):
            yield from random.sample(range(begin, begin + 8), 8)


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("every", [1, 1000])
@pytest.mark.parametrize("where", ["after a step", "before a step", "nowhere"])
def test_a_loop_that_leaves_its_batches_by_break_leaves_them_when_it_is_resumed(
    where, every, tmp_path, monkeypatch
):
    take_snapshots_every(monkeypatch, every)

    def trained(directory, stop=None, force=False):
        torch.manual_seed(0)
        random.seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
        if where == "nowhere":  # what draws is a sampler within one of torch's own
            loader = DataLoader(
                torch.arange(72.0).view(24, 3) / 72, batch_sampler=BatchSampler(Chunked(), 3, False)
            )
        parts = {"model": model, "optimizer": optimizer}
        with everystep.record(run=directory, resume=True, force=force, **parts) as recording:
            for _ in recording.epochs(3):
                for number, x in enumerate(recording.steps(loader)):
                    if recording.step_count == stop:
                        raise StopError
                    if number == 2 and where == "before a step":
                        break
                    loss = model(x + random.random()).square().mean()
                    recording.log(loss=descend(optimizer, loss))
                    if number == 1 and where == "after a step":
                        break
                recording.log(validation=torch.rand(()))
        return recording.run.table_frame()

    whole = trained(tmp_path / "whole")
    for stop in (2, 3, 4):
        with pytest.raises(StopError):
            trained(tmp_path / f"{stop}", stop)
        assert trained(tmp_path / f"{stop}", force=stop % 2 == 0).equals(whole), stop


def test_a_state_that_code_after_the_last_step_has_changed_is_not_that_after_the_step(tmp_path):
    def trained(directory, stop=None):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        with everystep.record(run=directory, resume=True, model=model) as recording:
            for _ in range(2):
                for x in recording.steps([torch.ones(2, 3)] * 3):
                    if recording.step_count == stop:
                        raise StopError
                    recording.log(loss=model(x).sum())
                nn.init.ones_(model.weight)
        return recording.run.table_frame()

    with pytest.raises(StopError):
        trained(tmp_path / "run", 3)
    assert trained(tmp_path / "run").equals(trained(tmp_path / "whole"))


def test_epochs_within_epochs_are_refused_before_the_first_step(tmp_path):
    with (
        pytest.raises(everystep.UsageError, match=r"within another recording\.epochs"),
        everystep.record(run=tmp_path / "run", model=nn.Linear(2, 1)) as recording,
    ):
        for _ in recording.epochs(2):
            for _ in recording.epochs(2):
                raise AssertionError
    assert len(everystep.open(tmp_path / "run")) == 0


def test_a_loop_recorded_without_epochs_is_not_resumed_with_them(tmp_path):
    def trained(in_epochs):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with everystep.record(
            run=tmp_path / "run", resume=True, model=model, optimizer=optimizer
        ) as recording:
            for _ in recording.epochs(3) if in_epochs else range(3):
                for x in recording.steps([torch.ones(2, 3)] * 5):
                    recording.log(loss=descend(optimizer, model(x).square().mean()))

    trained(False)
    with pytest.raises(everystep.RunError, match=r"recorded without recording\.epochs"):
        trained(True)
