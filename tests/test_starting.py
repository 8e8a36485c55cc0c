"""Commands start and end quickly: they import little, and search for no garbage that nobody drops.

Tests of the garbage collector say as well what Python does by itself. When that part fails, Python has
become better, and `everystep.__main__` can do without it.
"""

import subprocess
import sys

import pytest

COUNT = (
    "import gc, sys\n"
    "calls = []\n"
    "gc.callbacks.append(lambda phase, details: calls.append(phase))\n"
    "{run}\n"
    "print(calls.count('start'), file=sys.stderr)"
)
LOOK_AT_EXIT = (
    "import gc, sys\n"
    "gc.disable()\n"
    "class Dropped:\n"
    "    def __del__(self): print('searched')\n"
    "dropped = Dropped()\n"
    "dropped.itself = dropped\n"
    "del dropped\n"
    "{run}"
)
COMMAND = "from everystep.__main__ import main\ntry: main()\nexcept SystemExit: pass"


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_a_command_hardly_searches_for_garbage_while_it_imports_torch(everystep_command):
    everystep_command("train", "--steps", 3, "-q")
    done = run(COUNT.format(run=COMMAND), "step", "two-layer-1", "2")
    assert int(done.stderr.splitlines()[-1]) < 40
    python = run(COUNT.format(run="import torch"))
    assert int(python.stderr.splitlines()[-1]) > 200


def test_a_command_does_not_search_for_garbage_at_exit():
    assert "searched" not in run(LOOK_AT_EXIT.format(run=COMMAND), "--version").stdout
    assert "searched" in run(LOOK_AT_EXIT.format(run="")).stdout


@pytest.mark.parametrize("command", ["runs", "losses"])
def test_what_only_prints_recorded_numbers_imports_neither_torch_nor_polars(everystep_command, command):
    everystep_command("train", "--steps", 3, "-q")
    where = "runs" if command == "runs" else "two-layer-1"
    look = f"{COMMAND}\nimport sys\nprint(*sorted({{'torch', 'polars', 'pandas'}} & sys.modules.keys()))"
    done = run(look, command, where)
    assert "two-layer-1" in done.stdout or "step" in done.stdout
    assert done.stdout.splitlines()[-1] == ""
