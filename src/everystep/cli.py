"""The command line: one thin command per public function.

Data goes to stdout, progress and hints to stderr. Exit code 0: fine; 1: the answer is no, or writing
failed; 2: wrong use; 130: Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
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
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a value: optimizer.lr=1e-3. Repeatable."),
]
BudgetOption = Annotated[
    int, typer.Option(min=1, metavar="MB", help="Megabytes of snapshots the run may keep.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what goes wrong.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; nan and inf as strings.")]
ProcessesOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Replay in N processes instead of one for each core."),
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
    settings: SettingsOption = None,
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
    snapshot_budget: BudgetOption = 512,
    quiet: QuietOption = False,
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
    from everystep.views.progress import Silent, TerminalProgress
    from everystep.views.terminal import closing

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
            _hint(f"everystep: left out: {error}")
    if json:
        typer.echo(runs_json(summaries))
    elif summaries:
        width = None if sys.stdout.isatty() else 200  # whoever reads it cuts lines as they like
        Console(highlight=False, width=width).print(runs_table(summaries))
    else:
        _hint(f"{directory} has no runs; everystep train makes the first")


@app.command()
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
    _write(output, lambda: output.write_text(content, encoding="utf-8"))


@app.command(context_settings={"ignore_unknown_options": True})  # -1 is a step
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
    _tell(opened.problems)
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


@app.command()
def verify(run: RunArgument, processes: ProcessesOption = None, json: JsonOption = False) -> None:
    """Take every step again, and compare every loss and every snapshot, bit for bit.

    This shows that the run replays as it was recorded; the line `recorded` says what stands behind the
    recording itself. Exits with 1 if something differs.
    """
    from everystep.api import open
    from everystep.views.answers import as_json, verify_data, verify_text

    opened = open(run)
    found = opened.verify(processes=processes)
    if json:
        typer.echo(as_json(verify_data(opened.name, found)))
    else:
        typer.echo(verify_text(opened.name, opened.facts, found))
    if not found.is_exact:
        raise typer.Exit(1)


@app.command()
def diff(
    one: RunArgument,
    other: RunArgument,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Go through every step, not only where they part.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show where two runs part: experiments, losses, states, down to the first operation.

    Exits with 1 if they differ.
    """
    from everystep.api import open
    from everystep.views.answers import as_json
    from everystep.views.difference import diff_data, diff_text

    found = open(one).diff(open(other), thorough=thorough)
    typer.echo(as_json(diff_data(found)) if json else diff_text(found))
    if not found.is_same:
        raise typer.Exit(1)


@app.command()
def fork(
    run: RunArgument,
    at: Annotated[
        int, typer.Option("--at", metavar="STEP", help="The last step that is the parent's; 0: none.")
    ],
    settings: SettingsOption = None,
    steps: Annotated[
        int | None, typer.Option(help="The last step, counted from the parent's 1.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="The fork's directory; must not exist.")
    ] = None,
    snapshot_budget: BudgetOption = 512,
    quiet: QuietOption = False,
) -> None:
    """Train a run that is its parent's up to a step, and goes on by other rules from there."""
    from everystep import numerics
    from everystep.experiment.specification import parse_setting
    from everystep.views.terminal import closing

    numerics.prepare()
    from everystep.api import open

    changes: dict[str, Any] = dict(parse_setting(text) for text in settings or [])
    made = open(run).fork(
        at,
        changes,
        steps=steps,
        directory=directory,
        snapshot_budget=snapshot_budget * 1_000_000,
        progress=not quiet,
    )
    if not quiet:
        _hint(closing(made.directory, made.facts.reason))
    if made.status != "finished":
        raise typer.Exit(1)


@app.command()
def measure(
    run: RunArgument,
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help="norm(gradients['0.weight']), for example.")
    ],
    name: Annotated[
        str | None, typer.Option(help="The measurement's name; otherwise the expression.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Measure every N steps.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take the place of an earlier one of that name.")
    ] = False,
    processes: ProcessesOption = None,
) -> None:
    """Add a measurement to a finished run, as if it had been made while it was trained.

    An expression is of loss, step, batch.x, batch.y, parameters['0.weight'], buffers[...],
    gradients[...], activations['1'], updates[...], previous.loss (and so on), and measurements by name.
    Ctrl-C keeps what is done; the same command goes on from there.
    """
    from everystep.api import open
    from everystep.views.answers import measured_text

    opened = open(run)
    try:
        found = opened.measure(
            expression, name=name, every=every, overwrite=overwrite, processes=processes
        )
    except KeyboardInterrupt:
        count = len(opened.measured(name or expression))
        _hint(f"stopped; {count:,} values are kept, and the same command goes on from there")
        raise
    typer.echo(measured_text(found))
    _hint(f"everystep plot {run} -m {shlex.quote(found.name)} -o measured.png")
    if found.left_out:
        raise typer.Exit(1)


@app.command()
def when(
    run: RunArgument,
    condition: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help="isnan(loss), for example; or nonfinite.")
    ],
    last: Annotated[bool, typer.Option("--last", help="The last step instead of the first.")] = False,
    all: Annotated[bool, typer.Option("--all", help="All steps instead of the first.")] = False,
    processes: ProcessesOption = None,
    json: JsonOption = False,
) -> None:
    """Find the first step at which an expression is true; print the step and its loss.

    `nonfinite` finds the operation that made the first NaN or infinity. Exits with 1 if there is none.
    """
    from everystep.api import open
    from everystep.views.answers import as_json, nonfinite_data, nonfinite_text, when_text

    if last and all:
        raise UsageError("--last and --all exclude each other; choose one")
    opened = open(run)
    if condition.strip() == "nonfinite":
        made = opened.first_nonfinite(processes=processes)
        typer.echo(as_json(nonfinite_data(made)) if json else nonfinite_text(made))
        if made is None:
            raise typer.Exit(1)
        return
    found = opened.when(condition, "last" if last else "all" if all else "first", processes=processes)
    if found.inexact:
        steps = ", ".join(map(str, found.inexact))
        _hint(
            "everystep: left out, because a replayed loss was not the recorded one, from step "
            f"{steps} on; everystep verify says more"
        )
    losses = opened.losses_at(found.steps)
    if json:
        steps_data = [{"step": step, "loss": loss} for step, loss in losses.items()]
        typer.echo(as_json({"steps": steps_data, "left_out_from": list(found.inexact)}))
    else:
        typer.echo(when_text(found, losses), nl=False)
    if not found.steps:
        _hint("no step")
        raise typer.Exit(1)


@app.command()
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


def _tell(problems: list[str]) -> None:
    for problem in problems:
        _hint(f"everystep: {problem}")


def _hint(text: str) -> None:
    typer.echo(text, err=True)


def _first_sentence(path: Path) -> str:
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.removeprefix("#").strip())
    return " ".join(comments).partition(". ")[0].removesuffix(".")
