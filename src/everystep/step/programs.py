"""The programs of a training: chosen by rule, bound to its live tensors."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Hashable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from everystep.program.execute import BoundProgram, allocate
from everystep.program.program import Program, TensorSpec, hyperparameter
from everystep.step.build import Built
from everystep.step.eager import EagerStep, Training
from everystep.step.named_state import first_names, parameter_names

__all__ = ["ProgramRule", "Programs"]


class ProgramRule(NamedTuple):
    """Which steps a program runs: from step `since` on, those with a batch of the shape of its x and y.

    Of these, it runs `every` one, only step `since` itself (`first`), or all `later` ones. Programs with
    a later `since` replace all those before.
    """

    number: int
    steps: Literal["every", "first", "later"]
    since: int


class _Key(NamedTuple):
    """What decides which program runs a step."""

    since: int
    is_first: bool
    batch: Hashable


class Programs:
    """The programs of a training, by rule.

    Args:
        training: the training.
        first_step: the first step; it may create state that later ones find.
    """

    def __init__(self, training: Training, first_step: int = 1) -> None:
        self.built: list[Built] = []
        self._training = training
        self._since = [first_step]
        self._eager = EagerStep(training)
        self._by_key: dict[_Key, int] = {}
        self._bound: dict[int, BoundProgram] = {}
        self._bound_to: list[int] = []
        self._state_names: set[str] = set()
        self._look_at_optimizer()

    @property
    def has_optimizer_step(self) -> bool:
        """Whether one of them ends in the step of an optimizer."""
        return any(known.program.optimizer_step is not None for known in self.built)

    def has(self, step: int) -> bool:
        """Tell whether there is a program for a step."""
        return self._key(step) in self._by_key

    def renew(self, step: int) -> None:
        """Stop using these programs from `step` on."""
        if step > self._since[-1]:
            self._since.append(step)
        self._bound.clear()
        self._bound_to = []
        self._look_at_optimizer()

    def since(self, step: int) -> int:
        """Return the first step that the programs of a step were captured for."""
        return self._since[bisect_right(self._since, step) - 1]

    def until(self, step: int) -> int | None:
        """Return the last step that the programs of a step apply to, None if unknown."""
        place = bisect_right(self._since, step)
        return self._since[place] - 1 if place < len(self._since) else None

    def add(self, step: int, built: Built) -> None:
        """Use this program for all steps of the kind of `step`; an equal one is kept once."""
        same = (number for number, known in enumerate(self.built) if _are_equal(known, built))
        number = next(same, len(self.built))
        if number == len(self.built):
            self._append(built)
        self._by_key[self._key(step)] = number

    def use(self, built: Built, rule: ProgramRule, batch: Hashable) -> None:
        """Use a recorded program for the steps of a rule, and batches of that shape."""
        self._append(built)
        if rule.since not in self._since:
            insort(self._since, rule.since)
        for is_first in {"every": (True, False), "first": (True,), "later": (False,)}[rule.steps]:
            self._by_key[_Key(rule.since, is_first, batch)] = len(self.built) - 1

    def discard(self, step: int) -> None:
        """Drop the program of a step, which was added last."""
        number = self._by_key.pop(self._key(step))
        if number not in self._by_key.values():
            del self.built[number]

    def rules(self) -> list[ProgramRule]:
        """Return which steps each program (by its place in `built`) runs."""
        firsts: dict[tuple[int, int], set[bool]] = {}
        for key, number in self._by_key.items():
            firsts.setdefault((number, key.since), set()).add(key.is_first)
        return [
            ProgramRule(
                number, "every" if len(first) == 2 else "first" if True in first else "later", since
            )
            for (number, since), first in sorted(firsts.items(), key=lambda item: item[0][::-1])
        ]

    def bound(self, step: int) -> BoundProgram:
        """Return the program of a step, bound to the current tensors of the training."""
        number = self._by_key[self._key(step)]
        if number not in self._bound:
            self.refresh()  # all are bound to the same tensors
            self._bound[number] = self._bind(self.built[number])
        return self._bound[number]

    def refresh(self, state: Mapping[str, Tensor] | None = None) -> bool:
        """Detect state tensors that Python replaced since programs were bound.

        state: of the training now, if already known.

        Returns whether it replaced any.
        """
        state = self._training.named_state() if state is None else state
        now = [t.untyped_storage().data_ptr() for n, t in state.items() if n in self._state_names]
        if self._training.batch.is_fixed:
            # A program may have a copy of it with another layout.
            now += [n for t in self._training.batch(1) for n in (t.data_ptr(), t._version)]
        has_moved = now != self._bound_to
        if has_moved:
            self._bound.clear()
            self._bound_to = now
        return has_moved

    def misfit(self, state: Mapping[str, Tensor], since: int) -> str | None:
        """Return in words what of the state has another geometry than programs expect, or None.

        state: of the training now; since: the programs with this `since`.
        """
        numbers = {n for key, n in self._by_key.items() if key.since == since}
        for program in (self.built[number].program for number in numbers):
            for name in program.of_kind("state"):
                tensor, spec = state.get(name), program.tensors.get(name)
                if spec is not None and (tensor is None or not _is_as(tensor, spec)):
                    return f"{name.partition('/')[2]} changes its shape, dtype or memory"
            if program.optimizer_step is None:
                known = {name for name in state if name.startswith("optimizer/")}
                if not known <= set(program.of_kind("state")) | set(program.tensors):
                    return "the state of the optimizer changes"
        return None

    def load_batch(self, step: int, bound: BoundProgram) -> None:
        """Copy the batch of a step to where its program reads it."""
        if not self._training.batch.is_fixed:
            self._training.batch.into(step, bound.tensor("x"), bound.tensor("y"))

    def load_rates(self) -> None:
        """Copy the learning rates of the optimizer to where programs read them."""
        groups = self._training.optimizer.param_groups
        for group, tensor in self._rates.values():
            tensor.fill_(float(groups[group]["lr"]))

    def hand_over_gradients(self, bound: BoundProgram, *, as_copies: bool = False) -> None:
        """Set each parameter's gradient to the one that a program computed, as eager steps do.

        as_copies: for code that may keep them while the program continues to write into its own.
        """
        gradients: Mapping[str, Tensor] = bound.gradients
        if as_copies:
            state = set(bound.program.of_kind("state"))
            gradients = {
                name: gradient if f"gradient/{name}" in state else gradient.clone()
                for name, gradient in gradients.items()
            }
        self._hand_over(gradients)

    def _append(self, built: Built) -> None:
        self.built.append(built)
        self._state_names |= set(built.program.of_kind("state"))

    def _hand_over(self, gradients: Mapping[str, Tensor]) -> None:
        for parameter, name in self._parameters:
            gradient = gradients.get(name)
            if parameter.grad is not gradient:
                parameter.grad = gradient

    def _look_at_optimizer(self) -> None:
        """Note the optimizer's parameters, and create the tensors that programs read its lr from."""
        training = self._training
        names = first_names(training.model)
        self._parameters = list((names | parameter_names(training.model, training.optimizer)).items())
        rates = training.rates()
        self._rates = {
            hyperparameter("lr", group, str(dtype).removeprefix("torch.")): (
                group,
                torch.tensor(rate, dtype=dtype, device=training.device),
            )
            for group, rate in rates.items()
            for dtype in (torch.float32, torch.float64)
        }

    def _bind(self, built: Built) -> BoundProgram:
        training, program = self._training, built.program
        memory = dict(training.named_state())
        memory |= {name: tensor for name, (_, tensor) in self._rates.items()}
        values = dict(built.constants)
        if training.batch.is_fixed:
            for name, tensor in zip("xy", training.batch(1), strict=True):
                if _lies_as(tensor, program.tensors.get(name), program):
                    memory[name] = tensor
                else:
                    values[name] = tensor
        memory = allocate(program, values, training.device) | memory
        bound: BoundProgram

        def optimizer_step() -> None:
            self._hand_over(bound.gradients)
            self._eager.update()

        bound = BoundProgram(program, memory, training.device, optimizer_step)
        return bound

    def _key(self, step: int) -> _Key:
        since = self.since(step)
        return _Key(since, step == since, self._training.batch.shape(step))


def _is_as(tensor: Tensor, spec: TensorSpec) -> bool:
    """Tell whether a tensor has the geometry that a program expects."""
    return (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()) == (
        spec.torch_dtype,
        spec.shape,
        spec.stride,
        spec.offset,
    )


def _are_equal(one: Built, two: Built) -> bool:
    """Tell whether two programs and their constants are equal."""
    return (
        one.program == two.program
        and one.constants.keys() == two.constants.keys()
        and all(torch.equal(content, two.constants[name]) for name, content in one.constants.items())
    )


def _lies_as(tensor: Tensor, spec: TensorSpec | None, program: Program) -> bool:
    """Tell whether a program can read a tensor of the batch in place."""
    if spec is None:
        return True
    size = tensor.untyped_storage().nbytes()
    is_there = size >= program.storages[spec.storage].bytes and spec.offset == tensor.storage_offset()
    return is_there and spec.stride == tensor.stride()
