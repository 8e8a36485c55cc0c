"""The parent's end of the process that replays a run elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from everystep.errors import RunError, TrainingError
from everystep.program.observed import Observed
from everystep.recording.snapshots import write_snapshot
from everystep.replay.rerun.child import PROTOCOL
from everystep.replay.rerun.place import Place
from everystep.replay.step import Step
from everystep.step.state import State

__all__ = ["OtherProcess", "other_process"]

_CODE = "from everystep.replay.rerun.child import main; main()"


class OtherProcess:
    """A process that replays a run elsewhere."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, place: Place) -> None:
        self._process = process
        self._folder = folder
        self._place = place

    def greet(self) -> None:
        """Check that the process understands what it will be asked.

        Raises:
            TrainingError: it does not start, or has another everystep.
        """
        spoken = self._answer().get("protocol")
        if spoken != PROTOCOL:
            raise TrainingError(f"{self._place.interpreter} has another everystep; {self._cure}")

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """Ask for something, and wait for the answer.

        Raises:
            RunError: it cannot be done there; gives the reason.
            TrainingError: the process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do} | question) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        answer = self._answer()
        if "error" in answer:
            precision = f" in {self._place.precision}" if self._place.precision else ""
            raise RunError(f"the rerun{precision} failed: {answer['error']}")
        return answer

    def footprints(self, first: int, last: int, state: State) -> list[str]:
        """Return a digest of each of some steps, taken there from the state before them."""
        with self._written(state) as place:
            found: list[str] = self.ask("footprints", first=first, last=last, state=place)["digests"]
        return found

    def step(self, own: Step, state: State) -> Step:
        """Return a step with what its operations read and returned there.

        own: the same step as this process replays it, with the same program; state: before it.
        """
        from safetensors.torch import load_file

        file = self._folder / "step.safetensors"
        with self._written(state) as place:
            answer = self.ask("observe", step=own.number, state=place, file=str(file))
        tensors = load_file(file)
        file.unlink()
        table = answer["operations"]
        if len(table) != len(own.operations):
            raise RunError(
                f"step {own.number} has different operations in the rerun: the run was changed"
            )
        operations = tuple(
            Observed(
                seen.operation, *({name: tensors[key] for name, key in each.items()} for each in row)
            )
            for seen, row in zip(own.operations, table, strict=True)
        )
        return replace(own, operations=operations, loss=answer["loss"])

    @contextmanager
    def _written(self, state: State) -> Iterator[list[Any]]:
        """Write a state as a snapshot; yield its directory, and its row of a database."""
        row = write_snapshot(self._folder / "snapshots", state)
        yield [str(self._folder), *row]
        shutil.rmtree(self._folder / "snapshots")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._ended() from None
        return answer if isinstance(answer, dict) else {}

    def _ended(self) -> TrainingError:
        self._process.kill()
        self._process.wait()
        said = (self._folder / "errors").read_text(encoding="utf-8", errors="replace").strip()
        reason = said.splitlines()[-1] if said else f"exit status {self._process.returncode}"
        cure = f"; {self._cure}" if "NotFoundError" in said else ""
        return TrainingError(f"the process of the rerun ended early: {reason:.400}{cure}")

    @property
    def _cure(self) -> str:
        there = self._place.interpreter
        return f"install this one there: {there} -m pip install everystep=={version('everystep')}"


@contextmanager
def other_process(place: Place, environment: dict[str, str]) -> Iterator[OtherProcess]:
    """Start a process with these variables; it ends afterwards.

    Raises:
        TrainingError: it does not start, or has no everystep that understands this one.
    """
    with tempfile.TemporaryDirectory(prefix="everystep-") as folder:
        with (Path(folder) / "errors").open("wb") as errors:
            # -P: what lies in the working directory is not imported.
            process = subprocess.Popen(
                [place.interpreter, "-P", "-c", _CODE],
                env=os.environ | environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, encoding="utf-8",
            )  # fmt: skip
        try:
            found = OtherProcess(process, Path(folder), place)
            found.greet()
            yield found
        finally:
            process.kill()
            process.communicate()
