"""Processes end with the one that started them, however that one was ended."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from everystep.answers import other_process
from everystep.page import task_process, worker
from everystep.replay.processes import pool

#: Of Python, from 3.12 on: no other thread holds anything here.
pytestmark = pytest.mark.filterwarnings("ignore:.* use of fork")

FORK = multiprocessing.get_context("fork")
#: Seconds after which something is taken to hang, on the busiest machine.
PATIENCE = 120


def until(is_so):
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def begin_a_replay(told):
    """Be a process that lets another one compute for ever."""
    with pool(1, 1, {}) as (executor, _):
        told.send(executor.submit(os.getpid).result())
        executor.submit(time.sleep, 10**6).result()


@pytest.mark.sweep
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_what_replays_for_a_process_ends_with_it():
    heard, told = multiprocessing.Pipe(duplex=False)
    process = FORK.Process(target=begin_a_replay, args=(told,))
    process.start()
    replaying = heard.recv()
    assert not has_ended(replaying)
    process.kill()
    process.join()
    until(lambda: has_ended(replaying))


def compute(main, reader, writer):
    """Be a process that is at work for ever, and has the pipe as its stdin."""
    os.dup2(reader, 0)
    os.close(writer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.simplefilter", lambda *_: until(lambda: False))
        main()


@pytest.mark.parametrize("module", [worker, task_process, other_process])
def test_what_computes_for_another_process_ends_with_it(module):
    reader, writer = os.pipe()
    process = FORK.Process(target=compute, args=(module.main, reader, writer))
    process.start()
    os.close(reader)
    process.join(0.1)
    assert process.is_alive()
    os.close(writer)
    process.join(PATIENCE / 2)
    code = process.exitcode
    process.kill()
    assert code == 1
