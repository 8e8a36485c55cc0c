"""Where a run is replayed: what differs there from the recording, and the process that replays.

Tasks go to the stdin of the process, and results come from its stdout, as pickles: this one starts it,
and is the only one that it reads from.
"""

from __future__ import annotations

import copyreg
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from everystep.errors import (
    DamageWarning,
    EverystepError,
    ExperimentError,
    Fault,
    RunError,
    TrainingError,
    UsageError,
)
from everystep.numerics import MOST_THREADS, Numerics
from everystep.program.precision import Precision
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.processes import end_with_stdin, sent_tensor
from everystep.replay.run_replay import Replay

__all__ = ["Conditions", "OtherProcess", "main", "opened", "other_process"]

T = TypeVar("T")

#: The version of tasks and results: both processes must have the same.
PROTOCOL = 9

#: Branches that MKL_CBWR takes, each also with ",STRICT"; "OFF" is MKL's own choice.
_MKL_BRANCHES = ("OFF", "AUTO", "COMPATIBLE", "SSE4_2", "AVX", "AVX2", "AVX512")

#: What each setting of a place must be, as text, and a check of a value.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "threads": (f"must be from 1 to {MOST_THREADS:,}", lambda count: 1 <= count <= MOST_THREADS),
    "capability": (
        "must be one of default, avx2, avx512",
        lambda name: name in ("default", "avx2", "avx512"),
    ),
    "mkl": (
        f"must be one of {', '.join(_MKL_BRANCHES)}, or one with ,STRICT",
        lambda branch: branch.upper().removesuffix(",STRICT") in _MKL_BRANCHES,
    ),
}


@dataclass(frozen=True)
class Conditions:
    """Where a run is replayed; None is as in the recording.

    threads: of torch; capability: instruction set of torch's own kernels, as ATEN_CPU_CAPABILITY takes
    it; mkl: branch of MKL's reproducibility; precision: of all floating-point numbers; python: another
    interpreter, which has its own torch.
    """

    threads: int | None = None
    capability: str | None = None
    mkl: str | None = None
    precision: Literal["float64", "bfloat16"] | None = None
    python: str | None = None

    def check(self) -> None:
        """Check all settings.

        Raises:
            UsageError: nothing differs from the recording.
            ExperimentError: lists every invalid setting, with a fix.
        """
        if self == Conditions():
            raise UsageError(
                "a rerun needs a condition that differs from the recording: threads, capability, mkl, "
                "precision or python (everystep verify replays the run as it was recorded)"
            )
        given = {name: getattr(self, name) for name in _ALLOWED}
        faults = [
            Fault(name, f"{_ALLOWED[name][0]}, not {value!r:.40}")
            for name, value in given.items()
            if value is not None and not _ALLOWED[name][1](value)
        ]
        if self.python is not None and shutil.which(self.python) is None:
            faults.append(Fault("python", f"{self.python} is not a program that can be run"))
        if faults:
            raise ExperimentError(faults, "the rerun")

    @property
    def interpreter(self) -> str:
        """The interpreter that replays there."""
        return sys.executable if self.python is None else shutil.which(self.python) or self.python

    def environment(self, recorded: Numerics) -> dict[str, str]:
        """Return the variables that make a new process compute there."""
        found = recorded.environment()
        if self.threads is not None:
            found["OMP_NUM_THREADS"] = str(self.threads)
        if self.capability is not None:
            found["ATEN_CPU_CAPABILITY"] = self.capability
        if self.mkl is not None:
            # MKL takes a variable that is empty as one that is not set.
            found["MKL_CBWR"] = "" if self.mkl.upper() == "OFF" else self.mkl.upper()
        return found


class OtherProcess:
    """A process that replays a run under different conditions."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, conditions: Conditions) -> None:
        self._process = process
        self._folder = folder
        self._conditions = conditions
        # The first answer is sent without a task: it shows that everystep could be imported there.
        if self._answer() != PROTOCOL:
            raise TrainingError(f"{conditions.interpreter} has a different everystep; {self._cure}")

    def call(self, task: Callable[..., T], *given: Any, **named: Any) -> T:
        """Do something with the replay of the run there, which the task is given first, or open a run.

        Raises:
            RunError: it cannot be done there; gives the reason.
            TrainingError: the process ended.
        """
        assert self._process.stdin is not None
        try:
            pickle.dump((task, given, named), self._process.stdin)
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        answer: T = self._answer()
        if isinstance(answer, RuntimeError):
            precision = f" in {self._conditions.precision}" if self._conditions.precision else ""
            raise RunError(f"the rerun{precision} failed: {answer}")
        return answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, ValueError, pickle.UnpicklingError):
            raise self._ended() from None

    def _ended(self) -> TrainingError:
        self._process.kill()
        self._process.wait()
        errors = (self._folder / "errors").read_text(encoding="utf-8", errors="replace").strip()
        reason = errors.splitlines()[-1] if errors else f"exit status {self._process.returncode}"
        cure = f"; {self._cure}" if "NotFoundError" in errors else ""
        return TrainingError(f"the process of the rerun ended early: {reason:.400}{cure}")

    @property
    def _cure(self) -> str:
        there = self._conditions.interpreter
        return f"install this one there: {there} -m pip install everystep=={version('everystep')}"


@contextmanager
def other_process(conditions: Conditions, environment: dict[str, str]) -> Iterator[OtherProcess]:
    """Start a process with these variables; it ends afterwards.

    Raises:
        TrainingError: it does not start, or has no everystep that understands this one.
    """
    code = "from everystep.answers.other_process import main; main()"
    with tempfile.TemporaryDirectory(prefix="everystep-") as folder:
        # A file: nobody reads a pipe until the process ends, and a full one would stop it.
        with (Path(folder) / "errors").open("wb") as errors:
            # -P: nothing is imported from the working directory, which may be a stranger's.
            process = subprocess.Popen(
                [conditions.interpreter, "-P", "-c", code],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        try:
            yield OtherProcess(process, Path(folder), conditions)
        finally:
            process.kill()
            # It closes the pipes, and waits, so that no zombie is left.
            process.communicate()


def opened(run: Path, data: Any, threads: int, precision: str | None) -> Replay:
    """Return a replay of a run, to which the tasks after this one are done.

    data: of the run, None if it holds that itself.
    """
    wanted = None if precision is None else Precision(getattr(torch, precision))
    return Replay(RecordedRun(run), data, threads, wanted)


def main() -> None:
    """Do tasks until there are no more."""
    end_with_stdin()
    warnings.simplefilter("ignore", DamageWarning)  # who asks reports damage
    _send(PROTOCOL)
    # One replay for all tasks, so that states in memory serve the next one, too.
    replay: Replay | None = None
    with suppress(EOFError):
        while True:
            task, given, named = pickle.load(sys.stdin.buffer)
            try:
                if task is opened:
                    replay = opened(*given)
                _send(None if task is opened else task(replay, *given, **named))
            except (EverystepError, RuntimeError, OSError) as error:
                # Only the text: an error of this process may be of a class that the other one does not
                # have.
                _send(RuntimeError(str(error).strip().partition("\n")[0] or type(error).__name__))


def _send(result: Any) -> None:
    pickler = pickle.Pickler(sys.stdout.buffer)
    # torch cannot read all dtypes that it pickles.
    pickler.dispatch_table = copyreg.dispatch_table | {Tensor: sent_tensor}
    pickler.dump(result)
    sys.stdout.flush()
