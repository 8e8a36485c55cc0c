"""A slow disk: each sync takes seconds, those of SQLite too, and yet steps go on and none is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import everystep

__all__ = ["slow_disks"]

#: Seconds that each sync takes.
DELAYS = [0.0, 0.1, 1.0, 3.0]
#: Seconds that no step may take, on any of these disks.
LONGEST = 1.0
#: Trains for some seconds, and prints those before the first step, of the longest step, and of closing.
LOOP = """
import json, sys, time
import everystep, torch
from torch import nn
directory, seconds = sys.argv[1], float(sys.argv[2])
torch.manual_seed(0)
model = nn.Linear(10, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
x, y = torch.randn(8, 10), torch.randn(8, 1)
def batches():
    while time.perf_counter() - began < seconds:
        yield x, y
asked, longest, count = time.perf_counter(), 0.0, 0
with everystep.record(run=directory, model=model, optimizer=optimizer) as recording:
    began = last = time.perf_counter()
    for x, y in recording.steps(batches()):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recording.log(loss=loss)
        now = time.perf_counter()
        longest, last, count = max(longest, now - last), now, count + 1
    closing = time.perf_counter()
print(json.dumps([began - asked, count, longest, time.perf_counter() - closing]))
"""


def slow_disks(seconds: float) -> list[str]:
    """Train for some seconds on each disk, print a table, and return what failed.

    Raises:
        SystemExit: strace, which delays the calls, is missing.
    """
    if shutil.which("strace") is None:
        raise SystemExit("strace, which delays the syncs of a process, is missing; install it")
    failures = []
    print("each sync, s   before the first step, s    steps  longest, s  closing, s")
    for delay in DELAYS:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            before, count, longest, closing = _trained(run, seconds, delay)
            print(
                f"{delay:>12.1f}{before:>26.2f}{count:>9,}{longest:>12.2f}{closing:>12.2f}", flush=True
            )
            found = everystep.open(run)
            if len(found.losses) != count or not found.verify(progress=False).is_exact:
                failures.append(
                    f"{delay} s: the run has {len(found.losses)} of {count} steps, or other bits"
                )
        if longest > LONGEST:
            failures.append(f"{delay} s: a step took {longest:.2f} s")
    return failures


def _trained(run: Path, seconds: float, delay: float) -> tuple[float, int, float, float]:
    syncs = "fsync,fdatasync,sync_file_range,msync"
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={syncs}"]
    if delay:
        command += ["-e", f"inject={syncs}:delay_enter={int(delay * 1e6)}"]
    training = [sys.executable, "-c", LOOP, str(run), str(seconds)]
    done = subprocess.run([*command, *training], check=True, capture_output=True, text=True)
    before, count, longest, closing = json.loads(done.stdout.splitlines()[-1])
    return before, count, longest, closing
