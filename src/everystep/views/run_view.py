"""What runs answer: as text, and as the one plain data that `--json` prints and the page gets."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.errors import named
from everystep.recording.keep import kept_text
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import number_text, shortest
from everystep.views.comparisons import (
    diff_sentence,
    diff_text,
    listed,
    match_text,
    rerun_sentence,
    rerun_text,
    tensors_text,
)
from everystep.views.facts_text import engine_text
from everystep.views.formatting import (
    about_numbers,
    block,
    counted,
    labelled,
    number,
    several,
    shape_text,
)
from everystep.views.lists import summary_data, sweep_text
from everystep.views.plain import DERIVED, plain_data
from everystep.views.terminal import Column, table_text

if TYPE_CHECKING:
    from rich.text import Text

    from everystep.answers.doctor import Diagnosis
    from everystep.answers.measure import Measured
    from everystep.answers.nonfinite import NonFinite
    from everystep.answers.verify import Verification
    from everystep.recording.facts import Facts
    from everystep.replay.opened_step import Step
    from everystep.replay.recorded_columns import Found
    from everystep.replay.what_if import Case, WhatIf

__all__ = ["RunView", "finite_text", "skipped_text", "when_text"]

#: A long answer scrolls. Colours are those of the notebook, and only emphasis is added.
#: Its columns line up whatever a notebook has as the font of its outputs.
_HTML = (
    '<pre style="font-family: monospace; white-space: pre; overflow: auto; max-height: 40em; '
    'line-height: 1.35; background: none">{code}</pre>'
)

#: Rows of a training that are named before the rest is counted.
_ROWS_NAMED = 8


class RunView(NamedTuple):
    """How answers of a run are shown.

    run: None for a diagnosis, which also exists for a run that cannot be opened; step: of rows.
    """

    run: Any
    step: Step | None = None

    def shown(self, answer: Any, **options: Any) -> str | Text:
        """Return an answer as the terminal prints it, some with styles."""
        return _TEXTS[type(answer).__name__](answer, self, **options)

    def line(self, answer: Any) -> str:
        """Return the conclusion of an answer in a line."""
        return _LINES[type(answer).__name__](answer)

    def data(self, answer: Any, **options: Any) -> dict[str, Any]:
        """Return everything in an answer as plain data, under the names that it has in Python."""
        kind = type(answer).__name__
        found: dict[str, Any] = (
            _DATA[kind](answer, self, **options) if kind in _DATA else plain_data(answer)
        )
        return found if self.run is None else {"run": self.run.name} | found

    def html(self, answer: Any) -> str:
        """Return an answer as a notebook shows it: what the terminal prints."""
        shown = self.shown(answer)
        if isinstance(shown, str):
            return _HTML.format(code=escape(shown))
        # Recorded, not printed (in Jupyter, rich would show it as well): it turns its styles into HTML.
        from rich.console import Console  # no command prints HTML

        console = Console(file=io.StringIO(), record=True, color_system="truecolor", force_jupyter=False)
        console.print(shown, soft_wrap=True)
        return console.export_html(inline_styles=True, code_format=_HTML)

    def plot(self, answer: Any, **options: Any) -> Any:
        """Return the plot of a sweep."""
        from everystep.views.plot import sweep_plot

        begun = [case for case in answer.cases if case.run is not None]
        return sweep_plot([case.run for case in begun], [case.settings for case in begun], **options)

    def __reduce__(self) -> tuple[Any, ...]:
        # An answer can be pickled; a run with its opened steps cannot.
        return RunView, (self.run and RecordedRun(self.run.directory), self.step)


def _verify_text(found: Verification, view: RunView) -> str:
    facts = view.run.facts
    numerics = "; ".join(f"{key} {one}, now {two}" for key, (one, two) in found.numerics.items())
    lines = [
        ("recorded", engine_text(facts)),
        ("numerics", numerics and f"recorded with {numerics}"),
        ("replayed", _replayed_text(found, facts)),
        ("losses", _losses_text(found, facts)),
        ("snapshots", _snapshots_text(found)),
        *(("problem", problem) for problem in found.problems),
    ]
    verdict = "replays bit for bit" if found.is_exact else "does not replay bit for bit"
    # The lines about losses and snapshots would only say that all 0 of them are identical.
    if not found.all_steps and found.is_exact:
        return block(lines[:3], f"{view.run.name} has nothing to verify")
    what = f"what {view.run.name} keeps" if facts.not_kept else view.run.name
    return block(lines, f"{what} {verdict}")


def _replayed_text(found: Verification, facts: Facts) -> str:
    if not found.all_steps:
        return "the run has no steps"
    threads = ", ".join(
        f"{counted(steps, 'step')} with {counted(count, 'thread')}"
        for count, steps in sorted(found.threads.items())
    )
    # A loop may keep only some of its steps: the others are not missing.
    missing = _kept(found, facts) - found.steps
    left_out = f"; {missing:,} of {found.all_steps:,} could not be" if missing else ""
    kept = f"; {kept_text(facts, found.all_steps)}" if facts.not_kept else ""
    return (threads or "nothing") + left_out + kept


def _kept(found: Verification, facts: Facts) -> int:
    return sum(last - first + 1 for first, last in facts.kept(found.all_steps))


def _losses_text(found: Verification, facts: Facts) -> str:
    if not facts.has_loss:
        return "not logged; only the states are compared"
    if found.first_loss is None:
        others = found.steps - found.computed_losses
        if not others:
            return f"{_share(found.steps, _kept(found, facts))} bit-identical"
        same = f"{found.computed_losses:,} bit-identical; " if found.computed_losses else ""
        what = "the states, and the numbers that Python read from tensors, are compared"
        return f"{same}no operation computes {'the other' if same else 'any of the'} {others:,}; {what}"
    step, recorded, replayed = found.first_loss
    pair = f"recorded {shortest(recorded)}, replayed {shortest(replayed)}"
    far = _apart(recorded, replayed, found.loss_distance)
    return f"{found.different_steps:,} of {found.steps:,} differ, first at step {step:,}:\n{pair}{far}"


def _share(count: int, whole: int) -> str:
    every = "the only one" if whole == 1 else f"all {whole:,}"
    return every if count == whole else f"{count:,} of {whole:,}"


def _apart(recorded: float, replayed: float, units: int | None) -> str:
    # Imported here, as in all functions below that need torch: the list of runs does without it.
    from everystep.step.state import READABLE

    if not units:
        return ""
    # Millions of units in the last place mean nothing to a reader.
    if units > READABLE:
        return f", {abs(recorded - replayed):.4g} apart" if math.isfinite(recorded - replayed) else ""
    return f", {units:,} units in the last place apart"


def _snapshots_text(found: Verification) -> str:
    if not found.states:
        return f"{_share(found.snapshots, found.all_snapshots)} after state 0 bit-identical"
    states = sorted({each.state for each in found.states})
    # Later states differ in more tensors, as a consequence of the first.
    first = [each for each in found.states if each.state == states[0]]
    text = f"{len(states):,} of {found.snapshots:,} differ, first state {states[0]:,}:\n"
    return text + tensors_text(first)


def _measured_text(found: Measured, view: RunView | None) -> str:
    values = list(found.values.items())
    text = f"{found.name}: no values"
    if values:
        (first, begin), (last, end) = values[0], values[-1]
        # One NaN would be the smallest and the largest of all.
        finite = [value for value in found.values.values() if math.isfinite(value)]
        span = f", from {number(min(finite))} to {number(max(finite))}" if finite else ""
        text = (
            f"{found.name}: {counted(len(values), 'value')}{span}; "
            f"{number(begin)} at step {first:,}, {number(end)} at step {last:,}"
        )
    return f"{text}\n{skipped_text(found.left_out)}" if found.left_out else text


def skipped_text(steps: Sequence[int]) -> str:
    """Return from which steps on a question was not asked, in each span that was replayed, and why."""
    spans = ", ".join(f"{step:,}" for step in steps[:6])
    return (
        f"steps from {spans} on are skipped, because they cannot be replayed, were not kept, or a "
        "replayed loss differs from the recorded one"
    )


def finite_text(run: RecordedRun) -> str:
    """Return that a run has no NaN and no infinity."""
    facts = run.facts
    kept = f"; {kept_text(facts, run.newest_step())}" if facts.not_kept else ""
    return f"all results of all operations are finite{kept}"


def when_text(losses: Mapping[int, float]) -> str:
    """Return steps, one per line, with their losses."""
    return "".join(f"{step}\t{shortest(loss)}\n" for step, loss in losses.items())


def _found_text(found: Found, view: RunView) -> str:
    text = when_text(view.run.losses_at(found.steps)).rstrip("\n") or "no step matches"
    return f"{text}\n{skipped_text(found.inexact)}" if found.inexact else text


def _nonfinite_text(found: NonFinite, view: RunView) -> str:
    from everystep.answers.operations import name_in_words

    infinite = "infinite number" + "s" * (found.infinities > 1)
    # e.g. "2 NaN and 1 infinite number".
    counts = (found.nans, "NaN"), (found.infinities, infinite)
    what = " and ".join(f"{count:,} {kind}" for count, kind in counts if count)
    step, how = found.step.number, _by_own_code(found)
    how = f"; {how}" if how else ""
    if found.operation is None:
        is_of_batch = found.origin == "batch"
        name = f"{found.name} of the batch" if is_of_batch else name_in_words(found.name)
        lines = [f"step {step:,}: {name} has {what}{'' if is_of_batch else ' from the start'}{how}"]
    else:
        operation = found.operation.operation
        module = f" of module {operation.module}" if operation.module else ""
        made = f"made {what}"
        if how:
            made = f"put {what} into {name_in_words(found.name.partition('~')[0])}{how}"
        where = f"step {step:,}, {found.phase}, operation #{found.index}"
        _, inputs = _formula_and_inputs(found)
        lines = [
            f"{where}: {operation.operator}{module} {made}",
            *([] if found.operation.line is None else [f"  {found.operation.line}"]),
            *(f"  from {name}: {_range(tensor)}" for name, tensor in inputs.items()),
        ]
    if found.rows:
        lines.append(f"  {several('row', found.rows)} of {found.step.batch.whole}")
    if found.why is not None:
        from everystep.views.why_text import why_text

        # Without its heading: the step is named in the first line.
        lines.append(why_text(found.why).plain.partition("\n")[2].rstrip())
    return "\n".join(lines)


def _by_own_code(found: NonFinite) -> str:
    """Return when your own code brought it in, empty if it did not."""
    if found.origin == "between":
        return f"changed after step {found.step.number - 1:,}, outside of a step"
    if found.origin != "outside":
        return ""
    when = f"between operations #{found.index - 1} and" if found.index else "before operation"
    return f"your own code gave it to the step {when} #{found.index}"


def _range(tensor: Any) -> str:
    from everystep.replay.opened_step import statistics

    if not tensor.dim():
        return number_text(tensor.item())
    found = statistics(tensor)
    if math.isnan(found.minimum):
        return f"{shape_text(tensor)}, no finite number" if tensor.numel() else shape_text(tensor)
    bad = f", {found.nonfinite:,} not finite" if found.nonfinite else ""
    return f"{shape_text(tensor)}, {number(found.minimum)} to {number(found.maximum)}{bad}"


def _formula_and_inputs(found: NonFinite) -> tuple[str | None, dict[str, Any]]:
    """Return the operation as mathematics, and its inputs by their names there."""
    from everystep.views.mathematics import mathematics

    if found.index is None:
        return None, {}
    line = mathematics(found.step.operations)[found.index]
    inputs = found.step.operations[found.index].inputs
    return str(line), {line.given[name]: tensor for name, tensor in inputs.items()}


def _of_nonfinite(found: NonFinite) -> dict[str, Any]:
    from everystep.replay.opened_step import statistics

    line, inputs = _formula_and_inputs(found)
    return {
        "operation": found.operation,
        "phase": found.phase,
        "mathematics": line,
        "inputs": {
            name: {"shape": list(tensor.shape)} | statistics(tensor)._asdict()
            for name, tensor in inputs.items()
        },
        "by_own_code": _by_own_code(found),
        "rows_of": found.step.batch.whole,
        "why": found.why,
    }


def _diagnosis_text(found: Diagnosis, view: RunView | None = None) -> str:
    findings: list[str] = []
    for each in found.findings:
        findings += [labelled("place", each.place), labelled("problem", each.problem)]
        # Cures are written for any run: `everystep resume RUN`.
        findings += [labelled("cure", each.cure.replace("RUN", found.name)), ""]
    checked = f"{', '.join(found.checked)}, by their digests" if found.checked else ""
    lines = [("readable", "\n".join(found.readable) or "nothing"), ("checked", checked)]
    verdict = f"{found.name} {'is healthy' if found.is_healthy else 'is damaged'}"
    return "\n".join([*findings, block(lines, verdict)])


def _what_if_text(found: WhatIf, view: RunView) -> str:
    """Return the number at the last step, a line for each training, the smallest first."""
    known = found.recorded.value
    is_of_rates = any(case.lr is not None for case in found.cases)
    relabelled = next((case for case in found.cases if case.targets), None)

    def changed(case: Case) -> str:
        if is_of_rates:
            return "as recorded" if case.lr is None else _given_text(case.lr)
        if relabelled is not None:
            texts = [
                f"{row}: {_given_text(one)} | {_given_text(other)}"
                for row, (one, other) in case.targets.items()
            ]
            return named(texts, _ROWS_NAMED) or "as recorded"
        return named(case.rows, _ROWS_NAMED) or "none"

    table = table_text(
        [
            Column("lr" if is_of_rates else "row: target" if relabelled else "rows left out", changed),
            Column(found.by, lambda c: "-" if c.value is None else number(c.value), is_number=True),
            Column("change", lambda case: _change(case, known), is_number=True),
        ],
        [found.recorded, *found.cases],
    )
    title = f"{found.name}, trained again from state {found.at:,}: {found.by} at step {found.until:,}"
    # The earliest of all trainings: up to there, the table is certain for each of them.
    differs = min((c.differs_from for c in found.cases if c.differs_from is not None), default=None)
    notes = [] if is_of_rates else [about_numbers(found.source)]
    if relabelled is not None and not found.source:
        # Rows of a loop have no numbers in a data set: they are named by a batch that had them.
        notes[0] += f" of step {found.at + 1:,}; found in step {named(relabelled.found_in, _ROWS_NAMED)}"
        notes.append("what your code made of the targets outside of torch stays as recorded")
    if is_of_rates and not found.source:
        notes.append(
            "the batches, and the numbers that your code passes to torch, stay as recorded, also where "
            "your code computes them from the parameters or the rate"
        )
    if differs is not None:
        notes.append(
            f"from step {differs:,} on, Python could read different numbers than it did; if your code "
            "uses them, a training of your own differs"
        )
    return "\n".join([title, "", *table, *([""] if notes else []), *notes])


def _given_text(number: float) -> str:
    """Return a number that the user gave as they would write it: 4, 0.001, 1234567."""
    return shortest(number).removesuffix(".0")


def _change(case: Case, known: float | None) -> str:
    if not case.rows and case.lr is None and not case.targets:
        return ""
    if known is None or case.value is None:
        return "-"
    # A sign in front of nan has no meaning.
    return f"{case.value - known:+.4g}".replace("+nan", "nan")


def _found_data(found: Found, view: RunView, most: int | None = None) -> dict[str, Any]:
    losses = view.run.losses_at(found.steps[:most])
    steps = [{"step": step, "loss": plain_data(loss)} for step, loss in losses.items()]
    return {"count": len(found.steps), "steps": steps, "inexact": list(found.inexact)}


def _in(module: str) -> Any:
    """Return a module of the views that imports torch."""
    return import_module(f"everystep.views.{module}")


#: How each answer is written, by the name of its class: importing the classes would import torch.
_TEXTS: dict[str, Callable[..., str | Text]] = {
    "Diagnosis": _diagnosis_text,
    "Difference": lambda found, view: diff_text(found),
    "Found": _found_text,
    "Match": lambda found, view: match_text(found),
    "Measured": _measured_text,
    "NonFinite": _nonfinite_text,
    "Rerun": lambda found, view: rerun_text(found),
    "Rows": lambda found, view, **options: _in("rows_text").rows_text(
        view.step, view.run.facts, name=view.run.name, **options
    ),
    "Step": lambda found, view, **options: _in("step_text").step_text(
        found, view.run.facts, name=view.run.name, **options
    ),
    "Sweep": lambda found, view, **options: sweep_text(found, **options),
    "Verification": _verify_text,
    "WhatIf": _what_if_text,
    "Why": lambda found, view, **options: _in("why_text").why_text(found, name=view.run.name, **options),
}

#: The conclusion in a line, of the answers that have one.
_LINES: dict[str, Callable[..., str]] = {
    "Difference": diff_sentence,
    "Match": lambda found: match_text(found).splitlines()[-1],
    "Measured": lambda found: _measured_text(found, None).replace("\n", "; "),
    "Rerun": rerun_sentence,
    "Sweep": lambda found: sweep_text(found).plain.splitlines()[-1],
}

#: Answers that hold more than their fields and what these derive.
_DATA: dict[str, Callable[..., dict[str, Any]]] = {
    "Found": _found_data,
    "Rows": lambda found, view, **options: _in("rows_text").rows_data(
        view.step, view.run.facts, **options
    ),
    "Step": lambda found, view, **options: _in("step_data").step_data(found, view.run, **options),
}

DERIVED |= {
    **dict.fromkeys(("Group", "Number", "Term", "Why"), lambda part: _in("why_text").derived(part)),
    "Diagnosis": lambda found: {"is_healthy": found.is_healthy},
    "Difference": lambda found: {
        "is_same": found.is_same,
        "asked": listed(found),
        "sentence": diff_sentence(found),
    },
    "Match": lambda found: {"is_match": found.is_match},
    "NonFinite": _of_nonfinite,
    "Rerun": lambda found: {
        "has_same_bits": found.has_same_bits,
        "distance": found.distances,
        "apart": float(found.relative.max()),
        "sentence": rerun_sentence(found),
    },
    "SweepRun": lambda found: {
        "status": found.status,
        "summary": found.summary and summary_data(found.summary),
    },
    "StateDifference": lambda found: {"size": str(found.size)},
    "TensorDifference": lambda found: {"size": str(found.size)},
    "Verification": lambda found: {"is_exact": found.is_exact},
}
