"""Batches of many sizes: steps that differ only in sizes share a program."""

import numpy as np
import pytest
import torch
from tests.descent import descend, looped
from torch import nn

import everystep
from everystep.errors import ProgramError, RunError
from everystep.program.sizes import packed_sizes, resized, sizes_of
from everystep.program.step_program import Program

STEPS = 24


class Attending(nn.Module):
    """A small transformer on sequences of any length."""

    def __init__(self):
        super().__init__()
        self.embedding, self.places = nn.Embedding(20, 8), nn.Embedding(40, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 20)

    def forward(self, tokens):
        found = self.embedding(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.layer(found))

    def loss(self, tokens):
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Passing(nn.Module):
    """Messages along the edges of a graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def loss(self, graph):
        nodes, (source, target), y = graph
        found = self.first(nodes).relu()
        found = torch.zeros_like(found).index_add(0, target, found[source])
        return nn.functional.cross_entropy(self.second(found), y)


def _texts():
    lengths = np.random.default_rng(0).integers(4, 30, STEPS)
    return [torch.randint(0, 20, (4, int(length))) for length in lengths]


def _graphs(count=STEPS):
    found = []
    for nodes in np.random.default_rng(0).integers(5, 50, count).tolist():
        edges = torch.randint(0, nodes, (2, 3 * nodes))
        found.append((torch.randn(nodes, 4), edges, torch.randint(0, 3, (nodes,))))
    return found


def _recorded(make, batches, run=None, lr=0.05, **options):
    torch.manual_seed(0)
    model, given = make(), batches()
    return looped(
        *(model, given, lambda model, batch: model.loss(batch)),
        run=run,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
        **options,
    )


def _by_hand(make, batches, rates):
    """Return the losses of the plain loop. rates: of each step."""
    torch.manual_seed(0)
    model, given, losses = make(), batches(), []
    optimizer = torch.optim.Adam(model.parameters())
    for batch, rate in zip(given, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        losses.append(descend(optimizer, model.loss(batch)).item())
    return losses


KINDS = {"texts": (Attending, _texts), "graphs": (Passing, _graphs)}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Runs by their kinds, which no test may change."""
    place = tmp_path_factory.mktemp("sizes")
    return {kind: _recorded(*given, place / kind) for kind, given in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_differ_in_sizes_share_a_program(kind, run_of):
    (make, batches), run = KINDS[kind], run_of[kind]
    assert run.losses["loss"].to_list() == _by_hand(make, batches, [0.05] * STEPS)
    # The first step has no gradients before it, and makes the state of the optimizer.
    assert len([*(run.directory / "programs").iterdir()]) == 2
    assert run.verify(progress=False, processes=1).is_exact
    opened = everystep.open(run.directory)
    for step in (1, 2, 9, STEPS):
        assert opened[step].is_exact
    parts = opened[9].batch.tensors
    assert any(len(tensor) == len(parts[next(iter(parts))]) for tensor in parts.values())


def test_a_fork_by_programs_has_the_sizes_of_each_step(run_of, tmp_path):
    fork = run_of["graphs"].fork(10, lr=0.01, run=tmp_path / "fork", progress=False)
    assert fork.losses["loss"].to_list() == _by_hand(Passing, _graphs, [0.05] * 10 + [0.01] * 14)
    assert fork.verify(progress=False, processes=1).is_exact
    assert len([*(fork.directory / "programs").iterdir()]) == 2


@pytest.mark.sweep
def test_a_rerun_in_double_precision_has_the_sizes_of_each_step(run_of):
    run = run_of["texts"]
    found = run.rerun(precision="float64", progress=False)
    assert found.losses.tolist() == pytest.approx(run.losses["loss"].to_list(), rel=1e-4)


@pytest.mark.sweep
def test_runs_with_other_sizes_differ_where_the_sizes_do(run_of, tmp_path):
    def shorter():
        texts = _texts()
        texts[7] = texts[7][:, :-1].contiguous()
        return texts

    difference = run_of["texts"].diff(_recorded(Attending, shorter, tmp_path / "two"))
    assert difference.loss.step == 8 and "x (4, 4) int64 | (4, 3) int64" in repr(difference)


def test_dropped_sizes_are_reported(tmp_path):
    run = _recorded(Passing, lambda: _graphs(600), tmp_path / "run", batch_budget=900_000)
    assert run.facts.batches_lost_to
    with pytest.raises(RunError, match="was dropped"):
        _ = run[run.facts.batches_lost_to]
    assert run[600].is_exact


class Wandering(nn.Module):
    """Layers in another order at each step."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(9)])

    def loss(self, given):
        x, order = given
        for place in order:
            x = self.layers[place](x).tanh()
        return x.square().mean()


def _orders():
    generator = np.random.default_rng(1)
    return [
        (torch.randn(3, 6), [int(n) for n in generator.permutation(9)[: generator.integers(4, 9)]])
        for _ in range(40)
    ]


@pytest.mark.sweep
def test_steps_of_which_no_two_are_alike_are_within_the_budget_of_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("everystep.training.watched_steps.MOST_FILES", 24)
    run = _recorded(Wandering, _orders, tmp_path / "run")
    assert run.losses["loss"].to_list() == _by_hand(Wandering, _orders, [0.05] * 40)
    assert len([*(run.directory / "programs").iterdir()]) == 24
    opened = everystep.open(run.directory)
    assert opened.verify(progress=False, processes=1).is_exact
    assert all(opened[step].is_exact for step in (1, 24, 25, 40)) and opened.damage is None
    fork = run.fork(28, lr=0.01, progress=False)
    assert fork.losses["loss"].to_list() == _by_hand(Wandering, _orders, [0.05] * 28 + [0.01] * 12)
    assert everystep.open(fork.directory)[36].is_exact


@pytest.fixture
def program(run_of):
    run = run_of["graphs"]
    return Program.from_json((run.directory / "programs" / "2.json").read_text())


@pytest.mark.parametrize(
    "alter",
    [
        lambda sizes: b"",
        lambda sizes: b"no sizes",
        lambda sizes: packed_sizes(sizes[:-1], sizes[:-1]),
        lambda sizes: packed_sizes([*sizes, 1], [*sizes, 1]),
        lambda sizes: packed_sizes([10**6, *sizes[1:]], sizes)[:-9],
        lambda sizes: packed_sizes([-(size + 1) for size in sizes], sizes),
        lambda sizes: packed_sizes([2**62] * len(sizes), sizes),
        lambda sizes: packed_sizes([0] * len(sizes), sizes),
    ],
)
def test_sizes_that_do_not_fit_are_refused(alter, program):
    with pytest.raises(ProgramError, match="the sizes of the step do not fit its program"):
        resized(program, alter(sizes_of(program)), b"altered")


def test_the_sizes_of_a_program_give_the_program(program):
    sizes = sizes_of(program)
    assert resized(program, packed_sizes(sizes, sizes), b"its own") == program


@pytest.mark.parametrize("rows", [[0, 5, 0, 3], [5, 3, 0, 0]])
def test_empty_batches_have_the_program_of_others(rows, tmp_path):
    def loss(model, batch):
        # Of an empty result, the columns begin outside of its memory.
        columns = model(batch)[torch.randperm(len(batch))].unbind(1)
        return torch.stack([2 * column for column in columns], 1).square().sum()

    torch.manual_seed(0)
    run = looped(nn.Linear(4, 3), [torch.randn(n, 4) for n in rows], loss, run=tmp_path / "run")
    assert run.verify(progress=False, processes=1).is_exact
    assert all(run[step].is_exact for step in range(1, 5))
    assert len([*(run.directory / "programs").iterdir()]) == 2
