"""An operation as a short script that needs torch alone, with its inputs in a file beside it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch

from everystep.errors import UsageError
from everystep.program.execute import Observed
from everystep.program.unset import unset_results
from everystep.replay.processes import Opener, recorded_numerics
from everystep.replay.rerun import Place, Rerun
from everystep.views.output_file import write_file

__all__ = ["reproduce"]

#: A text, since it runs without everystep.
_SCRIPT = '''"""{title}

Run it beside {inputs}, which has the inputs: python {script}
"""
import os, subprocess, sys, torch

os.chdir(os.path.dirname(os.path.abspath(__file__)))
NAMES = {names!r}{about}
RECORDED = {recorded!r}
THERE = {there!r}
PYTHON = {python}

def computed(where):
    given = torch.load({inputs!r}, weights_only=True)[where]
    result = torch.ops.{operator}({call})
    tensors = [result] if isinstance(result, torch.Tensor) else list(result or ())
    return {{n: t for n, t in zip(NAMES, tensors or [given[n] for n in NAMES]) if n}}

if len(sys.argv) > 1:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_deterministic_debug_mode("warn"){settings}
    torch.save(computed(sys.argv[2]), sys.argv[1])
    sys.exit()
found = []
for name, python, settings in ("recorded", sys.executable, RECORDED), ("there", PYTHON, THERE):
    subprocess.run([python, {script!r}, name + ".pt", name], env=os.environ | settings, check=True)
    found.append(torch.load(name + ".pt", weights_only=True))
for name, one in found[0].items():
    a, b = one.double(), found[1][name].double()
    count, far = int((a != b).sum()), float((a - b).abs().max() / a.abs().max())
    print(f"{{name}}: {{count:,}} of {{a.numel():,}} differ, by up to {{far:.3g}} of the largest number")
    for place in (a != b).nonzero()[:3].tolist():
        print(f"  {{place}}  {{a[tuple(place)].item()!r}} and {{b[tuple(place)].item()!r}}")
'''


def reproduce(opener: Opener, found: Rerun, path: Path) -> bool:
    """Write the operation that parts as a script, with its inputs beside it.

    The script runs the operation as it was recorded and elsewhere, and prints what differs.

    Args:
        opener: of the run.
        found: what was found of it elsewhere.
        path: of the script; the inputs are beside it, as `.inputs.pt`.

    Returns whether there is such an operation.

    Raises:
        UsageError: the path is not that of a script, or cannot be written.
    """
    if path.suffix != ".py":
        raise UsageError(f"{path} must end in .py: it is a script")
    if found.operation is not None:
        step, index = found.operation.step, found.operation.index
    elif found.beyond is not None:
        step, index = found.beyond.step, found.beyond.operation
    else:
        return False
    observed = opener.step(step).operations[index]
    # The inputs of the first operation with other bits are the same there.
    there = None if found.operation is not None else found.there
    known = recorded_numerics(opener.run.facts)
    content = io.BytesIO()
    given = {"recorded": observed.inputs, "there": (there or observed).inputs}
    torch.save({name: dict(tensors) for name, tensors in given.items()}, content)
    environments = known.environment(), found.place.environment(known)
    name = re.sub(r"[^\w.-]", "_", found.name)  # it must not end the text that it is in
    title = f"Operation #{index} of step {step:,} of {name}: other numbers elsewhere."
    write_file(path.with_suffix(".inputs.pt"), content.getvalue())
    about = "" if there is None else "\n# There, the inputs are those that the step computed there."
    script = _script(observed, title, about, found.place, environments, known.statements(), path)
    write_file(path, script)
    return True


def _script(
    observed: Observed,
    title: str,
    about: str,
    place: Place,
    environments: tuple[dict[str, str], dict[str, str]],
    settings: list[str],
    path: Path,
) -> str:
    operation = observed.operation
    positional = [_source(value) for value in operation.arguments]
    keywords = [f"{key}={_source(value)}" for key, value in operation.keywords.items()]
    return _SCRIPT.format(
        title=title,
        about=about,
        inputs=path.with_suffix(".inputs.pt").name,
        script=path.name,
        # Without those that have no numbers.
        names=[None if n in unset_results(operation) else n for n in operation.results if n]
        or operation.written(),
        settings="".join(f"\n    {line}" for line in settings),
        recorded=environments[0],
        there=environments[1],
        python="sys.executable" if place.python is None else repr(place.interpreter),
        operator=operation.operator,
        call=", ".join([*positional, *keywords]),
    )


def _source(value: Any) -> str:
    """Return an argument, as a program holds it, as Python."""
    if isinstance(value, str):
        return f"given[{value!r}]"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_source, value))}]"
    if isinstance(value, dict):
        ((kind, name),) = value.items()
        if kind == "float":
            return f"float({name!r})"
        if kind in ("text", "device"):
            return repr(name)
        return f"torch.{name}"
    return repr(value)
