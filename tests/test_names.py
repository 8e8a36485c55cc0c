"""Names and numbers that nobody expects end each command in one message, soon."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import everystep

LONG = "n" * 5000
#: Runs commands in one process, and prints their exit codes.
EACH_COMMAND = """
import sys
from everystep.cli import main
codes = []
for command in sys.argv[1:]:
    sys.argv[1:] = command.split()
    try:
        main()
    except SystemExit as exit:
        codes.append(exit.code)
print(*codes)
"""
MANY = "9" * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained") / "run"
    return everystep.train_experiment("two-layer", {"steps": 5}, run=place, progress=False)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained.directory, tmp_path / "run")


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["train", "/dev/zero"], "/dev/zero cannot be read: it is not a regular file"),
        (["train", "pipe"], "pipe cannot be read: it is not a regular file"),
        (
            ["train", "--set", "data={source='arrays', x='HERE/pipe.npy', y='y.npy'}"],
            "not a regular file",
        ),
        (["train", LONG], "cannot be read: File name too long"),
        (["train", "--run", f"./{LONG}"], "cannot be named"),
        (["train", "--run", "./-rf"], "do not take '-rf' for a name"),
        (["fork", "run", "--at", "3", "--run", "~"], "do not take '~' for a name"),
        (["train", "--steps", MANY], "steps: must be at most 100000000000"),
        (["train", "--epochs", "100000000000", "--set", "batch_size=1"], "steps are too many"),
        (["train", "--set", f"batch_size={'9' * 5000}"], "batch_size: must be an integer"),
        (["fork", "run", "--at", "3", "--steps", MANY], "steps"),
        (["resume", "run", "--steps", MANY], "steps are too many"),
        (["measure", "run", "loss + 1", "--every", MANY], "steps are too many"),
        (["losses", LONG], "cannot be read: File name too long"),
        (["runs", LONG], "cannot be read: File name too long"),
        (["view", LONG], "cannot be read: File name too long"),
        (["table", "run", "-o", LONG], "cannot be written: File name too long"),
    ],
)
def test_strange_names_and_numbers(run, everystep_command, command, problem):
    os.mkfifo("pipe")
    os.mkfifo("pipe.npy")
    before = sorted(Path().iterdir())
    code, out, err = everystep_command(*(each.replace("HERE", str(Path.cwd())) for each in command))
    assert (code, out) == (2, "")
    assert problem in err and len(err) < 1000
    assert sorted(Path().iterdir()) == before


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("setpriv") is None and os.geteuid() == 0, reason="root reads all files")
def test_what_may_not_be_read_is_named(run):
    """Root gives up the right to read what it may not."""
    Path("mine.toml").write_text("steps = 1")
    shutil.copytree(run, "closed")
    for place in ("mine.toml", "closed", run / "programs" / "1.json"):
        Path(place).chmod(0)
    rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    problems = {
        "train mine.toml": "mine.toml cannot be read: Permission denied",
        "losses closed": "'closed' cannot be read: Permission denied",
        "view closed": "'closed' cannot be read: Permission denied",
        "step run 2": "programs/1.json cannot be read: Permission denied",
    }
    command = [*rights, sys.executable, "-c", EACH_COMMAND, *problems]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "2 2 2 2\n"), done.stderr
    said = done.stderr.split("everystep: ")[1:]
    assert "Traceback" not in done.stderr and len(said) == len(problems), done.stderr
    assert all(map(str.__contains__, said, problems.values())), done.stderr
    for place in ("mine.toml", "closed"):
        Path(place).chmod(0o700)
