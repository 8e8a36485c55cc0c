"""Footprints: digests of what each step is given and makes, by which two runs are compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from everystep.errors import RunError
from everystep.recording.files import program_file
from everystep.recording.run import RecordedRun
from everystep.replay.given import draws
from everystep.replay.loop import LoopStepper
from everystep.replay.replay import Replay
from everystep.step.check import bytes_of

__all__ = ["draws_at_random", "footprints", "model_digests", "programs_of"]


def footprints(replay: Replay, first: int, last: int, by_operation: bool, is_random: bool) -> list[str]:
    """Replay steps; return a digest of the inputs and results of each."""
    found = []
    at = -1
    with replay.in_force(first):
        for number in range(first, last + 1):
            digest = hashlib.sha256()
            if replay.stretch_of(number) != at:
                at = replay.stretch_of(number)
                stepper = replay.go_to(number - 1, at)
                _add_state(digest, stepper)
            given = stepper.given(number)
            if is_random:
                digest.update(bytes_of(torch.get_rng_state()))
            digest.update(given)
            if by_operation:
                observation = stepper.observe()
                losses = [float(observation.loss)]
                for observed in observation.operations:
                    digest.update(observed.operation.operator.encode())
                    for tensor in observed.made.values():
                        digest.update(bytes_of(tensor))
            else:
                losses = stepper.run(number).tolist()
            replay.compare(number, losses, replay.recorded_losses(number, number))
            _add_state(digest, stepper)
            found.append(digest.hexdigest())
    return found


def model_digests(replay: Replay, first: int, last: int) -> list[dict[str, bytes]]:
    """Return digests of the parameters and buffers, by name, of each state from `first` to `last`."""
    found = []
    with replay.in_force(first):
        for number in range(first, last + 1):
            state = replay.go_to(number).named_state()
            found.append(
                {
                    name: hashlib.sha256(bytes_of(tensor)).digest()
                    for name, tensor in state.items()
                    if name.startswith(("parameter/", "buffer/"))
                }
            )
    return found


def _add_state(digest: Any, stepper: LoopStepper) -> None:
    for name, tensor in sorted(stepper.named_state().items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))


def draws_at_random(run: RecordedRun) -> bool:
    """Tell whether a step of the run draws random numbers, if programs show it; otherwise it may."""
    if run.facts.training.loop or run.facts.training.unseen:
        return True
    try:
        return any(
            draws(operation["operator"])
            for each in programs_of(run)
            for operation in json.loads(each)["operations"]
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return True


def programs_of(run: RecordedRun) -> list[bytes]:
    """Return the programs of a run as they lie on disk; none if one of them cannot be read."""
    try:
        return [run.read_file(program_file(number)) for number in run.facts.training.programs]
    except RunError:
        return []
