"""Scripts as people write them: recorded in four added lines, killed and resumed, each step opened.

Each is a whole program. A line that recording adds is marked `# added`; one that it changes has what it
was (`# was: range(EPOCHS)`). Without them it runs as before: `without/everystep.py` stands in.
"""

import random
import re
from importlib.util import find_spec

import pytest
import torch
from tests.scripts.launcher import SCRIPTS, Kill, Launcher
from tests.training.by_hand import parts_of

import everystep

#: Where each script is killed: in a step, or in the code after an epoch.
KILLS = {
    "bert_accelerate": Kill(21, 3),
    "digits_cnn": Kill(24, 42),
    "ppo": Kill(10, 30),
    "seeds": Kill(46, 3),
}
#: What a script needs that may not be installed.
NEEDS = {"bert_accelerate": ("accelerate", "transformers")}


@pytest.fixture(scope="module")
def launcher():
    started = Launcher()
    yield started
    started.close()


class RanScript:
    """A script; it has run once without everystep, and once with it."""

    def __init__(self, name, launcher, place):
        self.path = SCRIPTS / f"{name}.py"
        self.kill = KILLS[name]
        self.launcher = launcher
        self.place = place
        self.plain = self.run("plain", is_recorded=False)
        self.whole = self.run("whole")

    def run(self, directory, kill=None, *, is_recorded=True):
        ended = self.launcher.run(self.path, self.place / directory, kill, is_recorded=is_recorded)
        assert ended.status == (0 if kill is None else -9), ended.err
        return ended


#: The imports of this one alone take longer than any other script.
PARAMETERS = [
    pytest.param(name, marks=pytest.mark.sweep if name in NEEDS else ()) for name in sorted(KILLS)
]


@pytest.fixture(scope="module", params=PARAMETERS)
def program(request, launcher, tmp_path_factory):
    for name in NEEDS.get(request.param, ()):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return RanScript(request.param, launcher, tmp_path_factory.mktemp(request.param))


def files_in(directory):
    """Return what is in the files that a script wrote, by name: the bits of torch's, and bytes."""
    runs = {path.parent for path in directory.rglob("run.sqlite")}
    paths = [path for path in directory.rglob("*") if path.is_file() and not runs & {*path.parents}]
    return {
        str(path.relative_to(directory)): parts_of(torch.load(path, weights_only=True), "")
        if path.suffix == ".pt"
        else path.read_bytes()
        for path in sorted(paths)
    }


def test_at_most_four_lines_are_added(program):
    lines = program.path.read_text().splitlines()
    assert 40 <= len(lines) <= 110
    marked = [line for line in lines if re.search(r"# (added|was: .+)$", line)]
    assert 1 < sum(line.endswith("# added") for line in marked) <= 4
    assert all(line in marked for line in lines if re.search(r"\b(everystep|parts|recording)\b", line))


def test_a_recorded_script_prints_and_writes_what_it_did(program):
    assert program.whole.out == program.plain.out and program.plain.out
    assert files_in(program.place / "plain") == files_in(program.place / "whole") != {}


def resume(program, kill, name):
    """Kill a script, and start it again; return how it ended. It must end as one that was not killed."""
    program.run(name, kill)
    resumed = program.run(name)
    assert program.whole.out.endswith(resumed.out)
    assert files_in(program.place / name) == files_in(program.place / "whole")
    return resumed


def test_a_killed_script_ends_as_if_it_had_not_been(program):
    resumed = resume(program, program.kill, "killed")
    assert " continues after step " in resumed.err
    assert resumed.out != program.whole.out


def test_steps_open_and_each_operation_has_its_line(program):
    assert program.launcher.faults(program.path, program.place / "whole") == []


@pytest.mark.sweep
@pytest.mark.parametrize("trial", range(5))
def test_a_script_that_is_killed_anywhere_ends_as_if_it_had_not_been(program, trial):
    draw = random.Random(f"{program.path.name} {trial}")
    runs = [everystep.open(path.parent) for path in (program.place / "whole").rglob("run.sqlite")]
    step = draw.randint(1, sum(map(len, runs)))
    resume(program, Kill(step, draw.randrange(40), draw.random() < 0.5), f"killed-{trial}")
