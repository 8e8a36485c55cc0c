"""Recorded steps with other targets for some rows: the programs run again, on changed batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from everystep.errors import ExperimentError, Fault, RunError
from everystep.experiment.batches import RowsOf
from everystep.program.step_program import Program
from everystep.recording.database import Repeat
from everystep.recording.recorded_run import RecordedRun, Stretch
from everystep.replay.recorded_steps import NotReplayedError, StepsAtRate
from everystep.training.job import relabelled_rows

__all__ = ["StepsRelabelled"]

#: The target of a batch with several tensors of one number per row.
_TARGETS = ("y", "label", "labels", "target", "targets")
_BATCH = "batch/"
_WHAT = "the other targets"


class StepsRelabelled(StepsAtRate):
    """Recorded steps with other targets for some rows, wherever these rows come.

    With batches by rule, rows have their numbers in the data. With batches by content, they are named by
    their places in the batch of the first step; a later batch has such a row where all its tensors with
    as many rows have the same bytes in it.

    Args:
        run, stretch, rule: as of `RecordedSteps`.
        steps: those to take.
        relabelled: the targets, by row.
        lr: another learning rate; None: the recorded ones.

    targets: of each row, the recorded and the other one.

    Raises:
        ExperimentError: lists rows that do not exist, and targets that do not fit.
        RunError: the batches have no targets of one number per row, no operation reads them, or code
            outside of torch may.
    """

    def __init__(
        self,
        run: RecordedRun,
        stretch: Stretch,
        rule: RowsOf | None,
        steps: range,
        relabelled: Mapping[int, float],
        lr: float | None = None,
    ) -> None:
        super().__init__(run, stretch, rule, lr)
        #: The bytes of each row, by the name of the tensor of the batch, and its target.
        self._changed: list[tuple[dict[str, Tensor], float]] = []
        #: Whether a batch has one of the rows, by the inputs of its step.
        self._has: dict[bytes | None, bool] = {}
        self._check_inputs(steps)
        if rule is not None:
            self.rule = relabelled_rows(rule, relabelled, _WHAT)
            y, places = rule.y, {row: int(rule.batches.places([row])[0]) for row in relabelled}
        else:
            y, places = self._follow(steps[0], relabelled), {row: row for row in relabelled}
        self.targets = {row: (float(y[places[row]]), target) for row, target in relabelled.items()}

    def _follow(self, first: int, relabelled: Mapping[int, float]) -> Tensor:
        """Note the bytes of rows of a batch, which later batches may have; return its targets."""
        row, what = self.row(first), f"the batch of step {first}"
        batch = _batch(super().stored(row))
        self._name = _target(batch, f"{what} of {self.run.name}")
        if not _is_read(self._name, self.program_of(row).program):
            raise RunError(f"no operation of step {first} of {self.run.name} reads {self._name}")
        y = batch[self._name]
        missing = f"{what} has rows 0 to {len(y) - 1:,}"
        faults = [
            Fault(f"relabel {place}", reason)
            for place, target in relabelled.items()
            if (reason := _why_not(y, target) if 0 <= place < len(y) else missing)
        ]
        if faults:
            raise ExperimentError(faults, _WHAT)
        alike = {name: _bytes(t) for name, t in batch.items() if t.dim() and len(t) == len(y)}
        for place, target in relabelled.items():
            self._changed.append(({name: each[place] for name, each in alike.items()}, target))
        return y

    def stored(self, row: Repeat) -> dict[str, Tensor]:
        """Return the inputs of a step that the run holds by content, with the other targets.

        Raises:
            NotReplayedError: one was dropped, or cannot be read; or a batch has a row twice.
        """
        tensors = super().stored(row)
        if not self._changed:
            return tensors
        batch = _batch(tensors)
        known = {name: _bytes(tensor) for name, tensor in batch.items() if tensor.dim()}
        self._has[row.inputs] = False
        for own, target in self._changed:
            places = _places_of(own, known)
            if len(places) > 1:
                raise NotReplayedError(
                    f"the batch of step {row.step} has the same row {len(places)} times (places "
                    f"{', '.join(map(str, places))}), so it cannot be known which one to relabel"
                )
            batch[self._name][places] = target
            self._has[row.inputs] |= bool(places)
        return tensors

    def _check_inputs(self, steps: range) -> None:
        """Check that the steps read nothing that code may have made from the targets, outside of torch.

        A tensor that is the same with several batches is none of these.
        """
        read, batches = self.inputs_read(steps), set()
        for row in map(self.row, (max(1, steps[0] - 1), *steps)):
            given = self.given(row).given.items()
            batches.add(tuple(each for name, each in given if name.startswith(_BATCH)))
        is_alone = len(batches) == 1 and (self.rule is None or self.rule.is_fixed)
        unsure = [name for name, each in read.items() if is_alone or len(each) > 1]
        if unsure:
            raise RunError(
                f"the steps of {self.run.name} read a tensor that is in no batch ({unsure[0]}): your "
                "code may make it from the targets, as with NumPy; change the targets in a fork instead"
            )

    def steps_with(self, steps: Iterable[int]) -> tuple[int, ...]:
        """Return those of some steps that have run and have a row of the changed ones in their batch."""
        return tuple(step for step in steps if self._has.get(self.row(step).inputs))


def _batch(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(_BATCH): t for n, t in inputs.items() if n.startswith(_BATCH)}


def _is_read(name: str, program: Program) -> bool:
    storage = program.tensors[name].storage if name in program.tensors else None
    read = (each for operation in program.operations for each in operation.reads())
    return any(program.tensors[each].storage == storage for each in read)


def _target(batch: Mapping[str, Tensor], what: str) -> str:
    """Return the name of the tensor that has the target of each row; what: names the batch."""
    found = [n for n, t in batch.items() if t.dim() and t.numel() == len(t) > 0 and not t.is_complex()]
    if len(found) > 1:
        found = [name for name in found if name.rpartition(".")[2] in _TARGETS] or found
    if len(found) == 1 and any(
        t.dim() and len(t) == len(batch[found[0]]) for name, t in batch.items() if name != found[0]
    ):
        return found[0]
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in batch.items()) or "no tensor"
    raise RunError(
        f"{what} has {shapes}: not rows with one target each, by which to relabel them; change the "
        "targets in a fork of your loop"
    )


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of each row (N, bytes)."""
    return tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8)


def _places_of(row: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> list[int]:
    """Return the places at which a batch has a row, by the bytes of its tensors."""
    pairs = [(own, batch[name]) for name, own in row.items() if name in batch]
    is_alike = len(pairs) == len(row) and len({len(its) for _, its in pairs}) == 1
    if not is_alike or any(its.shape[1:] != own.shape for own, its in pairs):
        return []
    same = torch.stack([(its == own).all(1) for own, its in pairs]).all(0)
    found: list[int] = same.nonzero()[:, 0].tolist()
    return found


def _why_not(y: Tensor, target: float) -> str | None:
    """Return why a tensor cannot hold a target, or None."""
    if y.is_floating_point():
        return None if math.isfinite(target) else f"{target:g} is not finite"
    fits = float(torch.tensor(target, dtype=torch.float64).to(y.dtype)) == target
    return None if fits else f"{target:g} does not fit into {str(y.dtype).removeprefix('torch.')}"
