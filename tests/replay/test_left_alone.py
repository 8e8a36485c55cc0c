"""Processes end with the one that started them, however that one was ended."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.snapshots import take_snapshots_every

import everystep
from everystep.answers import other_process
from everystep.page import task_process, worker

#: Seconds after which something is taken to hang, on the busiest machine.
PATIENCE = 120


def below(process):
    """Return the ids of all processes that a process has started, and those that these have started."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *below(child)]
    return found


def has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def has_torch(process):
    """Return whether a process has begun: it has read what its parent sent first."""
    try:
        return "libtorch" in Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return False


def until(is_so):
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_what_a_command_has_started_ends_with_it(monkeypatch):
    take_snapshots_every(monkeypatch, 250)
    settings = {"steps": 1500, "threads": 1}
    everystep.train_experiment("two-layer", settings, run="./run", progress=False)
    command = [sys.executable, "-m", "everystep", "verify", "run", "--processes", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as process:
        until(lambda: sum(map(has_torch, below(process.pid))) >= 2 or process.poll() is not None)
        others = below(process.pid)
        process.kill()
    assert others
    until(lambda: all(map(has_ended, others)))


def compute(main, reader, writer):
    """Be a process that is at work for ever, and has the pipe as its stdin."""
    os.dup2(reader, 0)
    os.close(writer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.simplefilter", lambda *_: until(lambda: False))
        main()


#: Of Python, from 3.12 on: no other thread holds anything here.
@pytest.mark.filterwarnings("ignore:.* use of fork")
@pytest.mark.parametrize("module", [worker, task_process, other_process])
def test_what_computes_for_another_process_ends_with_it(module):
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(
        target=compute, args=(module.main, reader, writer)
    )
    process.start()
    os.close(reader)
    process.join(0.1)
    assert process.is_alive()
    os.close(writer)
    process.join(PATIENCE / 2)
    code = process.exitcode
    process.kill()
    assert code == 1
