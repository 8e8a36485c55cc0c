"""Functions that a sweep calls in other processes, and what stands for these processes."""

import os
import signal
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
from tests.descent import descend
from torch import nn

import everystep


class Here:
    """Takes tasks as a pool of processes does, and does them in this process, at once."""

    def submit(self, task, *given):
        future = Future()
        future.set_result(task(*given))
        return future

    def close(self):
        pass


@contextmanager
def here(count, threads, environment, *, in_order):
    yield Here(), Here()


CALLS = []


def trained(lr, seed=0, what="fine"):
    """Record a loop; at its third step, its first time, it does what it is asked for."""
    CALLS.append(what)
    torch.manual_seed(seed)
    x, model = torch.randn(8, 3), nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number in recording.steps(range(6)):
            loss = descend(optimizer, model(x).square().sum())
            recording.log(loss=loss, accuracy=1 / (1 + loss.item()))
            mark = Path(recording.run.directory.parent.parent / f"{what}.done")
            if number == 3 and what != "fine" and not mark.exists():
                mark.touch()
                assert what != "stops all" or len(CALLS) == 1  # no other was called in this process
                if what == "raises":
                    raise RuntimeError("too high")
                whose = os.getppid() if what == "stops all" else os.getpid()
                os.kill(whose, signal.SIGKILL if what == "is killed" else signal.SIGINT)
                while True:  # until the signal is here, by way of the sweep
                    time.sleep(0.01)


def stopping(lr, width=2):
    """Record a loop that a condition stops, or its own code, with a config of its own."""
    model = nn.Linear(3, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    parts = {"model": model, "optimizer": optimizer}
    condition = "loss < 1e9" if lr < 0.2 else ()
    with everystep.record(**parts, config={"mine": 1}, stop_when=condition) as recording:
        for _ in recording.steps(range(6)):
            recording.log(loss=descend(optimizer, model(torch.ones(8, 3)).square().sum()))
            if not condition:
                recording.stop("by the rate")
