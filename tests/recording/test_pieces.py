"""Batches by content: rows that return, in any order, are stored once, and come back as they were."""

from shutil import rmtree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.descent import looped
from tests.sealing import sql
from tests.snapshots import take_snapshots_every
from torch import nn

import everystep
from everystep.recording.prune import prune, pruning_of

rows = st.lists(st.integers(0, 30), min_size=1, max_size=40)


def _mean_square(model, batch):
    return model(batch).square().mean()


def _record(run, batches, **options):
    torch.manual_seed(0)
    return looped(nn.Linear(20, 1), batches, _mean_square, run=run, **options)


@settings(max_examples=8, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5))
def test_each_row_is_stored_once_and_every_batch_opens(tmp_path_factory, drawn):
    data = torch.randn(31, 20, generator=torch.Generator().manual_seed(1))
    batches = [data[places] for places in drawn]
    run = _record(tmp_path_factory.mktemp("pieces") / "run", batches)
    for step, batch in enumerate(batches, 1):
        assert torch.equal(*run[step].batch, batch)
    of_rows = "SELECT coalesce(sum(length(digests)), 0) / 16 FROM contents WHERE size = 80"
    assert sql(run.directory, of_rows) == [(len({place for places in drawn for place in places}),)]
    assert run.verify(processes=1, progress=False).is_exact


def test_the_numbers_of_lost_rows_are_not_taken_for_those_of_later_ones(tmp_path):
    first, second, *later = torch.randn(16, 20, generator=torch.Generator().manual_seed(1)).split(4)
    run = _record(tmp_path / "run", [first, second])
    prune(run.directory, pruning_of(run.directory, snapshots=None, batches=0))
    later[-1] = later[-1].view(2, 2, 20)  # rows of another size
    again = _record(tmp_path / "run", [first, second, *reversed(later)], resume=True)
    for step in (1, 2):
        with pytest.raises(everystep.RunError, match="dropped"):
            again[step]
    for step, batch in enumerate(reversed(later), 3):
        assert torch.equal(*again[step].batch, batch)


def test_steps_after_lost_batches_open_however_often_a_run_is_resumed_and_pruned(tmp_path):
    batches = [*torch.randn(36, 4, 20, generator=torch.Generator().manual_seed(1))]
    run = _record(tmp_path / "run", batches[:12])
    prune(run.directory, pruning_of(run.directory, snapshots=None, batches=0))
    for steps in (24, 36):
        run = _record(tmp_path / "run", batches[:steps], resume=True)
    prune(run.directory, pruning_of(run.directory, snapshots=0, batches=None))
    for step in (13, 24, 36):
        assert torch.equal(*run[step].batch, batches[step - 1])


def test_a_loop_is_made_longer_more_than_once(tmp_path, monkeypatch):
    batches = [*torch.randn(12, 4, 20, generator=torch.Generator().manual_seed(1))]
    for steps, interval in ((4, 16), (8, 4), (12, 16)):
        take_snapshots_every(monkeypatch, interval)
        run = _record(tmp_path / "run", iter(batches[:steps]), resume=steps > 4)
        assert len(run.losses) == steps
    # From the end itself, where the recorded steps are not repeated.
    _record(tmp_path / "other", batches)
    assert len(_record(tmp_path / "other", batches * 2, resume=True, force=True).losses) == 24


def test_a_resume_that_differs_gives_up_no_batches(tmp_path, monkeypatch):
    batches = [*torch.randn(12, 4, 20, generator=torch.Generator().manual_seed(1))]
    run = _record(tmp_path / "run", batches, batch_budget=4000)
    rmtree(run.directory / "snapshots/000012")  # so that all steps are repeated
    monkeypatch.setattr("everystep.training.writer.FLUSH_SECONDS", 0.0)
    batches[10] = batches[10] + 1
    with pytest.raises(everystep.RunError, match=r"step 11 .* The run is unchanged"):
        _record(tmp_path / "run", batches, resume=True, batch_budget=400)
    again = everystep.open(run.directory)
    assert [len(again[step].batch) for step in range(1, 13)] == [1] * 12
