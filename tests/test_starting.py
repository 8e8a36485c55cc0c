"""Commands start and end quickly: they import little, and search for no garbage that nobody drops."""

import subprocess
import sys
from pathlib import Path

COUNT = (
    "import gc, sys\n"
    "calls = []\n"
    # What a search looked through and kept is in an older generation.
    "kept = lambda: len(gc.get_objects(1)) + len(gc.get_objects(2))\n"
    "gc.callbacks.append(lambda phase, details: phase == 'stop' and calls.append(kept()))\n"
    "{run}\n"
    "print(len(calls), max(calls), file=sys.stderr)"
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
    calls, most = map(int, done.stderr.splitlines()[-1].split())
    assert calls < 40
    assert most < 50_000


def test_a_command_does_not_search_for_garbage_at_exit():
    assert "searched" not in run(LOOK_AT_EXIT.format(run=COMMAND), "--version").stdout
    assert "searched" in run(LOOK_AT_EXIT.format(run="")).stdout


#: In one process, since starting one takes long.
BEGIN = """
import sys
from contextlib import suppress
from everystep.__main__ import main

def told(text, *modules):
    print(text, "imports", *sorted({*modules} & {name for name, of in sys.modules.items() if of}))

def command(text, *modules):
    sys.argv = ["everystep", *text.split()]
    with suppress(SystemExit):
        main()
    told(text, *modules)

"""
IMPORTS = """
sys.modules["pyarrow"] = None
command("runs", "torch", "plotnine", "polars", "pandas")
command("losses two-layer-1", "torch", "plotnine", "polars", "pandas")
command("--help", "torch", "plotnine")
command("experiments", "torch", "plotnine")
import everystep.page.server
from everystep.expression import parse
asked = parse("max(loss, 1) > 2 * previous.loss or isnan(lr) or 1 / 0 < exp(log(step))", ["lr"])
print(asked.is_recorded, asked.truth(lambda reference: 2.5), asked.number(lambda reference: 0))
told("the page", "torch", "plotnine", "pandas", "sklearn", "scipy")
command("table two-layer-1 -o t.html", "torch", "plotnine")
"""
QUESTIONS = """
for question in ("rows two-layer-1 2", "why two-layer-1 2 loss", "diff two-layer-1 two-layer-1"):
    command(question, "everystep.training.job", "rich.progress", "polars")
"""


def test_what_needs_no_torch_does_not_import_it(everystep_command):
    everystep_command("train", "--steps", 3, "-q")
    lines = run(BEGIN + IMPORTS).stdout.splitlines()
    assert [line.partition(" imports")[2] for line in lines if " imports" in line] == [""] * 6
    assert "True False 1.0" in lines and lines[-1].startswith("table two-layer-1")
    assert any(line.startswith("two-layer-1 ") for line in lines)
    assert Path("t.html").stat().st_size > 1000
    asked = [line for line in run(BEGIN + QUESTIONS).stdout.splitlines() if " imports" in line]
    assert [line.partition(" imports")[2] for line in asked] == [""] * 3
