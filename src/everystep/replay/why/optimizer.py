"""Which numbers the step of an optimizer, taken as a whole, updates a number from, and how."""

from __future__ import annotations

import re
from typing import Any

from everystep.program.elements import Made, NoRuleError, Piece, Words
from everystep.program.elements.optimizers import UPDATES, updated
from everystep.program.execute import Observed
from everystep.replay.step import Step

__all__ = ["optimizer_rule"]

#: The name of a setting that changes: `lr`, `momentum[1]`, `optimizer.betas.1`.
_CHANGED = re.compile(r"(optimizer\.)?(?P<key>[^.\[\]]+)(\.(?P<item>\d+))?(\[(?P<group>\d+)\])?")


def optimizer_rule(step: Step, seen: Observed, name: str, index: tuple[int, ...]) -> Made:
    """Return the numbers that `torch.optim.NAME` updated a parameter from, or a tensor of its state.

    Raises:
        NoRuleError: it may use numbers at other places, too.
    """
    optimizer = seen.operation.operator.rpartition(".")[2]
    if optimizer not in UPDATES:
        raise NoRuleError(f"{optimizer} does not update each number by itself")
    kind, _, rest = name.partition("/")
    path = rest if kind == "parameter" else rest.rpartition("/")[0]
    parameter, gradient = f"parameter/{path}", step.places.gradients.get(path)
    if parameter not in seen.inputs or gradient is None:
        raise NoRuleError(f"{parameter} is not among its inputs")
    shape = tuple(seen.inputs[parameter].shape)
    own = f"optimizer/{path}/"
    given = {"param": parameter, "grad": gradient.names[0]}
    given |= {each.removeprefix(own): each for each in step.state if each.startswith(own)}
    if tuple(step.end[name].shape) != shape:  # such as a counter of steps
        given = {key: each for key, each in given.items() if each == name}
        shape = tuple(step.end[name].shape)
    pieces = {}
    for key, each in given.items():
        tensor = seen.inputs[each] if each in seen.inputs else step.state[each]
        if tensor.is_complex():  # its real and its imaginary part are updated one by one
            raise NoRuleError(f"{each} is complex")
        if tuple(tensor.shape) != shape and tensor.numel() != 1:
            raise NoRuleError(f"{each} has another shape than {name}")
        pieces[key] = Piece(each, index if tuple(tensor.shape) == shape else (0,) * tensor.dim())
    key = "param" if kind == "parameter" else name.removeprefix(own)
    try:
        return updated(optimizer, key, _settings(step, path), pieces)
    except NoRuleError:
        return Words(f"updated by torch.optim.{optimizer} from these numbers and its settings", pieces)


def _settings(step: Step, path: str) -> dict[str, Any]:
    """Return the settings of the param group of a parameter at a step, those that change included."""
    known = step.places.optimizer
    groups = () if known is None else known.groups
    place = next((i for i, group in enumerate(groups) if path in group["params"]), None)
    if place is None:
        raise NoRuleError("its param group is not known")
    settings = dict(groups[place])
    for name, value in step.hyperparameters.items():
        found = _CHANGED.fullmatch(name)
        if found is None or int(found["group"] or 0) != place:
            continue
        if found["item"] is None:
            settings[found["key"]] = value
        elif isinstance(there := settings.get(found["key"]), list | tuple):
            settings[found["key"]] = [
                value if at == int(found["item"]) else each for at, each in enumerate(there)
            ]
    return settings
