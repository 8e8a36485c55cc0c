"""The programs of a training: chosen by rule, bound to its live tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from everystep.program.execute import BoundProgram, allocate
from everystep.program.fold import fold_updates
from everystep.program.program import Program, TensorSpec, hyperparameter
from everystep.step.build import Built
from everystep.step.eager import EagerStep, Trainee
from everystep.step.state import parameter_names

__all__ = ["ProgramRule", "Programs"]


class ProgramRule(NamedTuple):
    """Which steps a program takes: those whose batch is of the shape of its x and y, and of these
    `every` one, the `first` step of the training only, or all `later` ones.
    """

    number: int
    steps: Literal["every", "first", "later"]


class _Key(NamedTuple):
    """What decides which program takes a step."""

    is_first: bool
    batch: Hashable


class Programs:
    """The programs of a training, by rule.

    Args:
        trainee: what is trained.
        fold: whether updates shall be folded into matrix products.
        first_step: the first that is taken; it may make state that later ones find.

    is_folded: whether they may round otherwise than the eager step.
    """

    def __init__(self, trainee: Trainee, fold: bool, first_step: int = 1) -> None:
        self.built: list[Built] = []
        # What is folded has the lr as a number in it, so the lr must stay as it is.
        self._may_fold = fold and trainee.schedule is None
        self.is_folded = False
        self._trainee = trainee
        self._first_step = first_step
        self._update = EagerStep(trainee).update
        self._by_key: dict[_Key, int] = {}
        self._bound: dict[int, BoundProgram] = {}
        self._bound_to: list[int] = []
        self._rates = {
            hyperparameter("lr", group, str(dtype).removeprefix("torch.")): (
                group,
                torch.tensor(rate, dtype=dtype, device=trainee.device),
            )
            for group, rate in enumerate(trainee.rates())
            for dtype in (torch.float32, torch.float64)
        }
        names: dict[Tensor, str] = {p: name for name, p in trainee.model.named_parameters()}
        names |= parameter_names(trainee.model, trainee.optimizer)
        self._parameters = list(names.items())

    @property
    def has_optimizer_step(self) -> bool:
        """Whether one of them ends in the step of an optimizer."""
        return any(known.program.optimizer_step is not None for known in self.built)

    def has(self, step: int) -> bool:
        """Tell whether there is a program for a step."""
        return self._key(step) in self._by_key

    def add(self, step: int, built: Built) -> None:
        """Use this program for all steps of the kind of `step`; an equal one is kept once."""
        if self._may_fold:
            folded = fold_updates(built.program, self._trainee.rates())
            self.is_folded |= folded is not built.program
            built = built._replace(program=folded)
        programs = [known.program for known in self.built]
        if built.program not in programs:
            self.built.append(built)
            programs.append(built.program)
        self._by_key[self._key(step)] = programs.index(built.program)

    def use(self, built: Built, steps: Literal["every", "first", "later"], batch: Hashable) -> None:
        """Use a recorded program for the steps that a rule says, and batches of that shape."""
        self.built.append(built)
        for is_first in {"every": (True, False), "first": (True,), "later": (False,)}[steps]:
            self._by_key[_Key(is_first, batch)] = len(self.built) - 1

    def discard(self, step: int) -> None:
        """Give up the program of a step, which was added last."""
        number = self._by_key.pop(self._key(step))
        if number not in self._by_key.values():
            del self.built[number]

    def rules(self) -> list[ProgramRule]:
        """Return which steps each program (by its place in `built`) takes."""
        found: list[ProgramRule] = []
        for number in range(len(self.built)):
            firsts = {key.is_first for key, index in self._by_key.items() if index == number}
            steps = "every" if len(firsts) == 2 else "first" if True in firsts else "later"
            found.append(ProgramRule(number, steps))  # type: ignore[arg-type]
        return found

    def bound(self, step: int) -> BoundProgram:
        """Return the program of a step, bound to the tensors of the training as they are."""
        number = self._by_key[self._key(step)]
        if number not in self._bound:
            self._bound[number] = self._bind(self.built[number])
        return self._bound[number]

    def refresh(self) -> None:
        """Notice where Python has put other tensors in the place of those that programs are bound to."""
        now = [t.untyped_storage().data_ptr() for t in self._trainee.named_state().values()]
        if now != self._bound_to:
            self._bound.clear()
            self._bound_to = now

    def load_batch(self, step: int, bound: BoundProgram) -> None:
        """Put the batch of a step where its program reads it."""
        if not self._trainee.batch.is_fixed:
            self._trainee.batch.into(step, bound.tensor("x"), bound.tensor("y"))

    def load_rates(self) -> None:
        """Put the learning rates of the optimizer where programs read them."""
        groups = self._trainee.optimizer.param_groups
        for group, tensor in self._rates.values():
            tensor.fill_(float(groups[group]["lr"]))

    def hand_over_gradients(self, step: int) -> None:
        """Give each parameter the gradient that the program of `step` has made, as eager steps do."""
        self._hand_over(self.bound(step).gradients)

    def _hand_over(self, gradients: Mapping[str, Tensor]) -> None:
        for parameter, name in self._parameters:
            gradient = gradients.get(name)
            if parameter.grad is not gradient:
                parameter.grad = gradient

    def _bind(self, built: Built) -> BoundProgram:
        trainee, program = self._trainee, built.program
        memory = dict(trainee.named_state())
        memory |= {name: tensor for name, (_, tensor) in self._rates.items()}
        values = dict(built.constants)
        if trainee.batch.is_fixed:
            for name, tensor in zip("xy", trainee.batch(1), strict=True):
                if _lies_as(tensor, program.tensors.get(name), program):
                    memory[name] = tensor
                else:
                    values[name] = tensor
        memory = allocate(program, values, trainee.device) | memory
        bound: BoundProgram

        def optimizer_step() -> None:
            self._hand_over(bound.gradients)
            self._update()

        bound = BoundProgram(program, memory, trainee.device, optimizer_step)
        return bound

    def _key(self, step: int) -> _Key:
        return _Key(step == self._first_step, self._trainee.batch.shape(step))


def _lies_as(tensor: Tensor, spec: TensorSpec | None, program: Program) -> bool:
    """Tell whether a program can read a tensor of the batch where it is."""
    if spec is None:
        return True
    size = tensor.untyped_storage().nbytes()
    is_there = size >= program.storages[spec.storage].bytes and spec.offset == tensor.storage_offset()
    return is_there and spec.stride == tensor.stride()
