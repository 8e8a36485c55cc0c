"""A Dataset: read once where it is torch's own, of tensors, else at every step."""

import os
import signal

import pytest
import torch
from tests.training.by_hand import bits
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import everystep
from everystep.views.progress import Silent


class Rows(Dataset):
    """Rows of two tensors or arrays."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row], self.y[row]


class Counted(Rows):
    """The same rows at every read."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.reads = 0

    def __getitem__(self, row):
        self.reads += 1
        return self.x[row], self.y[row]


class Noisy(Rows):
    """Other rows each time, drawn from torch's generator."""

    def __getitem__(self, row):
        return self.x[row] + 0.1 * torch.randn(4), self.y[row]


class Drifting(Rows):
    """Different rows each time, from its own generator."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, row):
        return self.x[row] + torch.randn(4, generator=self.generator), self.y[row]


def rows():
    torch.manual_seed(3)
    return torch.randn(20, 4), torch.randn(20, 2)


def made(model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return {"model": model, "loss": nn.MSELoss(), "optimizer": optimizer}


def train(data, *, steps=12, model=None, **options):
    options = {"batch_size": 6, "progress": False, "threads": 1} | made(model) | options
    return everystep.train(options.pop("model"), data, steps=steps, **options)


def datasets_of(x, y):
    both = TensorDataset(x, y)
    return {
        "of torch": both,
        "subset": Subset(both, range(20)),
        "several": ConcatDataset([Subset(both, range(10)), Subset(both, range(10, 20))]),
    }


@pytest.mark.parametrize("kind", datasets_of(*rows()))
def test_rows_of_torchs_own_are_read_once(kind, capfd):
    expected = train(rows())
    run = train(datasets_of(*rows())[kind])
    assert run.losses.equals(expected.losses)
    assert not run.facts.training.data.lazy
    assert "read at every step" not in capfd.readouterr().err
    assert everystep.open(run.directory).verify().is_exact


def test_other_code_is_read_at_every_step_and_rows_that_stayed_the_same_are_in_the_run(capfd):
    expected = train(rows())
    dataset = Counted(*rows())
    run = train(dataset)
    assert dataset.reads == sum(len(step.batch.x) for step in run[1:13])
    assert run.losses.equals(expected.losses)
    assert "read at every step: Counted is not one of torch's, of tensors" in capfd.readouterr().err
    assert bits(everystep.open(run.directory)[3].batch.x) == bits(expected[3].batch.x)
    assert everystep.open(run.directory).verify().is_exact


def test_a_resumed_run_opens_its_steps_with_the_dataset_that_trained_it():
    run = train(Noisy(*rows()))
    for steps in (len(run) + 3, len(run) + 6):
        run = run.resume(steps, progress=False)
        assert len(run) == steps
        assert run[steps].is_exact and run[2].is_exact
        assert run.verify(processes=1).is_exact


def test_a_run_that_holds_its_rows_since_it_was_resumed_opens_the_steps_before():
    whole = train(Counted(*rows()))
    run = train(Counted(*rows()), steps=2)  # not all rows
    run = run.resume(10, progress=False).resume(12, progress=False)
    assert run.losses.equals(whole.losses)
    for step in (1, 5, 12):
        assert run[step].is_exact and bits(run[step].batch.x) == bits(whole[step].batch.x)
    for at in (1, 5):
        assert run.fork(at, progress=False).losses.equals(whole.losses)


@pytest.mark.parametrize("kind", [Counted, Drifting])
def test_what_follows_reads_the_dataset_again_even_if_each_row_was_read_once(kind):
    """The run holds the rows that it has read: Drifting gives others later."""
    whole = train(kind(*rows()))
    one, other = (train(kind(*rows()), steps=4) for _ in range(2))  # an epoch
    assert one.resume(12, progress=False).losses.equals(whole.losses)
    assert one.verify().is_exact and one[2].is_exact
    assert other.fork(2, steps=4, progress=False).losses.equals(whole.losses[:4])  # it is not read
    assert other.fork(4, steps=12, progress=False).losses.equals(whole.losses)
    with pytest.raises(everystep.RunError, match=r"pass it: fork\(\.\.\., data=dataset\)"):
        everystep.open(other.directory).fork(2, batch_size=20, progress=False, **made())


@pytest.mark.parametrize("kind", [Counted, Drifting])
def test_what_follows_a_fork_of_recorded_steps_reads_the_dataset(kind):
    whole, parent = train(kind(*rows())), train(kind(*rows()), steps=4)
    fork = parent.fork(2, steps=4, progress=False)  # it is not read
    with pytest.raises(everystep.RunError, match=r"pass it: resume\(\.\.\., data=dataset\)"):
        everystep.open(fork.directory).resume(12, progress=False, **made())
    fork = fork.resume(12, progress=False)
    assert fork.losses.equals(whole.losses)
    assert fork.verify().is_exact and fork[3].is_exact and fork[12].is_exact


@pytest.mark.sweep
def test_a_stopped_run_that_holds_its_rows_is_resumed_with_the_dataset():
    class Stopped(Silent):
        def advance(self, first, losses):
            if first <= 8 < first + len(losses):
                os.kill(os.getpid(), signal.SIGINT)

    whole = train(Counted(*rows()), steps=600)
    with pytest.raises(KeyboardInterrupt):
        train(Counted(*rows()), steps=600, run="./run", progress=Stopped())
    run = everystep.open("./run")
    assert run.status == "stopped" and len(run) < 600
    with pytest.raises(everystep.RunError, match=r"pass it: resume\(\.\.\., data=dataset\)"):
        run.resume(**made(), progress=False)
    assert run.resume(**made(), data=Counted(*rows()), progress=False).losses.equals(whole.losses)
    assert everystep.open("./run").verify().is_exact


@pytest.mark.parametrize("kind", [Noisy, Drifting])
def test_a_dataset_that_draws_opens_its_steps_again_without_it(kind):
    run = everystep.open(train(kind(*rows())).directory)
    assert run.verify(processes=1).is_exact
    step = run[3]
    assert step.is_exact
    assert step.batch.x.shape == (6, 4)
    assert bits(run[3].batch.x) == bits(step.batch.x)  # and again, from where it stands


def test_a_dataset_that_draws_goes_on_in_a_fork():
    run = train(Noisy(*rows()))
    fork = run.fork(5, steps=12, data=Noisy(*rows()), progress=False)
    assert fork.losses.equals(run.losses)


def test_a_dataset_that_a_metric_changes_after_it_was_read_ends_the_training():
    dataset = TensorDataset(*rows())

    def metric(prediction, target):
        dataset.tensors[0].add_(1)
        return 0.0

    with pytest.raises(everystep.TrainingError, match="a tensor of a TensorDataset change"):
        train(dataset, metrics={"mine": metric}, evaluate_every=4)


def test_what_is_read_at_every_step_has_no_rows_for_validation():
    with pytest.raises(everystep.UsageError, match=r"cannot be split; pass validation=\(x, y\)"):
        train(Counted(*rows()), validation=0.2)
    run = train(Counted(*rows()), validation=rows(), evaluate_every=6)
    assert set(run.measurements["name"]) == {"validation_loss", "validation_r2"}


@pytest.mark.parametrize("data", [Noisy(*rows()), rows()], ids=["Dataset", "tensors"])
def test_validation_continues_in_a_resume_and_a_fork(data):
    """With the rows of the run, or with those of the objects that trained it if it has none."""
    measuring = {"validation": rows(), "evaluate_every": 3}
    whole = train(data, **measuring)
    resumed, parent = (train(data, steps=6, **measuring) for _ in range(2))
    fork = parent.fork(3, steps=12, data=data, progress=False)
    assert fork.measured("validation_loss") == whole.measured("validation_loss")
    resumed = resumed.resume(9, progress=False)
    if isinstance(data, tuple):
        resumed = everystep.open(resumed.directory)
        resumed = resumed.resume(12, **made(), data=data, progress=False)
    else:
        again = everystep.open(resumed.directory)
        with pytest.raises(everystep.RunError, match=r"pass them: resume\(\.\.\., validation="):
            again.resume(12, **made(), data=data, progress=False)
        with pytest.raises(everystep.RunError, match="data=dataset"):
            again.resume(12, **made(), progress=False)
        resumed = resumed.resume(12, progress=False)
    assert resumed.losses.equals(whole.losses)
    assert resumed.measured("validation_loss") == whole.measured("validation_loss")


@pytest.mark.parametrize("data", [Noisy(*rows()), Counted(*rows())], ids=["other rows", "same rows"])
def test_a_dataset_is_resumed_with_the_validation_rows_of_the_run(data):
    whole = train(data, validation=rows(), evaluate_every=3)
    begun = train(data, steps=6, validation=rows(), evaluate_every=3)
    x, y = rows()
    with pytest.raises(everystep.RunError, match=r"(?s)data\.validation_digest: .*--force"):
        begun.resume(12, **made(), data=data, validation=(x + 1, y), progress=False)
    assert len(begun.losses) == 6
    resumed = begun.resume(12, **made(), data=data, validation=rows(), progress=False)
    assert resumed.measured("validation_loss") == whole.measured("validation_loss")
    assert "validation" not in whole.diff(resumed).to_text()
    other = train(data, steps=6, validation=(x + 1, y), evaluate_every=3)
    assert "validation_digest" in whole.diff(other).to_text()
    # What is measured changes no step, so rows may be added.
    begun = train(data, steps=6)
    resumed = begun.resume(12, **made(), data=data, validation=rows(), progress=False)
    assert resumed.losses.equals(whole.losses)


@pytest.mark.parametrize("validation", [0.2, rows()], ids=["a share", "rows"])
def test_a_fork_may_have_other_validation_rows(validation):
    parent = train(rows(), steps=6)
    whole = parent.fork(
        3, steps=12, validation=validation, settings={"evaluate_every": 3}, progress=False
    )
    fork = parent.fork(3, steps=6, validation=validation, settings={"evaluate_every": 3}, progress=False)
    fork = everystep.open(fork.resume(9, progress=False).directory)
    again = fork.resume(12, **made(), progress=False)
    assert again.losses.equals(whole.losses)
    assert again.measured("validation_loss") == whole.measured("validation_loss")
    assert whole[5].is_exact and whole.verify().is_exact and again.verify().is_exact
    assert whole.fork(6, progress=False).losses.equals(whole.losses)
