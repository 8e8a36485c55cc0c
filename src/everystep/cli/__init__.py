"""The command line: one thin command per public function.

Data goes to stdout, progress and hints to stderr. Exit code 0: success; 1: the answer is no, or writing
failed; 2: invalid use; 130: Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
import typer.core

from everystep.cli.asking import diff, measure, verify, when
from everystep.cli.making import experiments, fork, resume, train
from everystep.cli.output import hint, print_in_any_encoding
from everystep.cli.showing import losses, plot, report, runs, step, table, view
from everystep.errors import EverystepError, UsageError, did_you_mean

__all__ = ["app", "main"]

#: What other tools call a command, or may one day be one, and what there is.
_INSTEAD = {
    "list": "everystep runs",
    "ls": "everystep runs",
    "show": "everystep step RUN STEP, or everystep view",
    "open": "everystep step RUN STEP, or everystep view",
    "serve": "everystep view",
    "tensorboard": "everystep view",
    "compare": "everystep diff RUN RUN",
    "export": "everystep losses RUN --csv, or snapshots/*/parameters.safetensors",
    "predict": "everystep.open(run).predict(x), in Python",
}


class _Commands(typer.core.TyperGroup):
    """The commands; an unknown one is answered by what there is."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = "" if ctx.resilient_parsing or not args else args[0]  # the shell wants no errors
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            known = self.list_commands(ctx)
            begun = [f"did you mean {each}?" for each in known if each.startswith(name)]
            cure = _INSTEAD.get(name) or (begun[0] if len(begun) == 1 else did_you_mean(name, known))
            raise UsageError(f"no command {name!r}; {cure or 'everystep -h lists the commands'}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    name="everystep",
    help="Train a neural network step by step, and keep every step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(train)
app.command()(resume)
app.command()(experiments)
app.command()(runs)
app.command()(losses)
app.command()(table)
app.command()(plot)
app.command()(report)
app.command(context_settings={"ignore_unknown_options": True})(step)  # -1 is a step
app.command()(verify)
app.command()(diff)
app.command()(fork)
app.command()(measure)
app.command()(when)
app.command()(view)


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
    """Run the command line; report a user's mistake in one clear message."""
    print_in_any_encoding()
    try:
        app()
    except EverystepError as error:
        hint(f"everystep: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
