"""Acceleration: whether programs may run the steps of a training, and until when.

A program may run in place of Python only where all Python of the step is torch's own, known by identity,
or where the user vouches for it. Other code runs at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from everystep.step.eager import Training
from everystep.step.guards import is_a
from everystep.step.surroundings import Surroundings
from everystep.step.torchs_own import (
    is_torchs_optimizer,
    is_torchs_schedule,
    reason_against_loss,
    reason_against_module,
)

__all__ = ["Acceleration", "StandsBehind"]

StandsBehind = Literal["known", "vouched", "python"]

_OPTIMIZER = "the optimizer"


class Acceleration:
    """Whether programs may run the steps of a training, and what must hold for that.

    Args:
        training: what is trained.
        is_vouched: whether the user vouches for code that is not torch's.

    reason: why no program can be used, or None; by_python: why Python runs every step, although a
    program may repeat it later, or None; has_known_optimizer: whether the update is torch's own, and so
    may be in a program (any other optimizer is run at every step); has_foreign_code: whether code that
    is neither torch's nor everystep's runs between two steps of programs; stands_behind: what justifies
    the programs: the code is `known`, or `vouched` for; or `python` runs the steps itself.
    """

    def __init__(self, training: Training, is_vouched: bool = False) -> None:
        self._training = training
        against = reason_against_module(training.model) or reason_against_loss(training.loss)
        self.by_python = None if is_vouched else against
        self.stands_behind: StandsBehind = (
            "known" if against is None else "vouched" if is_vouched else "python"
        )
        self.has_known_optimizer = is_torchs_optimizer(training.optimizer)
        self.has_foreign_code = (
            not self.has_known_optimizer
            or not is_torchs_schedule(training.schedule)
            or training.batch.runs_python
            or self.by_python is not None
        )
        parts = {"the model": training.model, "the loss": training.loss}
        self._surroundings = Surroundings(
            {name: part for name, part in parts.items() if isinstance(part, nn.Module)},
            {_OPTIMIZER: training.optimizer},
            lambda: _but_optimizer(training.named_state()),
            training.device,
            is_vouched=is_vouched,
        )
        self.reason = next(self._surroundings.reasons(), None)

    def begin(self) -> None:
        """Note all settings again: a program is about to be captured that holds for these."""
        self._surroundings.begin()
        self._guard_loss()

    def difference(self, state: Mapping[str, Tensor] | None = None) -> str | None:
        """Return in words what changed since programs were captured, or None.

        state: of the training now, if already known.
        """
        return self._surroundings.difference(None if state is None else _but_optimizer(state))

    def guard_update(self, *, but_lr: bool) -> None:
        """Note the settings of the optimizer, which are among the operations of its update.

        but_lr: except for the learning rate, which they read at every step.
        """
        self._surroundings.guard_settings(_OPTIMIZER, but_lr=but_lr)

    def _guard_loss(self) -> None:
        """Note what a loss holds that is a function of torch with some of its arguments."""
        loss, guards = self._training.loss, self._surroundings.guards
        if type(loss) is not functools.partial:
            return
        guards.read("loss", "the loss", getattr, loss, "func")
        guards.read("arguments", "the arguments of the loss", getattr, loss, "args")
        guards.contents(loss.keywords, "the loss")
        for value in (*loss.args, *loss.keywords.values()):
            if is_a(value, Tensor):
                guards.tensor(value, "a tensor of the loss", is_state=False)


def _but_optimizer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a step carries, without what the optimizer creates and replaces itself."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("optimizer/")}
