"""Runs scripts, each in a process of its own, which may be killed at a chosen place.

Each process is a fork of one that has imported torch, since that takes longer than most of the scripts:
this module as a program, which reads a request per line, and answers with an exit status. Recorded
scripts are forks of its fork that has imported everystep, too.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TextIO

SCRIPTS = Path(__file__).parent
#: What takes long to import: for every script, and for some.
MODULES = ["torch", "torch._dynamo"]
MODULES_OF = {
    "bert_accelerate": ["accelerate", "transformers.models.bert.modeling_bert"],
    "digits_cnn": ["sklearn.datasets"],
}
#: Steps from one snapshot to the next, however fast the machine is.
INTERVAL = 4


class Kill(NamedTuple):
    """When a script is killed: `lines` of its lines after a step, counted over all of its runs.

    is_written: whether everything recorded until then is on disk.
    """

    step: int
    lines: int = 0
    is_written: bool = True


class ScriptEnd(NamedTuple):
    """How a script ended: its exit status, or the negative number of a signal."""

    status: int
    out: str
    err: str


class Launcher:
    """Starts scripts with everystep, or without it: a stand-in that records nothing has its name."""

    def __init__(self) -> None:
        from everystep.numerics import ENVIRONMENT

        # The scripts choose the numerics; those of the tests are not theirs.
        environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, script: Path, directory: Path, kill: Kill | None = None, *, is_recorded: bool = True
    ) -> ScriptEnd:
        """Run a script in a directory."""
        return self._ask(script, directory, kill, is_recorded)

    def faults(self, script: Path, directory: Path) -> list[str]:
        """Return what is wrong with the runs that a script has recorded in a directory."""
        ended = self._ask(script, directory, "examine", True)
        assert ended.status == 0, ended.err
        return json.loads(ended.out)

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, script: Path, directory: Path, task: Any, is_recorded: bool) -> ScriptEnd:
        directory.mkdir(exist_ok=True)
        out, err = (directory.with_suffix(f".{name}") for name in ("out", "err"))
        asked = [*map(str, (script, directory, out, err)), task, is_recorded]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return ScriptEnd(int(self._process.stdout.readline()), out.read_text(), err.read_text())


def serve() -> None:
    """Start a process for each request, which does what was requested."""
    for name in MODULES:
        import_module(name)
    with_everystep = None
    for line in sys.stdin:
        *_, is_recorded = json.loads(line)
        if is_recorded:
            with_everystep = with_everystep or _fork_with_everystep()
            asked, answered = with_everystep
            print(line, end="", file=asked, flush=True)
            status = int(answered.readline())
        else:
            status = _start(line)
        print(status, flush=True)


def _fork_with_everystep() -> tuple[TextIO, TextIO]:
    """Fork this process into one that has imported everystep; return where it reads and answers."""
    asked, answered = os.pipe(), os.pipe()
    if os.fork() == 0:
        import_module("everystep.training.record")
        os.close(asked[1])
        for line in os.fdopen(asked[0]):
            os.write(answered[1], b"%d\n" % _start(line))
        os._exit(0)
    os.close(asked[0])
    os.close(answered[1])
    return os.fdopen(asked[1], "w"), os.fdopen(answered[0])


def _start(line: str) -> int:
    """Do what was requested in a fork of this process; return its exit status."""
    script, directory, out, err, task, is_recorded = json.loads(line)
    for name in MODULES_OF.get(Path(script).stem, ()):
        import_module(name)
    gc.freeze()  # what each process shares with this one
    child = os.fork()
    if child == 0:
        if not is_recorded:
            sys.path.insert(0, str(SCRIPTS / "without"))
        os.chdir(directory)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate((out, err), 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if task == "examine":
            _examine(script)
        else:
            _run(script, task)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)  # to free all that was imported takes a second
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _run(script: str, kill: Any) -> None:
    import everystep

    if "without" not in everystep.__file__:
        from everystep.recording.recorder import Recorder
        from everystep.recording.snapshots import SnapshotPlan
        from everystep.training import writer

        writer.TIMED_STEPS = 1
        SnapshotPlan.choose_interval = lambda plan, *_: setattr(plan, "interval", INTERVAL)
        Recorder.is_behind = False
    if kill is not None:
        _kill_at(script, Kill(*kill))
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")
    if kill is not None:
        _die()


def _kill_at(script: str, kill: Kill) -> None:
    """End this process where `kill` names; the script has no part in it."""
    from everystep.training.record import Recording

    end, steps, lines = Recording.end_step, 0, 0

    def end_step(recording: Any) -> None:
        nonlocal steps
        end(recording)
        steps += 1
        if steps == kill.step:
            if kill.is_written:
                recording.flush()
            sys.settrace(called)
            frame = sys._getframe()
            while frame is not None:
                frame.f_trace = called(frame)
                frame = frame.f_back

    def called(frame: Any, *_: Any) -> Any:
        return reached if frame.f_code.co_filename == script else None

    def reached(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines > kill.lines:
                _die()
        return reached

    Recording.end_step = end_step


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _examine(script: str) -> None:
    """Print what is wrong with the runs in this directory, which a script recorded."""
    import torch

    torch.ones(8, 8) @ torch.ones(8, 8)  # its library now has the settings that the scripts had

    import everystep

    text, name = Path(script).read_text().splitlines(), Path(script).name
    faults = []
    for place in sorted(path.parent for path in Path().rglob("run.sqlite")):
        run = everystep.open(place)
        verified = run.verify(progress=False, processes=1)
        faults += [] if verified.is_exact else [f"{place}: {verified}"]
        if run.status not in ("finished", "stopped"):
            faults.append(f"{place}: {run.status}")
        for number in range(1, len(run) + 1, 1 + len(run) // 8):
            for seen in run[number].operations:
                line = seen.line
                if line is None or not line.text:
                    faults.append(f"{place}, step {number}: no line: {seen.operation.name}")
                elif line.file.endswith(name) and text[line.line - 1].strip() != line.text:
                    faults.append(f"{place}, step {number}: other line: {seen.operation.name}, {line}")
    print(json.dumps(faults))


if __name__ == "__main__":
    serve()
