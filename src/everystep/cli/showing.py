"""Commands that show what is recorded: as text, as a page, as a plot, in the browser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from everystep.cli.arguments import JsonOption, PageOption, RunArgument, RunsArgument
from everystep.cli.output import hint, tell, write
from everystep.errors import RunError, UsageError

__all__ = ["losses", "plot", "report", "runs", "step", "table", "view"]


def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the runs are.")] = Path(
        "runs"
    ),
    json: JsonOption = False,
) -> None:
    """List runs: name, status, steps, first and last loss, when."""
    from rich.console import Console

    from everystep.recording.run import RecordedRun, find_runs
    from everystep.views.terminal import runs_json, runs_table

    summaries = []
    for path in find_runs(directory):
        try:
            summaries.append(RecordedRun(path).summary())
        except RunError as error:
            hint(f"everystep: left out: {error}")
    if json:
        typer.echo(runs_json(summaries))
    elif summaries:
        width = None if sys.stdout.isatty() else 200  # whoever reads it cuts lines as they like
        Console(highlight=False, width=width).print(runs_table(summaries))
    else:
        hint(f"{directory} has no runs; everystep train makes the first")


def losses(
    run: RunArgument,
    csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
    json: JsonOption = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="As Parquet; goes into --output.")] = False,
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the last N steps.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write here instead of stdout.")
    ] = None,
) -> None:
    """Print the table of losses, with a column for every measurement."""
    from everystep.api import open
    from everystep.views.terminal import losses_text

    if csv + json + parquet > 1:
        raise UsageError("--csv, --json and --parquet exclude each other; choose one")
    if parquet and output is None:
        raise UsageError("Parquet is no text; say where it goes: --parquet -o losses.parquet")
    frame = open(run).table_frame(last)
    if parquet and output is not None:
        write(output, lambda: frame.write_parquet(output))
        return
    text = losses_text(frame, "csv" if csv else "json" if json else "plain")
    if output is None:
        sys.stdout.write(text)
    else:
        write(output, lambda: output.write_text(text, encoding="utf-8"))


def table(
    run: RunArgument,
    output: PageOption,
    rows: Annotated[
        int, typer.Option(min=1, help="Embed at most so many; of a longer run, an excerpt.")
    ] = 100_000,
) -> None:
    """Write the losses as a page with a table to browse: sort, search, page, copy, CSV."""
    from everystep.api import open

    page = open(run).table(rows)
    write(output, lambda: page.save(output))


def plot(
    runs: RunsArgument,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="The plot to write (.png, .svg, .pdf)."),
    ],
    log: Annotated[bool, typer.Option("--log", help="A logarithmic axis for the loss.")] = False,
    measurements: Annotated[
        list[str] | None,
        typer.Option("--measurement", "-m", metavar="NAME", help="Draw this too: validation_loss."),
    ] = None,
) -> None:
    """Plot the loss at each iteration; several runs are laid over each other."""
    from everystep.api import open
    from everystep.views.plot import loss_plot, save_plot

    drawn = loss_plot([open(run) for run in runs], log=log, measurements=measurements or [])
    write(output, lambda: save_plot(drawn, output))


def report(
    run: RunArgument,
    output: PageOption,
    steps: Annotated[
        list[int] | None,
        typer.Option("--step", metavar="N", help="Open this step inside; -1: the newest. Repeatable."),
    ] = None,
) -> None:
    """Write everything about a run as one page that needs nothing else."""
    from everystep.api import open

    opened = open(run)
    if steps:
        from everystep.page.share import shared_report

        content = shared_report(opened, steps)
    else:
        content = opened.report()
    write(output, lambda: output.write_text(content, encoding="utf-8"))


def step(
    run: RunArgument,
    number: Annotated[
        int, typer.Argument(metavar="STEP", help="Which step: from 1, or from the end: -1.")
    ],
    phase: Annotated[
        str | None,
        typer.Option(help="Only this: batch, forward, loss, zero_grad, backward, update."),
    ] = None,
    operation: Annotated[
        int | None, typer.Option("--op", metavar="N", help="Only this operation, whole.")
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="Print the numbers of tensors.")] = False,
    json: JsonOption = False,
) -> None:
    """Open a step: its batch, each operation with what it gives, gradients and updates.

    The step is taken again from the nearest state on disk, and its loss compared with the recorded one.
    """
    from rich.console import Console

    from everystep.api import open
    from everystep.views.step import step_text
    from everystep.views.step_json import step_json

    if phase is not None and operation is not None:
        raise UsageError("--phase and --op exclude each other; choose one")
    opened = open(run)
    found = opened[number]
    tell(opened.problems)
    if json:
        typer.echo(step_json(found, opened.facts, values=values))
    else:
        console = Console(highlight=False, soft_wrap=True)
        text = step_text(
            found,
            opened.facts,
            name=opened.name,
            phase=phase,
            operation=operation,
            values=values,
            width=max(console.width, 60) if sys.stdout.isatty() else 100,
        )
        console.print(text, end="")


def view(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN|DIRECTORY",
            help="A run (its directory, or its name in runs/) to open at, or a directory of runs.",
        ),
    ] = "runs",
    host: Annotated[
        str, typer.Option(help="Listen here; beyond this machine, the page is open to others.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Listen on this port; if it is taken, on the next.")
    ] = 8137,
    browser: Annotated[
        bool | None,
        typer.Option(
            "--browser/--no-browser", help="Open a browser; otherwise where there is one to be seen."
        ),
    ] = None,
) -> None:
    """Open runs as a local web page: watch a training, walk through its steps, compare, measure, fork.

    Prints the address, which lets in whoever has it, and serves until Ctrl-C. Runs that begin
    meanwhile appear by themselves.
    """
    from everystep.page.server import place_of, serve

    directory, run = place_of(what)
    serve(directory, run, host=host, port=port, browser=browser)
