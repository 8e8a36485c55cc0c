"""The command line: one thin command per public function.

Data goes to stdout, progress and hints to stderr. Exit code 0: success; 1: the answer is no, writing
failed, or the run is damaged; 2: invalid use; 130: Ctrl-C; 141: the reader of stdout closed it early.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from everystep.cli import display_commands as display
from everystep.cli import question_commands as question
from everystep.cli import space_commands as space
from everystep.cli import training_commands as training
from everystep.cli.command_group import Commands, documented
from everystep.cli.output import (
    OutputError,
    drop_output,
    hint,
    hint_at_damage,
    prepare_streams,
    shortened,
)
from everystep.errors import EverystepError, exit_code_of

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    name="everystep",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would keep the line breaks of docstrings in the help
)
for command in (  # in the order of the help
    *(training.train, training.sweep, training.resume, training.experiments, display.runs),
    *(display.losses, display.table, display.plot, display.report, display.step),
    *(question.verify, question.doctor, question.diff, question.match, question.rerun, training.fork),
    *(question.what_if, question.measure, question.when, question.first_nonfinite, question.why),
    *(question.rows, display.view, space.du, space.prune, space.rm),
):
    # -1 is a step, not an option.
    has_step = command in (display.step, question.why, question.rows)
    app.command(context_settings={"ignore_unknown_options": has_step})(documented(command))


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train a neural network step by step, and keep every step."""
    if show:
        from importlib.metadata import version as version_of

        typer.echo(f"everystep {version_of('everystep')}")
        raise typer.Exit


#: Set in a process that runs the same command in place of another one, in an environment that it needs.
_STARTED_AGAIN = "EVERYSTEP_STARTED_AGAIN"


def main() -> None:
    """Run the command line; report a user's mistake in one clear message."""
    # First of all: what follows may print.
    prepare_streams()
    damage = hint_at_damage()
    try:
        try:
            app()
        except SystemExit as end:
            # What a command printed of a damaged run is not all that was recorded.
            sys.exit(end.code or int(bool(damage)))
        finally:
            # Here, so that a full disk or a closed pipe is reported; at exit, Python prints a traceback.
            sys.stdout.flush()
    except OutputError as error:
        drop_output(error)
        sys.exit(error.exit_code)
    except EverystepError as error:
        needed = getattr(error, "environment", None)
        if needed is not None and _STARTED_AGAIN not in os.environ:
            # torch is already imported, and its libraries read these variables only once.
            changed = os.environ | needed | {_STARTED_AGAIN: "1"}
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], changed)
        # torchrun prints the errors of all ranks together.
        rank = f"rank {os.environ['RANK']}: " if "TORCHELASTIC_RUN_ID" in os.environ else ""
        hint(f"everystep: {rank}{shortened(str(error))}")
        sys.exit(error.exit_code)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        hint(f"everystep: {shortened(where)}{error.strerror or error}")
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(130)
