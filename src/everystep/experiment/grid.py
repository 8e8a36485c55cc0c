"""The settings of a sweep: every combination of some values, by the name of its run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from everystep.errors import ExperimentError, Fault
from everystep.experiment.specification import Experiment, load, parse_setting

__all__ = ["combinations", "experiments_of", "parse_values"]

#: Runs of a sweep that need no confirmation.
_MOST_RUNS = 1000
#: Characters of a value, and of all values, in the name of a run.
_LONGEST_VALUE, _LONGEST_NAME = 32, 200
#: A value among others; commas in quotes, brackets or parentheses belong to it.
_VALUE = re.compile(r"""(?:"[^"]*"|'[^']*'|\[(?:[^][]|\[[^]]*\])*\]|\((?:[^()]|\([^)]*\))*\)|[^,])+""")


def parse_values(texts: Iterable[str]) -> dict[str, Sequence[Any]]:
    """Return the values of each setting in `optimizer.lr=1e-4,1e-3`, `seed=0..7`, ...

    Raises:
        ExperimentError: lists each setting that is not in this form, or is set twice.
    """
    found: dict[str, Sequence[Any]] = {}
    faults: list[Fault] = []
    for text in texts:
        path, _, values = (each.strip() for each in text.partition("="))
        pieces = _VALUE.findall(values)
        ends = re.fullmatch(r"(-?\d{1,9})\.\.(-?\d{1,9})", values)
        if not (path and pieces and all(map(str.strip, pieces)) and ",".join(pieces) == values):
            faults.append(Fault(text, "write path=value,value or path=first..last: seed=0..7"))
        elif path in found:
            faults.append(Fault(path, "is set twice; write all its values in one --set"))
        elif ends is not None:
            found[path] = range(int(ends[1]), int(ends[2]) + 1)
        else:
            found[path] = [parse_setting(f"{path}={piece}")[1] for piece in pieces]
    if faults:
        raise ExperimentError(faults, "the sweep")
    return found


def combinations(settings: Mapping[str, Any], *, may_be_many: bool = False) -> dict[str, dict[str, Any]]:
    """Return every combination of the values of some settings, by the name of its run.

    settings: the values of each; anything but a list, a range or the like is one value.

    Raises:
        ExperimentError: there is nothing to vary, a setting has no value or the same one twice, or there
            are more than a thousand runs and `may_be_many` is not set.
    """
    values = {path: _listed(each) for path, each in settings.items()}
    faults = [Fault(path, "has no values") for path, each in values.items() if not len(each)]
    if not values:
        faults = [Fault("", "there is nothing to vary; name a setting and its values: seed=0..7")]
    elif (count := math.prod(map(len, values.values()))) > _MOST_RUNS and not may_be_many:
        problem = f"these are {count:,} runs; more than {_MOST_RUNS:,} need --force (force=True)"
        raise ExperimentError(problem, "the sweep")
    for path, each in values.items():
        twice = [text for text, number in Counter(map(str, each)).items() if number > 1]
        faults += [Fault(path, f"has the value {text} twice") for text in twice]
    if faults:
        raise ExperimentError(faults, "the sweep")
    # What is the same in all runs need not be in their names.
    varied = [path for path, each in values.items() if len(each) > 1] or [*values]
    # `lr=0.1` is enough, unless two settings end in the same word.
    short = {path: _plain_name(path.rpartition(".")[2]) for path in varied}
    if len({*short.values()}) < len(varied):
        short = {path: _plain_name(path) for path in varied}
    named = [zip(_distinct(each), each, strict=True) for each in values.values()]
    found = {}
    for number, chosen in enumerate(product(*named), 1):
        at = dict(zip(values, chosen, strict=True))
        name = ",".join(f"{short[path]}={at[path][0]}" for path in varied)
        name = name if len(name) <= _LONGEST_NAME else f"run={number}"
        found[name] = {path: value for path, (_, value) in at.items()}
    return found


def _listed(values: Any) -> Sequence[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values  # an array, perhaps of one number
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        return [values]
    return values if isinstance(values, range) else list(values)


def _distinct(values: Sequence[Any]) -> list[str]:
    """Return values for the names of runs, each with a text of its own."""
    names = [str(getattr(each, "__name__", each)) for each in values]
    texts = [_plain_name(name)[:_LONGEST_VALUE] for name in names]
    count = Counter(texts)
    return [t if count[t] == 1 else f"{t}-{place}" for place, t in enumerate(texts, start=1)]


def _plain_name(text: str) -> str:
    """Return a text for the name of a directory, in which nothing means anything to a shell."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).rstrip("-") or "-"


def experiments_of(
    source: str | Path | Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], threads: int
) -> dict[str, Experiment]:
    """Return the experiment of each run of a sweep, all of it checked.

    Args:
        source: as in `load`.
        runs: the settings of each run, by its name.
        threads: of each training, unless the experiment sets them.

    Raises:
        ExperimentError: lists every error of every run once, and runs that would be equal.
    """
    found: dict[str, Experiment] = {}
    faults: dict[Fault, None] = {}
    first: dict[str, str] = {}
    for name, settings in runs.items():
        try:
            experiment = load(source, settings)
        except ExperimentError as error:
            faults |= dict.fromkeys(error.faults)
            continue
        found[name] = experiment.model_copy(update={"threads": experiment.threads or threads})
        # Different texts may be the same setting, such as max_grad_norm=1 and 1.0.
        if (other := first.setdefault(found[name].to_toml(), name)) != name:
            faults[Fault("", f"{other} and {name} would be the same run")] = None
    if faults:
        where = str(source) if isinstance(source, str | Path) else "the experiment"
        raise ExperimentError([*faults], where)
    return found
