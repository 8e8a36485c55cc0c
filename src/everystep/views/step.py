"""An opened step as a page for the terminal: what happened in it, in the chapter's order."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, get_args

from rich.text import Text

from everystep.errors import UsageError, did_you_mean
from everystep.program.operation import Phase
from everystep.recording.facts import Facts, LoopFacts, TrainingFacts
from everystep.recording.texts import loss_text, optimizer_parts, shortest
from everystep.replay.step import Step, Update
from everystep.views.batch import (
    MOST_VALUES,
    about_classes,
    class_names,
    classes_text,
    other_values,
    targets,
)
from everystep.views.formula import Formula, update_formulas
from everystep.views.lines import (
    ABSOLUTE,
    Page,
    norm,
    statistics_text,
)
from everystep.views.mathematics import mathematics
from everystep.views.operations import operation_lines, write_operation
from everystep.views.segments import SegmentSeen, as_it_happened
from everystep.views.tables import Cell
from everystep.views.texts import grouped

__all__ = ["PHASES", "step_html", "step_text"]

#: What can be looked at alone.
PHASES = ("batch", *get_args(Phase))

#: Columns of a step in a notebook.
HTML_WIDTH = 110
#: Colours are those of the notebook, and only emphasis is added.
_HTML = '<pre style="overflow-x: auto; line-height: 1.35; background: none">{code}</pre>'

_INDENT = 2
#: Rows of a batch that are named.
_ROWS_SHOWN = 3


def step_text(
    step: Step,
    facts: Facts,
    *,
    name: str = "",
    phase: str | None = None,
    operation: int | None = None,
    values: bool = False,
    width: int = 100,
) -> Text:
    """Return a step as text, to print with `soft_wrap=True`.

    Args:
        step: the step.
        facts: of the run.
        name: of the run.
        phase: show only this one, in full; one of `PHASES`.
        operation: show only this one, counted from 0 as in `Step.operations`.
        values: show the values of the tensors, too; for more than 1,000 elements, only the edges.
        width: columns of the terminal; tables of operations omit what does not fit.

    Raises:
        UsageError: the phase or the operation does not exist.
    """
    if phase is not None and phase not in PHASES:
        cure = did_you_mean(phase, PHASES)
        raise UsageError(f"a step has no phase {phase!r}" + (f"; {cure}" if cure else ""))
    last = len(step.operations) - 1
    if operation is not None and not 0 <= operation <= last:
        known = f"operations are numbered from 0 to {last}" if last >= 0 else "it has none"
        raise UsageError(f"step {step.number} has no operation {operation}: {known}")
    opened = _Opened(step, facts, Page(width, values))
    if operation is not None:
        opened.operation(name, operation)
    else:
        opened.whole(name, phase)
    return opened.page.text


def step_html(step: Step, facts: Facts, name: str) -> str:
    """Return a step as a notebook shows it: the page of the terminal."""
    from rich.console import Console

    console = Console(file=io.StringIO(), record=True, width=HTML_WIDTH, color_system="truecolor")
    console.print(step_text(step, facts, name=name, width=HTML_WIDTH), soft_wrap=True)
    return console.export_html(inline_styles=True, code_format=_HTML)


class _Opened:
    """A step on its way to a page."""

    def __init__(self, step: Step, facts: Facts, page: Page) -> None:
        self.step = step
        self.steps = facts.steps or 0
        self.training = facts.training_of(step.number)
        self.classes = class_names(facts)
        self.page = page
        self.lines = mathematics(step.operations)

    def whole(self, name: str, phase: str | None) -> None:
        """Write the page, or one phase of it."""
        self._heading(name)
        if phase is None and self.training.loop is not None:
            self._as_it_happened(self.training.loop)
            return
        for each in PHASES:
            if phase in (None, each):
                getattr(self, f"_{each}")(phase is not None or self.page.values)
        self._complex_numbers()

    def _as_it_happened(self, loop: LoopFacts) -> None:
        """Write a step of a loop: its batch, its segments in their order, and what has changed."""
        step, page = self.step, self.page
        self._batch(False)
        happened = as_it_happened(step, self.training, loop)
        for number, seen in enumerate(happened.segments):
            segment = seen.segment
            if seen.formulas:
                self._segment_of_update(seen)
                continue
            title = self._title_of_update(seen) if segment.phase == "update" else segment.part or ""
            page.heading(segment.phase.replace("_", " "), title)
            numbers = range(segment.first, segment.last + 1)
            for place in numbers if number else (-1, *numbers):
                page.text.append(" " * _INDENT).append(self._rows[place + 1]).append("\n")
        if step.gradients:
            page.heading("grads", "as backward left them")
            self.page.tensors({f"{name}.grad": tensor for name, tensor in step.gradients.items()})
        if left := happened.changed_otherwise:
            page.heading("changed", "outside the updates")
            rows = [_update_row(name, step.updates[name], None) for name in left]
            page.table([_update_headings(), *rows])
        self._complex_numbers()

    def _complex_numbers(self) -> None:
        """Write what the sign in the tables means."""
        if f", {ABSOLUTE}" in self.page.text.plain:
            self.page.blank()
            self.page.line((f"{ABSOLUTE}: numbers are complex, statistics of absolute values", "dim"))

    def _segment_of_update(self, seen: SegmentSeen) -> None:
        """Write what an optimizer did: its formulas, and how far each parameter went."""
        segment, formulas = seen.segment, seen.formulas
        self.page.heading("update", self._title_of_update(seen))
        count = segment.last - segment.first + 1
        several = f" to #{segment.last}, {count:,} operations" if count > 1 else ""
        self.page.line((f"#{segment.first}{several}", "dim"), indent=_INDENT)
        self._formulas(formulas)
        self.page.blank()
        rows = [_update_row(n, self.step.updates[n], formula) for n, formula in formulas.items()]
        self.page.table([_update_headings(), *rows])

    def _title_of_update(self, seen: SegmentSeen) -> str:
        """Return the optimizer, its class and its settings."""
        optimizer = self.training.optimizers.get(seen.optimizer or "")
        names = [seen.segment.part or "", optimizer.class_name if optimizer else ""]
        settings = [f"{name} = {shortest(value)}" for name, value in seen.settings.items()]
        return ", ".join(filter(None, [": ".join(filter(None, names)), *settings]))

    def operation(self, name: str, place: int) -> None:
        """Write one operation."""
        page = self.page
        title = ", ".join([*([name] if name else []), f"step {self.step.number:,}"])
        page.line((f"{title}, operation #{place} of #0 to #{len(self.step.operations) - 1}", "bold"))
        page.blank()
        if not self.step.is_exact:
            page.labelled("replayed", self._exactness(), "yellow")
        about = about_classes(self.step, self.classes, self.training.modules)
        write_operation(page, self.step, place, self.lines[place], about)

    def _heading(self, name: str) -> None:
        step, page = self.step, self.page
        title = f"step {step.number:,} of {self.steps:,}"
        page.line((f"{name}, {title}" if name else title, "bold"))
        page.blank()
        if self.training.has_loss:
            page.labelled("loss", f"{grouped(step.loss)}, in full {shortest(step.loss)}")
        else:
            page.labelled("loss", "not logged")
        if self.training.has_loss and not math.isfinite(step.loss):
            page.labelled("", "the loss is not finite", "bold red")
        page.labelled("replayed", self._exactness(), "" if step.is_exact else "yellow")
        if step.batch.rows is not None:
            page.labelled("epoch", f"{step.epoch:,}, counted from 0")

    def _exactness(self) -> str:
        step = self.step
        how = "without your code" if self.training.loop is None else "without your loop code"
        if step.is_exact and not self.training.has_loss:
            return f"{how}; no loss was logged, so only `everystep verify` can check it"
        if step.is_exact:
            return f"bit-identical, {how}"
        losses = [shortest(loss) for loss in (step.loss, step.recorded_loss)]
        here = f"replayed loss {losses[0]}, recorded {losses[1]}"
        if losses[0] == losses[1]:
            here = f"this loss matches, but step {step.diverged_at:,} differs"
        if not self.training.has_loss:
            here = f"step {step.diverged_at:,} differs"
        return (
            f"NOT bit-identical, {how}: {here}\nsteps from {step.diverged_at:,} on differ from the "
            "recording"
        )

    def _batch(self, alone: bool) -> None:
        _write_batch(self.page, self.step, self.training, self.classes)

    def _forward(self, alone: bool) -> None:
        self.page.heading("forward")
        self._operations("forward", alone)

    def _loss(self, alone: bool) -> None:
        self.page.heading("loss", loss_text(self.training.loss))
        self._operations("loss", alone)

    def _zero_grad(self, alone: bool) -> None:
        before, dropped = self.step.number - 1, self.step.dropped
        if not dropped:
            self.page.heading("zero_grad", "no gradients to drop yet")
            return
        self.page.heading("zero_grad", f"drops the gradients of step {before:,}")
        if alone:
            self.page.tensors({f"{name}.grad": tensor for name, tensor in dropped.items()})
        else:
            norms = {f"{name}.grad": grouped(norm(tensor)) for name, tensor in dropped.items()}
            self.page.table(
                [[("gradient", "dim", False), ("norm", "dim", True)]]
                + [[(name, "", False), (text, "", True)] for name, text in norms.items()]
            )
        if any(seen.operation.phase == "zero_grad" for seen in self.step.operations):
            self._operations("zero_grad", alone)

    def _backward(self, alone: bool) -> None:
        self.page.heading("backward")
        self._operations("backward", alone)
        self.page.blank()
        self.page.tensors({f"{name}.grad": tensor for name, tensor in self.step.gradients.items()})

    def _update(self, alone: bool) -> None:
        step, page = self.step, self.page
        name, settings = optimizer_parts(self.training.optimizers)
        shown = {key: repr(float(shortest(value))) for key, value in step.hyperparameters.items()}
        shown |= {k: v for k, v in settings.items() if k not in (*shown, "decoupled_weight_decay")}
        page.heading("update", ", ".join([name, *(f"{key} = {value}" for key, value in shown.items())]))
        if self.training.clip_norm is not None:
            page.line((self._clipping(self.training.clip_norm), ""), indent=_INDENT)
        formulas = update_formulas(step.operations, self.training.optimizers)
        self._formulas(formulas)
        page.blank()
        rows = [_update_row(each, update, formulas.get(each)) for each, update in step.updates.items()]
        page.table([_update_headings(), *rows])
        if alone:
            page.blank()
            self._operations("update", alone)
            self._updates_in_full()

    def _other(self, alone: bool) -> None:
        if alone or any(seen.operation.phase == "other" for seen in self.step.operations):
            self.page.heading("other")
            self._operations("other", alone)

    def _formulas(self, formulas: Mapping[str, Formula]) -> None:
        """Write both notations, once for all the parameters that share them."""
        of_formula: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for parameter, formula in formulas.items():
            of_formula.setdefault((formula.operators, formula.calls), []).append(parameter)
        for (operators, calls), names in of_formula.items():
            if len(of_formula) > 1:
                self.page.line((_shortened(names), "dim"), indent=_INDENT)
            for line in operators:
                self.page.wrapped(line, "", indent=_INDENT)
            for line in calls:
                self.page.wrapped(line, "dim", indent=_INDENT)

    def _clipping(self, limit: float) -> str:
        whole = sum(norm(gradient) ** 2 for gradient in self.step.gradients.values()) ** 0.5
        effect = "are not clipped" if whole + 1e-6 <= limit else "are clipped"  # as torch does
        return f"first, the gradients, with norm {grouped(whole)}, {effect}: clip_norm = {limit:g}"

    def _updates_in_full(self) -> None:
        for title in ("before", "after", "change"):
            self.page.blank()
            updates = self.step.updates.items()
            self.page.tensors({name: getattr(update, title) for name, update in updates}, title)

    def _operations(self, phase: str, alone: bool) -> None:
        """List the operations of a phase: a line for each, or alone all that is known of them."""
        places = [i for i, seen in enumerate(self.step.operations) if seen.operation.phase == phase]
        if places and alone:
            for place in places:
                self._operation_in_full(place)
        elif places:
            for place in places if phase in ("loss", "other") else (-1, *places):
                self.page.text.append(" " * _INDENT).append(self._rows[place + 1]).append("\n")
        else:
            self.page.line(("no operations", "dim"), indent=_INDENT)

    def _operation_in_full(self, place: int) -> None:
        seen, line, page = self.step.operations[place], self.lines[place], self.page
        module = "" if seen.operation.module is None else f"  module {seen.operation.module}"
        origin = f"{module}  {seen.operation.operator}"
        page.line((f"{f'#{place}':<5}", "dim"), (str(line), ""), (origin, "dim"), indent=_INDENT)
        indent = _INDENT + 5
        for name, tensor in seen.results.items():
            several = [(f"{line.made.get(name, name)}  ", "")] if len(seen.results) > 1 else []
            is_unset = (place, "results", name) in self.step.unset
            page.line(*several, *statistics_text(tensor, is_unset=is_unset), indent=indent)
            if page.values and not is_unset:
                page.numbers(tensor, indent=indent)

    @cached_property
    def _rows(self) -> list[Text]:
        """A line for the headings, and one for each operation."""
        return operation_lines(self.step.operations, self.lines, self.page.width - _INDENT)


def _shortened(names: Iterable[str], longest: int = 4) -> str:
    known = list(names)
    more = f", ... ({len(known)} parameters)" if len(known) > longest else ""
    return ", ".join(known[:longest]) + more


def _write_batch(page: Page, step: Step, training: TrainingFacts, classes: list[str] | None) -> None:
    """Write the batch of a step; where values are asked for, all of it.

    classes: the names of the classes, if the data has such.
    """
    page.heading("batch", _rows_text(step, training, whole=page.values))
    page.tensors(step.batch.tensors)
    if counts := classes_text(step.batch, classes):
        page.wrapped(f"classes of y: {counts}", "", indent=_INDENT)
    if page.values and counts and (names := targets(step.batch, classes)):
        page.wrapped(f"row by row: {', '.join(names)}", "", indent=2 * _INDENT)
    _write_other_values(page, step.batch.nested)


def _rows_text(step: Step, training: TrainingFacts, *, whole: bool) -> str:
    rows, total = step.batch.rows, training.data.rows
    if training.loop is not None:
        return "" if step.batch.tensors else "no tensors"
    if rows is None:
        return f"all {total:,} rows, in order"
    whole_text = "" if step.batch.source == "the data" else f" of {step.batch.source}"
    shown = rows.tolist() if whole else rows[:_ROWS_SHOWN].tolist()
    more = ", ..." if len(shown) < len(rows) else ""
    return f"rows {', '.join(map(str, shown))}{more}{whole_text} ({len(rows):,} of {total:,})"


def _write_other_values(page: Page, nested: Any) -> None:
    """List what the batch holds besides tensors, each in a line."""
    given = dict(islice(other_values(nested), MOST_VALUES))
    label = max(map(len, given), default=0)
    for name, value in given.items():
        items = value if isinstance(value, list) else [value]
        texts = ", ".join(repr(item) if isinstance(item, str) else str(item) for item in items)
        count = f" ({len(items):,})" if isinstance(value, list) else ""
        line = f"{name:<{label}}  {texts}"
        width = page.width - _INDENT - len(count)
        if page.values:
            page.wrapped(line + count, "", indent=_INDENT)
        else:
            cut = line if len(line) <= width else f"{line[: width - 1]}…"
            page.line((cut + count, ""), indent=_INDENT)


def _update_headings() -> list[Cell]:
    """Return the headings for `_update_row`."""
    names = ("norm before", "norm after", "norm of change", "relative")
    return [("parameter", "dim", False), *((n, "dim", True) for n in names), ("by", "dim", False)]


def _update_row(name: str, update: Update, formula: Formula | None) -> list[Cell]:
    """Return a parameter, how far it went, and the operations that took it there, if they are known."""
    norms = [grouped(norm(each)) for each in (update.before, update.after, update.change)]
    relative = f"{100 * update.relative_size:.3g}%"
    by = _operations_text(formula.numbers) if formula else ""
    return [(name, "", False), *((text, "", True) for text in (*norms, relative)), (by, "dim", False)]


def _operations_text(numbers: tuple[int, ...]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first + 1 == len(numbers):
        return f"#{first} to #{last}"
    return " ".join(f"#{number}" for number in numbers)
