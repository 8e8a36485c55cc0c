"""What is missing, altered or asked for wrongly is named, and never passed off as right."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from tests.sealing import seal_files, sql
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import bits, by_train, new_training

import everystep
from everystep.replay.processes import needs_worker


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of 40 steps with a snapshot at every eighth, which no test may change."""
    with pytest.MonkeyPatch.context() as patch:
        take_snapshots_every(patch, 8)
        place = tmp_path_factory.mktemp("recorded") / "run"
        return by_train(new_training(), steps=40, run=place).directory


@pytest.fixture
def run(recorded):
    """A copy of it, newly opened."""
    return everystep.open(shutil.copytree(recorded, Path("runs", "sequential-1").absolute()))


def alter(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_an_altered_snapshot_is_named_by_its_digest_and_the_one_before_is_used(run):
    _, *between, _ = run.snapshots
    state = between[len(between) // 2]
    expected = bits(run.parameters(state + 3)["0.weight"])
    alter(run.directory / "snapshots" / f"{state:06d}" / "parameters.safetensors")
    opened = everystep.open(run.directory)
    assert opened[state + 3].is_exact
    assert bits(opened.parameters(state + 3)["0.weight"]) == expected
    [problem] = opened.problems
    assert f"{state:06d}/parameters.safetensors was changed after recording" in problem
    found = opened.verify(processes=1, progress=False)
    assert not found.is_exact
    assert (found.snapshots, found.all_snapshots) == (len(between), len(between) + 1)
    assert found.different_steps == 0 and not found.states


def test_altered_data_is_named(run):
    alter(run.directory / "data.safetensors")
    with pytest.raises(everystep.RunError, match=r"data\.safetensors was changed after recording"):
        everystep.open(run.directory)[3]
    seal_files(run.directory)
    with pytest.raises(
        everystep.RunError, match="is not the data that the run was trained on: its digest"
    ):
        everystep.open(run.directory)[3]


def test_an_altered_program_is_never_passed_off_as_the_original(run):
    for path in run.directory.glob("programs/*.json"):
        path.write_text(path.read_text().replace("aten.tanh.default", "aten.sin.default"))
    seal_files(run.directory)
    opened = everystep.open(run.directory)
    assert not opened[5].is_exact
    assert opened[5].diverged_at == 1
    found = opened.verify(processes=1, progress=False)
    assert found.first_loss.step == 1 and found.states
    assert opened.when("norm(parameters['0.bias']) > 0", progress=False).inexact
    with pytest.raises(everystep.RunError, match="differs from its recording"):
        opened.first_nonfinite(progress=False)


def test_a_step_before_the_one_that_diverged_is_exact_in_whatever_order_they_are_opened(run):
    sql(run.directory, "UPDATE steps SET loss = loss + 1 WHERE step = 20")
    opened = everystep.open(run.directory)
    assert opened[20].diverged_at == 20
    assert opened[5].is_exact and opened[5].diverged_at is None
    assert opened[21].diverged_at == 20


def test_nothing_is_measured_where_only_the_closing_state_tells_that_a_piece_diverged(run):
    _, first, second, *_ = run.snapshots
    folder = run.directory / "snapshots" / f"{second:06d}"
    tensors = load_file(folder / "parameters.safetensors")
    tensors["0.weight"][0, 0] += 1
    (folder / "parameters.safetensors").write_bytes(save(tensors))
    seal_files(run.directory)
    measured = everystep.open(run.directory).measure("norm(parameters['0.weight'])", progress=False)
    assert first in measured.values
    assert measured.left_out[0] == first + 1
    assert not set(range(first + 1, second + 1)) & measured.values.keys()


def test_a_loss_that_was_taken_out_is_named(run):
    sql(run.directory, "DELETE FROM steps WHERE step = 7")
    opened = everystep.open(run.directory)
    with pytest.raises(everystep.RunError, match="has no loss for step 7, but"):
        opened.verify(processes=1, progress=False)


def test_an_altered_experiment_is_not_forked(run):
    trained = everystep.train_experiment("two-layer", {"steps": 5}, progress=False)
    path = trained.directory / "experiment.toml"
    path.write_text(path.read_text().replace("0.0001", "0.0002"))
    with pytest.raises(everystep.RunError, match="was changed after recording"):
        trained.fork(3, progress=False)


def test_steps_by_any_kind_of_whole_number(run, everystep_command):
    wrong = (slice("a", None), slice(1.5, None), slice(None, "b"), slice(None, None, 0))
    for number in (41, 0, -41, 10**30, "a", None, 1.5, *wrong):
        with pytest.raises(everystep.StepError) as error:
            run[number]
        assert isinstance(error.value, IndexError)
    assert run[np.int64(5)].number == run[torch.tensor(5)].number == 5
    assert run[-1].number == run[40].number == 40
    assert [step.number for step in run[38:]] == [38, 39, 40]
    assert [step.number for step in run[5:1:-2]] == [5, 3]
    assert [step.number for step in run[-99:6:2]] == [1, 3, 5]  # as of a list
    assert repr(run[50:]) == "<no steps>"
    with pytest.raises(everystep.UsageError, match="has no measurement 'accuracy'; "):
        run.measured("accuracy")
    assert next(reversed(run)).number == 40
    assert len(list(run)) == len(run) == 40
    code, out, _ = everystep_command("step", run.directory, "-1")
    assert code == 0
    assert "step 40 of 40" in out


#: One of the runs has what torch itself does not pickle, count or compare.
OTHER_NUMERICS = """
import everystep, torch
everystep.train_experiment("two-layer", {"steps": 20, "threads": 1}, run="plain", progress=False)
model = torch.nn.Linear(4, 2)
with everystep.record(run="odd", model=model) as recording:
    for x in recording.steps([torch.rand(3, 4) for _ in range(4)]):
        odd = [x.to(each) for each in (torch.uint16, torch.uint64, torch.float8_e4m3fn)]
        loss = (model(x) + sum(each.float().sum() for each in odd)).square().sum()
        recording.log(loss=loss)
"""


@pytest.fixture(scope="module")
def other_numerics(tmp_path_factory):
    """Runs of a process with other numerics, which no test may change."""
    place = tmp_path_factory.mktemp("other")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    command = [sys.executable, "-c", OTHER_NUMERICS]
    subprocess.run(command, check=True, env=environment, cwd=place, timeout=120)
    return place / "runs"


@pytest.mark.sweep
def test_a_run_of_other_numerics_is_replayed_in_a_process_that_has_them_and_in_another_if_that_dies(
    other_numerics,
):
    run = everystep.open(other_numerics / "plain")
    here = everystep.train_experiment("two-layer", {"steps": 20, "threads": 1}, progress=False)
    pair = [each.facts.training.numerics for each in (here, run)]
    names = {
        name for name in ("cpu_capability", "mkl_cbwr") if len({getattr(n, name) for n in pair}) > 1
    }
    assert needs_worker(run.facts) == bool(names)
    assert run[7].is_exact
    assert run.verify(progress=False).is_exact
    assert here.diff(run, progress=False).numerics.keys() == names
    if not names:
        pytest.skip("this machine computes in one way only")
    for child in Path("/proc/self/task").glob("*/children"):
        for pid in child.read_text().split():
            if b"popen_loky" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
    with pytest.raises(everystep.TrainingError, match=r"has ended too early.*free memory"):
        run[19]
    assert run[19].is_exact


@pytest.mark.sweep
def test_tensors_of_rare_dtypes_come_from_a_process_with_other_numerics(other_numerics):
    run = everystep.open(other_numerics / "odd")
    step = run[2]
    made = {tensor.dtype: tensor for seen in step.operations for tensor in seen.results.values()}
    for dtype in (torch.uint16, torch.uint64, torch.float8_e4m3fn):
        assert torch.equal(made[dtype].float(), step.batch.x.to(dtype).float())
    assert step.is_exact and step.data()["operations"]
    assert run.first_nonfinite(progress=False) is None
    assert len(run.rerun(capability="avx2", progress=False).losses) == 4


def test_a_long_replay_is_announced(run, monkeypatch, capsys):
    run[2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("everystep.replay.run_replay.LONG_SECONDS", 0.0)
    run[3]
    assert capsys.readouterr().err == ""
    run[20]
    announced = r"everystep: steps 17 to 18 are replayed first: about [\d,]+ seconds\n"
    assert re.fullmatch(announced, capsys.readouterr().err)


def test_a_replay_takes_no_more_processes_than_half_of_the_memory_holds(run, monkeypatch):
    def pool(count, *_, **options):
        raise RuntimeError(f"{count} processes")

    monkeypatch.setattr("loky.cpu_count", lambda: 8)
    monkeypatch.setattr("everystep.replay.processes.ALONE_SECONDS", 0.0)
    monkeypatch.setattr("everystep.replay.processes.pool", pool)
    monkeypatch.setattr("everystep.replay.processes.MEMORY", 2_000_000_000)
    with pytest.raises(RuntimeError, match="3 processes"):
        run.verify(progress=False)
    monkeypatch.setattr("everystep.replay.processes.MEMORY", 1_000_000_000)
    assert run.verify(progress=False).is_exact
