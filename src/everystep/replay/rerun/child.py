"""The process that replays a run elsewhere: answers questions on stdin, one JSON object a line.

Its other end is `other_process`. Tensors go through files of safetensors, which every torch can read.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from everystep.device import select
from everystep.errors import DamageWarning, EverystepError
from everystep.numerics import Numerics
from everystep.program.precision import Precision
from everystep.recording.database import SnapshotRow
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import read_snapshot
from everystep.replay.parent import end_with_stdin
from everystep.replay.replay import Replay
from everystep.step.check import bytes_of, state_differences

__all__ = ["PROTOCOL", "footprints", "main"]

#: Of the questions and answers: both ends must have the same.
PROTOCOL = 4


class Answers:
    """Answers to questions about one run.

    It replays the run twice: freely, from its first state on, and single steps from recorded states.
    """

    def __init__(self) -> None:
        self._replay: Replay | None = None
        self._free: Replay | None = None

    def open(self, run: str, threads: int, precision: str | None, first: int) -> dict[str, Any]:
        """Open a run; return the numerics there. first: the step that a free replay begins with."""
        recorded = RecordedRun(Path(run))
        wanted = None if precision is None else Precision(getattr(torch, precision))
        self._replay = Replay(recorded, threads=threads, conversion=wanted)
        self._free = Replay(recorded, threads=threads, conversion=wanted)
        with self._free.in_force(first):
            self._free.go_to(first - 1, self._free.stretch_of(first))
            numerics = Numerics.read(select(recorded.facts.training.device))
        return {"numerics": numerics.named()}

    def run(self, last: int) -> dict[str, Any]:
        """Run steps from the current state on, whatever was recorded; return their losses."""
        assert self._free is not None
        with self._free.in_force(last):
            return {"losses": self._free.stepper.run(last).tolist()}

    def compare(self) -> dict[str, Any]:
        """Compare the state of the free replay with the snapshot of it; return what differs."""
        free = self._free
        assert free is not None
        row = next(each for each in free.snapshot_rows() if each.step == free.stepper.state)
        recorded = read_snapshot(free.run.directory, row)
        with free.in_force(max(row.step, 1)):
            here = free.stepper.capture()
        return {"differ": [each.tensor for each in state_differences(recorded, here, only_seen=True)]}

    def footprints(self, first: int, last: int, state: list[Any]) -> dict[str, Any]:
        """Replay steps from a recorded state on; return a digest of each loss, with its state."""
        replay = self._begun(first, state)
        return {"digests": footprints(replay, first, last)}

    def observe(self, step: int, state: list[Any], file: str) -> dict[str, Any]:
        """Replay a step from the state before it; write what each operation read and returned."""
        from safetensors.torch import save_file

        replay = self._begun(step, state)
        with replay.in_force(step):
            found = replay.next_step()
        tensors: dict[str, Tensor] = {}
        known: dict[int, str] = {}

        def kept(named: dict[str, Tensor]) -> dict[str, str]:
            for tensor in named.values():
                if id(tensor) not in known:
                    known[id(tensor)] = str(len(known))
                    tensors[known[id(tensor)]] = tensor.contiguous().cpu().clone()
            return {name: known[id(tensor)] for name, tensor in named.items()}

        table = [
            [kept(seen.inputs), kept(seen.results), kept(seen.written)] for seen in found.operations
        ]
        save_file(tensors, file)
        return {"operations": table, "loss": found.loss, "problems": replay.problems}

    def _begun(self, step: int, state: list[Any]) -> Replay:
        """Return the replay at a state: the directory of a snapshot, and its row of the database."""
        assert self._replay is not None
        directory, *row = state
        with self._replay.in_force(step):
            self._replay.begin(read_snapshot(Path(directory), SnapshotRow(*row)))
        return self._replay


def footprints(replay: Replay, first: int, last: int) -> list[str]:
    """Take steps from the current state on; return a digest of each loss, with the state after it."""
    found = []
    with replay.in_force(first):
        stepper = replay.stepper
        for number in range(first, last + 1):
            machine = xxhash.xxh3_128(repr(stepper.run(number).tolist()).encode())
            for name, tensor in sorted(stepper.named_state().items()):
                machine.update(name.encode())
                machine.update(bytes_of(tensor))
            found.append(machine.hexdigest())
    return found


def main() -> None:
    """Answer questions until there are no more."""
    end_with_stdin()
    warnings.simplefilter("ignore", DamageWarning)  # who asks reports damage
    answers = Answers()
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "open": answers.open, "run": answers.run, "compare": answers.compare,
        "footprints": answers.footprints, "observe": answers.observe,
    }  # fmt: skip
    _say({"protocol": PROTOCOL})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            _say(actions[asked.pop("do")](**asked))
        except (EverystepError, RuntimeError, OSError) as error:
            _say({"error": str(error).strip().partition("\n")[0] or type(error).__name__})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)
