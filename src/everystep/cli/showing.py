"""Commands that show recorded data: as text, page or plot, or in the browser."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everystep.cli.arguments import JsonOption, PageOption, RunArgument, RunsArgument, StepArgument
from everystep.cli.completing import measurement_names, one_of, operation_numbers, run_names
from everystep.cli.output import answer, hint, say, say_written, tell
from everystep.errors import RunError, UsageError

if TYPE_CHECKING:
    from everystep.recording.summary import Summary

__all__ = ["losses", "plot", "report", "runs", "step", "table", "view"]


def runs(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Directory that contains runs.")
    ] = Path("runs"),
    json: JsonOption = False,
) -> None:
    """List runs: name, status, steps, first and last loss, start time, note."""
    from everystep.views.lists import runs_json

    killed: list[Path] = []
    summaries = _summaries(directory, killed)
    if json:
        for text in runs_json(summaries):
            say(text, nl=False)
    elif _print_runs(summaries):
        _say_killed(killed)
    else:
        hint(f"{directory} has no runs; everystep train creates the first")


def _summaries(directory: Path, killed: list[Path]) -> Iterator[Summary]:
    """Yield all runs in one line each, as they are read; hint at damaged ones, and note killed ones."""
    from everystep.recording.directories import find_runs
    from everystep.recording.run import RecordedRun

    for path in find_runs(directory):
        try:
            summary = RecordedRun(path, may_be_cut=True).summary()
        except RunError as error:
            hint(f"everystep: skipped: {error}")
            continue
        if summary.damage is not None:
            hint(f"everystep: {summary.damage}")
        if summary.status == "killed":
            killed.append(path)
        yield summary


def _print_runs(summaries: Iterator[Summary]) -> bool:
    """Print the table of runs as they are read; return whether there are any."""
    from everystep.views.lists import runs_tables
    from everystep.views.tables import SafeConsole

    is_terminal = sys.stdout.isatty()
    # The reader of a pipe cuts lines.
    console = SafeConsole(highlight=False, width=None if is_terminal else 1000)
    has_some = False
    for table in runs_tables(summaries, console.width if is_terminal else None):
        console.print(table)
        sys.stdout.flush()
        has_some = True
    return has_some


#: Runs that the list names below it.
_MOST_KILLED = 3


def _say_killed(directories: list[Path]) -> None:
    """Say when the newest killed runs were killed, and how to go on with them."""
    from everystep.recording.run import RecordedRun
    from everystep.views.facts import ending, going_on

    found = [RecordedRun(directory, may_be_cut=True) for directory in directories]
    for run in sorted(found, key=lambda run: run.last_written)[-_MOST_KILLED:]:
        facts = run.facts
        how = ending(run, facts, "killed", run.newest_step())
        hint(f"{run.name}: {how}; resume with {going_on(run, facts)}")


def losses(
    run: RunArgument,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    json: JsonOption = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write Parquet; needs --output.")] = False,
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the last N steps.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write to FILE instead of stdout."),
    ] = None,
) -> None:
    """Print the table of losses, with a column for each measurement."""
    from everystep.api import open
    from everystep.views.lists import losses_text
    from everystep.views.output_file import write_file

    if csv + json + parquet > 1:
        raise UsageError("--csv, --json and --parquet are mutually exclusive")
    if parquet and output is None:
        raise UsageError("Parquet is binary; write it to a file: --parquet -o losses.parquet")
    opened = open(run)
    if parquet and output is not None:
        content = io.BytesIO()  # where polars writes a file itself, a full disk is an error of its own
        opened.table_frame(last).write_parquet(content)
        write_file(output, content.getvalue())
        say_written(output)
        return
    # Without polars: its import takes longer than printing some thousand steps.
    text = (
        opened.table_frame(last).write_csv()
        if csv
        else losses_text(opened.table_columns(last), "json" if json else "plain")
    )
    if output is None:
        say(text, nl=False)
    else:
        write_file(output, text)
        say_written(output)


def table(
    run: RunArgument,
    output: PageOption,
    rows: Annotated[
        int, typer.Option(min=1, help="Maximum number of rows to embed; a longer run is excerpted.")
    ] = 100_000,
) -> None:
    """Write the losses as a page with a browsable table: sort, search, page, copy, CSV."""
    from everystep.api import open

    page = open(run).table(rows)
    page.save(output)
    say_written(output)


def plot(
    runs: RunsArgument,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="The plot to write (.png, .svg, .pdf)."),
    ],
    log: Annotated[bool, typer.Option("--log", help="Use a logarithmic loss axis.")] = False,
    measurements: Annotated[
        list[str] | None,
        typer.Option(
            "--measurement",
            "-m",
            metavar="NAME",
            help="Also draw this measurement, such as validation_loss. Repeatable.",
            autocompletion=measurement_names,
        ),
    ] = None,
) -> None:
    """Plot the loss at each iteration; several runs share one plot."""
    from everystep.api import open
    from everystep.views.plot import loss_plot, save_plot

    drawn = loss_plot([open(run) for run in runs], log=log, measurements=measurements or [])
    save_plot(drawn, output)
    say_written(output)


def report(
    run: RunArgument,
    output: PageOption,
    steps: Annotated[
        list[int] | None,
        typer.Option("--step", metavar="N", help="Embed this step; -1: the newest. Repeatable."),
    ] = None,
) -> None:
    """Write everything about a run as one self-contained page."""
    from everystep.api import open
    from everystep.views.output_file import write_file

    opened = open(run)
    if steps:
        from everystep.page.share import shared_report

        content = shared_report(opened, steps)
    else:
        content = opened.report()
    write_file(output, content)
    say_written(output)


def step(
    run: RunArgument,
    number: StepArgument,
    phase: Annotated[
        str | None,
        typer.Option(
            help="Show only this phase: batch, forward, loss, zero_grad, backward, update.",
            autocompletion=one_of(
                "batch", "forward", "loss", "zero_grad", "backward", "update", "other"
            ),
        ),
    ] = None,
    operation: Annotated[
        int | None,
        typer.Option(
            "--op",
            metavar="N",
            help="Show only this operation, in full.",
            autocompletion=operation_numbers,
        ),
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="Print the values of tensors.")] = False,
    json: JsonOption = False,
) -> None:
    """Open a step: its batch, each operation with its results, gradients and updates.

    everystep replays the step from the nearest snapshot, and compares its loss with the recorded one.
    """
    from everystep.api import open
    from everystep.views.step import step_text
    from everystep.views.tables import SafeConsole

    if phase is not None and operation is not None:
        raise UsageError("--phase and --op are mutually exclusive")
    opened = open(run)
    found = opened[number]
    tell(opened.problems)
    if json:
        answer(found, json, values=values)
    else:
        console = SafeConsole(highlight=False, soft_wrap=True)
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
            help="Run to open (its directory, or its name in runs/), or a directory of runs.",
            autocompletion=run_names,
        ),
    ] = "runs",
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; any other than the default exposes the page to the network."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port to listen on; if taken, the next free one.")
    ] = 8137,
    browser: Annotated[
        bool | None,
        typer.Option(
            "--browser/--no-browser",
            help="Open a browser, or do not; default: only if one is available.",
        ),
    ] = None,
) -> None:
    """Open runs as a local web page: watch a training, walk through its steps, compare, measure, fork.

    Prints the address, which gives access to anyone who has it, and serves until Ctrl-C. New runs appear
    automatically.
    """
    from everystep.page.server import place_of, serve

    directory, run = place_of(what)
    if not directory.exists():
        hint(f"{what}/ does not exist yet; the page shows runs as soon as they start")
    serve(directory, run, host=host, port=port, browser=browser)
