"""The report with opened steps inside: the view of the page, with its data in the same file."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from torch import Tensor

from everystep.errors import UsageError
from everystep.page.regions import MOST, histogram, matrix, region
from everystep.replay.opened_step import Step
from everystep.replay.run_replay import no_such_step
from everystep.run import Run
from everystep.views.loss_table import rendered
from everystep.views.report import report_html
from everystep.views.step_data import tensor_of

__all__ = ["MOST_STEPS", "shared_report"]

#: Maximum number of steps in a report, which is to be sent to other people.
MOST_STEPS = 20
#: Tensors of up to so many numbers are embedded whole.
WHOLE = 4096
#: Larger ones are reduced to so many rows and columns, and to so many numbers in all slices together.
SIDE = 96

#: The module that begins.
_FIRST = "report/steps.js"


def shared_report(run: Run, steps: Sequence[int]) -> str:
    """Return the report of a run with some steps embedded, to open without a server.

    steps: their numbers; -1 is the newest; empty: the report alone.

    Raises:
        StepError: there is no such step.
        UsageError: there are too many.
        RunError: a needed file is missing or unreadable.
    """
    numbers = _numbers(run, steps)
    return report_html(run, _section(run, numbers), (_FIRST,)) if numbers else report_html(run)


def _numbers(run: Run, steps: Sequence[int]) -> list[int]:
    count = len(run)
    numbers = {step + count + 1 if -count <= step < 0 else step for step in steps}
    for number in sorted(numbers):
        if not 1 <= number <= count:
            raise no_such_step(run, number)
    if len(numbers) > MOST_STEPS:
        raise UsageError(
            f"a report with {len(numbers):,} steps inside would be too large to send; choose at most "
            f"{MOST_STEPS}"
        )
    return sorted(numbers)


def _section(run: Run, numbers: list[int]) -> Markup:
    kept = _HeldNumbers()
    steps = [kept.step(run[number], run) for number in numbers]
    data = {"run": run.name, "steps": steps, "histograms": kept.histograms, "numbers": kept.numbers}
    text = rendered(
        "opened.html",
        numbers=numbers,
        whole=WHOLE,
        is_reduced=kept.is_reduced,
        megabytes=len(json.dumps(data)) / 1e6,
        first=_FIRST,
        data=data,
    )
    return Markup(text)


class _HeldNumbers:
    """The numbers in the page: each sequence is held once, however many tensors have it."""

    def __init__(self) -> None:
        self.numbers: list[str] = []
        self.histograms: list[dict[str, Any]] = []
        self.is_reduced = False
        self._places: dict[bytes, int] = {}

    def step(self, step: Step, run: Run) -> dict[str, Any]:
        content = step.data()
        # Memory that nothing was written to has no numbers to send.
        shown = [id for id, seen in content["tensors"].items() if "unset" not in seen]
        tensors = {id: tensor_of(step, id, run.facts) for id in shown}
        return {
            "content": content,
            "regions": {id: self._slices(tensor) for id, tensor in tensors.items()},
            "histograms": {id: self._histogram(tensor) for id, tensor in tensors.items()},
        }

    def _slices(self, tensor: Tensor) -> list[dict[str, Any]]:
        """Return the slices of a tensor that fit; always the first."""
        most = WHOLE if tensor.numel() <= WHOLE else SIDE
        found: list[dict[str, Any]] = []
        used = 0
        for index in range(matrix(tensor)[1]):
            about, content = region(tensor, index, most=min(most, MOST))
            used += about["height"] * about["width"]
            if found and used > max(WHOLE, SIDE * SIDE):
                self.is_reduced = True
                break
            self.is_reduced |= about["block"] != [1, 1]
            # The shape and the like are those of the first slice.
            own = about if not found else {k: about[k] for k in ("format", "lowest", "highest")}
            text = base64.b64encode(content).decode("ascii")
            found.append(own | {"numbers": self._place(content, self.numbers, text)})
        return found

    def _histogram(self, tensor: Tensor) -> int:
        counted = histogram(tensor)
        return self._place(b"histogram" + json.dumps(counted).encode(), self.histograms, counted)

    def _place(self, key: bytes, held: list[Any], content: Any) -> int:
        """Return the place of a content in a list that has each once."""
        # An activation is the input of the next layer, of its backward pass, and so on: held once.
        if key not in self._places:
            self._places[key] = len(held)
            held.append(content)
        return self._places[key]
