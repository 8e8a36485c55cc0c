"""Footprints: digests of what each step is given and makes, by which two replays are compared."""

from __future__ import annotations

import torch
import xxhash

from everystep.recording.contents import digest_of
from everystep.replay.run_replay import Replay
from everystep.step.state import bytes_of

__all__ = ["BEFORE", "footprints"]

#: The name of the digest of the state before the first step.
BEFORE = "before"


def footprints(
    replay: Replay, first: int, last: int, *, by_operation: bool = False, is_random: bool = False
) -> list[dict[str, str]]:
    """Replay steps; return digests of the inputs and results of each by name, and of the state after it.

    by_operation: also of what each operation makes; is_random: also of the generator that steps draw
    from.
    """
    found = []
    with replay.in_force(first):
        for number in range(first, last + 1):
            at = replay.stretch_of(number)
            stepper = replay.go_to(number - 1, at)
            digests: dict[str, str] = {}
            if number in (first, replay.stretches[at].first):
                named = sorted(stepper.named_state().items())
                digests[BEFORE] = repr([(name, digest_of(tensor)) for name, tensor in named])
            digests["given"] = xxhash.xxh3_128(stepper.given(number)).hexdigest()
            if is_random:
                digests["generator"] = digest_of(torch.get_rng_state())
            if by_operation:
                made = xxhash.xxh3_128()
                observation = stepper.observe()
                losses = [float(observation.loss)]
                for seen in observation.operations:
                    made.update(seen.operation.operator.encode())
                    for tensor in seen.made.values():
                        made.update(bytes_of(tensor))
                digests["operations"] = made.hexdigest()
            else:
                losses = stepper.run(number).tolist()
            digests["loss"] = repr(losses)
            replay.compare(number, losses, replay.recorded_losses(number, number))
            state = stepper.named_state().items()
            found.append(digests | {name: digest_of(tensor) for name, tensor in state})
    return found
