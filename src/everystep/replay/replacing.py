"""Replacing: before each update, gradients become what expressions say, with `step.replacement`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from everystep.errors import ExpressionError, TrainingError, UsageError
from everystep.recording.texts import replaced_texts
from everystep.replay.expression import Expression, Reference, parse
from everystep.step.eager import Training
from everystep.step.replacement import Replacement, UnderWay, counted
from everystep.training.job import Job

__all__ = ["asked_replacements", "replacing", "with_replacement"]

#: What a step has between backward and its update.
_KNOWN = ("loss", "step", "batch", "parameters", "buffers", "gradients")


def asked_replacements(asked: Mapping[str, str], measurements: Collection[str]) -> dict[str, str]:
    """Return what gradients become, as expressions by parameter.

    asked: expressions by what they replace, such as `gradients['0.weight']`; measurements: of the run.

    Raises:
        UsageError: something is not a gradient, or an expression not a text.
        ExpressionError: an expression is invalid, or needs what a step under way does not have.
    """
    found: dict[str, str] = {}
    for target, text in asked.items():
        if not isinstance(target, str) or not isinstance(text, str):
            raise UsageError(
                f"replace: {target!r}: {text!r}: write both as text: "
                "{\"gradients['0.weight']\": \"clip(gradients['0.weight'], -1, 1)\"}"
            )
        name = _gradient_named(target)
        if name in found:
            raise UsageError(f"replace: gradients[{name!r}] is replaced twice; write one expression")
        expression = parse(text, measurements, is_live=True)
        for reference in sorted(expression.references):
            if reference.is_previous or reference.kind not in _KNOWN:
                raise ExpressionError(
                    f"{reference} is not known between the backward pass and the update; use the "
                    "gradients, parameters, buffers, batch.x, batch.y, loss and step"
                )
        found[name] = expression.text
    return found


def _gradient_named(target: str) -> str:
    """Return the parameter of a gradient that is to be replaced.

    Raises:
        UsageError: it is something else.
    """
    with suppress(ExpressionError):
        name = _whole_gradient(parse(target))
        if name is not None:
            return name
    raise UsageError(
        f"replace: {target:.200} is not a gradient; only whole gradients can be replaced: "
        "gradients['0.weight']=EXPRESSION"
    )


def _whole_gradient(expression: Expression) -> str | None:
    """Return the parameter if an expression is its gradient and nothing else, or None."""
    names = {
        reference.name
        for reference in expression.references
        if expression.text in (f"gradients[{quote}{reference.name}{quote}]" for quote in "'\"")
    }
    return names.pop() if names else None


def replacing(job: Job, expressions: Mapping[str, str]) -> Job:
    """Return a job that replaces gradients before each update.

    expressions: by parameter. The gradient itself means that it is not replaced.

    Raises:
        ExpressionError: an expression names a tensor that the training does not have.
        ExperimentError: the value of one cannot replace a gradient.
    """
    kept = {n: text for n, text in expressions.items() if _whole_gradient(parse(text)) != n}
    training = with_replacement(job.training, kept)
    if training.replacement is not None:
        _check(training, training.replacement, kept)
    return replace(job, training=training).with_facts(replaced=kept)


def with_replacement(training: Training, expressions: Mapping[str, str]) -> Training:
    """Return a training that replaces gradients before each update; expressions: by parameter."""
    read = {name: parse(text, is_live=True) for name, text in expressions.items()}
    rules = {name: _rule(expression) for name, expression in read.items()}
    reads_step = "step" in _kinds(read.values())
    return replace(training, replacement=Replacement(rules, reads_step) if rules else None)


def _kinds(expressions: Iterable[Expression]) -> set[str]:
    return {reference.kind for expression in expressions for reference in expression.references}


def _rule(expression: Expression) -> Callable[[UnderWay], Any]:
    def rule(step: UnderWay) -> Any:
        def value_of(reference: Reference) -> Any:
            found = getattr(step, reference.kind)
            if reference.kind == "loss":
                return found.reshape(()).double()
            if not reference.name:
                return found
            if reference.name not in found:
                raise TrainingError(
                    f"{expression.text}: this step has no {reference}: the loss does not depend on the "
                    "parameter"
                )
            return found[reference.name]

        value = expression.evaluate(value_of)
        # How many elements a tensor has is a plain number, but not a constant to fill a gradient with.
        is_constant = isinstance(value, torch.Tensor) or not expression.references
        return value if is_constant else step.step.new_full((), value)

    return rule


def _check(training: Training, replacement: Replacement, expressions: Mapping[str, str]) -> None:
    """Check names, shapes and dtypes, on gradients that are 0."""
    trained = (p for group in training.optimizer.param_groups for p in group["params"])
    learns = {parameter for parameter in trained if parameter.requires_grad}
    number = torch.zeros((), device=training.device)
    # Reading a batch may run code that draws random numbers.
    has_batch = not training.batch.runs_python
    x, y = training.batch(1) if has_batch else (number, number)
    step = training.under_way(counted(1, training.device), number, x, y)
    gradients = {n: torch.zeros_like(p) for n, p in step.parameters.items() if p in learns}
    step = step._replace(gradients=gradients)
    known = {kind: [*getattr(step, kind)] for kind in ("parameters", "buffers", "gradients")}
    read = {name: parse(text) for name, text in expressions.items()}
    for (name, expression), text in zip(read.items(), replaced_texts(expressions), strict=True):
        named = expression.references | {Reference("gradients", name, False)}
        replace(expression, text=text, references=named).check(known)
    if has_batch or "batch" not in _kinds(read.values()):
        replacement.gradients(step)
