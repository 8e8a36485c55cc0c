"""Step rows: what repeats each watched step: its program, its numbers and its inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep import clock
from everystep.errors import say
from everystep.program.operators import NotAllowedError
from everystep.recording.contents import Taken, digest_of
from everystep.recording.recorder import Recorder
from everystep.step.build import BuiltPath, NotCapturableError, build_path
from everystep.step.cursor import Cursor
from everystep.step.path import Path
from everystep.step.taken import TakenByProgram

__all__ = ["AnyWatch", "StepRows", "WrittenProgram"]

#: Paths that are remembered; a training in which every step has another would fill the memory.
MOST_PATHS = 200
#: Digests of the state are computed if that takes at most this share of the time so far, at so many
#: bytes per second.
DIGEST_SHARE = 0.01
DIGESTED_A_SECOND = 2e9

#: An object that knows a step's operations.
AnyWatch = Cursor | TakenByProgram


class WrittenProgram(NamedTuple):
    """A program of the run, and its number."""

    number: int
    built: BuiltPath


class StepRows:
    """Turns watched steps into rows, and writes their programs.

    Args:
        writer: of the run; None: nothing is written.

    written: the numbers of the programs so far.
    """

    def __init__(self, writer: Recorder | None) -> None:
        self.written: list[int] = []
        self._writer = writer
        #: The program of each path, or why it has none.
        self._programs: dict[Path, WrittenProgram | str] = {}
        self._generator = torch.get_rng_state()
        self._copied = 0
        self._began = clock.now()

    def program_of(self, path: Path) -> WrittenProgram | str:
        """Return the program of a path with a row, or why it has none."""
        return self._programs.get(path, "the steps do something else each time")

    def forget_generator(self) -> None:
        """Note the generator again at the next draw: it is not as the last row left it."""
        self._generator = torch.empty(0, dtype=torch.uint8)

    def row(
        self,
        step: int,
        watch: AnyWatch,
        path: Path,
        state: dict[str, Tensor],
        inputs: dict[str, Tensor],
        nesting: Any = None,
        copied: int = 0,
    ) -> Taken:
        """Return the row of a finished step.

        Args:
            step: its number.
            watch: of the step.
            path: of the step.
            state: the live tensors after it.
            inputs: those that the watch does not know, by their names in rows.
            nesting: of its batch.
            copied: bytes from outside that were copied since the training began.
        """
        try:
            known = self._programs[path]
        except KeyError:
            known = self._programs[path] = self._build(step, path, watch)
            if len(self._programs) > MOST_PATHS:  # a path that occurs again then has two programs
                del self._programs[next(iter(self._programs))]
        size = sum(t.nbytes for n, t in inputs.items() if n.startswith("batch/"))
        size, self._copied = size + copied - self._copied, copied
        if isinstance(known, str):
            return Taken(step, None, None, inputs, nesting, size, {})
        cuts = {}
        for name, storage in known.built.inputs.items():
            content = watch.content(storage)
            if content is not None and f"batch/{name}" not in inputs:
                rows = watch.rows(storage)  # each is kept once
                inputs[f"input/{name}"] = content if rows == 1 else content.view(rows, -1)
                if (cut := watch.cut(storage)) is not None:
                    cuts[f"input/{name}"] = cut
        for draw, generator in watch.generators.items():
            # A replay has the generator as the last draw left it, in this step or one before.
            if draw or not torch.equal(generator, self._generator):
                inputs[f"generator/{draw}"] = generator
        self._generator = watch.drawn if watch.drawn is not None else self._generator
        numbers = known.built.numbers(watch.numbers, watch.offsets)
        digests = self._digests(step, state)
        return Taken(step, known.number, numbers, inputs, nesting, size, digests, cuts=cuts)

    def _build(self, step: int, path: Path, watch: AnyWatch) -> WrittenProgram | str:
        try:
            built = build_path(path, watch.numbers, watch.offsets)
        except (NotCapturableError, NotAllowedError) as error:
            say(f"step {step} cannot be replayed without your code: {error}")
            return str(error)
        count = len(self.written) + 1
        number = count if self._writer is None else self._writer.program(built.program)
        self.written.append(number)
        return WrittenProgram(number, built)

    def _digests(self, step: int, state: dict[str, Tensor]) -> dict[str, str]:
        """Return digests of the state after step 1, 2, 4, 8, ..., except gradients, which may be gone.

        They show between which steps something wrote where torch does not see it.
        """
        if step & (step - 1):
            return {}
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("gradient/")}
        seconds = sum(tensor.nbytes for tensor in kept.values()) / DIGESTED_A_SECOND
        if seconds > DIGEST_SHARE * (clock.now() - self._began):
            return {}
        return {name: digest_of(tensor) for name, tensor in kept.items()}
