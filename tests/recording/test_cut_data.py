"""Windows and rows that steps cut out of data: kept as their places in it, once the data is kept."""

import shutil

import numpy as np
import pytest
import torch
from tests.descent import descend, looped, recorded_as_it_is
from tests.sealing import sql
from tests.snapshots import take_snapshots_every
from torch import nn
from torch.nn import functional

import everystep
from everystep.recording.prune import prune, pruning_of


def _trained(run, text, steps=60, change=None, noise=0, **options):
    """Record a loop that trains on windows of a text, drawn within each step; return its losses.

    change: changes the text before a step; noise: how many numbers from NumPy each step uses, too.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with everystep.record(model=model, optimizer=optimizer, run=run, **options) as recording:
        for t in recording.steps(range(steps)):
            if change is not None:
                change(t)
            at = torch.randint(len(text) - 33, (12,))
            x, y = (torch.stack([text[i + k : i + k + 32] for i in at]) for k in (0, 1))
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            if noise:
                loss = loss + torch.from_numpy(np.random.default_rng(t).random(noise)).mean()
            recording.log(loss=descend(optimizer, loss))
            losses.append(loss.item())
            if t % 10 == 0:
                recording.flush()
    return everystep.open(recording.run.directory), losses


def _size(run):
    return sum(path.stat().st_size for path in (run.directory / "batches").iterdir())


@pytest.fixture
def text():
    return torch.randint(50, (10_000,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    text = torch.randint(50, (10_000,), generator=torch.Generator().manual_seed(3))
    return _trained(tmp_path_factory.mktemp("cut") / "run", text)[0]


def test_steps_cost_the_places_of_their_windows_once_these_cost_as_much_as_the_text(recorded, text):
    windows = 2 * 12 * 32 * text.itemsize
    places = 2 * 12 * 4
    assert _size(recorded) < 2 * (text.nbytes + windows) + 60 * places + 20_000
    assert _size(recorded) < 60 * windows / 1.5
    assert recorded.verify(processes=1, progress=False).is_exact
    assert recorded.facts.training.loop.programs <= 2
    assert recorded.damage is None


def test_a_fork_with_another_text_has_the_steps_of_both(recorded, text, tmp_path):
    def change(t):
        if t == 40:
            text.copy_(torch.arange(10_000) % 50)

    fork, losses = _trained(tmp_path / "fork", text, change=change, fork=recorded.directory, at=40)
    assert len(fork.losses) == 60 and fork[35].is_exact and fork[55].is_exact
    assert losses[-1] == fork.losses["loss"][-1]


def test_a_text_that_changes_is_kept_by_content(text, tmp_path):
    def change(t):
        if t % 3 == 0:
            text.numpy()[:] = np.roll(text.numpy(), 7)  # torch does not see it
        if t == 40:
            text.fill_(1)

    run, losses = _trained(tmp_path / "run", text, change=change)
    assert run.verify(processes=1, progress=False).is_exact
    assert [run[step].loss for step in (16, 35, 59)] == [losses[s - 1] for s in (16, 35, 59)]


def test_the_text_stays_while_newer_steps_need_it(text, tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 10)
    run, _ = _trained(tmp_path / "run", text, noise=2000, batch_budget=400_000)
    lost = run.facts.batches_lost_to
    assert 0 < lost < 55 and _size(run) < 500_000
    assert run[60].is_exact
    # Pruned, the run has the places of the newest steps, but no text.
    newest = max((run.directory / "batches").iterdir(), key=lambda path: int(path.stem))
    prune(run.directory, pruning_of(run.directory, None, batches=newest.stat().st_size))
    assert [*newest.parent.iterdir()] == [newest]
    assert run.damage is None and not run.doctor().findings
    kept, _ = _trained(tmp_path / "kept", text, keep="last 20 steps")
    assert kept.verify(processes=1, progress=False).is_exact and kept[50].is_exact


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE contents SET source = number WHERE source IS NOT NULL",
        "UPDATE contents SET source = 1000000 WHERE source IS NOT NULL",
        "UPDATE contents SET digests = substr(digests, 2) WHERE source IS NOT NULL",
        "UPDATE contents SET digests = zeroblob(16) WHERE source IS NOT NULL",
        "UPDATE contents SET number = number + 1000000",
        "UPDATE contents SET size = -1 WHERE source IS NOT NULL",
        "UPDATE contents SET size = size - 4 WHERE source IS NOT NULL",
        "UPDATE contents SET size = 0 WHERE source IS NOT NULL",
        "UPDATE contents SET place = place + 1 WHERE source IS NOT NULL",
    ],
)
def test_places_that_were_altered_are_reported(recorded, text, tmp_path, change):
    place = shutil.copytree(recorded.directory, tmp_path / "run")
    sql(place, change)
    with pytest.raises(everystep.RunError, match=r"changed|dropped"):
        everystep.open(place)[59]


def _direct(t, data, model):
    """Slices that the model takes as they are."""
    at = int(torch.randint(900, ()))
    return model(data[at : at + 90].view(10, 9)).square().mean()


def _whole_too(t, data, model):
    """A step that reads all of the data, and then a part of it."""
    rows, at = data[:1800].view(200, 9), int(torch.randint(190, ()))
    return model((rows[at : at + 8] - rows.mean(0)) / rows.std(0)).square().mean()


def _changed_after(t, data, model):
    """A step that changes memory that it has read a part of."""
    at = int(torch.randint(900, ()))
    part = data[at : at + 9]
    with torch.no_grad():
        before = model(part)
    data[at : at + 9] = data[at + 9 : at + 18] * 0.5
    return (model(part) - before).square().sum()


def _two_of_one(t, data, model):
    """Two parts of the same memory in one operation."""
    one, two = torch.randint(100, (2,)).tolist()
    picked = torch.where(data[16 * one :][:90] > 0, data[16 * one :][:90], data[16 * two :][:90])
    return model(picked.view(10, 9)).square().mean()


def _memory(t, data, model):
    """Samples out of a memory of tensors, some of them more than once, and made in this step."""
    memory = model.__dict__.setdefault("memory", [])
    with torch.no_grad():
        memory.append(model(data[:9]).expand(9) + torch.randn(9))
    picked = torch.randint(len(memory), (8,)).tolist()
    return model(torch.stack([memory[place] for place in picked])).square().mean()


def _own_generator(t, data, model):
    """Rows picked by a generator of the loop's own."""
    generator = model.__dict__.setdefault("generator", torch.Generator().manual_seed(1))
    rows = torch.randint(0, 200, (8,), generator=generator)
    return model(data[:1800].view(200, 9)[rows]).square().mean()


def _growing(t, data, model):
    """Rows of a memory that each step writes a row of."""
    memory = data[:1800].view(200, 9)
    memory[t] = torch.randn(9)
    return model(memory[torch.randint(0, t + 1, (6,))]).square().mean()


def _picked(t, data, model):
    """Rows at places that NumPy has drawn."""
    at = torch.from_numpy(np.random.default_rng(t).permutation(200)[:6])
    return model(data[:1800].view(200, 9).index_select(0, at) + at[:, None] / 200).square().mean()


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize(
    "loss_of",
    [_changed_after, _own_generator, _memory, _direct, _growing, _two_of_one, _picked, _whole_too],
)
def test_parts_of_data_at_any_place_have_the_same_programs(loss_of, tmp_path):
    """Floats have one for each way in which they lie in aligned memory: kernels may differ by that."""

    def make():
        data, model = torch.randn(2000), nn.Linear(9, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, range(60), lambda model, t, _: loss_of(t, data, model)

    run = recorded_as_it_is(tmp_path / "run", make)
    assert run.facts.training.loop.programs <= (30 if loss_of is _memory else 17)


class Tagged(torch.Tensor):
    """A tensor as libraries have them."""


@pytest.mark.parametrize(
    "read",
    [
        lambda data, t: data[20 + t : 28 + t] - data[:8].as_subclass(Tagged).clone(),
        lambda data, t: torch.stack([data[t].clone() for _ in range(5)])[None].expand(7, 5, 9) * 2,
        lambda data, t: torch.stack([data[100:110].clone()[k : k + 2] for k in range(8)]).flatten(0, 1),
    ],
)
def test_data_that_is_read_in_odd_ways_is_recorded(read):
    torch.manual_seed(0)
    data, model = torch.randn(200, 9), nn.Linear(9, 1)

    def loss_of(model, t):
        return model(read(data, t)).square().mean()

    run = looped(model, range(20), loss_of, optimizer=None)
    assert run.verify(processes=1, progress=False).is_exact
