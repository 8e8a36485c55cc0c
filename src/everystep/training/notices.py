"""Notices about a recorded loop, on stderr, each kind once or a few times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from everystep.errors import say
from everystep.step.build import BuiltPath
from everystep.training.agreement import ranks_here
from everystep.training.step_under_way import AnyWatch

__all__ = ["Notices"]

#: Maximum number of reports about unseen operations; all are in the run's facts.
MOST_SAID = 3


class Notices:
    """Reports what a recording lacks, or what may differ from the loop without everystep.

    Of several processes, rank 0 reports: what holds for one nearly always holds for all. The run of each
    rank has it in its facts.

    unseen: what was not recorded, as text.
    """

    def __init__(self) -> None:
        ranks = ranks_here()
        self.is_quiet = ranks is not None and ranks.rank > 0
        self.unseen: set[str] = set()
        self._said: set[str] = set()

    def changed_between(self, step: int, name: str) -> None:
        """Report that the loop changed a tensor outside of a step."""
        self._once(
            "between",
            f"after step {step}, the loop changes {name} outside of a step; everystep keeps its "
            "values, but no step shows how they came about",
        )

    def begun_again(self, name: str, variables: Sequence[str]) -> None:
        """Report variables of a resumed loop that count or collect, and are in no part.

        name: `steps` or `epochs`, over which it iterates.
        """
        if variables:
            self._once(
                f"begun {name}",
                f"the loop continues after earlier {name}, but variables that it changes began again "
                f"with this process: {', '.join(variables)}. If anything depends on them, such as a "
                "rate or a checkpoint, keep them in a part: counts = {'total': 0.0}, "
                "everystep.record(..., counts=counts)",
            )

    def unkept(self, part: str, kinds: Sequence[str]) -> None:
        """Report that a part has values that a run cannot keep. kinds: their classes."""
        self._once(
            f"unkept {part} {', '.join(kinds)}",
            f"the part {part} has values of {', '.join(kinds)}, which a run cannot keep: a resumed loop "
            "gets them as your script makes them; pass modules and optimizers as parts of their own, "
            "and keep numbers, texts, tensors or arrays instead of others",
        )

    def of_step(self, step: int, seen: AnyWatch) -> None:
        """Report what the recording of a step lacks."""
        for reason in seen.unseen:
            is_new = reason not in self.unseen
            self.unseen.add(reason)
            if is_new and len(self.unseen) <= MOST_SAID:
                self._once(
                    reason,
                    f"step {step}: {reason}; everystep keeps its results as numbers, and no view "
                    "shows how they were computed",
                )
        if seen.is_compiled:
            self._once(
                "compiled",
                f"step {step} calls a torch.compile function, which torch runs uncompiled while "
                "everystep watches: the bits may differ from those of the loop without everystep; use "
                "the uncompiled function in the loop",
            )
        if seen.changed_outside is not None:
            self._once(
                "outside",
                f"step {step} changes {seen.changed_outside} that is not among the tensors of the "
                "parts; everystep stores it again at every step. Unless it is an attribute of a module, "
                "a resumed loop gets it as your script makes it: pass the object that holds it to "
                "everystep.record(...)",
            )

    def of_program(self, step: int, built: BuiltPath) -> None:
        """Report that a step, the first with this program, evaluates a model that it trains."""
        if built.evaluation is None:
            return
        count, first = built.evaluation
        # The line of the loop that evaluates, not the one in a forward that it has called.
        line, of = built.program.line_of(first), len(built.program.operations)
        around = [] if line is None else [line, *line.callers]
        called = [each.place for each in around if not each.function.endswith("forward")]
        where = f" ({called[0]})" if called else ""
        self._once(
            "evaluates",
            f"step {step} evaluates a model that it also trains{where}: {count:,} of its {of:,} "
            "operations compute nothing that the training uses; `with recording.paused():` around the "
            "evaluation leaves them out",
        )

    def without_loss(self, step: int, *, is_first: bool) -> None:
        """Report a step without a loss in a loop that logs one. is_first: those before it have none."""
        which = f"steps before {step} log" if is_first else f"step {step} logs"
        self._once(
            "loss", f"{which} no loss, and others do; the run has NaN in its place: log it in each step"
        )

    def set_within(self, step: int, name: str, before: Any, now: Any) -> None:
        """Report a setting that bits depend on, and that the loop has changed."""
        self._once(
            f"set {name}",
            f"step {step} runs with {name} = {now}, which was {before} when the recording began; a "
            f"replay uses {before}, so it may differ from here on; set it before the recording begins",
        )

    def marked(self, step: int, condition: str) -> None:
        """Report that a condition marks a step, and may mark more."""
        self._once(f"marked {condition}", f"{condition} at step {step:,}; the run marks each such step")

    # By kind, not by message: the message of a later step would differ by its number.
    def _once(self, kind: str, message: str) -> None:
        if kind not in self._said and not self.is_quiet:
            self._said.add(kind)
            say(message)
