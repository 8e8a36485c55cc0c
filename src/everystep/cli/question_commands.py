"""Commands that answer a question: they replay or repeat the steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import everystep
from everystep.cli import shared_options as shared
from everystep.cli.output import answer, hint, page_width, quoted, say, say_written
from everystep.errors import UsageError

if TYPE_CHECKING:
    from everystep.answers.why import Why

__all__ = [
    "diff",
    "doctor",
    "first_nonfinite",
    "match",
    "measure",
    "rerun",
    "rows",
    "verify",
    "what_if",
    "when",
    "why",
]


def why(
    run: shared.RunArgument,
    number: shared.StepArgument,
    expression: Annotated[str, typer.Argument(metavar="NUMBER")],
    back: Annotated[int, typer.Option(min=0, metavar="N")] = 0,
    depth: shared.CountOption = 1,
    terms: shared.CountOption = 5,
    json: shared.JsonOption = False,
    rank: shared.RankOption = None,
) -> None:
    """Show where a number of a step comes from.

    Names the operation that computed it, and its inputs. Each of these can be queried in turn. NaN and
    infinity are followed to their origin, with the rows of the batch that they depend on. "=" is shown
    if the formula, computed in double precision from the numbers shown and rounded once, gives the same
    bits.

    Args:
        expression: gradients['0.weight'][3, 5], loss, or #7[3, 5] of operation 7.
        back: Follow the state N steps back.
        depth: Follow the largest numbers N operations deep.
        terms: Terms of a sum to show one by one.
    """
    run = shared.of_rank(run, rank)
    opened = everystep.open(run)
    found = opened.why(number, expression, back=back, depth=depth, terms=terms)
    answer(found, json, opened.problems, text={"width": page_width()})
    if not json:
        _hint_next(run, found)


def rows(
    run: shared.RunArgument,
    number: shared.StepArgument,
    by: Annotated[str | None, typer.Option(metavar="ORDER")] = None,
    parameter: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    first: shared.CountOption = 10,
    json: shared.JsonOption = False,
    rank: shared.RankOption = None,
) -> None:
    """Rank the rows (samples) of a step by loss or gradient.

    The rows are those of its batch, and the gradient is what each adds to it. Exact where the step
    itself adds up rows. If an operation mixes rows, as batch norm does, it is named, and the result is
    unknown. Exits with 1 if the result is unknown.

    Args:
        by: loss or gradient; default: loss, if known.
        parameter: The gradient of this parameter only: 0.weight.
        first: Rows to print.
    """
    from everystep.views.rows_text import orders_of

    opened = everystep.open(shared.of_rank(run, rank))
    found = opened.rows(number)
    # Before anything is printed: it refuses a wrong order or parameter.
    is_known = bool(orders_of(found, by, parameter))
    first_rows = {"first": first}
    answer(found, json, opened.problems, is_yes=is_known, text=first_rows, by=by, parameter=parameter)


def _hint_next(run: str, found: Why) -> None:
    """Name the command that follows the first number which an operation made."""
    # The answer has followed it already.
    if found.causes:
        return
    made = [number for number in found.numbers if number.is_made]
    if made:
        rank = "" if made[0].rank is None else f" --rank {made[0].rank}"
        hint(f"next: everystep why {quoted(run)} {made[0].step} {quoted(made[0].name)}{rank}")
    elif found.origin == "state" and found.number.step > 1:
        hint(f"{found.number.name} is what the step before left; --back 1 follows it there")


def verify(
    run: shared.RunArgument, processes: shared.ProcessesOption = None, json: shared.JsonOption = False
) -> None:
    """Replay every step, and compare it bit for bit.

    Compares every loss and every snapshot. This shows that the replay matches the recording; the line
    `recorded` shows what backs the recording itself. Exits with 1 if something differs.
    """
    found = everystep.open(run).verify(processes=processes)
    answer(found, json, is_yes=found.is_exact)


def doctor(
    run: shared.RunArgument,
    export: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    json: shared.JsonOption = False,
) -> None:
    """Report what is wrong with a run, and what is readable.

    Compares numbers, states, data, programs and batches with their digests; everystep verify replays the
    steps. Exits with 1 if something is wrong. The last column of the CSV shows if the digest of a
    number matches, differs or is missing.

    Args:
        export: Write the numbers that can be read as CSV.
    """
    found = everystep.doctor(run)
    answer(found, json)
    if export is not None:  # after the answer: it fails if the database cannot be opened
        everystep.doctor(run, export=export)
        say_written(export)
    if not found.is_healthy:
        raise typer.Exit(1)


def diff(
    one: shared.RunArgument,
    other: shared.RunArgument,
    thorough: Annotated[bool, typer.Option("--thorough")] = False,
    json: shared.JsonOption = False,
) -> None:
    """Show where two runs differ, down to the operation.

    Compares experiments, losses and states. Exits with 1 if they differ.

    Args:
        thorough: Compare every step, not only those around the first difference.
    """
    found = everystep.open(one).diff(everystep.open(other), thorough=thorough)
    answer(found, json, is_yes=found.is_same)


def match(
    one: shared.RunArgument,
    other: shared.RunArgument,
    step: shared.StepOption = None,
    json: shared.JsonOption = False,
) -> None:
    """Match two trainings that are written differently.

    Searches the other run for the numbers of each tensor of a step, up to rounding, whatever operations
    computed them: to check a backward pass written by hand, for example. Exits with 1 if they differ.

    Args:
        step: Match this step; default: the first that differs.
    """
    found = everystep.open(one).match(everystep.open(other), step)
    answer(found, json, is_yes=found.is_match)


def measure(
    run: shared.RunArgument,
    expression: Annotated[str, typer.Argument(metavar="EXPRESSION")],
    name: str | None = None,
    every: shared.CountOption = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    processes: shared.ProcessesOption = None,
    json: shared.JsonOption = False,
    rank: shared.RankOption = None,
) -> None:
    """Add a measurement to a finished run.

    Its values are those of a measurement made during training. An expression can use loss, step,
    batch.x, batch.y, parameters['0.weight'], buffers[...], gradients[...], activations['1'],
    updates[...], previous.loss (and so on), and measurements by name. Ctrl-C keeps the values measured
    so far; run the same command again to continue.

    Args:
        expression: norm(gradients['0.weight']), for example.
        name: Name of the measurement; default: the expression.
        every: Measure every N steps.
        overwrite: Replace an existing measurement of that name.
    """
    run = shared.of_rank(run, rank)
    opened = everystep.open(run)
    found = opened.measure(expression, name=name, every=every, overwrite=overwrite, processes=processes)
    answer(found, json)
    hint(f"next: everystep plot {quoted(run)} -m {quoted(found.name)}")
    # Values are missing: a script must not take them for all.
    if found.left_out:
        raise typer.Exit(1)


def when(
    run: shared.RunArgument,
    condition: Annotated[str, typer.Argument(metavar="EXPRESSION")],
    last: Annotated[bool, typer.Option("--last")] = False,
    all: Annotated[bool, typer.Option("--all")] = False,
    processes: shared.ProcessesOption = None,
    json: shared.JsonOption = False,
    rank: shared.RankOption = None,
) -> None:
    """Find the first step at which something is true.

    Prints the step and its loss. Exits with 1 if no step matches.

    Args:
        condition: isnan(loss), for example; ranks differ, of several processes that trained together.
        last: Find the last step instead of the first.
        all: Find all steps instead of the first.
    """
    from everystep.views.run_view import skipped_text, when_text

    if last and all:
        raise UsageError("--last and --all are mutually exclusive")
    opened = everystep.open(shared.of_rank(run, rank))
    found = opened.when(condition, "last" if last else "all" if all else "first", processes=processes)
    if found.inexact:
        hint(f"everystep: {skipped_text(found.inexact)}; run everystep verify for details")
    if json:
        answer(found, json)
    else:
        # Two columns for other programs; the reasons for gaps are on stderr.
        say(when_text(opened.losses_at(found.steps)), nl=False)
    if not found.steps:
        hint("no step matches")
        raise typer.Exit(1)


def first_nonfinite(
    run: shared.RunArgument,
    processes: shared.ProcessesOption = None,
    json: shared.JsonOption = False,
    rank: shared.RankOption = None,
) -> None:
    """Find the operation that made the first NaN or infinity.

    Prints its inputs, and the rows of the batch behind them. Exits with 1 if all results are finite.
    """
    from everystep.views.run_view import finite_text

    opened = everystep.open(shared.of_rank(run, rank))
    found = opened.first_nonfinite(processes=processes)
    if found is None:
        say("null" if json else finite_text(opened))
        raise typer.Exit(1)
    answer(found, json)


def rerun(
    run: shared.RunArgument,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N")] = None,
    capability: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    mkl: Annotated[str | None, typer.Option(metavar="BRANCH")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="DTYPE", autocompletion=lambda: ["float64", "bfloat16"])
    ] = None,
    python: Annotated[str | None, typer.Option(metavar="FILE")] = None,
    compare: Annotated[list[str] | None, typer.Option("--compare", metavar="RUN")] = None,
    output: shared.FileOption = None,
    log: Annotated[bool, typer.Option("--log")] = False,
    json: shared.JsonOption = False,
) -> None:
    """Repeat the steps under different numerics, and compare.

    Reports where they diverge, and how far; also in another precision, or with another torch. The
    programs of the run compute the steps, without its code. Exits with 1 if results differ under
    different numerics or another torch.

    Args:
        threads: Number of threads of torch.
        capability: CPU instructions: default, avx2 or avx512.
        mkl: MKL's reproducibility branch: COMPATIBLE, for example.
        precision: Of all floating-point numbers: float64 or bfloat16.
        python: Another interpreter, with its own torch.
        compare: Also plot and compare this run. Repeatable.
        output: Plot both losses (.png, .svg or .pdf).
        log: Plot on a log axis.
    """
    found = everystep.open(run).rerun(
        threads=threads,
        capability=capability,
        mkl=mkl,
        precision=precision,  # type: ignore[arg-type]  # checked with the other settings
        python=python,
        compare=[everystep.open(each) for each in compare or ()],
    )
    answer(found, json)
    if output is not None:
        from everystep.views.plot import curves_plot, save_plot

        save_plot(curves_plot(found.curves, log=log), output)
        say_written(output)
    # In another precision, all results differ: that does not count as a failure.
    if found.place.precision is None and not found.has_same_bits:
        raise typer.Exit(1)


def what_if(
    run: shared.RunArgument,
    at: shared.StepOption = None,
    until: shared.StepOption = None,
    without_rows: shared.RowsOption = None,
    without_rows_of: shared.StepOption = None,
    each: Annotated[bool, typer.Option("--each")] = False,
    lr: Annotated[list[float] | None, typer.Option(metavar="RATE")] = None,
    relabel: shared.RelabelOption = None,
    by: Annotated[str, typer.Option(metavar="EXPRESSION")] = "loss",
    processes: shared.ProcessesOption = None,
    json: shared.JsonOption = False,
) -> None:
    """Train again without rows, at another rate, or relabelled.

    Trains from a step, and ranks the trainings by the resulting loss. Without rows (samples), each has
    the bits of a training by hand without them. At a different learning rate, or with new targets,
    programs repeat the recorded steps of any run. Nothing is recorded; everystep fork records one.

    Args:
        at: Step to start after; default: before --without-rows-of.
        until: Step to compare; default: the last.
        without_rows: Rows (samples) of the data to leave out: 8123,8124.
        without_rows_of: Leave out the rows of the batch of this step.
        each: Leave out each row alone, not all at once.
        lr: A different learning rate, in a separate training. Repeatable.
        relabel: A new target for a row of the data; in your own loop, for a row of the batch of the
            step after --at, and wherever that row appears again. Repeatable.
        by: What to compare: norm(gradients['0.weight']).
    """
    found = everystep.open(run).what_if(
        at,
        until,
        without_rows=shared.row_numbers(without_rows),
        without_rows_of=without_rows_of,
        each=each,
        lr=lr or (),
        relabel=shared.targets(relabel),
        by=by,
        processes=processes,
    )
    answer(found, json)
