"""The group of commands: for an unknown command or option, it prints what to type."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from copy import copy
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer.core

from everystep.cli.output import hint
from everystep.errors import UsageError, did_you_mean, rephrased

__all__ = ["Commands", "documented"]

#: Names of commands in other tools, and the everystep command to use instead.
_INSTEAD = {
    "help": "everystep -h, or everystep COMMAND -h",
    **dict.fromkeys(("list", "ls"), "everystep runs lists the runs"),
    **dict.fromkeys(("show", "open"), "everystep step RUN STEP opens a step, everystep view a page"),
    **dict.fromkeys(("serve", "tensorboard"), "everystep view opens the page"),
    **dict.fromkeys(("delete", "remove"), "everystep rm RUN removes a run"),
    "compare": "everystep diff RUN RUN compares two runs",
    "continue": "everystep resume RUN continues a run, everystep fork RUN --at STEP in a new run",
    "export": "everystep losses RUN --csv prints the losses; parameters are in "
    "RUN/snapshots/*/parameters.safetensors",
    "predict": "load the parameters in Python: "
    "model.load_state_dict(everystep.open(RUN).parameters(-1))",
}

#: Values of an experiment that people look for as options, by the path to set.
_SETTINGS = {
    "--lr": "optimizer.lr",
    "--learning-rate": "optimizer.lr",
    "--momentum": "optimizer.momentum",
    "--weight-decay": "optimizer.weight_decay",
    "--optimizer": "optimizer.name",
    "--loss": "loss.name",
    "--batch-size": "batch_size",
    "--max-grad-norm": "max_grad_norm",
    **{f"--{name}": name for name in ("seed", "steps", "epochs", "device", "threads", "engine")},
}
#: How to give a setting to the commands that train.
_TRAINING = dict.fromkeys(("train", "sweep", "fork"), "write") | {
    "resume": "it keeps its settings; to change them, everystep fork RUN --at STEP"
}
#: The error of typer for wrong use, which has no public name of its own.
_WrongUse: Any = typer.BadParameter.__base__


#: An argument in a docstring.
_ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def documented(command: Callable[..., None]) -> Callable[..., None]:
    """Give the arguments and options of a command the help that its docstring has for them."""
    # Help stands in one place: an argument is described in the docstring, as in Python.
    text, _, arguments = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:\n")
    hints = get_type_hints(command, include_extras=True)
    for name, help in _ARGUMENT.findall(arguments):
        kind, *declared = (
            get_args(hints[name]) if get_origin(hints[name]) is Annotated else [hints[name]]
        )
        # A copy: commands share options, and describe them differently.
        option = copy(declared[0]) if declared else typer.Option()
        option.help = " ".join(help.split())
        hints[name] = Annotated[kind, option]
    command.__doc__, command.__annotations__ = text, hints
    return command


# What was typed              what is printed
#   everystep serve             no command 'serve'; everystep view opens the page
#   everystep train --lr 0.1    no such option: --lr; write --set optimizer.lr=VALUE
class Commands(typer.core.TyperGroup):
    """The commands; the error of wrong use names what to type."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that was typed, and its arguments.

        Raises:
            UsageError: the command is unknown.
        """
        name = "" if ctx.resilient_parsing or not args else args[0]  # the shell wants no errors
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            known = self.list_commands(ctx)
            # `first` can only mean first-nonfinite.
            begun = [f"did you mean {each}?" for each in known if each.startswith(name)]
            cure = _INSTEAD.get(name) or (begun[0] if len(begun) == 1 else did_you_mean(name, known))
            raise UsageError(f"no command {name!r}; {cure or 'everystep -h lists the commands'}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; print the message of an interruption as a hint.

        Raises:
            UsageError: an argument or an option is missing, unknown or invalid, or is a setting.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            # e.g. of a measurement: how many values are kept, and how to continue.
            if text := str(stopped):
                hint(text)
            raise
        except _WrongUse as error:
            name, option = ctx.invoked_subcommand, getattr(error, "option_name", "").replace("_", "-")
            problem = error.format_message().partition(", unable to parse")[0].rstrip(".")
            problem = rephrased(f"{problem[0].lower()}{problem[1:]}")
            cure = f"everystep {name} -h describes it"
            if problem.startswith("no such option") and option in _SETTINGS and name in _TRAINING:
                problem = problem.partition(" (")[0]
                cure = f"{_TRAINING[name]} --set {_SETTINGS[option]}=VALUE"
            raise UsageError(f"{problem}; {cure}") from None
