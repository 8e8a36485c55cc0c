"""The command line: one thin command per public function.

Data goes to stdout, progress and hints to stderr. Exit code 0: success; 1: the answer is no, or writing
failed, or that the run is damaged; 2: invalid use; 130: Ctrl-C; 141: the reader of stdout left before it
had all.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from everystep.cli.asking import diff, doctor, measure, rerun, rows, verify, whatif, when, why
from everystep.cli.commands import Commands
from everystep.cli.making import experiments, fork, resume, train
from everystep.cli.output import (
    OutputError,
    damage_on_stderr,
    drop_output,
    hint,
    prepare_streams,
    shortened,
)
from everystep.cli.showing import losses, plot, report, runs, step, table, view
from everystep.errors import EverystepError

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    name="everystep",
    help="Train a neural network step by step, and keep every step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
#: What a command does, in a line of the list of commands on 80 columns.
for command, line in (
    (train, "Train an experiment, and record every step."),
    (resume, "Continue a training that was killed or stopped."),
    (experiments, "List the built-in experiments, or print one to copy."),
    (runs, "List runs."),
    (losses, "Print the loss and the measurements of every step."),
    (table, "Write a page with a table of the losses to browse."),
    (plot, "Plot the loss of one run or several."),
    (report, "Write everything about a run as one page."),
    (step, "Open a step: batch, operations, gradients, updates."),
    (verify, "Replay every step, and compare it bit for bit."),
    (doctor, "Report what is wrong with a run, and what is readable."),
    (diff, "Show where two runs differ, down to the operation."),
    (rerun, "Repeat the steps under different numerics, and compare."),
    (fork, "Continue a run from any step, with changes."),
    (whatif, "Train again without some rows, and rank them."),
    (measure, "Add a measurement to a finished run."),
    (when, "Find the first step at which something is true."),
    (why, "Show where a number of a step comes from."),
    (rows, "Rank the rows of a step by loss or gradient."),
    (view, "Open runs as a local web page."),
):
    # -1 is a step, not an option.
    settings = {"ignore_unknown_options": True} if command in (step, why, rows) else {}
    app.command(short_help=line, context_settings=settings)(command)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train a neural network step by step, and keep every step."""
    if show:
        from importlib.metadata import version as version_of

        typer.echo(f"everystep {version_of('everystep')}")
        raise typer.Exit


#: What the system answers where a name that was typed leads to nothing that can be opened.
_OF_NAMES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EINVAL),
}


def main() -> None:
    """Run the command line; report a user's mistake in one clear message."""
    prepare_streams()
    try:
        with damage_on_stderr() as is_damaged:
            try:
                app()
            except SystemExit as end:
                if end.code or not is_damaged():
                    raise
                sys.exit(1)
            finally:
                sys.stdout.flush()
    except OutputError as error:
        drop_output(error)
        sys.exit(error.exit_code)
    except EverystepError as error:
        hint(f"everystep: {shortened(str(error))}")
        sys.exit(error.exit_code)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        hint(f"everystep: {shortened(where)}{error.strerror or error}")
        sys.exit(2 if error.errno in _OF_NAMES else 1)
    except KeyboardInterrupt:
        sys.exit(130)
