"""Recorded loops do what they do without everystep, and every step of them opens again without them."""

import copy
import gc
import math
import re
import shutil
import threading
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.descent import as_alone, descend, looped
from tests.sealing import seal_repeats, sql
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import bits
from tests.training.loops import LOOPS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everystep
from everystep.recording.contents import packed

STEPS = 30


@pytest.mark.sweep(every=6)
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_does_the_same_recorded_and_every_step_opens_again(name, tmp_path):
    run, (losses, _) = as_alone(tmp_path / name, partial(LOOPS[name], STEPS))
    assert (run.losses["loss"].to_list(), run.status) == (losses, "finished")
    last = len(run)
    for number in (last, 2, last // 2, 1):
        step = run[number]
        assert step.is_exact and step.loss == losses[number - 1]
        assert len(step.operations) > 5


# Messages, and what is kept, in other cases.


@pytest.fixture
def made():
    """A small model, its optimizer and a batch; runs go to a place of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, (torch.randn(16, 4), torch.randn(16, 2))


def mean_square(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def take(model, optimizer, batch):
    return descend(optimizer, mean_square(model, batch))


def test_a_number_that_is_logged_after_a_tensor_keeps_its_digits(made, tmp_path):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer, run=tmp_path / "run") as recording:
        for number, each in enumerate(recording.steps([batch] * 3)):
            loss = take(model, optimizer, each)
            recording.log(loss=0.1 if number == 1 else loss)
    assert recording.run.losses["loss"].to_list()[1] == 0.1


def test_a_break_ends_a_step_and_an_exception_discards_it(made, capfd):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number, each in enumerate(recording.steps([batch] * 9)):
            recording.log(loss=take(model, optimizer, each))
            if number == 3:
                break
    assert (len(recording.run), recording.run.snapshots[-1]) == (4, 4)
    with (
        pytest.raises(ZeroDivisionError),
        everystep.record(model=model, optimizer=optimizer) as recording,
    ):
        for number, each in enumerate(recording.steps([batch] * 9)):
            loss = take(model, optimizer, each)
            if number == 3:
                raise ZeroDivisionError("of my own")
            recording.log(loss=loss)
    assert "logs no loss" not in capfd.readouterr().err
    run = recording.run
    assert (len(run), run.status, run.facts.reason) == (3, "failed", "of my own")
    assert run.snapshots == [0]
    assert run.verify(processes=1, progress=False).is_exact


def test_what_a_batch_may_be(made):
    model, optimizer, (x, y) = made
    batch = {
        "inputs": {"x": x},
        "targets": [y, "as text"],
        "weights": np.ones(3),
        "n": 3,
        "what": object(),
    }
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for each in recording.steps([batch] * 2):
            recording.log(loss=take(model, optimizer, (each["inputs"]["x"], each["targets"][0])))
            each["inputs"]["x"] = None
            batch["inputs"]["x"] = x
    found = recording.run[2].batch
    assert list(found.tensors) == ["inputs.x", "targets.0", "weights"]
    nested = found.nested
    assert nested["inputs"]["x"].equal(x) and nested["targets"][1] == "as text" and nested["n"] == 3
    assert nested["what"] == "<object>"
    with pytest.raises(everystep.UsageError, match=r"no tensor 'x'; known: inputs\.x, targets\.0"):
        found.x  # noqa: B018


def test_a_body_may_change_its_batch_and_loaders_may_use_their_memory_again(made):
    model, _, (x, y) = made
    memory = torch.empty_like(x)

    def batches():
        for number in range(4):
            memory.copy_(x * (number + 1))
            yield memory, y

    run = looped(model, batches(), lambda model, pair: mean_square(model, (pair[0].add_(1), pair[1])))
    assert run.verify(processes=1, progress=False).is_exact
    assert run[3].batch.x.equal(x * 3)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_training_another_model_than_the_recorded_one_is_reported(make, made, capfd):
    model, _, pair = made
    other = copy.deepcopy(model)
    optimizer = make(other.parameters(), lr=0.01)
    with everystep.record(model=model, run="run") as recording:
        for batch in recording.steps([pair] * 3):
            optimizer.zero_grad()
            loss = mean_square(other, batch)
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
    notice = capfd.readouterr().err
    shape = tuple(next(other.parameters()).shape)
    assert f"changes a parameter {shape} of torch.float32 (" in notice and "test_record.py:" in notice
    assert "pass the object that holds it to everystep.record(...)" in notice
    assert everystep.open("run").verify(progress=False).is_exact


@pytest.mark.parametrize("way", ["numpy", "sobol"])
def test_memory_that_other_code_fills_may_be_changed_in_place(way, made, capfd):
    model, _, (_, y) = made
    rows = np.random.default_rng(0).random((5, *y.shape[:1], 4), np.float32)

    def loss_of(model, number):
        if way == "sobol":  # its kernel fills memory, and what follows scales it in place
            x = torch.quasirandom.SobolEngine(4, scramble=True, seed=int(number)).draw(len(y))
        else:
            x = torch.empty(len(y), 4)
            x.numpy()[:] = rows[int(number)]
            x.mul_(2.0)
        return mean_square(model, (x, y))

    run = looped(model, [*torch.arange(5)], loss_of)
    assert run.verify(processes=1, progress=False).is_exact
    assert "not among the tensors of the parts" not in capfd.readouterr().err


def test_rows_are_kept_once_however_they_are_shuffled():
    x, y = torch.randn(64, 400) / 10, torch.randn(64, 2)
    batches = (x[torch.randperm(64)] for _ in range(20))
    run = looped(nn.Linear(400, 2), batches, lambda model, rows: mean_square(model, (rows, y)))
    kept = sum(file.stat().st_size for file in (run.directory / "batches").iterdir())
    assert kept < x.nbytes + y.nbytes + 100
    assert run.verify(processes=1, progress=False).is_exact


def test_beyond_the_budget_the_oldest_batches_go_and_later_steps_still_open(made):
    model, optimizer, (_, y) = made
    with everystep.record(model=model, optimizer=optimizer, batch_budget=20_000) as recording:
        for number in range(300):
            x = torch.randn(16, 4)
            with recording.step((x, y)):
                recording.log(loss=take(model, optimizer, (x, y)))
            if number % 20 == 0:
                recording.flush()
    run = recording.run
    lost_to = run.facts.batches_lost_to
    assert 100 < lost_to < 300
    with pytest.raises(everystep.RunError, match=r"batch_budget of everystep\.record"):
        run[lost_to]
    assert run[300].is_exact and run[300].batch.x.equal(x)
    found = run.verify(processes=1, progress=False)
    assert not found.is_exact and found.steps < found.all_steps
    assert not found.different_steps and any("was dropped" in problem for problem in found.problems)
    after = next(step for step in run.snapshots if step > lost_to)
    assert after < 300 and run[after + 1].is_exact


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "pass at least the model"),
        ({"model": nn.Linear}, "model: is not a part of a training: Linear"),
        ({"model": 3}, "model: is not a part of a training: int"),
        ({"model": nn.Sequential(), "rate": None}, "rate: is not a part"),
        ({"model": nn.Sequential(), "rate": 0.1}, "dicts, lists, deques or objects that hold values"),
        ({"model": nn.ModuleDict({"head": nn.Linear(1, 1)}), "head": nn.Linear(1, 1)}, "head_part="),
    ],
)
def test_what_is_no_part_is_named(parts, message):
    with pytest.raises(everystep.UsageError, match=message):
        everystep.record(**parts)


class _Trainer:
    """As many write them: it holds all that it needs, the recording included."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.recording = model, optimizer, None
        self.loader = DataLoader(TensorDataset(torch.randn(6, 4), torch.randn(6, 2)), 3)

    def fit(self):
        with everystep.record(
            trainer=self, stop_when="norm(gradients['0.weight']) < 0"
        ) as self.recording:
            for x, y in self.recording.steps(self.loader):
                loss = nn.functional.mse_loss(self.model(x), y)
                self.recording.log(loss=descend(self.optimizer, loss))


def test_all_is_free_once_the_recording_has_ended(made):
    """Python ends the workers of a loader that it finds in a cycle 5 seconds late."""
    trainer = _Trainer(*made[:2])
    trainer.fit()
    run, known = trainer.recording.run, [weakref.ref(each) for each in (trainer, trainer.loader)]
    gc.disable()
    try:
        del trainer
        assert [each() for each in known] == [None, None] and len(run) == 2
    finally:
        gc.enable()


@pytest.fixture
def collector():
    """Python's garbage collector as a user has it; the tests have none."""
    usual = gc.get_threshold()
    gc.enable()
    yield
    gc.disable()
    gc.unfreeze()
    gc.set_threshold(*usual)


def test_what_a_loop_does_with_the_garbage_collector_stays_so(made, collector):
    model, optimizer, batch = made
    usual, seen = gc.get_threshold(), []
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number, _ in enumerate(recording.steps([batch] * 8)):
            take(model, optimizer, [part[number:] for part in batch])
            seen.append(gc.isenabled())
            if number == 1:
                gc.freeze()
                gc.disable()
            if number == 3:
                gc.enable()
                gc.set_threshold(5000, 5, 5)
            if number == 5:
                gc.set_threshold(*usual)
                gc.disable()
    assert seen == [True, True, False, False, True, True, False, False]
    assert not gc.isenabled() and gc.get_threshold() == usual


@pytest.mark.parametrize("how", ["raise", "break", "leave a context"])
def test_the_garbage_collector_is_as_before_after_a_loop(how, made, collector):
    model, optimizer, batch = made
    usual = gc.get_threshold()
    with suppress(KeyError), everystep.record(model=model, optimizer=optimizer) as recording:
        steps = recording.steps([batch] * 3)
        for _ in () if how == "leave a context" else steps:
            take(model, optimizer, batch)
            if how == "raise":
                raise KeyError
            break
        if how == "leave a context":
            with recording.step(batch):
                take(model, optimizer, batch)
                raise KeyError
    assert gc.isenabled() and gc.get_threshold() == usual


def test_a_progress_bar_knows_how_many_steps_there_are(made):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        steps = recording.steps([batch] * 3)
        assert len(steps) == 3 and [len(each) for each in steps] == [2, 2, 2]
        with pytest.raises(TypeError, match="has no len"):
            len(recording.steps(iter([batch])))
        assert len(list(recording.steps(iter([batch])))) == 1


def test_a_part_without_a_name_is_reported(made):
    model, optimizer, _ = made
    with pytest.raises(everystep.UsageError, match=r"got Sequential, .* without a name.*model=model"):
        everystep.record(model, optimizer)


def test_calls_at_the_wrong_time_say_what_to_do(made):
    model, _, batch = made
    recording = everystep.record(model=model)
    with pytest.raises(everystep.UsageError, match=r"with everystep\.record\(\.\.\.\) as recording"):
        next(recording.steps([batch]))
    with recording:
        with pytest.raises(everystep.UsageError, match="outside of a step"):
            recording.log(loss=1.0)
        with pytest.raises(everystep.UsageError, match="another recording is in progress"):
            everystep.record(model=model).__enter__()
        with recording.step(batch):
            for wrong in (torch.zeros(2), "text", None, b"1", np.complex64(1j), 10**400):
                with pytest.raises(everystep.UsageError, match="log: loss"):
                    recording.log(loss=wrong)
            with pytest.raises(everystep.UsageError, match="one loop at a time"):
                next(recording.steps([batch]))
    with pytest.raises(everystep.UsageError, match="already started"):
        recording.__enter__()
    for late in (lambda: recording.begin_step(batch), lambda: recording.stop("no progress")):
        with pytest.raises(everystep.UsageError, match="the recording has ended"):
            late()
    with pytest.raises(everystep.RunError, match="your own code"):
        recording.run.fork(1)


def test_of_two_threads_that_begin_at_once_one_records(tmp_path):
    ready, is_refused, refused = threading.Barrier(2), threading.Event(), []

    def record(name):
        model = nn.Linear(3, 1)
        ready.wait()
        try:
            with everystep.record(model=model, run=tmp_path / name) as recording:
                is_refused.wait(60)
                for x in recording.steps([torch.ones(2, 3)] * 3):
                    recording.log(loss=model(x).sum())
        except everystep.UsageError as error:
            refused.append(str(error))
            is_refused.set()

    threads = [threading.Thread(target=record, args=(name,)) for name in "ab"]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    (message,), (run,) = refused, everystep.runs(tmp_path)
    assert f"another recording is in progress ({run.name})" in message
    assert len(run) == 3 and run.verify(progress=False).is_exact


def test_steps_that_another_thread_reads_ahead_are_refused(made):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        steps, raised = iter(recording.steps([batch] * 3)), []

        def ahead():
            try:
                next(steps)
            except everystep.UsageError as error:
                raised.append(str(error))

        thread = threading.Thread(target=ahead)
        thread.start()
        thread.join()
        assert "recording.steps(ahead(loader))" in raised[0]


def test_a_loader_that_is_empty_or_raises(made, capsys):
    model, optimizer, batch = made
    with everystep.record(model=model) as recording:
        for _ in recording.steps([]):
            pass
    assert "no step was recorded: there was no batch, or" in capsys.readouterr().err
    assert len(recording.run) == 0

    def broken():
        yield batch
        raise OSError("the disk is gone")

    with (
        pytest.raises(OSError, match="the disk is gone"),
        everystep.record(model=model, optimizer=optimizer) as recording,
    ):
        for each in recording.steps(broken()):
            recording.log(loss=take(model, optimizer, each))
    assert (len(recording.run), recording.run.status) == (1, "failed")


def test_rows_that_are_not_finite_are_those_of_the_batch(made):
    model, _, (x, y) = made
    worse = x.clone()
    worse[5, 0] = math.inf
    run = looped(model, [(x, y), (worse, y), (x, y)], mean_square)
    found = run.first_nonfinite(progress=False)
    assert (found.step.number, found.rows, found.step.batch.whole) == (2, (5,), "the batch")


def test_a_loss_that_an_infinite_number_makes_infinite_is_found(made):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number, _ in enumerate(recording.steps([0] * 3), 1):
            loss = mean_square(model, batch)
            recording.log(loss=loss * math.inf if number == 2 else loss)
    found = recording.run.first_nonfinite(progress=False)
    assert (found.step.number, found.origin, found.name, found.infinities) == (2, "outside", "loss", 1)
    assert "put 1 infinite number into loss; your own code" in found.to_text()


def test_snapshots_have_no_gradients_that_the_next_step_drops(made):
    model, _, batch = made
    run = looped(model, [batch] * 80, mean_square)
    *between, last = sorted((run.directory / "snapshots").iterdir())
    assert len(between) > 1
    for snapshot in between:
        rest = load_file(snapshot / "rest.safetensors")
        assert not [name for name in rest if "gradient/" in name]
    assert "gradient/0.weight" in load_file(last / "rest.safetensors")
    assert run.verify(processes=1, progress=False).is_exact


def test_snapshots_of_a_training_have_no_gradients_that_the_next_step_drops(tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 2)
    run = everystep.train_experiment("two-layer", {"steps": 6}, run=tmp_path / "run", progress=False)
    snapshots = sorted((run.directory / "snapshots").iterdir())
    assert len(snapshots) == 4
    for snapshot in snapshots:
        assert not [name for name in load_file(snapshot / "rest.safetensors") if "gradient/" in name]


def test_gradients_that_wait_for_a_later_step_are_in_the_snapshots_between(tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 1)

    def left(until=None, **options):
        torch.manual_seed(0)
        often, rarely, batches = nn.Linear(3, 1), nn.Linear(3, 1), torch.randn(8, 4, 3).unbind()
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (often, rarely)]
        parts = {"often": often, "rarely": rarely, "one": optimizers[0], "two": optimizers[1]}
        with everystep.record(run=tmp_path / "run", **parts, **options) as recording:
            for x in recording.steps(batches):
                number = recording.step_count + 1
                recording.log(loss=descend(optimizers[0], often(x).pow(2).mean()))
                if number in (1, 5):
                    rarely(x).pow(2).mean().backward()
                if number == 7:
                    optimizers[1].step()
                if number == until:
                    break
        return bits(rarely.weight)

    expected = left()
    assert everystep.open(tmp_path / "run").verify(processes=1, progress=False).is_exact
    shutil.rmtree(tmp_path / "run")
    left(until=4)
    assert left(resume=True) == expected


@pytest.mark.parametrize("uses", ["steps", "reads"])
def test_gradients_that_code_after_an_epoch_uses_are_in_the_snapshot(uses, tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 1)

    def left(directory, stop=None):
        torch.manual_seed(0)
        model, batches = nn.Linear(3, 1), torch.randn(5, 4, 3).unbind()
        optimizer, scale = torch.optim.SGD(model.parameters(), lr=0.1), {"is": 1.0}
        with everystep.record(
            run=directory, resume=True, model=model, optimizer=optimizer, scale=scale
        ) as recording:
            for _ in recording.epochs(3):
                for x in recording.steps(batches):
                    if recording.step_count == stop:
                        break
                    recording.log(loss=descend(optimizer, model(x).square().mean() * scale["is"]))
                if recording.step_count == stop:
                    break
                if uses == "steps":
                    optimizer.step()
                else:
                    scale["is"] = 1 / (1 + float(model.weight.grad.norm()))
        return recording.run.losses

    whole = left(tmp_path / "whole")
    left(tmp_path / "run", 6)
    assert left(tmp_path / "run").equals(whole)


@pytest.mark.parametrize("read", [torch.norm, lambda gradient: sum(map(abs, gradient.tolist()[0]))])
def test_gradients_that_python_alone_reads_are_in_the_snapshots_before(read, tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 1)

    def left(**options):
        torch.manual_seed(0)
        model, batches = nn.Linear(3, 1), torch.randn(6, 4, 3).unbind()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with everystep.record(model=model, optimizer=optimizer, **options) as recording:
            for x in recording.steps(batches):
                if model.weight.grad is not None:
                    optimizer.param_groups[0]["lr"] = 0.1 / (1 + float(read(model.weight.grad)))
                recording.log(loss=descend(optimizer, model(x).pow(2).mean()))
        return bits(model.weight)

    expected = left(run=tmp_path / "run")
    assert left(run=tmp_path / "fork", fork=tmp_path / "run", at=2) == expected


def clipped_between_steps(model, number):
    for parameter in model.parameters():
        parameter.data.clamp_(-0.2, 0.2)


def gradients_scaled_between_steps(model, number):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data.mul_(0.5)


def made_before_the_first_step(model, number):
    if number == 1:
        model.apply(lambda m: m.weight.data.normal_(0, 0.2) if isinstance(m, nn.Linear) else None)


def written_through_a_view(model, number):
    model[0].weight[0].data.mul_(0.9)


def written_by_numpy(model, number):
    model[0].weight.detach().numpy()[0] *= 0.9
    np.asarray(model[0].bias.detach())[:1] = number


def only_read(model, number):
    assert model[0].weight.data.norm() > 0
    assert model[0].bias.detach().numpy().shape == (len(model[0].bias.tolist()),)


def test_a_gradient_that_code_between_two_steps_makes_is_not_called_its_parameter(made, capfd):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for _ in recording.epochs(2):
            for each in recording.steps([batch] * 2):
                recording.log(loss=take(model, optimizer, each))
            mean_square(model, batch).backward()  # such as for the importance of each parameter
    assert "the loop changes the gradient of 0.weight outside of a step" in capfd.readouterr().err
    assert recording.run.verify(processes=1, progress=False).is_exact


@pytest.mark.parametrize(
    ("between", "is_told"),
    [
        *[(clipped_between_steps, True), (gradients_scaled_between_steps, True)],
        *[(made_before_the_first_step, True), (written_through_a_view, True)],
        *[(written_by_numpy, True), (only_read, False)],
    ],
)
def test_what_is_written_without_a_count_between_steps_is_kept(made, capfd, between, is_told):
    """torch does not count such writes."""
    model, _, (x, y) = made
    shadow = torch.zeros(2)  # in no part
    with everystep.record(model=model) as recording:
        for number in range(1, 9):
            between(model, number)
            shadow.data.add_(0.1)
            with recording.step((x, y)):
                loss = ((model(x) + shadow - y) ** 2).mean()
                loss.backward()
                for parameter in model.parameters():
                    parameter.data.sub_(0.1 * parameter.grad.data)
                recording.log(loss=loss)
        between(model, 9)
    run = recording.run
    assert run.verify(processes=1, progress=False).is_exact
    assert run[5].is_exact
    assert ("outside of a step" in capfd.readouterr().err) is is_told
    if between is clipped_between_steps:
        assert float(run[5].parameters["0.weight"].abs().max()) < 0.2001


def doubled(loss):
    loss.data.mul_(2)


def with_other_memory(loss):
    loss.data = loss.data * 2


@pytest.mark.parametrize("change", [doubled, with_other_memory])
def test_a_loss_that_is_changed_after_it_was_logged_is_the_logged_one(made, change):
    model, optimizer, batch = made
    known = []
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for x, y in recording.steps([batch] * 4):
            loss = ((model(x) - y) ** 2).mean()
            recording.log(loss=loss)
            known.append(loss.item())
            descend(optimizer, loss)
            change(loss)
    assert recording.run.losses["loss"].to_list() == known
    assert recording.run.verify(processes=1, progress=False).is_exact


def test_a_loop_that_logs_some_losses_is_told_of_the_others(made, capfd):
    model, optimizer, batch = made
    for first in (0, 1):
        with everystep.record(model=model, optimizer=optimizer) as recording:
            for number, each in enumerate(recording.steps([batch] * 4)):
                loss = take(model, optimizer, each)
                if number % 2 == first:
                    recording.log(loss=loss)
        which = "steps before 2 log no loss" if first else "step 2 logs no loss"
        assert f"{which}, and others do; the run has NaN in its place" in capfd.readouterr().err


def test_names_of_a_batch_that_are_alike_are_told_apart(made):
    model, _, (x, y) = made
    given = [{1: x, "1": 2 * x, "a.b": y, "a": {"b": -y}}] * 2
    run = looped(model, given, lambda model, at: mean_square(model, (at["1"] - at[1], at["a.b"])))
    batch = run[2].batch.nested
    assert torch.equal(batch["1"], x) and torch.equal(batch["1_"], 2 * x)
    assert torch.equal(batch["a.b"], y) and torch.equal(batch["a"]["b"], -y)


def test_what_inference_mode_has_made_may_change_between_steps(made):
    """torch counts no changes of such tensors."""
    model, optimizer, (x, y) = made
    state = {"shift": torch.zeros(2)}
    with everystep.record(model=model, optimizer=optimizer, state=state) as recording:
        for _ in range(6):
            with recording.step((x, y)):
                loss = ((model(x) + state["shift"].clone() - y) ** 2).mean()
                recording.log(loss=descend(optimizer, loss))
                with torch.inference_mode():
                    state["shift"] = model(x).mean(0)
            with torch.inference_mode():
                state["shift"].add_(0.3)
    assert recording.run.verify(processes=1, progress=False).is_exact


def write_by_numpy(weight, array):
    array[0, 0] = 0.5


def write_in_a_thread(weight, array):
    thread = threading.Thread(target=lambda: weight.data.fill_(0.5))
    thread.start()
    thread.join()


@pytest.mark.parametrize("write", [write_by_numpy, write_in_a_thread])
def test_hidden_writes_are_found_by_the_next_digest_where_there_is_no_loss(
    made, write, everystep_command, monkeypatch
):
    take_snapshots_every(monkeypatch, 1000)  # a state after 128 would have what was written
    model, optimizer, batch = made
    array = model[0].weight.detach().numpy()
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number, each in enumerate(recording.steps([batch] * 150), start=1):
            take(model, optimizer, each)
            if number == 80:
                write(model[0].weight, array)
    run = recording.run
    found = run.verify(processes=1, progress=False)
    assert not found.is_exact
    (problem,) = found.problems
    assert problem.startswith("after step 128, the state differs from the recording: 0.weight, ")
    assert "something wrote after step 64 where torch does not see it" in problem
    assert "only `everystep verify` can check it" in everystep_command("step", run.name, "110")[1]
    assert "NOT bit-identical" in everystep_command("step", run.name, "137")[1]


def test_gradients_are_shown_where_the_loop_itself_updates_and_drops_them(made, tmp_path):
    model, _, batch = made
    bias, found = torch.zeros(1, requires_grad=True), []
    with everystep.record(run=tmp_path / "run", model=model, bias=bias) as recording:
        for each in recording.steps([batch] * 12):
            loss = mean_square(model, each) + bias.square().sum() + bias.sum()
            loss.backward()
            (0.1 * model(each[0]).sum()).backward()  # adds to them
            recording.log(loss=loss)
            with torch.no_grad():
                for tensor in (*model.parameters(), bias):
                    tensor -= 0.1 * tensor.grad
            found.append([tensor.grad for tensor in (*model.parameters(), bias)])
            model.zero_grad()
            bias.grad = None
    for number in (1, 2, 12):
        gradients = recording.run[number].gradients
        assert set(gradients) == {*dict(model.named_parameters()), "bias"}
        for name, expected in zip(gradients, found[number - 1], strict=True):
            assert torch.equal(gradients[name], expected)
    assert recording.run.verify(progress=False).is_exact
    assert recording.run.why(7, "gradients['2.bias'][1]").number.value == found[6][3][1].item()


def test_a_loss_that_is_not_a_number_is_read_from_an_operation(made):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number, each in enumerate(recording.steps([batch] * 6)):
            loss = take(model, optimizer, each) * (math.nan if number > 2 else 1)
            recording.log(loss=loss.item())
    found = recording.run.verify(progress=False)
    assert (found.is_exact, found.computed_losses) == (True, 6)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_loss_that_no_operation_computes_is_not_said_to_be_verified(made, is_mixed, everystep_command):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number, each in enumerate(recording.steps([batch] * 40), start=1):
            loss = take(model, optimizer, each)
            recording.log(loss=loss if is_mixed and number % 2 == 0 else loss.item() / 3)
    run = recording.run
    found = run.verify(progress=False)
    assert (found.is_exact, found.computed_losses) == (True, 20 if is_mixed else 0)
    said = (
        "20 bit-identical; no operation computes the other 20; the states, and the numbers that Python"
        if is_mixed
        else "no operation computes any of the 40; the states, and the numbers that Python"
    )
    _, text, _ = everystep_command("verify", run.name)
    assert said in " ".join(text.split())
    _, text, _ = everystep_command("step", run.name, "3")
    assert "no operation computes the loss, so only `everystep verify` can check it" in " ".join(
        text.split()
    )
    assert ("bit-identical" in repr(run[3]), "bit-identical" in repr(run[4])) == (False, is_mixed)


def test_what_the_loop_changes_and_did_not_name_is_said(made, capsys):
    model, optimizer, batch = made
    average, losses = torch.zeros(8, 4), torch.zeros(())
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for each in recording.steps([batch] * 6):
            loss = take(model, optimizer, each)
            losses += loss.detach()  # a number takes no room, and need not be said
            recording.log(loss=loss)
            average.mul_(0.9).add_(model[0].weight.detach())
            with torch.no_grad():
                model[0].weight.add_(average, alpha=1e-3)
    said = capsys.readouterr().err
    files = re.findall(
        r"changes a tensor \(8, 4\) of torch.float32 \((.*):\d+\) that is not among", said
    )
    assert [Path(file).name for file in files] == ["test_record.py"]
    assert recording.run.verify(processes=1, progress=False).is_exact


def test_data_from_elsewhere_is_kept_once_or_not_at_all(made, monkeypatch):
    from everystep.step import outside_tensors, under_way

    model, optimizer, _ = made
    data, targets = torch.randn(1000, 4), torch.randn(1000, 2)
    sizes = []
    for most in (under_way.MOST_BYTES, 10_000):
        for module in (outside_tensors, under_way):
            monkeypatch.setattr(module, "MOST_BYTES", most)
        with everystep.record(model=model, optimizer=optimizer) as recording:
            for number in range(40):
                with recording.step():
                    rows = torch.arange(16) + number
                    recording.log(loss=take(model, optimizer, (data[rows], targets[rows])))
        run = recording.run
        assert run.verify(processes=1, progress=False).is_exact
        sizes.append(sum(file.stat().st_size for file in (run.directory / "batches").iterdir()))
    assert data.nbytes + targets.nbytes <= sizes[0] < data.nbytes + targets.nbytes + 10_000
    assert sizes[1] < sizes[0]


def test_what_is_written_into_a_tensor_of_all_parameters_between_steps_is_kept(made):
    model, optimizer, (x, y) = made
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for _ in range(5):
            with recording.step((x, y)):
                recording.log(loss=descend(optimizer, ((model(x) - y) ** 2).mean()))
            flat.mul_(0.9)
    assert recording.run.verify(processes=1, progress=False).is_exact


def test_a_gradient_flows_through_what_is_picked_from_outside(tmp_path):
    """A table that is no part, but is trained."""

    def trained(record):
        table = torch.randn(10, 4, requires_grad=True)
        model = nn.Linear(4, 1)
        losses = []
        with record(model=model) as recording:
            for _ in range(12):
                with recording.step():
                    loss = (model(table[torch.randint(10, (3,))]) - 1).square().mean()
                    (gradient,) = torch.autograd.grad(loss, table)
                    with torch.no_grad():
                        table.sub_(gradient, alpha=0.1)
                    recording.log(loss=loss)
                losses.append(loss.item())
        return losses

    as_alone(tmp_path / "run", trained)


def test_a_pause_is_no_part_of_the_step(made):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for each in recording.steps([batch] * 4):
            recording.log(loss=take(model, optimizer, each))
            with recording.paused(), torch.no_grad():
                recording.log(validation=((model(batch[0]) - batch[1]) ** 2).mean().item())
    run = recording.run
    assert run.facts.training.loop.programs == 1 + (run.facts.training.loop.programs > 1)
    assert not any(
        seen.operation.operator.startswith("aten._local_scalar") for seen in run[2].operations
    )
    assert len(run.measured("validation")) == 4


@pytest.mark.parametrize("is_paused", [True, False], ids=["paused", "between"])
@pytest.mark.parametrize("every", [1, 3])
def test_what_changes_in_a_pause_or_between_steps_is_kept(every, is_paused, monkeypatch):
    take_snapshots_every(monkeypatch, 2)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(5, 4)
    before = {}

    def change(step):
        with torch.no_grad():
            model(x + 1)  # torch does not count that it changes the averages of the normalization
            if step == 3:
                model[0].bias.mul_(0.5)

    with everystep.record(model=model, optimizer=optimizer) as recording:
        for step in range(1, 10):
            if not is_paused and step % every == 0:
                change(step)
            before[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            with recording.step(x):
                recording.log(loss=descend(optimizer, model(x).square().mean()))
                if is_paused and step % every == 0:
                    with recording.paused():
                        change(step)
    run = recording.run
    assert run.verify(processes=1, progress=False).is_exact
    for step, expected in before.items():
        opened = {**run[step].parameters, **run[step].buffers}
        assert {n: bits(t) for n, t in opened.items()} == {n: bits(t) for n, t in expected.items()}


def test_what_numpy_writes_in_a_pause_is_kept(made):
    model, optimizer, batch = made
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number, each in enumerate(recording.steps([batch] * 6)):
            with recording.paused():
                assert model[0].bias.detach().numpy().shape
                if number % 3 == 1:
                    model[0].weight.detach().numpy()[0] *= 0.9
            recording.log(loss=take(model, optimizer, each))
    assert recording.run.verify(processes=1, progress=False).is_exact


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """The directory of a run that no test changes."""
    batches = [(torch.randn(16, 4), torch.randn(16, 2))] * 3
    place = tmp_path_factory.mktemp("three") / "run"
    return looped(nn.Linear(4, 2), batches, mean_square, run=place).directory


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("numbers", b"no zlib"),
        ("numbers", packed(["text"])),
        ("numbers", packed([])),
        ("inputs", packed({"given": {"batch/x": ["float32", [4], "00"]}})),
        ("inputs", packed({"given": {"batch/x": ["no dtype", [0], ""]}})),
        ("inputs", packed({"given": {"generator/torch": ["uint8", [0], ""]}})),
        ("inputs", packed([1, 2])),
        ("inputs", None),
        ("program", 999),
        *(("count", count) for count in (0, -1, "many", 1.5, 2**60, 3)),
        ("program", "../../etc"),
    ],
)
def test_a_database_that_was_changed_is_refused(three_steps, tmp_path, column, value):
    run = everystep.open(shutil.copytree(three_steps, tmp_path / "run"))
    sql(run.directory, (f"UPDATE repeats SET {column} = ? WHERE step = 2", (value,)))
    seal_repeats(run.directory)
    with pytest.raises(everystep.EverystepError):
        run[2]
    assert not run.verify(processes=1, progress=False).is_exact


def test_a_step_with_the_numbers_of_another_one_is_refused():
    """Without losses, no replay of a step would show it."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with everystep.record(model=model, optimizer=optimizer, run="./run") as recording:
        for x in recording.steps([torch.ones(3, 4)] * 3):
            descend(optimizer, model(x).mean())
            optimizer.param_groups[0]["lr"] /= 2
    of_another = "(SELECT numbers FROM repeats WHERE step = 2)"
    sql("run", f"UPDATE repeats SET numbers = {of_another} WHERE step = 3")
    run = everystep.open("run")
    with pytest.raises(everystep.RunError, match="what repeats step 3 does not match its digest"):
        run[3]
    (found,) = run.doctor().findings
    assert "what repeats step 3" in found.problem


def _after_it(optimizer, scheduler, turn):
    optimizer.step()
    scheduler.step()


def _before_it(optimizer, scheduler, turn):
    scheduler.step()
    optimizer.step()


def _by_hand(optimizer, scheduler, turn):
    optimizer.param_groups[0]["lr"] = 0.1 / (1 + turn)
    optimizer.step()


def _every_other_turn(optimizer, scheduler, turn):
    if turn % 2:
        optimizer.step()
    scheduler.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    ("way", "as_function"),
    [(_after_it, True), (_before_it, False), (_by_hand, True), (_every_other_turn, False)],
)
def test_the_learning_rate_of_a_step_is_the_one_that_its_update_uses(made, way, as_function):
    model, optimizer, (x, y) = made
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    used, turns = {}, iter(range(1, 100))
    # Called where torch calls the optimizer, outside of what everystep reads.
    hook = optimizer.register_step_pre_hook(
        lambda o, *_: used.update({turn[0]: o.param_groups[0]["lr"]})
    )
    turn = [0]

    def step(batch):
        turn[0] = next(turns)
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        way(optimizer, scheduler, turn[0])
        return loss

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if as_function:
        run = everystep.train(step, [(x, y)], parts=parts, steps=12, progress=False)
    else:
        with everystep.record(**parts) as recording:
            for batch in recording.steps([(x, y)] * 12):
                recording.log(loss=step(batch))
        run = recording.run
    hook.remove()
    assert len(used) in (6, 12)
    assert {number: run[number].hyperparameters["lr"] for number in used} == used


def test_a_rate_that_the_loop_logs_has_a_name_of_its_own(made):
    model, optimizer, batch = made
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    logged = {}
    with everystep.record(model=model, optimizer=optimizer, scheduler=scheduler) as recording:
        for number, (x, y) in enumerate(recording.steps([batch] * 6), 1):
            loss = descend(optimizer, nn.functional.mse_loss(model(x), y))
            scheduler.step()
            logged[number] = scheduler.get_last_lr()[0]
            recording.log(loss=loss, lr=logged[number])
    run = recording.run
    assert run.measured("lr (logged)") == logged
    assert run[3].hyperparameters == {"lr": 0.1} and run[4].hyperparameters == {"lr": 0.05}


def test_a_step_shows_the_settings_that_its_optimizers_used(made):
    model, _, batch = made
    one, other = model[0], model[-1]
    sgd = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    adam = torch.optim.Adam(other.parameters(), lr=0.1)
    with everystep.record(model=model, one=sgd, other=adam) as recording:
        for number, (x, y) in enumerate(recording.steps([batch] * 4), 1):
            if number == 3:
                sgd.param_groups[0] |= {"momentum": 0.5, "weight_decay": 0.25}
                adam.param_groups[0]["betas"] = (0.5, 0.9)
            loss = nn.functional.mse_loss(model(x), y)
            descend(sgd, loss)
            adam.step()
            recording.log(loss=loss)
    rates = {"one.lr": 0.1, "other.lr": 0.1}
    later = {"one.momentum": 0.5, "one.optimizer.weight_decay": 0.25}
    later |= {"other.beta1": 0.5, "other.optimizer.betas.1": 0.9}
    for number, expected in ((2, rates), (3, rates | later)):
        assert recording.run[number].hyperparameters == expected
    texts = [each["optimizer"] for each in recording.run[4].data()["segments"] if each["optimizer"]]
    assert texts[0]["settings"] == {"lr": "0.1", "momentum": "0.5", "weight_decay": "0.25"}
    assert texts[1]["settings"]["betas"] == "(0.5, 0.9)"


def test_an_optimizer_that_is_no_part_does_not_pass_for_one(made, tmp_path):
    """Such as one that adapts a copy of the model in each step."""
    by_hand = []
    for rate in (0.1, 0.01):
        torch.manual_seed(0)
        model, (x, y) = nn.Linear(4, 2), made[2]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        with everystep.record(model=model, optimizer=optimizer, run=tmp_path / f"{rate}") as recording:
            for number in recording.steps(range(6)):
                optimizer.param_groups[0]["lr"] = rate if number >= 3 else 0.1
                fast = [each.detach().clone().requires_grad_() for each in model.parameters()]
                inner = torch.optim.SGD(fast, lr=0.05, momentum=0.5)
                descend(inner, nn.functional.mse_loss(nn.functional.linear(x, *fast), y))
                loss = descend(inner, nn.functional.mse_loss(nn.functional.linear(x, *fast), y))
                for parameter, other in zip(model.parameters(), fast, strict=True):
                    parameter.grad = other.grad
                optimizer.step()
                recording.log(loss=loss)
                losses.append(loss.detach())
        by_hand.append([loss.item() for loss in losses])
    run = everystep.open(tmp_path / "0.1")
    assert run[5].hyperparameters == {"lr": 0.1}
    fork = run.fork(3, lr=0.01, run=tmp_path / "fork", progress=False)
    assert fork.losses["loss"].to_list() == by_hand[1]


@pytest.mark.parametrize("first", [1, 4])
def test_a_setting_of_torch_that_the_loop_changes_is_recorded_or_reported(made, first, capsys):
    model, optimizer, batch = made
    try:
        with everystep.record(model=model, optimizer=optimizer) as recording:
            for number, (x, y) in enumerate(recording.steps([batch] * 6), 1):
                if number == first:
                    torch.backends.nnpack.set_flags(False)
                recording.log(loss=descend(optimizer, nn.functional.mse_loss(model(x), y)))
    finally:
        torch.backends.nnpack.set_flags(True)
    name = "torch.backends.nnpack.set_flags"
    is_reported = f"step {first} runs with {name} = False, which was True" in capsys.readouterr().err
    assert is_reported == (first > 1)
    assert recording.run.facts.training.numerics.settings[name] == (first > 1)
