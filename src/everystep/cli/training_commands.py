"""Commands that create runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import everystep
from everystep.cli import shared_options as shared
from everystep.cli.output import answer, hint, say, say_lines, terminal_width
from everystep.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from everystep.run import Run
    from everystep.training.job import Progress

__all__ = ["experiments", "fork", "resume", "sweep", "train"]


def train(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", autocompletion=shared.experiments_and_files)
    ] = "two-layer",
    settings: shared.SettingsOption = None,
    steps: int | None = None,
    epochs: int | None = None,
    device: Annotated[
        str | None, typer.Option(autocompletion=lambda: ["cpu", "cuda", "mps", "xpu", "auto"])
    ] = None,
    seed: int | None = None,
    threads: int | None = None,
    engine: Annotated[
        str | None, typer.Option(autocompletion=lambda: ["auto", "program", "eager"])
    ] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="RUN")] = None,
    resume_run: Annotated[bool, typer.Option("--resume")] = False,
    tag: Annotated[list[str] | None, typer.Option(metavar="NAME")] = None,
    snapshot_budget: shared.BudgetOption = 512,
    quiet: shared.QuietOption = False,
) -> None:
    """Train an experiment, and record every step.

    In a terminal, it shows the experiment and a progress bar; if stdout is piped, it prints a line
    step<TAB>loss for each step.

    Args:
        experiment: TOML file, or name of a built-in experiment.
        steps: Number of steps.
        epochs: Number of passes over all rows, instead of steps.
        device: cpu, cuda, cuda:1, mps, xpu, or auto.
        seed: Seed of data, model and batches.
        threads: Number of threads that torch uses.
        engine: eager: Python runs every step; auto: programs run the steps if all code is torch's;
            program: the same, and you vouch for your own code.
        run: The new run: a name in runs/, or a path. It must not exist, except with --resume.
            Default: EXPERIMENT-1, EXPERIMENT-2, ...
        resume_run: Resume the run that --run names if it exists.
        tag: A word by which everystep runs --tag finds the run. Repeatable.
    """
    from everystep import numerics
    from everystep.experiment.specification import parse_setting

    if steps is not None and epochs is not None:
        raise UsageError("--steps and --epochs are mutually exclusive")
    if resume_run and run is None:
        raise UsageError("--resume needs the run: --run NAME")
    numerics.prepare()  # before torch is imported, whose libraries read the settings once
    overrides: dict[str, Any] = dict(parse_setting(text) for text in settings or [])
    shorthands = {"steps": steps, "epochs": epochs, "device": device, "seed": seed, "threads": threads}
    shorthands |= {"engine": engine}
    # An option wins over --set; one that was not typed keeps the experiment's value.
    overrides |= {key: value for key, value in shorthands.items() if value is not None}
    asked = {"run": run, "resume": resume_run, "tags": tag or ()}
    _train(quiet, snapshot_budget, everystep.train_experiment, experiment, overrides, **asked)


def sweep(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", autocompletion=shared.experiments_and_files)
    ],
    settings: Annotated[list[str], typer.Option("--set", metavar="PATH=VALUE,VALUE")],
    processes: Annotated[int | None, typer.Option(min=1, metavar="N")] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="DIRECTORY")] = None,
    resume_runs: Annotated[bool, typer.Option("--resume")] = False,
    ray: Annotated[bool, typer.Option("--ray")] = False,
    force: Annotated[bool, typer.Option("--force")] = False,
    snapshot_budget: shared.BudgetOption = 512,
    quiet: shared.QuietOption = False,
    json: shared.JsonOption = False,
) -> None:
    """Train an experiment with many settings, side by side.

    Trains a run for every combination of the values, all in one directory. A run that fails does not
    stop the others. Prints a table, the best run first.

    Args:
        experiment: TOML file, or name of a built-in experiment.
        settings: Values of a setting: optimizer.lr=1e-4,1e-3 or seed=0..7. Repeatable.
        processes: Number of trainings at a time; default: one per core.
        run: The directory of the runs: a name in runs/, or a path; default: EXPERIMENT-sweep-1, ...
        resume_runs: Continue the sweep that --run names; finished runs stay as they are.
        ray: Let Ray run the trainings, on all machines of its cluster.
        force: Train more than 1,000 runs.
    """
    from everystep.experiment.grid import parse_values

    found = everystep.sweep(
        experiment,
        parse_values(settings),
        run=run,
        resume=resume_runs,
        processes=processes,
        ray=ray,
        force=force,
        snapshot_budget=snapshot_budget * 1_000_000,
        progress=not quiet,
    )
    answer(found, json, is_yes=found.is_finished, text={"width": terminal_width()})


def resume(
    run: shared.RunArgument,
    steps: int | None = None,
    force: Annotated[bool, typer.Option("--force")] = False,
    snapshot_budget: shared.BudgetOption = 512,
    quiet: shared.QuietOption = False,
) -> None:
    """Continue a training that was killed or stopped.

    With as many processes as before, it is bit-identical to one that was not interrupted.

    Args:
        steps: Last step, to train further; default: that of the run.
        force: Resume although versions, data or numerics changed; discards the recorded steps after the
            newest snapshot.
    """
    from everystep.recording.directories import find_run
    from everystep.recording.recorded_run import RecordedRun

    place = find_run(run)
    trained = RecordedRun(place).facts.trained
    if trained is not None:
        # Read when torch is imported: the bits depend on it.
        os.environ.update(trained.numerics.environment())

    from everystep.run import Run

    _train(quiet, snapshot_budget, Run(place).resume, steps, force=force)


def experiments(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", autocompletion=shared.experiment_names)
    ] = None,
) -> None:
    """List the built-in experiments, or print one to copy.

    Args:
        name: The experiment to print.
    """
    from everystep.experiment.specification import built_in
    from everystep.views.terminal import keyed, table_text

    known = built_in()
    if name is None:
        rows = [{"name": each, "about": _first_sentence(path)} for each, path in known.items()]
        say("\n".join(table_text([keyed("name", ""), keyed("about", "")], rows)))
        hint("next: everystep experiments NAME > my.toml; everystep train my.toml")
        return
    if name not in known:
        raise UsageError(f"no built-in experiment {name!r}; {did_you_mean(name, list(known))}")
    say(known[name].read_text(encoding="utf-8"), nl=False)


def fork(
    run: shared.RunArgument,
    at: Annotated[int, typer.Option("--at", metavar="STEP")],
    settings: shared.SettingsOption = None,
    steps: Annotated[int | None, typer.Option("--steps", "--until")] = None,
    without_rows: shared.RowsOption = None,
    relabel: shared.RelabelOption = None,
    directory: Annotated[str | None, typer.Option("--run", metavar="RUN")] = None,
    snapshot_budget: shared.BudgetOption = 512,
    quiet: shared.QuietOption = False,
) -> None:
    """Continue a run from any step, with changes.

    The fork is a new run, which equals its parent up to that step.

    Args:
        at: Last step to keep from the parent; 0: none.
        steps: Last step of the fork, counted from the parent's step 1.
        without_rows: Rows (samples) to leave out of their batches: 8123,8124.
        relabel: A new target for a row of the data; in your own loop, for a row of the batch of the
            step after --at, and wherever that row appears again. Repeatable.
        directory: The fork: a name in runs/, or a path. It must not exist. Default: RUN-fork-1, ...
    """
    from everystep import numerics
    from everystep.experiment.specification import parse_setting

    numerics.prepare()
    asked = {
        "steps": steps,
        "without_rows": shared.row_numbers(without_rows),
        "relabel": shared.targets(relabel),
        "run": directory,
        "progress": not quiet,
    }
    changed = dict(parse_setting(text) for text in settings or [])
    _train(quiet, snapshot_budget, everystep.open(run).fork, at, changed, **asked)


def _train(quiet: bool, budget: int, train: Callable[..., Run], *given: Any, **named: Any) -> None:
    """Train, then print how that ended, and what to type next.

    budget: of snapshots, in MB; train: is called with all others, and with what watches it.
    """
    from everystep.run import StoppedByUser
    from everystep.views.facts_text import closing

    with _processes(quiet) as (progress, quiet):
        watched, code = {"snapshot_budget": 1_000_000 * budget, "progress": progress}, 1
        try:
            run = train(*given, **watched | named)
        except StoppedByUser as stopped:
            # Ctrl-C: what was recorded is a run like others, and the message tells how to continue.
            run, code = everystep.open(stopped.directory), 130
    if not quiet:
        hint(closing(run.directory))
    if run.status != "finished":
        raise typer.Exit(code)


@contextmanager
def _processes(quiet: bool) -> Iterator[tuple[Progress, bool]]:
    """Join the processes that torchrun has started with this one, if any.

    Yields the progress, and whether to be quiet: the first process alone prints. A pipe gets lines.
    """
    from everystep.training.job import Progress
    from everystep.views.progress import Silent, TerminalProgress

    # In a terminal, the bar shows the loss.
    piped = None if sys.stdout.isatty() else say_lines
    progress = Silent() if quiet else TerminalProgress(show_header=True, lines=piped)
    # torchrun sets both variables.
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield progress, quiet
        return
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        yield (Progress(), True) if distributed.get_rank() else (progress, quiet)
    finally:
        distributed.destroy_process_group()


def _first_sentence(path: Path) -> str:
    comments = takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in comments)
    return text.partition(". ")[0].removesuffix(".")
