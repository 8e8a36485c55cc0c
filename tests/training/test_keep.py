"""Recordings that keep some of their steps: these open as ever, the others are refused by name."""

import multiprocessing
import os
import random

import pytest
import torch
from tests.descent import descend, looped
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import bits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import everystep

#: Of Python, from 3.12 on: no other thread holds anything here.
pytestmark = pytest.mark.filterwarnings("ignore:.* use of fork")

EPOCHS, LENGTH = 4, 15
STEPS = EPOCHS * LENGTH
RING, WINDOWS = "last 15 steps", [(0, 4), (21, 29), (50, 52)]


class Augmented(Dataset):
    """Rows with noise: each epoch has others, and each batch draws random numbers."""

    def __len__(self):
        return 4 * LENGTH

    def __getitem__(self, place):
        return torch.full((20,), place / 10) + 0.1 * torch.randn(20) * random.random()


def train(directory, keep, killed_after=None, diverges_at=None, **options):
    """Train, resumed if the run is there; change a buffer after every third step."""
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
    with pytest.MonkeyPatch.context() as patch:
        take_snapshots_every(patch, 4)
        options = {"run": directory, "resume": True} | options
        recorded = everystep.record(model=model, optimizer=optimizer, keep=keep, **options)
        with recorded as recording:
            for _ in recording.epochs(EPOCHS):
                for batch in recording.steps(loader):
                    loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
                    if recording.step_count + 1 == diverges_at:
                        loss = loss / 0
                    recording.log(loss=descend(optimizer, loss))
                    if recording.step_count % 3 == 0:
                        model[1].num_batches_tracked.zero_()
                    if recording.step_count == killed_after:
                        recording.flush()
                        os._exit(9)
    return recording.run


def train_killed(place, keep, step, **options):
    """Train in a process that is killed after a step; return what is there of its run."""
    given = (place, keep, step), options
    process = multiprocessing.get_context("fork").Process(None, train, None, *given)
    process.start()
    process.join()
    assert process.exitcode == 9
    return everystep.open(place)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all steps."""
    return train(tmp_path_factory.mktemp("runs") / "whole", None)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("keep", [RING, WINDOWS])
def test_kept_steps_are_as_ever_and_others_are_refused_also_after_a_kill(
    keep, whole, tmp_path, everystep_command
):
    place = tmp_path / "kept"
    killed = train_killed(place, keep, 36)
    assert (killed.status, len(killed)) == ("killed", 36)
    run = train(place, keep)
    assert run.losses.equals(whole.losses) and run.measurements.equals(whole.measurements)
    kept = run.facts.kept(STEPS)
    if keep is WINDOWS:
        assert kept == [(1, 4), (21, 29), (50, 52)]
    else:  # from a snapshot on, given up in chunks
        ((first, last),) = kept
        assert last == STEPS and STEPS - 15 - 4 - 15 // 8 < first - 1 <= STEPS - 15
    steps = [step for one, two in kept for step in range(one, two + 1)]
    for number in {*steps[::4], steps[-1]}:  # verify replays all of them
        found, before = run[number], whole[number]
        assert found.is_exact
        for kind in ("gradients", "parameters"):
            one, two = ({n: bits(t) for n, t in getattr(each, kind).items()} for each in (found, before))
            assert one == two
        assert found.batch.whole is None or bits(found.batch.x) == bits(before.batch.x)
    others = [step for step in range(1, STEPS + 1) if step not in steps]
    for number in {*others[::9], others[-1]}:
        with pytest.raises(everystep.RunError, match=rf"^step {number} of kept was not kept \(keep: "):
            run[number]
    size, other = (sum(f.stat().st_size for f in each.directory.rglob("*")) for each in (run, whole))
    assert size < 0.75 * other
    found = run.verify(processes=1, progress=False)
    assert found.is_exact and (found.steps, found.all_steps) == (len(steps), STEPS)
    code, text, _ = everystep_command("verify", place)
    ranges = " and ".join(f"{one} to {two}" for one, two in kept)
    assert (
        code == 0 and f"only steps {ranges} are kept" in text and "what kept keeps replays bit" in text
    )
    code, text, _ = everystep_command("first-nonfinite", place)
    assert (
        code == 1 and text == f"all results of all operations are finite; only steps {ranges} are kept\n"
    )
    code, _, text = everystep_command("step", place, 10)
    assert code == 2 and f"step 10 of kept was not kept (keep: {keep}); only steps {ranges}" in text
    measured = run.measure("norm(gradients['0.weight'])", progress=False)
    assert [*measured.values] == steps and 8 not in measured.values
    found = run.diff(whole, thorough=True, progress=False)
    assert found.is_same and found.problems == (f"of kept, only steps {ranges} are kept",)
    matched = run.match(whole)
    assert matched.is_match and matched.step == steps[-1]
    code, text, _ = everystep_command("du", place)
    assert code == 0 and text.split("\n")[1].endswith(str(keep))
    with pytest.raises(everystep.RunError, match="was not kept"):
        run.parameters(10)
    assert run.parameters(steps[-1])["0.weight"].equal(whole.parameters(steps[-1])["0.weight"])


def test_a_ring_still_answers_where_a_nan_comes_from_and_can_be_forked_and_pruned(
    tmp_path, everystep_command
):
    run = train(tmp_path / "ring", RING, diverges_at=55)
    ((first, _),) = run.facts.kept(STEPS)
    assert run.first_nonfinite(progress=False).step.number == run.facts.nonfinite_step == 55
    assert run.why(first + 1, "parameters['0.weight'][0,0]", back=5) is not None
    found = run.rerun(precision="float64", progress=False)
    assert (found.first, len(found.losses)) == (first, STEPS - first + 1)
    fork = train(tmp_path / "fork", [(57, 59)], fork=run, at=52, resume=False)
    assert fork.facts.kept(STEPS) == [(first, 52), (57, 59)]
    assert fork.verify(processes=1, progress=False).is_exact
    everystep_command("prune", run.directory, "--snapshots", 0, "--force")
    assert run[first].is_exact and run[STEPS].is_exact


def test_a_resumed_loop_may_keep_others_from_there_on(whole, tmp_path):
    train_killed(tmp_path / "kept", None, 25)
    run = train(tmp_path / "kept", [(30, 35)])
    assert run.losses.equals(whole.losses) and run.facts.keep == "[(30, 35)]"
    assert run.facts.kept(STEPS) == [(1, 25), (30, 35)]
    assert all(run[step].is_exact for step in (1, 25, 30, 35))
    assert run.verify(processes=1, progress=False).is_exact


def test_a_budget_gives_up_batches_and_not_what_a_resume_needs(whole, tmp_path):
    budget = {"batch_budget": 5000}
    assert train_killed(tmp_path / "run", None, 25, **budget).facts.batches_lost_to
    assert train_killed(tmp_path / "run", None, 43, **budget).facts.batches_lost_to > 25
    run = train(tmp_path / "run", None, **budget)
    assert run.losses.equals(whole.losses) and run.measurements.equals(whole.measurements)


def test_a_resume_begins_at_the_second_newest_snapshot_whatever_fits(whole, tmp_path, capfd):
    train_killed(tmp_path / "run", None, 25, snapshot_budget=0)
    assert everystep.open(tmp_path / "run").snapshots == [0, 20, 24]
    run = train(tmp_path / "run", None, snapshot_budget=0)
    assert run.losses.equals(whole.losses) and "continues after step 20" in capfd.readouterr().err


def test_steps_of_a_function_are_kept_too_and_a_model_needs_no_keep(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"steps": 12, "run": tmp_path / "run", "progress": False}
    parts = {"model": model, "optimizer": optimizer}
    batches = [torch.randn(4, 3) for _ in range(12)]

    def step(x):
        return descend(optimizer, model(x).square().mean())

    run = everystep.train(step, batches, parts=parts, keep=[(4, 6)], **options)
    assert run.facts.kept(12) == [(4, 6)] and run[4].is_exact and run[6].batch.tensors
    with pytest.raises(everystep.UsageError, match="keep is for a step function"):
        everystep.train(model, (torch.ones(2, 3), torch.ones(2, 1)), keep="last 3 steps", **options)


@pytest.mark.parametrize(
    ("keep", "messages"),
    [
        ("last 0 steps", ["keep='last 0 steps' names no number", 'keep="last 2000 steps"']),
        ("last ten", ["names no number of newest steps"]),
        (2000, ["keep: must be a text, a list of windows, such as [(0, 500)] or None"]),
        ([], ["neither a text nor a list of windows"]),
        ((0, 500), ["keep[0]: 0 is not a pair of steps", "keep[1]: 500 is not"]),
        (
            [(9, 3), (-1, 4), (10, 20), (20, 30), (1.5, 40)],
            ["4 errors", "[0]: (9, 3) has no", "[1]: (-1, 4)", "[3]: (20, 30) begins before", "[4]: (1"],
        ),
    ],
)
def test_what_cannot_be_kept_is_reported_with_what_to_write(keep, messages):
    with pytest.raises(everystep.UsageError) as caught:
        everystep.record(model=nn.Linear(1, 1), keep=keep)
    assert all(message in str(caught.value) for message in messages), caught.value


@pytest.mark.parametrize(
    "budget", [{"batch_budget": "2 GB"}, {"snapshot_budget": None}, {"batch_budget": -1}]
)
def test_a_budget_is_a_number_of_bytes(budget):
    with pytest.raises(everystep.UsageError, match=r"must be a number of bytes, such as 2e9, of"):
        everystep.record(model=nn.Linear(1, 1), run="./run", **budget)


class Batches:
    """As many batches of 1 MB."""

    def __init__(self, count, are_new=True):
        self.count, self.are_new = count, are_new
        self.first = torch.randn(250, 1000)

    def __len__(self):
        return self.count

    def __iter__(self):
        yield from (torch.randn(250, 1000) if self.are_new else self.first for _ in range(self.count))


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("batches", "epochs", "options", "message"),
    [
        (Batches(4000), 1, {}, "this run will take about 2 GB: 2 GB of batches (now 1 MB a step)"),
        (Batches(600), 2, {}, None),  # the rows may come again
        (Batches(10), 200, {}, "from about step 1,999 on, the oldest batches are given up"),
        (Batches(10, are_new=False), 10_000, {}, None),
        (Batches(4000), 1, {"keep": "last 200 steps"}, None),
        (Batches(4000), 1, {"keep": [(0, 300), (3000, 3300)]}, None),
        (Batches(4000), 1, {"keep": "last 3000 steps"}, "pass fewer steps in keep or a larger batch"),
    ],
)
def test_a_run_that_will_be_large_is_announced_once(
    batches, epochs, options, message, monkeypatch, tmp_path, capsys
):
    take_snapshots_every(monkeypatch, 1000)
    model, taken = nn.Linear(1000, 1), 0
    with everystep.record(model=model, run=tmp_path / "run", **options) as recording:
        for _ in recording.epochs(epochs):
            for x in recording.steps(batches):
                recording.log(loss=model(x).sum())
                taken += 1
                if taken == 40:
                    recording.stop("enough")
                    break
            if taken == 40:
                break
    said = [line for line in capsys.readouterr().err.splitlines() if "GB" in line]
    assert len(said) == (message is not None) and all(message in line for line in said), said


def test_a_budget_for_fewer_than_two_snapshots_is_announced(monkeypatch, capsys):
    monkeypatch.setattr("everystep.recording.keep._LARGE", 10_000)
    batches, sum_of = [torch.randn(1, 1000)] * 40, lambda model, x: model(x).sum()
    looped(nn.Linear(1000, 2), batches, sum_of, optimizer=None, snapshot_budget=9000)
    said = capsys.readouterr().err
    assert "a step between them opens by a replay of all before it; to change that, pass" in said
    assert "only the first and the two newest snapshots stay" in said
    assert "a larger snapshot_budget" in said
