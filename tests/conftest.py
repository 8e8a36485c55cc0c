"""Every test computes under the numerics that everystep sets, as a user's process does.

With one thread, though: the workers of the test run would wait for each other's. What depends on
several asks for them.
"""

import gc
import math
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from contextlib import ExitStack, chdir, contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where a shell forbids to keep compiled modules, each of a hundred processes would compile everystep.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What took long to train, as all does on a busy machine, would be replayed by one process per core.
os.environ["LOKY_MAX_CPU_COUNT"] = "1"

# A million objects are imported, which stay: no search for garbage needs to look at them.
gc.disable()

# The tests write a hundred thousand small files, and sync many: in memory, none waits for a disk.
if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

# A shell starts what runs in its background with Ctrl-C ignored; the tests are about what it does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from everystep import numerics  # noqa: E402

numerics.prepare()

import pytest  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch import nn  # noqa: E402

import everystep  # noqa: E402
from everystep import cli, clock  # noqa: E402
from everystep.experiment.batches import Batches  # noqa: E402
from everystep.step import check_plan  # noqa: E402
from everystep.training.model_step import Training  # noqa: E402
from everystep.training.stepper import Stepper  # noqa: E402
from everystep.training.writer import Unwritten  # noqa: E402

# Its assertions report what they compared, whichever test imports it first.
pytest.register_assert_rewrite("tests.training.by_hand")

# Tests run a thousand commands in this process, and typer puts them all together for each.
typer.main.get_command = cache(typer.main.get_command)

settings.register_profile("everystep", deadline=None, max_examples=50)
settings.load_profile("everystep")


#: How many modules there were when they were last left out of such searches.
FROZEN = {"modules": len(sys.modules)}


def pytest_addoption(parser):
    parser.addoption("--sweep", action="store_true", help="run every case of every table of tests")


def pytest_collection_modifyitems(config, items):
    """Without --sweep, keep some cases of the tables that are marked `sweep(every=N)`: each Nth."""
    if config.getoption("--sweep"):
        return
    seen, left_out = Counter(), []
    for item in items:
        mark = item.get_closest_marker("sweep")
        if mark is not None:
            place = seen[item.function]
            seen[item.function] += 1
            if "every" not in mark.kwargs or place % mark.kwargs["every"]:
                left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    out = set(map(id, left_out))
    items[:] = [item for item in items if id(item) not in out]


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def what_was_imported_stays():
    """Let searches of all objects, for garbage or an `enumerate`, leave out what tests have imported."""
    if len(sys.modules) > FROZEN["modules"] + 100:
        FROZEN["modules"] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture
def chapter():
    """The chapter's model and data, made as the chapter makes them."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 1000), torch.randn(64, 10)
    model = nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10))
    return model, x, y


@pytest.fixture
def small():
    """A small model and its data."""
    torch.manual_seed(1)
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), x, y


def _tick(seconds, tick):
    seconds.passed = getattr(seconds, "passed", 0.0) + tick
    return seconds.passed


@pytest.fixture(autouse=True)
def clock_that_ticks(monkeypatch):
    """Let a millisecond pass whenever a thread looks at the clock, however fast the machine is.

    Half of it is work, so that a snapshot takes a millisecond: it is looked at twice.
    """
    for name, tick in (("now", 0.001), ("worked", 0.0005)):
        monkeypatch.setattr(clock, name, partial(_tick, threading.local(), tick))
    monkeypatch.setattr("everystep.answers.diff.THOROUGH_SECONDS", math.inf)


@pytest.fixture(autouse=True)
def checks_at_powers_of_two(monkeypatch):
    """Check steps 2, 4, 8, ... and the last, however long that takes on a busy machine."""
    monkeypatch.setattr(check_plan.CheckPlan, "is_light", True)
    monkeypatch.setattr(check_plan, "CHECK_SHARE", 0.0)


@pytest.fixture
def checks_in_time(monkeypatch, checks_at_powers_of_two):
    """Check when that is worth its time, as outside of tests."""
    monkeypatch.undo()


@pytest.fixture(autouse=True, scope="session")
def a_cache_of_its_own(tmp_path_factory):
    """Programs that other runs of the tests have found sound are checked again; no file is noted yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def processes_of_reruns():
    """Let reruns in the same environment share a process: starting one takes seconds."""
    kept, real = {}, import_module("everystep.answers.rerun").other_process

    @contextmanager
    def known(place, environment):
        key = place.interpreter, *environment.items()
        if key not in kept:
            with chdir(Path(__file__).parent):  # that of the test will be removed
                kept[key] = ends.enter_context(real(place, environment))
        yield kept[key]

    with ExitStack() as ends, pytest.MonkeyPatch.context() as patch:
        patch.setattr("everystep.answers.rerun.other_process", known)
        yield


@pytest.fixture(scope="session")
def made_once(request, tmp_path_factory):
    """Make a directory once, in whichever worker of the test run asks first; return where it is."""
    own = tmp_path_factory.getbasetemp()
    place = own.parent if hasattr(request.config, "workerinput") else own

    def made_once(name, make):
        directory, done = place / name, place / f"{name}-is-made"
        with FileLock(place / f"{name}.lock"):
            if not done.exists():
                directory.mkdir()
                make(directory)
                done.touch()
        return directory

    return made_once


def descent(parameters):
    return everystep.GradientDescent(parameters, lr=1e-3)


@pytest.fixture
def make_trainee():
    def make(model, x, y, *, loss=None, optimizer=descent, batch_size=None, **options):
        return Training(
            model=model,
            loss=loss or nn.MSELoss(reduction="sum"),
            optimizer=optimizer(model.parameters()),
            batch=Batches(len(x), batch_size).of(x, y),
            device=torch.device("cpu"),
            **options,
        )

    return make


@pytest.fixture
def program_of():
    """Take the first step of a training in Python, and return its program."""

    def program_of(training):
        stepper = Stepper(training, Unwritten(), 1, "eager")
        stepper.watch(1, *training.batch(1))
        stepper.watched.finish()
        return stepper.watched.last_program().program

    return program_of


@pytest.fixture
def stepper_of():
    """Return what runs the steps of a training, and writes nothing."""

    return lambda training, steps, engine="auto": Stepper(training, Unwritten(), steps, engine)


@pytest.fixture
def everystep_command(capfd, monkeypatch):
    """Run a command in this process; returns exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["everystep", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture(autouse=True)
def leaves_torch_as_it_was():
    before = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    yield
    assert (torch.get_deterministic_debug_mode(), torch.get_num_threads()) == before
