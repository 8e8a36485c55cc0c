"""A killed run loses nothing and resumes to the same bits; `make torture` does this at length."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.descent import descend
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everystep
from everystep.recording import recorder
from everystep.training.loop_writer import LoopWriter
from everystep.training.watched_steps import WatchedSteps
from everystep.views.progress import Silent

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("what", "each"), [("operations", 200), pytest.param("signals", 2, marks=pytest.mark.sweep)]
)
def test_death_loses_nothing_and_signals_close_the_run(what, each):
    command = [sys.executable, "-m", "benchmarks.torture", what, "--only", "chapter-whole-batch"]
    done = subprocess.run([*command, "--each", str(each)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"\| all \| (\d+) \|", done.stdout)[1]) > 1  # that came before the end


def loop(steps, directory, resume=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = torch.randn(32, 6), torch.randn(32, 2)
    loader = DataLoader(TensorDataset(*data), batch_size=8, shuffle=True)

    def batches(count=0):
        while True:
            for batch in loader:
                if count == steps:
                    return
                count += 1
                yield batch

    with everystep.record(
        run=Path(directory), resume=resume, model=model, optimizer=optimizer
    ) as recording:
        for x, y in recording.steps(batches()):
            loss = descend(optimizer, nn.functional.mse_loss(model(x), y))
            recording.log(loss=loss, size=x.abs().mean())
    return recording.run


def test_a_loop_that_goes_on_has_the_table_and_the_state_of_a_whole_one():
    whole = loop(36, "whole")
    for steps in (12, 24):  # the batches end with a draw that begins another epoch
        loop(steps, "run", resume=True)
    run = loop(36, "run", resume=True)
    assert run.losses.schema == whole.losses.schema
    assert run.table_frame().equals(whole.table_frame())
    assert run.measured("lr") == {1: 0.01}
    states = [each.state_near(36).rest for each in (run, whole)]
    assert states[0]["generator/torch"].equal(states[1]["generator/torch"])


def test_a_loop_begins_where_a_killed_one_left_no_state():
    for name in ("run.lock", "run.sqlite-new", ".data.safetensors.tmp"):
        Path("run/snapshots").mkdir(parents=True, exist_ok=True)
        (Path("run") / name).write_text("")
    Path("run/.data.safetensors.tmp").unlink()
    run = loop(4, "run", resume=True)
    assert run.status == "finished" and len(run.losses) == 4


def test_a_loop_does_not_begin_where_other_files_are():
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("")
    with pytest.raises(everystep.RunError, match="already exists"):
        loop(4, "run", resume=True)
    assert Path("run/thesis.tex").exists()


def test_a_fork_is_there_with_its_own_first_state_or_not_at_all(monkeypatch):
    settings = {"steps": 20, "data.N": 16, "data.D_in": 4, "data.D_out": 2}
    layers = {"model.layers": ["Linear(4, 2)"]}
    run = everystep.train_experiment("two-layer", settings | layers, run="./parent")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "write_snapshot", full)
        with pytest.raises(everystep.RecordingError, match="No space left"):
            run.fork(7, lr=1e-5, run="./fork")
    assert not Path("fork").exists()
    assert run.fork(7, lr=1e-5, run="./fork").verify(processes=1).is_exact


def test_a_signal_as_a_run_begins_waits_for_its_first_step():
    class Interrupting(Silent):
        def begin(self, directory, facts):
            signal.raise_signal(signal.SIGINT)

    run = everystep.train_experiment("two-layer", {"steps": 9}, run="./parent", progress=False)
    with pytest.raises(KeyboardInterrupt):
        run.fork(7, lr=1e-7, run="./fork", progress=Interrupting())
    fork = everystep.open("./fork")
    assert (fork.status, len(fork)) == ("stopped", 8)


def test_a_measurement_without_values_leaves_no_name():
    run = loop(4, "run")
    with pytest.raises(ZeroDivisionError):
        run.measure(lambda step: 1 / 0, name="ratio", processes=1)
    assert "ratio" not in run.facts.measured


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        *((signal.SIGINT, moment) for moment in ("_note_logged", "is_snapshot_due", "flush")),
        (signal.SIGTERM, "flush"),
    ],
)
def test_a_signal_while_a_step_is_recorded_waits_until_it_is(monkeypatch, kind, moment):
    recorded, calls = getattr(LoopWriter, moment), []

    def interrupted(self, *arguments):
        calls.append(self.step)
        if self.step == 5 and calls.count(5) == 1:
            signal.raise_signal(kind)
        return recorded(self, *arguments)

    ended, kill = [], os.kill

    def kill_no_test(process, number):  # but workers of loaders that are dropped meanwhile
        ended.append(number) if process == os.getpid() else kill(process, number)

    with monkeypatch.context() as patch:
        patch.setattr("everystep.training.writer.FLUSH_SECONDS", 0.0)
        patch.setattr(LoopWriter, moment, interrupted)
        patch.setattr("os.kill", kill_no_test)
        with pytest.raises(KeyboardInterrupt if kind == signal.SIGINT else SystemExit):
            loop(12, "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert ended == ([signal.SIGTERM] if kind == signal.SIGTERM else [])
    run = everystep.open("run")
    assert (run.status, len(run), run.snapshots[-1]) == ("stopped", 5, 5)
    whole = loop(12, "whole")
    again = loop(12, "run", resume=True)
    assert again.losses.equals(whole.losses) and again.verify(progress=False).is_exact


@pytest.mark.parametrize("moment", ["__init__", "begin", "close", "finish"])
def test_ctrl_c_as_a_recording_begins_or_ends_leaves_a_closed_run(moment, monkeypatch):
    happens, calls = getattr(WatchedSteps, moment), []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == (12 if moment == "close" else 1):
            signal.raise_signal(signal.SIGINT)
        return happens(self, *arguments)

    def by_next(resume=False):
        model = nn.Linear(2, 2)
        with everystep.record(run="./run", resume=resume, model=model) as recording:
            batches = recording.steps(torch.ones(12, 1, 2))
            for _ in range(12 - recording.step_count):
                recording.log(loss=model(next(batches)).sum())
        return recording.run

    with monkeypatch.context() as patch:
        patch.setattr(WatchedSteps, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            by_next()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert everystep.open("run").status in ("stopped", "finished")
    assert len(by_next(resume=True)) == 12


def test_ctrl_c_while_a_run_is_closed_waits_until_it_is(monkeypatch):
    close = LoopWriter.finish

    def interrupted(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        close(self, *arguments)

    monkeypatch.setattr(LoopWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop(4, "run")
    assert everystep.open("run").status == "finished"


def test_ctrl_c_in_the_body_of_a_loop_ends_it_at_once():
    with (
        pytest.raises(KeyboardInterrupt),
        everystep.record(model=nn.Linear(2, 2), run="./run") as recording,
    ):
        for step in recording.steps(range(5)):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
    run = everystep.open("run")
    assert (run.status, len(run)) == ("stopped", 3)


def test_a_loop_that_leaves_by_exit_has_not_finished():
    with pytest.raises(SystemExit), everystep.record(model=nn.Linear(2, 2), run="./run") as recording:
        for step in recording.steps(range(5)):
            if step == 3:
                sys.exit("diverged")
    run = everystep.open("run")
    assert (run.status, run.facts.reason, len(run)) == ("stopped", "by SystemExit: diverged", 3)


def test_a_step_function_that_is_stopped_keeps_its_last_state():
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(8, 6), torch.randn(8, 2)

    def step():
        taken.append(1)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        return descend(optimizer, nn.functional.mse_loss(model(x), y))

    taken = []
    parts = {"model": model, "optimizer": optimizer}
    with pytest.raises(KeyboardInterrupt):
        everystep.train(step, parts=parts, steps=10_000_000, run="./run")
    run = everystep.open("run")
    assert (run.status, len(run), run.snapshots[-1]) == ("stopped", 3, 3)


def test_what_is_raised_as_a_loop_breaks_off_is_raised_after_it(monkeypatch):
    def differs(self, **options):
        raise everystep.RunError("the state is not the recorded one")

    monkeypatch.setattr(LoopWriter, "rests", differs)
    model = torch.nn.Linear(2, 1)
    with (
        pytest.raises(everystep.RunError, match="not the recorded one"),
        everystep.record(run="./run", model=model) as recording,
    ):
        for x in recording.steps(torch.ones(3, 2)):
            recording.log(loss=model(x))
            break
    assert everystep.open("run").status == "failed"


def serve():
    while True:
        time.sleep(0.01)


def test_a_process_that_a_step_forks_ends_as_it_does_without_everystep(tmp_path):
    """A recording waits with SIGTERM for the end of the step, but not in a child."""
    model = nn.Linear(2, 1)
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for x in recording.steps([torch.randn(3, 2)] * 2):
            child = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
            child.start()
            child.terminate()
            child.join(20)
            code = child.exitcode
            child.kill()
            assert code == -signal.SIGTERM
            recording.log(loss=model(x).sum())
