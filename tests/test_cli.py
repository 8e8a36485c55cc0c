"""The commands, as typed."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from tests.page.serving import PATIENCE

import everystep
from everystep.experiment.specification import built_in
from everystep.recording.directories import find_runs
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import model_text, optimizers_text
from everystep.views.lists import runs_text


def start(*arguments, **options):
    command = [sys.executable, "-c", "from everystep.cli import main; main()", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_train_prints_lines_where_piped_and_says_what_is_next(everystep_command):
    code, out, err = everystep_command("train")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    assert [int(step) for step, _ in lines] == list(range(1, 501))
    run = everystep.open("two-layer-1")
    assert [float(loss) for _, loss in lines] == pytest.approx(run.losses["loss"].to_list(), rel=1e-7)
    headings = [line.split()[0] for line in err.splitlines() if re.match(r"[a-z]+ ", line)]
    assert headings[:6] == ["device", "data", "model", "loss", "update", "steps"]
    assert "(0): Linear(in_features=1000, out_features=100, bias=True)" in err
    assert "recorded in runs/two-layer-1" in err
    view, *others = err.partition("next:\n")[2].splitlines()
    assert view.split() == ["everystep", "view", "two-layer-1"]  # it serves until it is stopped
    for line in others:
        assert everystep_command(*line.split()[1:])[0] == 0


@pytest.mark.parametrize("steps", [500, 45, 7])
def test_a_cell_of_a_notebook_shows_few_lines(everystep_command, monkeypatch, steps):
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    _, out, _ = everystep_command("train", "--steps", steps)
    shown = [int(line.split("\t")[0]) for line in out.splitlines()]
    assert shown[0] == 1 and shown[-1] == steps and len(shown) in (7, 21, 24)
    assert shown == sorted(set(shown))


def test_settings_and_shorthands(everystep_command):
    code, _, _ = everystep_command(
        "train", "two-layer", "--steps", 3, "--seed", 7, "--device", "cpu", "--threads", 1,
        "--set", "optimizer.lr=1e-3", "--set", "model.layers[1]=Tanh()", "--run", "./mine", "-q",
    )  # fmt: skip
    assert code == 0
    run = everystep.open("mine")
    assert run.facts.training.seed == 7
    assert "Tanh()" in model_text(run.facts.training.modules)
    assert "lr=0.001" in optimizers_text(run.facts.training.optimizers)


@pytest.mark.parametrize("name", built_in())
def test_every_built_in_experiment_is_listed_printed_and_trains_from_its_print(everystep_command, name):
    assert name in everystep_command("experiments")[1]
    code, text, _ = everystep_command("experiments", name)
    assert (code, text) == (0, built_in()[name].read_text())
    Path("copy.toml").write_text(text)
    assert everystep_command("train", "copy.toml", "--steps", 2, "-q")[0] == 0
    assert everystep.open("copy-1").status == "finished"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "two-layr"], "did you mean two-layer"),
        (["train", "--steps", "-1"], "steps: must be at least 0, not -1"),
        (["train", "--set", "optimizer.lrr=1"], "did you mean lr"),
        (["train", "--set", "nonsense"], "path=value"),
        (["train", "--device", "cuda:7"], "this machine has: cpu"),
        (["train", "--set", "batch_size=65"], "65 is out of range: there are 64 training rows"),
        (["train", "--set", "loss.reduction=none"], "mean or sum"),
        (["train", "--threads", "100000"], "threads: must be at most 1024"),
        (["train", "--set", "optimizer.lr=abc"], "optimizer.lr: must be a number, not 'abc'"),
        (["train", "--set", "optimizer.lr=[0.1]"], "optimizer.lr: must be a number, not [0.1]"),
        (["train", "--set", "data=3"], "data: must be a section [data], not 3"),
        (["train", "--run", "."], "never overwrites a run"),
        (["train", "wine", "--set", "data.path=nothing.csv"], "does not exist"),
        (["losses", "nothing"], "has no runs; run `everystep train`"),
        (["runs"], "is not a directory; `everystep train`"),
        (["plot", "nothing", "-o", "x.png"], "no run 'nothing'"),
        (["nonsense"], "no command 'nonsense'"),
        (["train", "--nonsense"], "no such option: --nonsense"),
        (["continue", "x"], "no command 'continue'; everystep resume RUN"),
        (["tensorboard"], "no command 'tensorboard'; everystep view"),
        (["plto"], "no command 'plto'; did you mean plot?"),
        (["zzz"], "no command 'zzz'; everystep -h lists the commands"),
        (["train", "--steps", "5", "--epochs", "2"], "--steps and --epochs are mutually exclusive"),
        (["train", "--device", "gpu"], "unknown device 'gpu'; did you mean cuda"),
        (["train", "--set", "lr=1"],
         "experiment two-layer: lr: unknown key; did you mean optimizer.lr?"),
        (["list"], "everystep runs lists the runs"),
        (["predict"], "everystep.open(RUN).parameters(-1)"),
        (["export", "x"], "everystep losses RUN --csv"),
        (["help", "train"], "everystep COMMAND -h"),
        (["train", "--lr", "3"], "no such option: --lr; write --set optimizer.lr=VALUE"),
        (["resume", "x", "--lr", "3"],
         "no such option: --lr; it keeps its settings; to change them, everystep fork"),
        (["train", "--batch_size=4"], "no such option: --batch_size; write --set batch_size=VALUE"),
        (["fork", "x", "--at", "1", "--lr", "--quiet"], "write --set optimizer.lr=VALUE"),
        (["train", "--step", "3"], "--steps"),
        (["sweep", "digits", "--steps", "3"], "no such option: --steps; write --set steps=VALUE"),
        (["train", "--steps", "few"], "'--steps': must be an integer; everystep train -h"),
        (["losses", "mine", "--last", "0"], "'--last': must be at least 1"),
        (["train", "--epochs"], "option '--epochs' requires an argument; everystep train -h"),
        (["step", "mine"], "missing argument 'STEP'; everystep step -h describes it"),
        (["runs", "mine"], "mine is not a directory; it is a run in runs/"),
        (["runs", "runs/mine"], "runs/mine is a run; `everystep runs runs` lists the runs next to it"),
    ],
)  # fmt: skip
def test_wrong_use_ends_in_one_message_with_the_cure_and_exit_code_2(
    everystep_command, arguments, message
):
    if arguments[-1].endswith("mine"):
        Path("runs/mine").mkdir(parents=True)
        Path("runs/mine/run.sqlite").touch()
    code, out, err = everystep_command(*arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_losses_in_every_form(everystep_command):
    everystep_command("train", "digits", "--steps", "46", "--run", "./run", "-q")
    frame = everystep.open("run").table_frame()
    code, out, _ = everystep_command("losses", "run", "--last", 2)
    assert (code, len(out.splitlines())) == (0, 3)
    assert out.split()[:4] == ["step", "loss", "validation_accuracy", "validation_loss"]
    everystep_command("losses", "run", "--csv", "-o", "l.csv")
    read = pl.read_csv("l.csv", schema_overrides={"loss": pl.Float32})
    assert read["loss"].equals(frame["loss"])
    everystep_command("losses", "run", "--parquet", "-o", "l.parquet")
    assert pl.read_parquet("l.parquet").equals(frame)
    rows = json.loads(everystep_command("losses", "run", "--json")[1])
    assert [row["loss"] for row in rows] == frame["loss"].to_list()
    # Text and CSV have the same digits: those of float32 for the losses, of float64 for the others.
    lines = (everystep_command("losses", "run", *form)[1].splitlines()[1:] for form in ([], ["--csv"]))
    text, csv = ([line.replace(",", " ").split() for line in each] for each in lines)
    assert text[-1] == csv[-1] and text[-1][1] == str(np.float32(rows[-1]["loss"]))
    assert everystep_command("losses", "run", "--csv", "--json")[0] == 2
    assert everystep_command("losses", "run", "--parquet")[0] == 2


def test_names_survive_json_in_any_encoding(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    name = "é\N{ZERO WIDTH JOINER}\N{GRINNING FACE}²"
    everystep.train_experiment("two-layer", {"steps": 1}, run="run", progress=False).measure(
        lambda step: 1.0, name=name, progress=False
    )
    with start("losses", "run", "--json") as process:
        assert name in json.loads(process.stdout.read())[0]


def test_nan_and_infinity_survive_json(everystep_command):
    everystep_command("train", "--steps", 12, "--set", "optimizer.lr=10.0", "--run", "./run", "-q")
    losses = [row["loss"] for row in json.loads(everystep_command("losses", "run", "--json")[1])]
    assert losses[-1] == "nan"
    assert "inf" in losses
    (run,) = json.loads(everystep_command("runs", ".", "--json")[1])
    assert (run["last_loss"], run["status"], run["steps"]) == ("nan", "finished", 12)


def test_what_torch_cannot_do_in_a_step_ends_in_a_message(everystep_command):
    scheduler = ["--set", "scheduler.name=OneCycleLR", "--set", "scheduler.max_lr=0.1"]
    scheduler += ["--set", "scheduler.cycle_momentum=false", "--set", "scheduler.total_steps=5"]
    code, _, err = everystep_command("train", *scheduler)
    assert code == 1
    assert "two-layer failed: Tried to step" in err
    run = everystep.open("two-layer-1")
    assert run.status == "failed"
    assert len(run.losses) >= 5


def test_runs_that_cannot_be_read_are_named_and_the_others_listed(everystep_command):
    everystep_command("train", "--steps", 3, "-q")
    Path("runs/broken").mkdir()
    Path("runs/broken/run.sqlite").write_bytes(b"nothing of the kind" * 100)
    code, out, err = everystep_command("runs")
    assert (code, "two-layer-1" in out) == (0, True)
    assert "skipped: runs/broken/run.sqlite cannot be read" in err


@pytest.mark.sweep
def test_an_encoding_without_mathematical_signs_is_no_error():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    run = everystep.train_experiment("two-layer", {"steps": 3}, run="r\xfcn", progress=False)
    loss = str(np.float32(run.losses["loss"][2]))  # other processors have other ones
    for arguments, shown in (
        (["step", "r\xfcn", "2", "--op", "5"], "d#2 = 2 * (#2 - y)"), (["losses", "r\xfcn"], loss),
    ):  # fmt: skip
        process = start(*arguments, env=environment)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, shown in out, "Error" in err) == (0, True, False), (out, err)


def test_a_run_without_steps_says_what_it_holds_and_how_to_go_on(everystep_command):
    code, out, err = everystep_command("train", "--steps", 0)
    assert (code, out) == (0, "")
    assert "only the initial state, state 0, is recorded" in err
    view, fork = err.partition("next:\n")[2].splitlines()
    assert view.split() == ["everystep", "view", "two-layer-1"]
    assert everystep_command(*fork.split()[1:], "-q")[0] == 0
    everystep_command("train", "-q")
    assert everystep.open("two-layer-1-fork-1").losses.equals(everystep.open("two-layer-2").losses)


def test_the_list_of_runs_fits_a_narrow_terminal(everystep_command):
    for settings in ([], ["--set", "optimizer.lr=10.0"]):
        everystep_command(
            "train", "--steps", 8, *settings, "--run", f"runs/a-long-name-{len(settings)}", "-q"
        )
    everystep_command("fork", "a-long-name-0", "--at", 2, "--run", "runs/part", "-q")
    summaries = [RecordedRun(path).summary() for path in find_runs()]
    for width, headings in (
        (130, ["run", "status", "steps", "first", "loss", "last", "loss", "started", "fork", "of"]),
        (80, ["run", "status", "steps", "last", "loss", "started"]),
        (60, ["run", "status", "steps", "last", "loss"]),
        (40, ["run", "status"]),
    ):
        file = io.StringIO()
        Console(file=file, width=width).print(runs_text(summaries, width))
        lines = file.getvalue().splitlines()
        assert lines[0].split() == headings
        assert max(map(len, lines)) <= width
        assert [line.split()[0] for line in lines if "finished" in line] == [
            "a-long-name-0", "a-long-name-2", "part",
        ]  # fmt: skip


def test_runs_are_listed_by_number(everystep_command):
    for number in (10, 2, 1):
        everystep_command("train", "--steps", 0, "--run", f"runs/r{number}", "-q")
    assert [run.name for run in everystep.runs()] == ["r1", "r2", "r10"]
    _, out, _ = everystep_command("runs")
    assert [line.split()[0] for line in out.splitlines()] == ["run", "r1", "r2", "r10"]


def test_ctrl_c_stops_cleanly_and_leaves_a_readable_run():
    process = start("train", "--steps", "1000000")
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "stopped: by the user (Ctrl-C)" in err
    assert "Traceback" not in err
    run = everystep.open("two-layer-1")
    losses = run.losses
    assert run.status == "stopped"
    assert losses["step"].to_list() == list(range(1, len(losses) + 1))
    assert run.snapshots[-1] == len(losses)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("module", ["typer", "torch", "numpy.linalg"])
def test_ctrl_c_while_modules_are_imported_ends_at_once(module):
    code = (
        "import os, signal, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from everystep.__main__ import main\n"
        "sys.argv = ['everystep', 'train', '--steps', '3']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")
    assert not Path("runs").exists()


def shown_in_terminal(code, *arguments):
    """Return what Python code prints in a terminal."""
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=child, stderr=child, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other end has closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    os.close(parent)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


@pytest.mark.sweep
def test_a_bar_is_shown_in_a_terminal_and_the_compiler_is_not_imported():
    code = (
        "import sys; from everystep.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sys.modules)\n"
        "from everystep.replay import run_replay; run_replay.LONG_SECONDS = 0.0\n"
        "sys.argv = ['everystep', 'step', 'two-layer-1', '400']; main()"
    )
    text = shown_in_terminal(code, "train")
    assert "500/500" in text
    (run,) = everystep.runs()
    assert f"loss {run.losses['loss'][-1]:.4g}" in text
    assert "/s" in text
    assert "500\t" not in text
    assert " torch.optim " in text and " torch._dynamo " not in text
    assert re.search(r"everystep: steps \d+ to 398 are replayed first: about \d+ seconds", text)
    assert re.search(r"replaying .* (\d+)/\1 ", text)


def test_what_is_missing_and_where_files_cannot_be_is_said(everystep_command):
    everystep_command("train", "--steps", 3, "-q")
    for condition, message in (("loss <", "after <"), ("loss > 1 and", "after and")):
        code, _, err = everystep_command("when", "two-layer-1", condition)
        assert code == 2 and f"something is missing {message}" in err
    for command, file in (("losses", "x.csv"), ("table", "x.html"), ("plot", "x.png")):
        code, _, err = everystep_command(command, "two-layer-1", "-o", f"nowhere/{file}")
        assert code == 2 and "the directory nowhere does not exist" in err


def test_the_list_of_runs_names_the_first_step_that_is_not_finite(everystep_command):
    lr = ["--set", "optimizer.lr=1"]
    everystep_command("train", *lr, "--steps", 20, "--run", "runs/diverged", "-q")
    losses = everystep.open("diverged").losses["loss"].to_list()
    assert losses.index(math.inf) < next(i for i, loss in enumerate(losses) if math.isnan(loss))
    code, out, _ = everystep_command("runs")
    assert code == 0
    assert f"finished, not finite at step {losses.index(math.inf) + 1} " in out


def test_a_loss_that_is_not_finite_leads_to_its_origin(everystep_command):
    _, _, err = everystep_command("train", "--set", "optimizer.lr=1", "--steps", 20)
    assert "training continues (stop_on_nan = true stops it)" in err
    assert "everystep first-nonfinite two-layer-1 finds where it came from" in err
    code, _, err = everystep_command("train", "--set", "optimizer.lr=1", "--set", "stop_on_nan=true")
    assert code == 1 and "training stops" in err and "continues" not in err
    assert "stopped: the loss is" in err


def test_the_list_of_commands_fits_80_columns(everystep_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = everystep_command("--help")
    assert out.count("\n  ") > 14
    assert "..." not in out.replace("[ARGS]...", "")


def test_a_hint_is_a_command_to_copy(everystep_command):
    everystep_command("train", "--steps", 2, "--run", "./run", "-q")
    _, _, err = everystep_command("measure", "run", "norm(gradients['0.weight'])")
    assert """plot run -m "norm(gradients['0.weight'])"\n""" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [(["losses", "run"], ""), (["losses", "run"], "1"), (["-h"], "")]
)
def test_output_to_a_full_disk_ends_in_one_message(everystep_command, arguments, unbuffered):
    everystep_command("train", "--steps", 2, "--run", "./run", "-q")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "everystep", *arguments], stdout=full, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.stderr == "everystep: the output cannot be written: No space left on device\n"
    assert done.returncode == 1


def run_with(stdout, *arguments, shell="", **options):
    command = [sys.executable, "-m", "everystep", *map(str, arguments)]
    if shell:  # which closes streams as users do
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, **options)
    return done.returncode, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes streams by a shell")
def test_an_answer_that_nobody_receives_is_no_success(everystep_command):
    everystep_command("train", "--steps", 2, "--run", "./run", "-q")
    ours, reader = os.pipe()
    os.close(ours)
    assert run_with(reader, "losses", "run") == (141, "")
    os.close(reader)
    closed = "everystep: the output cannot be written: stdout is closed\n"
    assert run_with(None, "losses", "run", shell=">&-") == (1, closed)
    assert run_with(subprocess.DEVNULL, "losses", "run", shell="2>&- <&-") == (0, "")


@pytest.mark.skipif(os.name != "posix", reason="closes streams by a shell")
@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("shell", [">&- 2>&- <&-", ">&-", "", "2>&1"])
def test_a_training_continues_without_a_reader_of_its_lines(shell):
    ours, reader = os.pipe()
    os.close(ours)
    code, err = run_with(reader, "train", "--steps", 4, "--run", "./run", shell=shell)
    os.close(reader)
    run = everystep.open("run")
    assert (code, run.status, len(run)) == (0, "finished", 4)
    assert run.verify(processes=1, progress=False).is_exact
    assert ("stdout is closed" in err) == (shell == ">&-")


#: A script that imports everystep after torch has computed, in a shell that sets nothing.
LATE = """
import torch
x, y = torch.randn(64, 4), torch.randn(64)
x @ x.T
import everystep
weight = torch.randn(4, requires_grad=True)
with everystep.record(weight=weight, run="base") as recording:  # an optimizer would import the compiler
    for rows, targets in recording.steps(zip(x.split(8), y.split(8))):
        loss = (rows @ weight - targets).square().mean()
        loss.backward()
        weight.data -= 0.1 * weight.grad
        weight.grad = None
        recording.log(loss=loss)
run = everystep.train_experiment("two-layer", {"steps": 2}, run="run", progress=False)
print(run.facts.training.numerics.mkl_cbwr)
"""


@pytest.mark.sweep
def test_numerics_that_come_too_late_are_said_and_are_those_of_replays_and_forks(monkeypatch):
    for name in ("MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", LATE], check=True, capture_output=True, text=True)
    is_late = "torch already computed something in this process" in done.stderr
    assert is_late == (done.stdout.splitlines()[-1] == "off")
    verified = everystep.open("base").verify(progress=False)
    assert verified.is_exact and not verified.numerics
    command = [sys.executable, "-m", "everystep", "fork", "base", "--at", "2", "--relabel", "0=3"]
    done = subprocess.run([*command, "--run", "other"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # its process has started again
    assert len(everystep.open("other").losses) == 8
