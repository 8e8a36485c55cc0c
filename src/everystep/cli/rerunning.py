"""Commands that take the steps of a run once more: elsewhere, or without some rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everystep.cli.arguments import JsonOption, ProcessesOption, RunArgument, row_numbers
from everystep.cli.output import answer, say_written
from everystep.errors import UsageError

__all__ = ["rerun", "whatif"]


def rerun(
    run: RunArgument,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of threads of torch.")
    ] = None,
    capability: Annotated[
        str | None, typer.Option(metavar="NAME", help="CPU instructions: default, avx2 or avx512.")
    ] = None,
    mkl: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="MKL's reproducibility branch: COMPATIBLE, for example."),
    ] = None,
    float64: Annotated[bool, typer.Option("--float64", help="All numbers in double precision.")] = False,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="All numbers in bfloat16.")] = False,
    python: Annotated[
        str | None, typer.Option(metavar="FILE", help="Another interpreter, with a torch of its own.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="RUN", help="Also plot and compare this run. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Plot both losses (.png, .svg or .pdf)."),
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Plot on a log axis.")] = False,
    json: JsonOption = False,
) -> None:
    """Repeat the steps of a run under different numerics, and report where they diverge, and how far.

    Also in another precision, or with another torch. The programs of the run compute the steps, without
    its code. Exits with 1 if results differ under different numerics or another torch.
    """
    from everystep.api import open

    if float64 and bfloat16:
        raise UsageError("--float64 and --bfloat16 are mutually exclusive")
    opened = open(run)
    found = opened.rerun(
        threads=threads,
        capability=capability,
        mkl=mkl,
        precision="float64" if float64 else "bfloat16" if bfloat16 else None,
        python=python,
        beside=[open(each) for each in beside or ()],
    )
    answer(found, json)
    if output is not None:
        from everystep.views.plot import curves_plot, save_plot

        save_plot(curves_plot(found.curves, log=log), output)
        say_written(output)
    if found.place.precision is None and not found.has_same_bits:
        raise typer.Exit(1)


def whatif(
    run: RunArgument,
    at: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="Step to start after; default: before --without-rows-of."),
    ] = None,
    until: Annotated[
        int | None, typer.Option(metavar="STEP", help="Step to compare; default: the last.")
    ] = None,
    without_rows: Annotated[
        str | None, typer.Option(metavar="ROWS", help="Rows of the data to leave out: 8123,8124.")
    ] = None,
    without_rows_of: Annotated[
        int | None, typer.Option(metavar="STEP", help="Leave out the rows of the batch of this step.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Leave out each row alone, not all at once.")
    ] = False,
    by: Annotated[
        str, typer.Option(metavar="EXPRESSION", help="What to compare: norm(gradients['0.weight']).")
    ] = "loss",
    processes: ProcessesOption = None,
    json: JsonOption = False,
) -> None:
    """Train again from a step without some rows, and rank them by what the loss becomes.

    These are exact trainings: each has the bits of a training by hand without those rows. Nothing is
    recorded; everystep fork --without-rows records one.
    """
    from everystep.api import open
    from everystep.replay.what_if import check_has_rows

    opened = open(run)
    check_has_rows(opened)
    if without_rows is None and without_rows_of is None:
        raise UsageError(
            "no rows to leave out: add --without-rows 8123,8124, or --without-rows-of STEP; "
            f"everystep rows {run} STEP ranks those of a step"
        )
    if at is None and without_rows_of is None:
        raise UsageError("no start: add --at STEP, the step after which the trainings start")
    found = opened.what_if(
        at,
        until,
        without_rows=row_numbers(without_rows),
        without_rows_of=without_rows_of,
        each=each,
        by=by,
        processes=processes,
    )
    answer(found, json)
