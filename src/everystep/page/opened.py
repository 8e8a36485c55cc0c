"""An opened step as plain data for the page; its tensors are named by ids, their numbers come apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from everystep.page.batch import of_classes
from everystep.page.network import network
from everystep.page.tensors import first_of, id_of_batch, images_of, unset_ids
from everystep.program.operation import Operation
from everystep.recording.facts import Facts, ModuleFacts, TrainingFacts
from everystep.recording.texts import loss_text, optimizer_parts
from everystep.replay.step import Batch, Step, statistics
from everystep.run import Run
from everystep.views.answers import plain
from everystep.views.batch import class_names, plain_values, targets
from everystep.views.formula import Formula, update_formulas
from everystep.views.lines import norm
from everystep.views.mathematics import Line, all_arguments, mathematics, value_text
from everystep.views.segments import Happened, as_it_happened
from everystep.views.terminal import shortest

__all__ = ["step_content", "step_json"]


def step_json(step: Step, run: Run, facts: Facts) -> bytes:
    """Return all that the page shows of a step but the numbers of its tensors, as JSON.

    facts: of the run.
    """
    content = _content(step, run, facts)
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    except ValueError:  # rarely is something not finite, and a look at every number takes its time
        text = json.dumps(plain(content), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace")


def step_content(step: Step, run: Run) -> dict[str, Any]:
    """Return the same as plain data; NaN and infinities are texts, so that it can be JSON."""
    found: dict[str, Any] = plain(_content(step, run, run.facts))
    return found


def _content(step: Step, run: Run, facts: Facts) -> dict[str, Any]:
    training = facts.training_of(step.number)
    tensors = _Tensors(unset_ids(step), of_classes(step, class_names(facts), training.modules))
    optimizer, settings = optimizer_parts(training.optimizers)
    loss = loss_text(training.loss)
    loop = training.loop
    happened = as_it_happened(step, training, loop) if loop else None
    content = {
        "run": run.name,
        "step": step.number,
        "steps": len(run),
        "epoch": step.epoch,
        "loss": step.loss,
        "loss_text": shortest(step.loss),
        "recorded_loss_text": shortest(step.recorded_loss),
        "is_exact": step.is_exact,
        "diverged_at": step.diverged_at,
        "is_of_loop": loop is not None,
        "has_loss": training.has_loss,
        "problems": run.problems,
        "hyperparameters": step.hyperparameters,
        "clip_norm": training.clip_norm,
        "optimizer": {"name": optimizer, "settings": settings},
        "loss_function": {"name": training.loss.class_name if training.loss else loss, "text": loss},
        "batch": _batch(step.batch, facts, tensors),
        "network": _network(step, training.modules, tensors),
        "operations": _operations(step, tensors),
        "segments": _segments(happened, training) if happened else None,
        "changed_otherwise": happened.changed_otherwise if happened else [],
        # What is pending at the beginning of a loop's step is state, and need not be dropped in it.
        "dropped": tensors.of("dropped", {} if happened else step.dropped),
        "gradients": tensors.of("gradients", _as_made(step)),
        "updates": _updates(step, _formulas(step, training, happened), tensors),
    }
    return content | {"tensors": tensors.known}


class _Tensors:
    """The tensors that are spoken of, by id, with what their numbers are like.

    Many ids are of the same memory, and are looked at once.
    """

    def __init__(self, unset: frozenset[str], of_classes: Mapping[str, str]) -> None:
        self._unset = unset
        self._of_classes = of_classes
        self.known: dict[str, dict[str, Any]] = {}
        self._seen: dict[tuple[Any, ...], dict[str, Any]] = {}
        # As long as they are held, no other tensor can come to lie in their memory.
        self._held: list[Tensor] = []

    def add(self, id: str, tensor: Tensor) -> str:
        """Look at a tensor; returns its id."""
        own: dict[str, Any] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        if about := self._of_classes.get(id):
            own["classes"] = about
        self.known[id] = own | ({"unset": True} if id in self._unset else self._look(tensor))
        return id

    def of(self, kind: str, named: dict[str, Tensor]) -> list[dict[str, str]]:
        """Look at a tensor of each parameter."""
        return [{"parameter": n, "tensor": self.add(f"{kind}/{n}", t)} for n, t in named.items()]

    def called(
        self, place: str, given: dict[str, Tensor], names: dict[str, str]
    ) -> list[dict[str, str]]:
        """Look at what an operation is given, or gives; `names`: what its mathematics calls each."""
        return [
            {"name": n, "called": names.get(n, n), "tensor": self.add(f"{place}/{n}", tensor)}
            for n, tensor in given.items()
        ]

    def _look(self, tensor: Tensor) -> dict[str, Any]:
        # A transposed view has the same numbers.
        dimensions = sorted(zip(tensor.stride(), tensor.shape, strict=True))
        place = tensor.data_ptr(), tensor.dtype, *(each for each in dimensions if each[1] != 1)
        if place not in self._seen:
            self._held.append(tensor)
            self._seen[place] = {**statistics(tensor)._asdict(), "norm": norm(tensor)}
        return self._seen[place]


def _batch(batch: Batch, facts: Facts, tensors: _Tensors) -> dict[str, Any]:
    images = images_of(next(iter(batch.tensors.values())), facts) if batch.tensors else None
    names = class_names(facts)
    return {
        "tensors": [
            {"name": name, "tensor": tensors.add(id_of_batch(name), tensor)}
            for name, tensor in batch.tensors.items()
        ],
        "rows": None if batch.rows is None else batch.rows.tolist(),
        "rows_of": batch.whole,
        "images": None if images is None else tensors.add("batch.images", images),
        "targets": targets(batch, names),
        "classes": names,
        "values": plain_values(batch.nested),
    }


def _network(step: Step, modules: Mapping[str, ModuleFacts], tensors: _Tensors) -> list[dict[str, Any]]:
    layers = network(step, modules)
    for layer in layers:
        if layer["activation"] is not None:
            activation = first_of(step.activations[layer["path"]])
            assert activation is not None
            tensors.add(layer["activation"], activation)
        for name in layer["parameters"].values():
            tensors.add(name, step.parameters[name.partition("/")[2]])
    return layers


def _operations(step: Step, tensors: _Tensors) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "phase": seen.operation.phase,
            "module": seen.operation.module,
            "operator": seen.operation.operator,
            "left": line.left,
            "right": line.right,
            "arguments": _arguments(seen.operation, line),
            "inputs": tensors.called(f"operations/{number}/inputs", seen.inputs, line.given),
            "results": tensors.called(f"operations/{number}/results", seen.results, line.made),
        }
        for number, (seen, line) in enumerate(
            zip(step.operations, mathematics(step.operations), strict=True)
        )
    ]


def _arguments(operation: Operation, line: Line) -> list[tuple[str, str, bool]]:
    """Return name, text, and whether it is the default."""
    return [
        (key, value_text(value, lambda name: line.given.get(name, name)), not is_given)
        for key, (value, is_given) in all_arguments(operation).items()
    ]


def _as_made(step: Step) -> dict[str, Tensor]:
    """Return the gradients as the backward pass made them, in order; those not seen there at the end."""
    made: dict[str, int] = {}
    for number, seen in enumerate(step.operations):
        if seen.operation.phase == "backward":
            for name in seen.results:
                kind, _, parameter = name.partition("/")
                if kind == "gradient":
                    made[parameter.partition("~")[0]] = number
    order = sorted(step.gradients, key=lambda name: made.get(name, len(step.operations)))
    return {name: step.gradients[name] for name in order}


def _segments(happened: Happened, training: TrainingFacts) -> list[dict[str, Any]]:
    """Return the segments of a loop's step; an update has its optimizer and its parameters."""
    found = []
    for seen in happened.segments:
        optimizer = training.optimizers.get(seen.optimizer or "")
        name, settings = optimizer_parts({"": optimizer} if optimizer else {})
        found.append(
            seen.segment._asdict()
            | {"optimizer": {"name": name, "settings": settings} if optimizer else None}
            | {"hyperparameters": seen.settings, "parameters": list(seen.formulas)}
        )
    return found


def _formulas(step: Step, training: TrainingFacts, happened: Happened | None) -> dict[str, Formula]:
    if happened is None:
        return update_formulas(step.operations, training.optimizers)
    return {name: each for seen in happened.segments for name, each in seen.formulas.items()}


def _updates(step: Step, formulas: dict[str, Formula], tensors: _Tensors) -> list[dict[str, Any]]:
    found = []
    for name, update in step.updates.items():
        formula = formulas.get(name) or Formula((), (), ())
        parts = {"before": update.before, "after": update.after, "change": update.change}
        found.append(
            {"parameter": name}
            | {part: tensors.add(f"updates/{name}/{part}", tensor) for part, tensor in parts.items()}
            | {"relative_size": update.relative_size}
            | formula._asdict()
        )
    return found
