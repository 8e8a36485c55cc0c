"""An opened step as JSON: for programs, with every number in full precision."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everystep.recording.facts import Facts
from everystep.replay.step import Step, Update, statistics
from everystep.views.batch import class_names, other_values
from everystep.views.formula import Formula, update_formulas
from everystep.views.mathematics import Line, all_arguments, mathematics

__all__ = ["step_json"]

_PLAIN = str | int | float | bool


def step_json(step: Step, facts: Facts, *, values: bool = False) -> str:
    """Return everything in a step as JSON; NaN and infinities are texts.

    `batch_values` is what the batch holds besides tensors; `classes` names the numbers of the targets.

    facts: of the run; values: the numbers of every tensor, too, as nested lists.
    """
    training = facts.training_of(step.number)
    content = {
        "step": step.number,
        "steps": facts.steps,
        "epoch": step.epoch,
        "loss": step.loss,
        "recorded_loss": step.recorded_loss,
        "is_exact": step.is_exact,
        "diverged_at": step.diverged_at,
        "hyperparameters": step.hyperparameters,
        "clip_norm": training.clip_norm,
    }
    content = _for_json(content) | _tensors_of(step, values)
    content["batch_values"] = {
        name: _for_json(value) if isinstance(value, list | _PLAIN) else str(value)
        for name, value in other_values(step.batch.nested)
    }
    content["classes"] = class_names(facts)
    formulas = update_formulas(step.operations, training.optimizers)
    content["updates"] = {
        name: _update(update, formulas.get(name), values) for name, update in step.updates.items()
    }
    lines = mathematics(step.operations)
    content["operations"] = [_operation(step, place, line, values) for place, line in enumerate(lines)]
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def _tensors_of(step: Step, values: bool) -> dict[str, Any]:
    rows = step.batch.rows
    return {
        "batch": {
            "rows": None if rows is None else rows.tolist(),
            "rows_of": step.batch.whole,
            **_tensors(step.batch.tensors, values),
        },
        "parameters": _tensors(step.parameters, values),
        "buffers": _tensors(step.buffers, values),
        "activations": _tensors(step.activations, values),
        "dropped": _tensors(step.dropped, values),
        "gradients": _tensors(step.gradients, values),
    }


def _update(update: Update, formula: Formula | None, values: bool) -> dict[str, Any]:
    named = {"before": update.before, "after": update.after, "change": update.change}
    return {
        **_tensors(named, values),
        "relative_size": _for_json(update.relative_size),
        "formula": None if formula is None else formula._asdict(),
    }


def _operation(step: Step, place: int, line: Line, values: bool) -> dict[str, Any]:
    seen = step.operations[place]
    given = {key: value for key, (value, given) in all_arguments(seen.operation).items() if given}
    return {
        "number": place,
        "phase": seen.operation.phase,
        "module": seen.operation.module,
        "operator": seen.operation.operator,
        "mathematics": str(line),
        "arguments": _for_json(given),
        **{
            role: {
                name: _shape(tensor) | {"unset": True}
                if (place, role, name) in step.unset
                else _tensor(tensor, values)
                for name, tensor in tensors.items()
            }
            for role, tensors in (("inputs", seen.inputs), ("results", seen.results))
        },
    }


def _tensors(named: Mapping[str, Any], values: bool) -> dict[str, Any]:
    return {
        name: [_tensor(part, values) for part in given]
        if isinstance(given, list | tuple)
        else _tensor(given, values)
        for name, given in named.items()
    }


def _tensor(tensor: Tensor, values: bool) -> dict[str, Any]:
    found: dict[str, Any] = _shape(tensor) | _for_json(statistics(tensor)._asdict())
    if tensor.is_complex():
        found["statistics_of"] = "absolute values"
    if values:
        content = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
        is_finite = not content.is_floating_point() or bool(torch.isfinite(content).all())
        listed = content.tolist()
        found["values"] = listed if is_finite else _for_json(listed)
    return found


def _shape(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _for_json(value: Any) -> Any:
    """Return what JSON can hold: it has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in value.items()}
    return [_for_json(item) for item in value] if isinstance(value, list | tuple) else value
