"""The command line: one thin command per public function.

Data goes to stdout, progress and hints to stderr. Exit code 0: fine; 1: the answer is no, or writing
failed; 2: wrong use; 130: Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from everystep.errors import EverystepError, RunError, UsageError, did_you_mean

__all__ = ["app", "main"]

app = typer.Typer(
    name="everystep",
    help="Train a neural network step by step, and keep every step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's directory, or its name in runs/.")
]
RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Runs' directories, or their names in runs/.")
]
PageOption = Annotated[
    Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write (.html).")
]


@app.command()
def train(
    experiment: Annotated[
        str,
        typer.Argument(metavar="EXPERIMENT", help="A TOML file, or the name of a built-in experiment."),
    ] = "two-layer",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Override a value: optimizer.lr=1e-3. Repeatable."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps to take.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="How often to see all rows, instead of steps.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of data, model and batches.")] = None,
    threads: Annotated[int | None, typer.Option(help="How many threads torch computes with.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="program, eager, or auto: by program where it gives the very bits."),
    ] = None,
    fold: Annotated[
        bool | None,
        typer.Option("--fold", help="Fold updates into matrix products: faster, other rounding."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="The run's directory; it must not exist.")
    ] = None,
    snapshot_budget: Annotated[
        int, typer.Option(min=1, metavar="MB", help="Megabytes of snapshots the run may keep.")
    ] = 512,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say only what goes wrong.")] = False,
) -> None:
    """Train an experiment, recording every step.

    In a terminal it shows what is trained and a progress bar; piped, a line of step<TAB>loss for
    each step.
    """
    from everystep import numerics
    from everystep.experiment.specification import load, parse_setting
    from everystep.recording.run import RUNS

    numerics.prepare()
    overrides: dict[str, Any] = dict(parse_setting(text) for text in settings or [])
    shorthands = {"steps": steps, "epochs": epochs, "device": device, "seed": seed, "threads": threads}
    shorthands |= {"engine": engine, "fold": fold}
    overrides |= {key: value for key, value in shorthands.items() if value is not None}
    loaded = load(experiment, overrides)

    from everystep.training.from_experiment import train_experiment
    from everystep.views.terminal import Silent, TerminalProgress, closing

    piped = None if sys.stdout.isatty() else sys.stdout
    progress = Silent() if quiet else TerminalProgress(show_header=True, lines=piped)
    name = Path(experiment).stem
    outcome = train_experiment(loaded, name, run, RUNS, snapshot_budget * 1_000_000, progress)
    if not quiet:
        _hint(closing(outcome.directory, outcome.reason))
    if outcome.reason is not None:
        raise typer.Exit(130 if outcome.interrupted else 1)


@app.command()
def experiments(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The one to print.")] = None,
) -> None:
    """List the built-in experiments, or print one, to be copied and changed."""
    from everystep.experiment.specification import built_in

    known = built_in()
    if name is None:
        width = max(map(len, known))
        for each, path in known.items():
            typer.echo(f"{each:<{width}}  {_first_sentence(path)}")
        _hint("everystep experiments NAME > my.toml; everystep train my.toml")
        return
    if name not in known:
        raise UsageError(f"no built-in experiment {name!r}; {did_you_mean(name, list(known))}")
    typer.echo(known[name].read_text(encoding="utf-8"), nl=False)


@app.command()
def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the runs are.")] = Path(
        "runs"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
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
            _hint(f"everystep: left out: {error}")
    if json:
        typer.echo(runs_json(summaries))
    elif summaries:
        Console(highlight=False).print(runs_table(summaries))
    else:
        _hint(f"{directory} has no runs; everystep train makes the first")


@app.command()
def losses(
    run: RunArgument,
    csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="As a JSON array; nan and inf as strings.")
    ] = False,
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
        _write(output, lambda: frame.write_parquet(output))
        return
    text = losses_text(frame, "csv" if csv else "json" if json else "plain")
    if output is None:
        sys.stdout.write(text)
    else:
        _write(output, lambda: output.write_text(text, encoding="utf-8"))


@app.command()
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
    _write(output, lambda: page.save(output))


@app.command()
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
    _write(output, lambda: save_plot(drawn, output))


@app.command()
def report(run: RunArgument, output: PageOption) -> None:
    """Write everything about a run as one page that needs nothing else."""
    from everystep.api import open

    content = open(run).report()
    _write(output, lambda: output.write_text(content, encoding="utf-8"))


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train a neural network step by step, and keep every step."""
    if show:
        from importlib.metadata import version as version_of

        typer.echo(f"everystep {version_of('everystep')}")
        raise typer.Exit


def main() -> None:
    """Run the command line; what a user did wrong ends in one clear message."""
    try:
        app()
    except EverystepError as error:
        _hint(f"everystep: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def _write(path: Path, write: Any) -> None:
    try:
        write()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
    _hint(f"{path} ({path.stat().st_size / 1000:,.0f} kB)")


def _hint(text: str) -> None:
    typer.echo(text, err=True)


def _first_sentence(path: Path) -> str:
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.removeprefix("#").strip())
    return " ".join(comments).partition(". ")[0].removesuffix(".")
