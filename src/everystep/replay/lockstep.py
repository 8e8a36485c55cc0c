"""Lockstep: two runs gone through side by side, up to the first operation whose result differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from everystep.errors import RunError
from everystep.recording.files import own_path
from everystep.recording.run import RecordedRun
from everystep.replay.objects import Objects
from everystep.replay.opener import Opener
from everystep.replay.operations import COMPUTED_OTHERWISE, OperationDifference, compare_steps, draws
from everystep.replay.replay import Replay
from everystep.replay.replayable import Replayable
from everystep.replay.workers import recorded_numerics
from everystep.step.check import bytes_of

__all__ = ["Lockstep", "draws_at_random"]

#: Steps that are gone through between two looks.
STRIDE = 64


class Lockstep:
    """Goes through two runs side by side."""

    def __init__(
        self,
        one: RecordedRun,
        other: RecordedRun,
        objects: tuple[Objects | None, Objects | None],
        told: Callable[[int], None],
    ) -> None:
        self._runs = (one, other)
        self._openers = (Opener(one, objects[0]), Opener(other, objects[1]))
        self._told = told
        # Under the same numerics, the same program gives the same for the same inputs.
        differences = recorded_numerics(one.facts).differences(recorded_numerics(other.facts))
        self._numerics = [f"{name} {a} and {b}" for name, (a, b) in differences.items()]
        is_own_loop = "loop" in one.facts or "loop" in other.facts
        self._by_operation = bool(self._numerics) or is_own_loop or _programs(one) != _programs(other)
        self._is_random = draws_at_random(one) or draws_at_random(other)

    def first(self, first: int, last: int) -> OperationDifference | None:
        """Return the first operation, of steps `first` to `last`, whose result differs."""
        for step in self._suspicious(first, last):
            found = compare_steps(*(opener.step(step) for opener in self._openers))
            if found is not None and found.causes == [COMPUTED_OTHERWISE] and self._numerics:
                cause = f"{COMPUTED_OTHERWISE}, under other numerics: {', '.join(self._numerics)}"
                return replace(found, causes=[cause])
            if found is not None:
                return found
        return None

    def departures(self) -> list[str]:
        """Return in words which run was not the same when it was taken again."""
        departed = [opener.departed_at for opener in self._openers]
        return [
            f"{run.name} was not the same when it was taken again, from step {step} on: what is said of "
            "later steps is not of the original"
            for run, step in zip(self._runs, departed, strict=True)
            if step is not None
        ]

    def _suspicious(self, first: int, last: int) -> Iterator[int]:
        """Yield steps that are not the same in both runs, in order."""
        for begin in range(first, last + 1, STRIDE):
            end = min(last, begin + STRIDE - 1)
            pair = [
                opener.call(_footprints, begin, end, self._by_operation, self._is_random)
                for opener in self._openers
            ]
            for step, (one, other) in enumerate(zip(*pair, strict=True), start=begin):
                if one != other:
                    yield step
            self._told(end - begin + 1)


def _footprints(replay: Replay, first: int, last: int, by_operation: bool, is_random: bool) -> list[str]:
    """Take steps again; return for each a digest of what it took and gave."""
    found = []
    at = -1
    with replay.in_force(first):
        for number in range(first, last + 1):
            digest = hashlib.sha256()
            if replay.stretch_of(number) != at:
                at = replay.stretch_of(number)
                revived = replay.go_to(number - 1, at)
                _add_state(digest, revived)
            given = revived.given(number)
            if is_random:
                digest.update(bytes_of(torch.get_rng_state()))
            digest.update(given)
            if by_operation:
                observation = revived.observe()
                losses = [float(observation.loss)]
                for observed in observation.operations:
                    digest.update(observed.operation.operator.encode())
                    for tensor in observed.results.values():
                        digest.update(bytes_of(tensor))
            else:
                losses = revived.run(number).tolist()
            replay.compare(number, losses, replay.recorded_losses(number, number))
            _add_state(digest, revived)
            found.append(digest.hexdigest())
    return found


def _add_state(digest: Any, revived: Replayable) -> None:
    for name, tensor in sorted(revived.named_state().items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))


def draws_at_random(run: RecordedRun) -> bool:
    """Tell whether a step of the run draws random numbers, as far as programs say; else it may."""
    engine = run.facts.get("engine") or {"eager_from": 1}
    if engine["eager_from"] is not None:
        return True
    try:
        return any(
            draws(operation["operator"])
            for each in _programs(run)
            for operation in json.loads(each)["operations"]
        )
    except (ValueError, LookupError, TypeError):
        return True


def _programs(run: RecordedRun) -> list[bytes]:
    rules = (run.facts.get("engine") or {}).get("programs", [])
    try:
        return [own_path(run.directory, rule["file"]).read_bytes() for rule in rules]
    except (OSError, RunError):
        return []
