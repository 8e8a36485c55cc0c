"""Commands that show recorded data: as text, page or plot, or in the browser."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import everystep
from everystep.cli import shared_options as shared
from everystep.cli.output import answer, hint, page_width, say, say_written, show, terminal_width
from everystep.errors import RunError, UsageError

if TYPE_CHECKING:
    from everystep.recording.summary import Summary

__all__ = ["losses", "plot", "report", "runs", "step", "table", "view"]


def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY")] = Path("runs"),
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="NAME")] = None,
    json: shared.JsonOption = False,
) -> None:
    """List runs.

    Shows name, status, steps, first and last loss, start time, parent, tags and note, as the width
    allows.

    Args:
        directory: Directory that contains runs.
        tag: Only runs with this tag.
    """
    from everystep.views.lists import runs_text, summary_data
    from everystep.views.plain import as_json

    wanted = {*(tag or ())}
    found = [run for run in _summaries(directory) if wanted <= {*run.tags}]
    if json:
        say(as_json([summary_data(run) for run in found]))
    elif found:
        # Without a terminal, no width limits the table: nothing is left out.
        show(runs_text(found, terminal_width()))
        _say_killed([run.directory for run in found if run.status == "killed"])
    elif wanted:
        hint(f"{directory} has no runs with the tag {' and '.join(sorted(wanted))}")
    else:
        hint(f"{directory} has no runs; everystep train creates the first")


def _summaries(directory: Path) -> list[Summary]:
    """Return all runs that can be read in one line each; hint at damaged ones."""
    from everystep.recording.directories import find_runs
    from everystep.recording.recorded_run import RecordedRun

    found = []
    for path in find_runs(directory):
        try:
            found.append(RecordedRun(path).summary())
        except RunError as error:
            hint(f"everystep: skipped: {error}")
        else:
            if damage := found[-1].damage:
                hint(f"everystep: {damage}")
    return found


#: Runs that the list names below it.
_MOST_KILLED = 3


def _say_killed(directories: list[Path]) -> None:
    """Print when the newest killed runs were killed, and how to continue them."""
    from everystep.recording.recorded_run import RecordedRun
    from everystep.views.facts_text import continue_with, ending

    found = [RecordedRun(directory) for directory in directories]
    for run in sorted(found, key=lambda run: run.last_written)[-_MOST_KILLED:]:
        facts = run.facts
        how = ending(run, facts, "killed", run.newest_step())
        hint(f"{run.name}: {how}; resume with {continue_with(run, facts)}")


def losses(
    run: shared.RunArgument,
    csv: Annotated[bool, typer.Option("--csv")] = False,
    json: shared.JsonOption = False,
    parquet: Annotated[bool, typer.Option("--parquet")] = False,
    last: Annotated[int | None, typer.Option(min=1, metavar="N")] = None,
    output: shared.FileOption = None,
    rank: shared.RankOption = None,
) -> None:
    """Print the loss and the measurements of every step.

    Args:
        csv: Print CSV.
        parquet: Write Parquet; needs --output.
        last: Only the last N steps.
        output: Write to FILE instead of stdout.
    """
    from everystep.views.lists import losses_text
    from everystep.views.output_file import write_file

    if csv + json + parquet > 1:
        raise UsageError("--csv, --json and --parquet are mutually exclusive")
    if parquet and output is None:
        raise UsageError("Parquet is binary; write it to a file: --parquet -o losses.parquet")
    opened = everystep.open(shared.of_rank(run, rank))
    content: str | bytes
    if parquet:
        file = io.BytesIO()  # if polars writes a file itself, a full disk raises its own error
        opened.table_frame(last).write_parquet(file)
        content = file.getvalue()
    elif csv:
        content = opened.table_frame(last).write_csv()
    else:  # without polars: its import takes longer than printing some thousand steps
        content = losses_text(opened.table_columns(last), "json" if json else "plain")
    if output is not None:
        write_file(output, content)
        say_written(output)
    elif isinstance(content, str):
        say(content, nl=False)


def table(
    run: shared.RunArgument,
    output: shared.FileOption = None,
    rows: Annotated[int, typer.Option(min=100, metavar="N")] = 100_000,
    rank: shared.RankOption = None,
) -> None:
    """Write a page with a table of the losses to browse.

    The table can be sorted, searched, copied, and saved as CSV.

    Args:
        output: The page to write (.html); default: RUN-losses.html here.
        rows: Maximum number of rows to embed; a longer run is excerpted.
    """
    from everystep.views.output_file import default_output

    opened = everystep.open(shared.of_rank(run, rank))
    place = output or default_output(f"{opened.name}-losses.html")
    opened.table(rows).save(place)
    say_written(place)


def plot(
    runs: shared.RunsArgument,
    output: shared.FileOption = None,
    log: Annotated[bool, typer.Option("--log")] = False,
    measurements: Annotated[
        list[str] | None,
        typer.Option("--measurement", "-m", metavar="NAME", autocompletion=shared.measurement_names),
    ] = None,
) -> None:
    """Plot the loss of one run or several.

    The loss is drawn at each iteration; several runs share one plot. Of a directory, such as a sweep,
    colors and panels show the settings that differ.

    Args:
        output: The plot to write (.png, .svg, .pdf); default: RUN-loss.png, or loss.png, here.
        log: Use a logarithmic loss axis.
        measurements: Also draw this measurement, such as validation_loss. Repeatable.
    """
    from everystep.recording.directories import directory_of
    from everystep.recording.settings_diff import settings_of
    from everystep.views.output_file import default_output
    from everystep.views.plot import loss_plot, save_plot, sweep_plot

    directory = directory_of(runs[0]) if len(runs) == 1 else None
    if directory is not None and measurements:
        raise UsageError(f"{runs[0]} has many runs, and only their losses are drawn; leave out -m")
    if directory is not None:
        opened = everystep.runs(directory)
        drawn = sweep_plot(opened, [settings_of(run) for run in opened], log)
    else:
        opened = [everystep.open(run) for run in runs]
        drawn = loss_plot(opened, log=log, measurements=measurements or [])
    # Of several runs, no name is better than another: loss.png.
    name = f"{directory.name}-" if directory else f"{opened[0].name}-" * (len(opened) == 1)
    place = output or default_output(f"{name}loss.png")
    save_plot(drawn, place)
    say_written(place)


def report(
    run: shared.RunArgument,
    output: shared.FileOption = None,
    steps: Annotated[list[int] | None, typer.Option("--step", metavar="N")] = None,
    rank: shared.RankOption = None,
) -> None:
    """Write everything about a run as one page.

    Args:
        output: The page to write (.html); default: RUN-report.html here.
        steps: Embed this step; -1: the newest. Repeatable.
    """
    from everystep.views.output_file import default_output, write_file

    opened = everystep.open(shared.of_rank(run, rank))
    place = output or default_output(f"{opened.name}-report.html")
    # Opened steps need torch; a report alone does not.
    if steps:
        from everystep.page.share import shared_report

        content = shared_report(opened, steps)
    else:
        content = opened.report()
    write_file(place, content)
    say_written(place)


def step(
    run: shared.RunArgument,
    number: shared.StepArgument,
    phase: Annotated[
        str | None,
        typer.Option(
            autocompletion=lambda: [
                *("batch", "forward", "loss", "zero_grad", "backward", "update", "other")
            ]
        ),
    ] = None,
    operation: Annotated[int | None, typer.Option("--op", metavar="N")] = None,
    lines: Annotated[bool, typer.Option("--lines")] = False,
    values: Annotated[bool, typer.Option("--values")] = False,
    json: shared.JsonOption = False,
    rank: shared.RankOption = None,
) -> None:
    """Open a step: batch, operations, gradients, updates.

    everystep replays the step from the nearest snapshot, and compares its loss with the recorded one.

    Args:
        phase: Show only this phase: batch, forward, loss, zero_grad, backward, update, other.
        operation: Show only this operation, in full.
        lines: Print the line of your code that called each operation.
        values: Print the values of tensors.
    """
    if phase is not None and operation is not None:
        raise UsageError("--phase and --op are mutually exclusive")
    opened = everystep.open(shared.of_rank(run, rank))
    text = {"phase": phase, "operation": operation, "lines": lines, "width": page_width()}
    answer(opened[number], json, opened.problems, text=text, values=values)


def view(
    what: Annotated[
        str, typer.Argument(metavar="RUN|DIRECTORY", autocompletion=shared.run_names)
    ] = "runs",
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8137,
    browser: Annotated[bool | None, typer.Option("--browser/--no-browser")] = None,
) -> None:
    """Open runs as a local web page.

    Watch a training, walk through its steps, compare, measure, fork. Prints the address, which gives
    access to anyone who has it, and serves until Ctrl-C. New runs appear automatically.

    Args:
        what: Run to open (its directory, or its name in runs/), or a directory of runs.
        host: Address to listen on; any other than the default exposes the page to the network.
        port: Port to listen on; if taken, the next free one.
        browser: Open a browser, or do not; default: only if one is available.
    """
    from everystep.page.server import place_of, serve

    directory, run = place_of(what)
    # The page can be opened before the first training.
    if not directory.exists():
        hint(f"{what}/ does not exist yet; the page shows runs as soon as they start")
    serve(directory, run, host=host, port=port, browser=browser)
