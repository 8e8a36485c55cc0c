"""An opened step as a page for the terminal: what happened in it, in the chapter's order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import get_args

from rich.text import Text
from torch import Tensor

from everystep.errors import UsageError, did_you_mean
from everystep.program.operation import CodeLine, Phase
from everystep.recording.facts import Facts, LoopFacts
from everystep.recording.texts import loss_text, optimizer_parts, shortest
from everystep.replay.opened_step import Step, norm
from everystep.views.batch_text import (
    MOST_VALUES,
    class_names,
    classes_of_tensors,
    classes_text,
    other_values,
    targets,
)
from everystep.views.formatting import cut, grouped
from everystep.views.mathematics import argument_texts, mathematics
from everystep.views.step_data import SegmentSeen, as_it_happened
from everystep.views.tensor_texts import (
    ABSOLUTE,
    NUMBERS,
    numbers_of,
    statistics_text,
    write_numbers,
    write_tensors,
)
from everystep.views.terminal import Cell, Column, Page, Styled, keyed, table_lines
from everystep.views.update_formula import UpdateFormula, update_formulas

__all__ = ["PHASES", "step_text"]

#: Phases that can be shown alone.
PHASES = ("batch", *get_args(Phase))

_INDENT = 2
#: Rows of a batch that are named.
_ROWS_SHOWN = 3
#: Numbers of an operation's tensors are shown by default up to so many elements.
FEW_VALUES = 64
#: Characters of the path of a module.
_LONGEST_PATH = 18
#: Parameters that are named above the formula that they share.
_NAMED = 4

#: The columns of an operation in the terminal.
OPERATIONS: tuple[Column[Mapping[str, Cell]], ...] = (
    keyed("number", "", style="dim"),
    keyed("module", style="cyan"),
    keyed("formula", least=34),
    *NUMBERS,
    keyed("operator", style="dim", rank=4),
)
#: The columns of the arguments of an operation: name, text, whether it is the default.
ARGUMENTS: tuple[Column[tuple[str, str, bool]], ...] = (
    Column("", lambda row: row[0], style="dim"),
    Column("", lambda row: row[1]),
    Column("", lambda row: "default" if row[2] else "", style="dim"),
)
#: The columns of the update of a parameter.
UPDATES: tuple[Column[Mapping[str, Cell]], ...] = (
    keyed("parameter"),
    keyed("norm before", is_number=True, rank=1),
    keyed("norm after", is_number=True, rank=1),
    keyed("norm of change", is_number=True),
    keyed("relative", is_number=True),
    keyed("by", style="dim"),
)


def step_text(
    step: Step,
    facts: Facts,
    *,
    name: str = "",
    phase: str | None = None,
    operation: int | None = None,
    values: bool = False,
    lines: bool = False,
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
        lines: show the line of code above the operations that it called.
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
    opened = _Opened(step, facts, Page(width), values, lines)
    if operation is not None:
        opened.operation(name, operation)
    else:
        opened.whole(name, phase)
    return opened.page.text


class _Opened:
    """A step on its way to a page.

    values: whether the numbers of tensors are shown; has_code: whether the lines of code are.
    """

    def __init__(self, step: Step, facts: Facts, page: Page, values: bool, has_code: bool) -> None:
        self.step = step
        self.steps = facts.steps or 0
        self.training = facts.training_of(step.number)
        self.classes = class_names(facts)
        self.page = page
        self.values = values
        self.has_code = has_code
        self._code = ""
        self.lines = mathematics(step.operations)

    def whole(self, name: str, phase: str | None) -> None:
        """Write the page, or one phase of it."""
        self._heading(name)
        if phase is None and self.training.loop is not None:
            self._as_it_happened(self.training.loop)
        else:
            alone = phase is not None or self.values
            for each in PHASES if phase is None else (phase,):
                self._phase(each, alone)
        if f", {ABSOLUTE}" in self.page.text.plain:
            self.page.blank()
            self.page.line((f"{ABSOLUTE}: numbers are complex, statistics of absolute values", "dim"))

    def operation(self, name: str, place: int) -> None:
        """Write one operation with its arguments, inputs and results."""
        page, seen, line = self.page, self.step.operations[place], self.lines[place]
        title = ", ".join([*([name] if name else []), f"step {self.step.number:,}"])
        page.line((f"{title}, operation #{place} of #0 to #{len(self.step.operations) - 1}", "bold"))
        page.blank()
        if not self.step.is_exact:
            page.labelled("replayed", self._exactness(), "yellow")
        page.labelled("formula", f"{line.left or f'#{place}'} = {line.right}")
        page.labelled("operator", seen.operation.operator)
        page.labelled("phase", seen.operation.phase)
        if seen.operation.module:
            page.labelled("module", seen.operation.module)
        if seen.line is not None:
            page.labelled("line", str(seen.line))
            if seen.line.callers:
                page.labelled("called by", "\n".join(map(str, seen.line.callers)))
        if arguments := argument_texts(seen.operation, line.given):
            page.heading("arguments")
            page.table(ARGUMENTS, arguments)
        about = self._about_classes()
        for role, tensors, called in (
            ("inputs", seen.inputs, line.given),
            ("results", seen.results, line.made),
        ):
            page.heading(role)
            for own, tensor in tensors.items():
                title = called.get(own, own)
                strides = f"strides ({', '.join(map(str, tensor.stride()))})"
                also = f"{own}, " if own != title else ""
                page.line((title, "bold"), (f"  {also}{strides}", "dim"), indent=_INDENT)
                is_unset = (place, role, own) in self.step.unset
                page.line(*statistics_text(tensor, is_unset=is_unset), indent=2 * _INDENT)
                if text := about.get(f"operations/{place}/{role}/{own}"):
                    page.wrapped(text, "dim", indent=2 * _INDENT)
                if (self.values or tensor.numel() <= FEW_VALUES) and not is_unset:
                    write_numbers(page, tensor, indent=2 * _INDENT)

    def _about_classes(self) -> dict[str, str]:
        """Return explanations of tensors, by id; classes with their numbers as names need none."""
        names = self.classes or []
        if names == [str(number) for number in range(len(names))]:
            return {}
        numbered = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        texts = {"values": f"classes: {numbered}", "columns": f"columns: {', '.join(names)}"}
        found = classes_of_tensors(self.step, names, self.training.modules)
        return {id: texts[kind] for id, kind in found.items()}

    def _heading(self, name: str) -> None:
        step, page = self.step, self.page
        title = f"step {step.number:,} of {self.steps:,}"
        page.line((f"{name}, {title}" if name else title, "bold"))
        page.blank()
        has_loss = self.training.has_loss
        loss = f"{grouped(step.loss)}, in full {shortest(step.loss)}" if has_loss else "not logged"
        page.labelled("loss", loss)
        if has_loss and not math.isfinite(step.loss):
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

    def _as_it_happened(self, loop: LoopFacts) -> None:
        """Write a step of a loop: its batch, its segments in order, and other changes."""
        step, page = self.step, self.page
        self._batch()
        segments, changed_otherwise = as_it_happened(step, self.training, loop)
        for number, seen in enumerate(segments):
            segment = seen.segment
            title = self._title_of_update(seen) if segment.phase == "update" else segment.part or ""
            page.heading(segment.phase.replace("_", " "), title)
            if not seen.formulas:
                self._list(range(segment.first, segment.last + 1), has_headings=number == 0)
                continue
            count = segment.last - segment.first + 1
            several = f" to #{segment.last}, {count:,} operations" if count > 1 else ""
            page.line((f"#{segment.first}{several}", "dim"), indent=_INDENT)
            self._updated(seen.formulas, seen.formulas)
        if step.gradients:
            page.heading("grads", "as backward left them")
            self._tensors(_gradients(step.gradients))
        if changed_otherwise:
            page.heading("changed", "outside the updates")
            page.table(UPDATES, [self._update_row(name, None) for name in changed_otherwise])

    def _title_of_update(self, seen: SegmentSeen) -> str:
        optimizer = self.training.optimizers.get(seen.optimizer or "")
        names = [seen.segment.part or "", optimizer.class_name if optimizer else ""]
        settings = [f"{name} = {shortest(value)}" for name, value in seen.settings.items()]
        return ", ".join(filter(None, [": ".join(filter(None, names)), *settings]))

    def _batch(self) -> None:
        """Write the batch; where values are asked for, all of it."""
        page, batch = self.page, self.step.batch
        page.heading("batch", self._rows_text())
        if batch.tensors:
            self._tensors(batch.tensors)
        if counts := classes_text(batch, self.classes):
            page.wrapped(f"classes of y: {counts}", indent=_INDENT)
        if self.values and counts and (names := targets(batch, self.classes)):
            page.wrapped(f"row by row: {', '.join(names)}", indent=2 * _INDENT)
        given = dict(islice(other_values(batch.nested), MOST_VALUES))
        label = max(map(len, given), default=0)
        for name, value in given.items():
            items = value if isinstance(value, list) else [value]
            texts = ", ".join(repr(item) if isinstance(item, str) else str(item) for item in items)
            count = f" ({len(items):,})" if isinstance(value, list) else ""
            line = f"{name:<{label}}  {texts}"
            if not self.values:
                line = cut(line, page.width - _INDENT - len(count))
            page.wrapped(line + count, indent=_INDENT)

    def _rows_text(self) -> str:
        batch, total = self.step.batch, self.training.data.rows
        if self.training.loop is not None:
            return "" if batch.tensors else "no tensors"
        if batch.rows is None:
            return f"all {total:,} rows, in order"
        whole = "" if batch.source == "the data" else f" of {batch.source}"
        shown = batch.rows.tolist() if self.values else batch.rows[:_ROWS_SHOWN].tolist()
        more = ", ..." if len(shown) < len(batch.rows) else ""
        return f"rows {', '.join(map(str, shown))}{more}{whole} ({len(batch.rows):,} of {total:,})"

    def _phase(self, phase: str, alone: bool) -> None:
        """Write what happened in a phase; alone: in full."""
        if phase == "batch":
            self._batch()
        elif phase == "zero_grad":
            self._zero_grad(alone)
        elif phase == "update":
            self._update(alone)
        elif phase != "other" or alone or self._places(phase):
            self.page.heading(phase, loss_text(self.training.loss) if phase == "loss" else "")
            self._operations(phase, alone)
            if phase == "backward":
                self.page.blank()
                self._tensors(_gradients(self.step.gradients))

    def _zero_grad(self, alone: bool) -> None:
        before, dropped = self.step.number - 1, _gradients(self.step.dropped)
        if not dropped:
            self.page.heading("zero_grad", "no gradients to drop yet")
            return
        self.page.heading("zero_grad", f"drops the gradients of step {before:,}")
        if alone:
            self._tensors(dropped)
        else:
            norms = [{"gradient": name, "norm": grouped(norm(each))} for name, each in dropped.items()]
            self.page.table((keyed("gradient"), keyed("norm", is_number=True)), norms)
        if self._places("zero_grad"):
            self._operations("zero_grad", alone)

    def _update(self, alone: bool) -> None:
        step, page = self.step, self.page
        name, settings = optimizer_parts(self.training.optimizers)
        shown = {key: repr(float(shortest(value))) for key, value in step.hyperparameters.items()}
        shown |= {k: v for k, v in settings.items() if k not in (*shown, "decoupled_weight_decay")}
        page.heading("update", ", ".join([name, *(f"{key} = {value}" for key, value in shown.items())]))
        if self.training.max_grad_norm is not None:
            page.line((self._clipping(self.training.max_grad_norm), ""), indent=_INDENT)
        self._updated(step.updates, update_formulas(step.operations, self.training.optimizers))
        if alone:
            page.blank()
            self._operations("update", alone)
            for title in ("before", "after", "change"):
                page.blank()
                tensors = {name: getattr(update, title) for name, update in step.updates.items()}
                self._tensors(tensors, title)

    def _clipping(self, limit: float) -> str:
        whole = sum(norm(gradient) ** 2 for gradient in self.step.gradients.values()) ** 0.5
        effect = "are not clipped" if whole + 1e-6 <= limit else "are clipped"  # as torch does
        return f"first, the gradients, with norm {grouped(whole)}, {effect}: max_grad_norm = {limit:g}"

    def _updated(self, names: Iterable[str], formulas: Mapping[str, UpdateFormula]) -> None:
        """Write both notations, once for all the parameters that share them, and how far each went."""
        of_formula: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for parameter, formula in formulas.items():
            of_formula.setdefault((formula.operators, formula.calls), []).append(parameter)
        for (operators, calls), parameters in of_formula.items():
            if len(of_formula) > 1:
                more = [f"... ({len(parameters)} parameters)"] if len(parameters) > _NAMED else []
                named = ", ".join([*parameters[:_NAMED], *more])
                self.page.line((named, "dim"), indent=_INDENT)
            for style, lines in (("", operators), ("dim", calls)):
                for line in lines:
                    self.page.wrapped(line, style, indent=_INDENT)
        self.page.blank()
        self.page.table(UPDATES, [self._update_row(name, formulas.get(name)) for name in names])

    def _update_row(self, name: str, formula: UpdateFormula | None) -> Mapping[str, Cell]:
        """Return a parameter, how far it went, and the operations that took it there, if known."""
        update = self.step.updates[name]
        norms = (grouped(norm(each)) for each in (update.before, update.after, update.change))
        return dict(zip(("norm before", "norm after", "norm of change"), norms, strict=True)) | {
            "parameter": name,
            "relative": f"{100 * update.relative_size:.3g}%",
            "by": _operations_text(formula.numbers) if formula else "",
        }

    def _operations(self, phase: str, alone: bool) -> None:
        """List the operations of a phase: a line for each, or a single one in full."""
        places = self._places(phase)
        if not places:
            self.page.line(("no operations", "dim"), indent=_INDENT)
        elif alone:
            for place in places:
                self._operation_in_full(place)
        else:
            self._list(places, has_headings=phase not in ("loss", "other"))

    def _places(self, phase: str) -> list[int]:
        return [i for i, seen in enumerate(self.step.operations) if seen.operation.phase == phase]

    def _list(self, places: Sequence[int], *, has_headings: bool) -> None:
        for place in (-1, *places) if has_headings else places:
            if place >= 0:
                self._write_code(self.step.operations[place].line)
            self.page.line(*self._rows[place + 1], indent=_INDENT)

    def _write_code(self, line: CodeLine | None) -> None:
        """Write the line of code of the next operation, if it is not that of the last one."""
        text = "" if line is None else str(line)
        if self.has_code and text and text != self._code:
            self.page.line((cut(text, self.page.width - _INDENT), "green"), indent=_INDENT)
        self._code = text

    @cached_property
    def _rows(self) -> list[list[Styled]]:
        """A line for the headings, and one for each operation; aligned through the whole page."""
        rows: list[dict[str, Cell]] = []
        for place, (seen, line) in enumerate(zip(self.step.operations, self.lines, strict=True)):
            rows.append({"number": f"#{place}"})
            if seen.operation.phase != "update":
                path = seen.operation.module or ""
                rows[-1] |= {
                    "module": path if len(path) <= _LONGEST_PATH else "…" + path[-_LONGEST_PATH + 1 :],
                    "formula": line.short,
                    "operator": seen.operation.operator,
                }
                rows[-1] |= numbers_of(next(iter(seen.made.values()))) if seen.made else {}
        return list(table_lines(OPERATIONS, rows, self.page.width - _INDENT))

    def _operation_in_full(self, place: int) -> None:
        seen, line, page = self.step.operations[place], self.lines[place], self.page
        self._write_code(seen.line)
        module = f"  module {seen.operation.module}" if seen.operation.module else ""
        origin = f"{module}  {seen.operation.operator}"
        page.line((f"{f'#{place}':<5}", "dim"), (str(line), ""), (origin, "dim"), indent=_INDENT)
        indent = _INDENT + 5
        for name, tensor in seen.results.items():
            several = [(f"{line.made.get(name, name)}  ", "")] if len(seen.results) > 1 else []
            is_unset = (place, "results", name) in self.step.unset
            page.line(*several, *statistics_text(tensor, is_unset=is_unset), indent=indent)
            if self.values and not is_unset:
                write_numbers(page, tensor, indent=indent)

    def _tensors(self, named: Mapping[str, Tensor], title: str = "") -> None:
        write_tensors(self.page, named, title, values=self.values)


def _gradients(of_parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.grad": tensor for name, tensor in of_parameters.items()}


def _operations_text(numbers: tuple[int, ...]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first + 1 == len(numbers):
        return f"#{first} to #{last}"
    return " ".join(f"#{number}" for number in numbers)
