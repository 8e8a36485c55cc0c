"""What the shell offers when a user presses Tab."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import everystep
from everystep.views.step_text import PHASES


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with runs/; no test changes its runs."""
    place = tmp_path_factory.mktemp("completion")
    settings = {"steps": 4, "seed": 1}
    everystep.train_experiment("two-layer", settings, run=place / "runs/first-1", progress=False)
    shutil.copytree(place / "runs/first-1", place / "runs/first-2")
    shutil.copytree(place / "runs/first-1", place / "here-1")
    run = everystep.open(place / "runs/first-2")
    run.measure("step * 2", name="twice", progress=False)
    return place


@pytest.fixture
def complete(runs, monkeypatch, everystep_command):
    """Return what is offered after these words; the last is not yet complete."""
    monkeypatch.chdir(runs)
    # Under `python -m pytest`, the name of the program would be that of a module.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", "", raising=False)

    def complete(*words):
        monkeypatch.setenv("_EVERYSTEP_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(["everystep", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        code, out, err = everystep_command()
        assert (code, err) == (0, "")
        return out.split("\n")[:-1] if out.strip() else []

    return complete


def test_commands_options_and_names(complete, runs):
    assert complete("me") == ["measure"]
    assert complete("step", "--ph") == ["--phase"]
    assert complete("step", "fir") == ["first-1", "first-2"]
    assert complete("losses", "h") == ["here-1"]
    assert complete("diff", "first-1", "f") == ["first-1", "first-2"]
    assert complete("view", "first-2") == ["first-2"]
    (runs / "mine.toml").write_text("epochs = 1")
    assert complete("train", "") == ["diabetes", "digits", "two-layer", "wine", "mine.toml"]
    assert complete("experiments", "d") == ["diabetes", "digits"]
    assert complete("train", "--engine", "e") == ["eager"]


def test_phases_and_measurements(complete):
    assert complete("step", "first-1", "2", "--phase", "") == list(PHASES)
    assert complete("plot", "first-1", "first-2", "-m", "t") == ["twice"]


def test_what_does_not_exist_is_left_to_the_shell(complete):
    assert complete("nonsense", "x") == []
    assert complete("losses", "nothing") == []


def test_bash_completes_without_torch(runs, tmp_path):
    command = tmp_path / "everystep"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom everystep.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    command.chmod(0o755)
    script = (
        'eval "$(everystep --show-completion)"\n'
        "COMP_WORDS=(everystep step fir) COMP_CWORD=2\n"
        "_everystep_completion everystep; echo ${COMPREPLY[@]}"
    )
    source = str(Path(everystep.__file__).parent.parent)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": source}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=runs, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("first-1 first-2\n", "")
