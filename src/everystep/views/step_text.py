"""An opened step as a page for the terminal: what happened in it, in the chapter's order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import cast, get_args

from rich.text import Text
from torch import Tensor

from everystep.errors import UsageError, did_you_mean
from everystep.program.operation import CodeLine, Phase
from everystep.recording.facts import Facts
from everystep.recording.texts import loss_text, shortest
from everystep.replay.opened_step import Segment, Step, norm
from everystep.views.batch_text import (
    MOST_VALUES,
    class_names,
    classes_of_tensors,
    classes_text,
    other_values,
    targets,
)
from everystep.views.formatting import cut, dtype_text, grouped, percent
from everystep.views.mathematics import argument_texts, mathematics
from everystep.views.step_data import SegmentSeen, as_it_happened
from everystep.views.tensor_texts import ABSOLUTE, NUMBERS, numbers_of, statistics_text, write_numbers
from everystep.views.terminal import Cell, Column, Page, Styled, keyed, table_lines
from everystep.views.update_formula import UpdateFormula

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

    facts, name: of the run; phase: show only this one, in full; one of `PHASES`; operation: show only
    this one, counted from 0 as in `Step.operations`; values: show the values of the tensors, too; for
    more than 1,000 elements, only the edges; lines: show the line of code above the operations that it
    called; width: columns of the terminal; tables of operations omit what does not fit.

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


# A page in the order of the step; headings are the phases:
#   two-layer-1, step 137 of 500
#   batch       rows 3, 17, 4, ... (64 of 1,000)
#   forward     #0  0  x · 0.weightᵀ + 0.bias  the shape and statistics of the result
#   loss  zero_grad  backward
#   grads       what backward left
#   update      the formula, once for all parameters that share it, then how far each of them went
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
        """Write the page, or one phase of it in full."""
        self._heading(name)
        in_full = phase is not None or self.values
        if phase in (None, "batch"):
            self._batch()
        segments, changed_outside = as_it_happened(self.step, self.training)
        shown = [each for each in segments if phase in (None, each.segment.phase)]
        # A phase that is asked for and has no operations gets its heading, and a line that reports this.
        if not shown and phase in get_args(Phase):
            shown = [SegmentSeen(Segment(cast("Phase", phase), None, 0, -1))]
        phases = [each.segment.phase for each in shown]
        for number, seen in enumerate(shown):
            self._segment(seen, in_full, is_first=phases[number] not in phases[:number])
            # After the last of several: earlier ones leave only a part.
            if phases[number] == "backward" and "backward" not in phases[number + 1 :]:
                self._gradients()
        if phase is None and "backward" not in phases:
            self._gradients()
        if phase is None and changed_outside:
            self.page.heading("changed", "outside the updates")
            self.page.table(UPDATES, [self._update_row(name, None) for name in changed_outside])
        # A footnote, only on pages with a complex tensor.
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
        # Of a data set of digits, the name of class 3 is "3".
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
        if step.batch.rows is not None and step.epoch is not None:
            page.labelled("epoch", f"{step.epoch:,}, counted from 0")

    def _exactness(self) -> str:
        step = self.step
        how = "without your code" if self.training.loop is None else "without your loop code"
        if step.is_exact and not self.training.has_loss:
            return f"{how}; no loss was logged, so only `everystep verify` can check it"
        if step.is_exact and step.places.loss is None:
            return f"{how}; no operation computes the loss, so only `everystep verify` can check it"
        if step.is_exact:
            return f"bit-identical, {how}"
        losses = [shortest(loss) for loss in (step.loss, step.recorded_loss)]
        here = f"replayed loss {losses[0]}, recorded {losses[1]}"
        # A step before this one differs, and this loss happens to agree.
        if losses[0] == losses[1]:
            here = f"this loss matches, but step {step.diverged_at:,} differs"
        if not self.training.has_loss:
            here = f"step {step.diverged_at:,} differs"
        return (
            f"NOT bit-identical, {how}: {here}\nsteps from {step.diverged_at:,} on differ from the "
            "recording"
        )

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

    def _segment(self, seen: SegmentSeen, in_full: bool, *, is_first: bool) -> None:
        """Write a segment: the formulas of an update, or operations. is_first: of its phase."""
        page, (phase, part, first, last) = self.page, seen.segment
        is_own, dropped = self.training.loop is None, _gradients(self.step.dropped)
        title, before = part or "", f"drops the gradients of step {self.step.number - 1:,}"
        if phase == "loss" and is_own:
            title = loss_text(self.training.loss)
        elif phase == "zero_grad" and is_first and (dropped or is_own):
            title = before if dropped else "no gradients to drop yet"
        elif phase == "update":
            title = self._title_of_update(seen)
        page.heading(phase, title)
        if phase == "zero_grad" and is_first and in_full:
            self._tensors(dropped)
        elif phase == "zero_grad" and is_first and dropped:
            norms = [{"gradient": name, "norm": grouped(norm(each))} for name, each in dropped.items()]
            page.table((keyed("gradient"), keyed("norm", is_number=True)), norms)
        if seen.parameters:
            self._updated(seen)
            if not in_full:
                return
            page.blank()
        for place in range(first, last + 1) if in_full else ():
            self._operation_in_full(place)
        # zero_grad may set gradients to None, without an operation.
        if last < first and phase != "zero_grad":
            page.line(("no operations", "dim"), indent=_INDENT)
        elif first <= last and not in_full:
            has_headings = is_first and phase not in ("loss", "other")
            self._list(range(first, last + 1), has_headings=has_headings)
        for title in ("before", "after", "change") if seen.parameters else ():
            page.blank()
            updates = {name: self.step.updates[name] for name in seen.parameters}
            self._tensors({name: getattr(each, title) for name, each in updates.items()}, title)

    def _gradients(self) -> None:
        if self.step.gradients:
            self.page.heading("grads", "as backward left them")
            self._tensors(_gradients(self.step.gradients))

    def _title_of_update(self, seen: SegmentSeen) -> str:
        """Return the optimizer with its settings, first those recorded at each step."""
        name, settings = seen.made or ("", {})
        # As recorded in this step: a scheduler may have changed what the optimizer was made with.
        shown = {key: repr(float(shortest(value))) for key, value in seen.settings.items()}
        shown |= {k: v for k, v in settings.items() if k not in shown}
        texts = [f"{key} = {value}" for key, value in shown.items()]
        return ", ".join(filter(None, [": ".join(filter(None, (seen.segment.part, name))), *texts]))

    def _clipping(self, limit: float) -> str:
        whole = sum(norm(gradient) ** 2 for gradient in self.step.gradients.values()) ** 0.5
        effect = "are not clipped" if whole + 1e-6 <= limit else "are clipped"  # as torch does
        return f"first, the gradients, with norm {grouped(whole)}, {effect}: max_grad_norm = {limit:g}"

    def _updated(self, seen: SegmentSeen) -> None:
        """Write both notations, once for all the parameters that share them, and how far each went."""
        (_, _, first, last), limit = seen.segment, self.training.max_grad_norm
        several = f" to #{last}, {last - first + 1:,} operations" if last > first else ""
        self.page.line((f"#{first}{several}", "dim"), indent=_INDENT)
        if limit is not None:
            self.page.line((self._clipping(limit), ""), indent=_INDENT)
        # Most parameters share one formula, which would be written as often as there are parameters.
        of_formula: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for parameter, formula in seen.formulas.items():
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
        rows = [self._update_row(name, seen.formulas.get(name)) for name in seen.parameters]
        self.page.table(UPDATES, rows)

    def _update_row(self, name: str, formula: UpdateFormula | None) -> Mapping[str, Cell]:
        """Return a parameter, how far it went, and the operations that took it there, if known."""
        update = self.step.updates[name]
        norms = (grouped(norm(each)) for each in (update.before, update.after, update.change))
        return dict(zip(("norm before", "norm after", "norm of change"), norms, strict=True)) | {
            "parameter": name,
            "relative": percent(update.relative_size),
            "by": _operations_text(formula.numbers) if formula else "",
        }

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
        """Write tensors with what their numbers are like; where values are asked for, with these."""
        if not self.values:
            columns = keyed("name", title), keyed("dtype", "", style="dim"), *NUMBERS
            rows = [numbers_of(t) | {"name": name, "dtype": dtype_text(t)} for name, t in named.items()]
            self.page.table(columns, rows)
            return
        for name, tensor in named.items():
            self.page.line((f"{name}  ", "bold"), *statistics_text(tensor), indent=_INDENT)
            write_numbers(self.page, tensor, indent=2 * _INDENT)


def _gradients(of_parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.grad": tensor for name, tensor in of_parameters.items()}


def _operations_text(numbers: tuple[int, ...]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first + 1 == len(numbers):
        return f"#{first} to #{last}"
    return " ".join(f"#{number}" for number in numbers)
