"""The command that takes the steps of a run elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everystep.cli.arguments import JsonOption, RunArgument
from everystep.cli.output import hint, say, say_written
from everystep.errors import UsageError

__all__ = ["rerun"]


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
        typer.Option("--with", metavar="RUN", help="Lay this run beside, too. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Plot both losses (.png, .svg or .pdf)."),
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Plot on a log axis.")] = False,
    emit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the operation that parts as a script (.py)."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Take the steps of a run elsewhere, and say where they part from the recording, and by how much.

    Elsewhere: under other numerics, in another precision, or by another torch. The programs of the run
    do it, without its code. Exits with 1 if bits differ under other numerics or another torch.
    """
    from everystep.api import open
    from everystep.views.answers import as_json
    from everystep.views.rerun import rerun_data, rerun_text

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
        emit=emit,
    )
    say(as_json(rerun_data(found)) if json else rerun_text(found))
    if output is not None:
        from everystep.views.plot import curves_plot, save_plot

        save_plot(curves_plot(found.curves, log=log), output)
        say_written(output)
    if emit is not None:
        if found.operation is None and found.beyond is None:
            hint("no operation parts, so there is no script to write")
        else:
            say_written(emit)
    if found.place.precision is None and not found.has_same_bits:
        raise typer.Exit(1)
