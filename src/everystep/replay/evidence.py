"""What is known of two runs at a step besides its operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from everystep.program.memory import copy_on_cpu
from everystep.recording.asked import Setting, flat
from everystep.recording.texts import shortest
from everystep.replay.given import Sources
from everystep.replay.replay import Replay
from everystep.replay.step import Step
from everystep.step.state import State

__all__ = ["Around", "Evidence", "around"]


class Around(NamedTuple):
    """What a step begins and ends with besides its batch.

    before, after: tensors of the state, by name; generators: the states of random generators that it
    draws from, by name; settings: of the optimizer's param groups, and numbers that it keeps, by name;
    changed: the tensors that code outside of a step changed just before it.
    """

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    generators: dict[str, Tensor]
    settings: dict[str, Any]
    changed: frozenset[str]


@dataclass(frozen=True)
class Evidence:
    """What is known of two runs at a step besides its operations.

    names: of the runs; steps: in both; settings: those of both trainings that differ; modules and
    optimizers: the classes of the first run's, by path and by name; look: returns what the step begins
    and ends with; look_at_first: returns state 0; numerics: those that differ, in words; is_seeded:
    whether the seed decides on everything that is drawn before the first step; is_data_drawn: whether
    the data is drawn, too; has_rows: whether batches are rows of data that the runs know by
    their numbers; unseen: what operations took that no program holds, in words.
    """

    names: tuple[str, str]
    steps: tuple[Step, Step]
    settings: list[Setting]
    modules: dict[str, str]
    optimizers: dict[str, str]
    look: Callable[[], tuple[Around, Around]]
    look_at_first: Callable[[], tuple[State, State]]
    numerics: list[str]
    is_seeded: bool
    is_data_drawn: bool
    has_rows: bool
    unseen: tuple[str, ...] = ()

    @cached_property
    def around(self) -> tuple[Around, Around]:
        """What the step begins and ends with, in both."""
        return self.look()

    @cached_property
    def sources(self) -> tuple[Sources, Sources]:
        """Where the tensors of the step come from, in both."""
        return Sources(self.steps[0]), Sources(self.steps[1])

    @cached_property
    def first_states(self) -> tuple[State, State]:
        """State 0 of both."""
        return self.look_at_first()

    @cached_property
    def current(self) -> list[Setting]:
        """The learning rates and other numbers of optimizers that differ at this step."""
        one, other = (step.hyperparameters for step in self.steps)
        return [
            self.of_optimizer(name, (float(shortest(value)), float(shortest(other[name]))))
            for name, value in one.items()
            if name in other and value != other[name]
        ]

    def of_optimizer(self, name: str, values: tuple[Any, Any]) -> Setting:
        """Return a setting of an optimizer. name: `lr[1]`; `generator.lr[1]` if it is one of several."""
        prefix, _, rest = name.partition(".")
        path, key = (prefix, rest) if prefix in self.optimizers and rest else ("optimizer", name)
        owner = self.optimizers.get(path) or next(iter(self.optimizers.values()), "optimizer")
        return Setting("optimizer", "" if path == "optimizer" else path, owner, key, values)

    def of_group(self, key: str, place: str, values: tuple[Any, Any]) -> Setting:
        """Return a setting of a param group that is a tensor of one number. place: of the group."""
        shown = tuple(float(shortest(value)) for value in values)
        return self.of_optimizer(key if place == "0" else f"{key}[{place}]", (shown[0], shown[1]))

    def of_update(self, module: str | None) -> list[Setting]:
        """Return the settings on which an operation of the update depends, the current numbers first.

        module: of the operation, the name of the optimizer if there are several.
        """
        names = {(each.path, each.name) for each in self.current}
        found = self.current + [
            each
            for each in self.settings
            if each.kind in ("optimizer", "clip_norm") and (each.path, each.name) not in names
        ]
        its = (module or "").partition(".")[0]
        if its not in self.optimizers:
            return found
        path = "" if its == "optimizer" else its
        return [each for each in found if each.kind != "optimizer" or each.path == path]

    def schedules(self) -> Iterator[str]:
        """Yield what differs in schedules, unless the numbers that they start from differ."""
        names = {(each.path, each.name) for each in self.settings if each.kind == "optimizer"}
        if not any((each.path, each.name) in names for each in self.current):
            yield from (str(each) for each in self.settings if each.kind == "schedule")


def around(replay: Replay, number: int) -> Around:
    """Return what a step begins and ends with besides its batch; runs it."""
    with replay.in_force(number):
        stepper = replay.go_to(number - 1, replay.stretch_of(number))
        stepper.given(number)  # sets what belongs to the step
        before = {name: copy_on_cpu(tensor) for name, tensor in stepper.named_state().items()}
        generators = stepper.generators(number)
        optimizer = {} if stepper.has_gradients_in_state else stepper.capture().optimizer("optimizer")
        stepper.run(number)
        after = {name: copy_on_cpu(tensor) for name, tensor in stepper.named_state().items()}
    groups = {
        f"{key}[{place}]" if place else key: value
        for place, group in enumerate(optimizer.get("groups", ()))
        for key, value in group.items()
        if key not in ("params", "initial_lr")
    }
    file = replay.run.change_files().get(number - 1)
    changed = frozenset(replay.run.change(file).tensors if file else ())
    return Around(before, after, generators, groups | flat(optimizer.get("values", {})), changed)
