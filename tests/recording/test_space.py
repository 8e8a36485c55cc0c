"""What runs take on the disk, and how they are removed."""

import itertools
import json
import shutil
import sqlite3
import subprocess
from contextlib import closing

import pytest
import torch
from filelock import FileLock
from tests.descent import looped
from tests.snapshots import take_snapshots_every
from torch import nn

import everystep
from everystep.errors import size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((12, "12 bytes"), (12_300, "12 kB"), (3_400_000, "3.4 MB"), (999_400_000, "999 MB")),
        *((999_600_000, "1 GB"), (12_345_678_901, "12.3 GB"), (1_234_567_890_123, "1,235 GB")),
    ],
)
def test_sizes_have_three_digits_and_no_exponent(count, text):
    assert size_text(count) == text


def sum_of(model, x):
    return model(x).sum()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two runs and a fork, which no test may change."""
    place = tmp_path_factory.mktemp("space") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        take_snapshots_every(patch, 4)
        first = everystep.train_experiment("two-layer", {"steps": 20}, run=place / "first")
        first.fork(5, run=place / "fork")
        batches = [torch.randn(50, 300) for _ in range(3)]
        looped(nn.Linear(300, 300), batches, sum_of, run=place / "large", optimizer=None)
    return place


@pytest.fixture
def runs(recorded, tmp_path, monkeypatch):
    """A copy of them in runs/, with hard links as they were, the working directory being that of all."""
    take_snapshots_every(monkeypatch, 4)
    subprocess.run(["cp", "-a", recorded, tmp_path / "runs"], check=True)
    return tmp_path / "runs"


def test_what_runs_take_is_listed_by_kind_the_largest_first(runs, everystep_command):
    (runs / "large" / "mine.txt").write_text("x" * 5000)
    found = json.loads(everystep_command("du", "--json")[1])
    totals = [each["total"] for each in found]
    assert totals == sorted(totals, reverse=True)
    of = {each["name"]: each for each in found}
    kinds = ("snapshots", "batches", "data", "programs", "database", "others")
    for each in found:
        assert each["total"] == sum(each[kind] for kind in kinds)
    assert of["large"]["snapshots"] > 2 * 300 * 300 * 4
    assert of["large"]["batches"] >= 3 * 50 * 300 * 4
    assert of["large"]["others"] >= 5000
    assert of["first"]["data"] >= 64 * 1000 * 4
    # A fork has its parent's data as hard links, which count once.
    assert of["first"]["data"] == 0 or of["fork"]["data"] < 64 * 1000 * 4
    code, table, _ = everystep_command("du")
    assert code == 0
    assert [line.split()[0] for line in table.splitlines()] == ["run", *of, "all"]
    assert everystep_command("du", "large")[1].splitlines()[1].split()[0] == "large"


def test_a_removed_run_is_gone_and_its_fork_is_whole(runs, everystep_command):
    code, out, err = everystep_command("rm", "first", "--force")
    assert (code, out) == (0, "")
    assert err.startswith("removed runs/first (")
    assert not (runs / "first").exists()
    assert everystep.open("runs/fork").verify().is_exact
    assert json.loads(everystep_command("du", "fork", "--json")[1])[0]["others"] == 0
    assert "still has" not in everystep_command("rm", "fork", "--force")[2]
    assert not (runs / "fork").exists()


def test_files_of_others_stay(runs, everystep_command):
    (runs / "large" / "best.pt").write_text("mine")
    err = everystep_command("rm", "large", "--force")[2]
    assert "runs/large still has best.pt, which everystep did not write" in err
    assert [path.name for path in (runs / "large").iterdir()] == ["best.pt"]


def test_a_link_and_the_database_of_another_program_are_not_removed(runs, everystep_command):
    link, foreign = runs / "link", runs / "foreign" / "run.sqlite"
    link.symlink_to("first")
    code, _, err = everystep_command("rm", "link", "--force")
    assert code == 2
    assert "runs/link is a link; remove " in err
    assert everystep.open("runs/first").verify().is_exact
    foreign.parent.mkdir()
    with closing(sqlite3.connect(foreign)) as database:
        database.execute("CREATE TABLE mine (number)")
    code, _, err = everystep_command("rm", "foreign", "--force")
    assert code == 2
    assert "not of an everystep run" in err
    assert foreign.exists()
    foreign.write_bytes(b"damaged")  # a damaged run can be removed
    assert everystep_command("rm", "foreign", "--force")[0] == 0
    link.unlink()


def test_nothing_is_removed_without_a_yes_or_while_it_is_written(runs, everystep_command):
    code, _, err = everystep_command("rm", "first", "large")
    assert code == 2
    assert "pass --force" in err
    with FileLock(runs / "first" / "run.lock"):
        code, _, err = everystep_command("rm", "first", "--force")
    assert code != 0
    assert "is being written" in err
    code, _, err = everystep_command("rm", "none", "--force")
    assert code != 0
    assert "no run 'none'" in err
    assert everystep.open("runs/first").verify().is_exact


def test_a_directory_without_runs(runs, everystep_command):
    shutil.rmtree(runs)
    runs.mkdir()
    assert everystep_command("du") == (0, "", "runs has no runs\n")


def test_states_are_pruned_and_every_step_still_opens(runs, everystep_command):
    run = everystep.train_experiment("two-layer", {"steps": 60}, run="runs/long")
    before = list(run.snapshots)
    assert len(before) > 4
    code, said, _ = everystep_command("prune", "long", "--snapshots", 1, "--force")
    assert code == 0
    run = everystep.open("runs/long")
    kept = list(run.snapshots)
    assert kept[0] == 0 and kept[-1] == 60 and len(kept) < len(before)
    gap = max(two - one for one, two in itertools.pairwise(kept))
    count = f"{len(before) - len(kept)} of {len(before)} states on disk are removed"
    assert said == f"{count}; opening a step replays up to {gap} steps\n"
    assert sorted(path.name for path in (runs / "long" / "snapshots").iterdir()) == [
        f"{step:06d}" for step in kept
    ]
    assert run.verify().is_exact and run.damage is None
    assert everystep_command("prune", "long", "--snapshots", 1, "--force")[2].endswith(
        "more to remove\n"
    )


def test_the_oldest_batches_are_pruned_and_what_still_opens_is_said(runs, everystep_command):
    batches = [torch.randn(50, 200) for _ in range(300)]
    options = {"run": "runs/wide", "optimizer": None, "batch_budget": 16_000_000}
    looped(nn.Linear(200, 10), batches, sum_of, **options)
    code, said, _ = everystep_command("prune", "wide", "--batches", 6, "--force")
    assert code == 0
    run = everystep.open("runs/wide")
    lost = run.facts.batches_lost_to
    assert said.startswith(f"batches of steps 1 to {lost} are removed: steps from ")
    opens = int(said.split("steps from ")[1].split()[0])
    assert lost < opens < 300 and run[opens].is_exact and run[300].is_exact
    held = sum(path.stat().st_size for path in (runs / "wide" / "batches").iterdir())
    assert held <= 6_000_000
    with pytest.raises(everystep.RunError, match="batch"):
        run[1]
    assert len(run.losses) == 300
    assert run.damage is None


def test_pruning_asks_for_what_and_whether(runs, everystep_command):
    code, _, err = everystep_command("prune", "first")
    assert code == 2 and "--snapshots MB, --batches MB" in err
    everystep.train_experiment("two-layer", {"steps": 60}, run="runs/long")
    code, _, err = everystep_command("prune", "long", "--snapshots", 1)
    assert code == 2 and "pass --force" in err
    with FileLock("runs/long/run.lock"):
        assert everystep_command("prune", "long", "--snapshots", 1, "--force")[:2] == (2, "")
    assert everystep.open("runs/long").verify().is_exact
