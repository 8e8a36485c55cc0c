"""An opened step as plain data: what `--json` prints and the page gets.

Its tensors are named by ids, such as `batch.x` or `operations/3/inputs/x`; their statistics are in one
common table, and their numbers are sent separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import UsageError
from everystep.recording.facts import Facts, ModuleFacts, TrainingFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import loss_text, optimizer_parts, shortest
from everystep.replay.opened_step import Batch, Segment, Step, norm, statistics
from everystep.views.batch_text import class_names, classes_of_tensors, first_of, plain_values, targets
from everystep.views.formatting import dtype_text
from everystep.views.mathematics import argument_texts, mathematics
from everystep.views.plain import plain_data
from everystep.views.update_formula import UpdateFormula, update_formulas

__all__ = ["SegmentSeen", "as_it_happened", "step_data", "tensor_of"]


# The segments of a loop's step with two models and two optimizers:
#   forward of maker   #0
#   forward of judge   #1
#   loss, backward     #2 to #4, #5 to #13
#   update of_judge    #14 to #15   settings {"lr": 0.01}, parameters ["judge.weight", "judge.bias"]
#   update of_maker    #16 to #21   settings {"lr": 0.1}, parameters ["maker.weight", "maker.bias"]
class SegmentSeen(NamedTuple):
    """A segment of a step.

    optimizer: the name of the optimizer that updates in it; None if it is not an update, or unknown.
    settings: the optimizer's learning rates and similar settings at this step. parameters: those that it
    updates, in the order of the step; one that several segments change belongs to the last of them.
    formulas: of these, as far as operations show them. made: the optimizer's class, and all its settings
    as text.
    """

    segment: Segment
    optimizer: str | None = None
    settings: Mapping[str, float] = {}
    parameters: Sequence[str] = ()
    formulas: Mapping[str, UpdateFormula] = {}
    made: tuple[str, Mapping[str, str]] | None = None


def as_it_happened(step: Step, training: TrainingFacts) -> tuple[list[SegmentSeen], list[str]]:
    """Return the segments of a step in order, and the parameters that no optimizer has changed.

    A step of everystep's own has one update, which may leave parameters as they are; and it always drops
    gradients, even if no operation shows it.
    """
    is_own, optimizers = training.loop is None, training.optimizers
    updates = step.updates.items()
    # What a loop changes can be any parameters, and only a look at them tells.
    left = [n for n, u in updates if is_own or not torch.equal(u.before, u.after)]
    known = {name: update_formulas(step.operations, each) for name, each in optimizers.items()}
    segments = step.segments(() if training.loop is None else training.loop.parts)
    # Before the backward pass, as in the chapter's loop; it has no operations: last < first.
    if is_own and all(each.phase != "zero_grad" for each in segments):
        at = next((n for n, each in enumerate(segments) if each.phase == "backward"), len(segments))
        first = segments[at - 1].last + 1 if at else 0
        segments.insert(at, Segment("zero_grad", None, first, first - 1))
    found = []
    # From the last on: a parameter that several segments change belongs to the last of them.
    for segment in reversed(segments):
        if segment.phase != "update":
            found.append(SegmentSeen(segment))
            continue
        optimizer = segment.part if segment.part in optimizers else next(iter(optimizers), None)
        formulas = known.get(optimizer or "", {})
        numbers = set(range(segment.first, segment.last + 1))
        changed = {name for name, f in formulas.items() if not numbers.isdisjoint(f.numbers)}
        own = [name for name in left if is_own or name in changed]
        left = [name for name in left if name not in own]
        prefix = f"{segment.part}." if segment.part else ""  # of the only one, names have none
        given = step.hyperparameters.items()
        settings = {key.removeprefix(prefix): value for key, value in given if key.startswith(prefix)}
        its = {name: formulas[name] for name in own if name in formulas}
        its_own = {} if optimizer is None else {"": optimizers[optimizer]}
        made = optimizer_parts(its_own, settings, is_known=is_own) if its_own else None
        found.append(SegmentSeen(segment, optimizer, settings, own, its, made))
    return found[::-1], [] if is_own else left


#: Images are drawn up to this many pixels along a side.
_LARGEST_IMAGE = 512
_PARTS_OF_UPDATE = ("before", "after", "change")
#: Inputs of an operation other than the output of the previous layer.
_OWN = ("parameter/", "buffer/")


def step_data(step: Step, run: RecordedRun, *, values: bool = False) -> dict[str, Any]:
    """Return everything in a step as plain data; NaN and infinities are texts.

    values: the numbers of every tensor, too, as nested lists, and all other values of the batch.
    """
    facts = run.facts
    training = facts.training_of(step.number)
    tensors = _Tensors(step, classes_of_tensors(step, class_names(facts), training.modules), values)
    loss, loop = loss_text(training.loss), training.loop
    used = training.optimizers, step.hyperparameters
    optimizer, settings = optimizer_parts(*used, is_known=loop is None)
    segments, changed_outside = as_it_happened(step, training)
    formulas = {name: each for seen in segments for name, each in seen.formulas.items()}
    layers = network(step, training.modules)
    for layer in layers:
        if (output := first_of(step.activations.get(layer["path"]))) is not None:
            tensors.add(layer["activation"], output)
    content = {
        "step": step.number,
        "steps": run.newest_step(),
        "epoch": step.epoch,
        "loss": step.loss,
        "loss_text": shortest(step.loss),
        "recorded_loss": step.recorded_loss,
        "recorded_loss_text": shortest(step.recorded_loss),
        "is_exact": step.is_exact,
        "diverged_at": step.diverged_at,
        "is_of_loop": loop is not None,
        "has_loss": training.has_loss,
        "is_computed": step.places.loss is not None,
        "problems": getattr(run, "problems", []),
        "hyperparameters": step.hyperparameters,
        "max_grad_norm": training.max_grad_norm,
        "optimizer": {"name": optimizer, "settings": settings},
        "loss_function": {"name": training.loss.class_name if training.loss else loss, "text": loss},
        "batch": _batch(step.batch, facts, tensors, values),
        "parameters": tensors.of("parameters", step.parameters),
        "buffers": tensors.of("buffers", step.buffers),
        "network": layers,
        "operations": _operations(step, tensors),
        "segments": None if loop is None else [_segment(seen) for seen in segments],
        "changed_outside": changed_outside,
        "dropped": tensors.of("dropped", step.dropped),
        "gradients": tensors.of("gradients", _as_made(step)),
        "updates": _updates(step, formulas, tensors),
    }
    content["tensors"] = tensors.known
    # These are many, and none of their values can be NaN.
    plain = ("operations", "network")
    return {key: each if key in plain else plain_data(each) for key, each in content.items()}


def network(step: Step, modules: Mapping[str, ModuleFacts]) -> list[dict[str, Any]]:
    """Return the layers in the order of execution, each with its shapes, parameters and operations.

    A module with submodules is included only if it ran operations of its own.

    modules: of the model, by path.
    """
    # Modules with others inside, by path: "0.1" is in "0".
    containers = {path.rpartition(".")[0] for path in modules if path}
    operations: dict[str, list[int]] = {}
    backward: dict[str, list[int]] = {}
    of_phase = {"forward": operations, "backward": backward}
    is_layer = "" in modules and "" not in containers  # then operations are of no module within it
    for number, seen in enumerate(step.operations):
        module, phase = seen.operation.module, seen.operation.phase
        module = "" if module is None and is_layer else module
        if module is not None and phase in of_phase:
            of_phase[phase].setdefault(module, []).append(number)
    parents = {path.rpartition(".")[0] for path in (*step.activations, *operations) if path}
    layers = [
        _layer(step, path, operations.get(path, []), backward.get(path, []))
        | _described(modules.get(path), path in containers)
        for path in _in_order(step, operations)
        if path in operations or path not in parents | containers
    ]
    for before, layer in pairwise(layers):
        layer["follows"] = _follows(step, before["operations"], layer["operations"])
    return layers


def _follows(step: Step, before: list[int], operations: list[int]) -> bool:
    """Return whether a layer uses the output of the previous one; True for one without operations."""
    if not before or not operations:
        return True
    # What depends on the layer before, from its own results on.
    reached: set[str] = set()
    for number in range(before[0], operations[-1] + 1):
        seen = step.operations[number]
        uses = not reached.isdisjoint(_bases(seen.inputs))
        if uses and number in operations:
            return True
        if uses or number in before:
            reached |= _bases(seen.results)
    return False


def _in_order(step: Step, operations: dict[str, list[int]]) -> list[str]:
    """Return the paths of modules; one without operations comes after the module before it."""
    places: dict[str, float] = {path: numbers[0] for path, numbers in operations.items()}
    # Between the operations of its neighbours: numbers are whole, and places of such modules are halves.
    last = -0.5
    for path in step.activations:
        if path in operations:
            last = operations[path][-1] + 0.5
        else:
            places[path] = last
    return sorted(places, key=lambda path: places[path])


def _described(module: ModuleFacts | None, is_container: bool) -> dict[str, str]:
    """Return a module's class, its printed settings, and both together."""
    name = module.class_name if module else ""
    # The settings of a container are the modules in it, which have lines of their own.
    if module is None or is_container or "\n" in module.arguments:
        return {"type": name, "arguments": "", "text": name}
    return {"type": name, "arguments": module.arguments, "text": f"{name}({module.arguments})"}


def _layer(step: Step, path: str, operations: list[int], backward: list[int]) -> dict[str, Any]:
    output = first_of(step.activations.get(path))
    return {
        "path": path,
        "depth": path.count("."),
        "input": _input_shape(step, operations),
        "output": None if output is None else list(output.shape),
        "activation": None if output is None else f"activations/{path}",
        "parameters": {
            name.rpartition(".")[2]: f"parameters/{name}"
            for name in step.parameters
            if name.rpartition(".")[0] == path
        },
        "operations": operations,
        "backward": backward,
    }


def _input_shape(step: Step, operations: list[int]) -> list[int] | None:
    """Return the shape of the input from outside the layer."""
    made: set[str] = set()
    for number in operations:
        seen = step.operations[number]
        made |= _bases(seen.results)
        for name, tensor in seen.inputs.items():
            # The first tensor that it neither made nor owns.
            if not name.startswith(_OWN) and _bases([name]).isdisjoint(made):
                return list(tensor.shape)
    return None


def _bases(names: Iterable[str]) -> set[str]:
    """Return the names of the tensors that these are views of, or are."""
    return {name.partition("~")[0] for name in names}


class _Tensors:
    """The named tensors, by id, with their statistics.

    Many ids share memory, which is read once.
    """

    def __init__(self, step: Step, of_classes: Mapping[str, str], values: bool) -> None:
        self._unset = unset_ids(step)
        self._of_classes = of_classes
        self._values = values
        self.known: dict[str, dict[str, Any]] = {}
        self._seen: dict[tuple[Any, ...], dict[str, Any]] = {}
        # While they are referenced, no other tensor can get their memory.
        self._held: list[Tensor] = []

    def add(self, id: str, tensor: Tensor) -> str:
        """Look at a tensor; returns its id."""
        about = self.known[id] = {"shape": list(tensor.shape), "dtype": dtype_text(tensor)}
        if classes := self._of_classes.get(id):
            about["classes"] = classes
        if id in self._unset:
            about["unset"] = True
            return id
        about |= self._look(tensor)
        if is_complex := tensor.is_complex():
            about["statistics_of"] = "absolute values"
        if self._values:
            # JSON has no complex numbers: they become pairs.
            content = torch.view_as_real(tensor.detach().resolve_conj()) if is_complex else tensor
            about["values"] = content.tolist()
        return id

    def of(self, kind: str, named: dict[str, Tensor]) -> list[dict[str, str]]:
        return [{"parameter": n, "tensor": self.add(f"{kind}/{n}", t)} for n, t in named.items()]

    def called(
        self, place: str, given: dict[str, Tensor], names: dict[str, str]
    ) -> list[dict[str, str]]:
        """Add the inputs or results of an operation; `names`: of each in its mathematics."""
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


def _batch(batch: Batch, facts: Facts, tensors: _Tensors, values: bool) -> dict[str, Any]:
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
        "values": plain_values(batch.nested, whole=values),
    }


def _operations(step: Step, tensors: _Tensors) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "phase": seen.operation.phase,
            "module": seen.operation.module,
            "operator": seen.operation.operator,
            "line": None if seen.line is None else seen.line.data(),
            "left": line.left,
            "right": line.right,
            "arguments": argument_texts(seen.operation, line.given),
            "inputs": tensors.called(f"operations/{number}/inputs", seen.inputs, line.given),
            "results": tensors.called(f"operations/{number}/results", seen.results, line.made),
        }
        for number, (seen, line) in enumerate(
            zip(step.operations, mathematics(step.operations), strict=True)
        )
    ]


def _as_made(step: Step) -> dict[str, Tensor]:
    """Return the gradients in the order of the backward pass; unknown ones at the end."""
    made = {
        name: number
        for number, seen in enumerate(step.operations)
        if seen.operation.phase == "backward"
        for name in _bases(seen.results)
    }
    order = sorted(step.gradients, key=lambda name: made.get(f"gradient/{name}", len(step.operations)))
    return {name: step.gradients[name] for name in order}


def _segment(seen: SegmentSeen) -> dict[str, Any]:
    """Return a segment of a loop's step; an update has its optimizer and its parameters."""
    optimizer = seen.made and {"name": seen.made[0], "settings": seen.made[1]}
    own = {"hyperparameters": seen.settings, "parameters": list(seen.parameters)}
    return seen.segment._asdict() | {"optimizer": optimizer} | own


def _updates(step: Step, formulas: dict[str, UpdateFormula], tensors: _Tensors) -> list[dict[str, Any]]:
    found = []
    for name, update in step.updates.items():
        formula = formulas.get(name) or UpdateFormula((), (), ())
        parts = {part: getattr(update, part) for part in _PARTS_OF_UPDATE}
        found.append(
            {"parameter": name}
            | {part: tensors.add(f"updates/{name}/{part}", tensor) for part, tensor in parts.items()}
            | {"relative_size": update.relative_size}
            | formula._asdict()
        )
    return found


def tensor_of(step: Step, id: str, facts: Facts) -> Tensor:
    """Return a tensor of a step by its id, such as `batch.x` or `operations/3/inputs/x`.

    facts: of the run.

    Raises:
        UsageError: the step has no such tensor.
    """
    kind, _, rest = id.partition("/")
    found: dict[str, Any] = {id_of_batch(name): each for name, each in step.batch.tensors.items()}
    if id == "batch.images" and found:
        found[id] = images_of(next(iter(found.values())), facts)
    elif kind in ("parameters", "buffers", "dropped", "gradients", "activations"):
        found[id] = first_of(getattr(step, kind).get(rest))
    elif kind == "updates":
        parameter, _, part = rest.rpartition("/")
        if parameter in step.updates and part in _PARTS_OF_UPDATE:
            found[id] = getattr(step.updates[parameter], part)
    elif kind == "operations":
        number, _, own = rest.partition("/")
        role, _, name = own.partition("/")
        # By text: int() also takes " 7" and "+7", which would be further names of one tensor.
        seen = {str(place): each for place, each in enumerate(step.operations)}.get(number)
        if seen is not None and role in ("inputs", "results"):
            found[id] = getattr(seen, role).get(name)
    if id in unset_ids(step):
        raise UsageError(
            f"{id} has no numbers: it is memory of the kernel, or nothing was written to it yet"
        )
    tensor = found.get(id)
    if not isinstance(tensor, Tensor):
        raise UsageError(f"step {step.number} has no tensor {id!r:.200}; see the step's list of tensors")
    return tensor


def id_of_batch(name: str) -> str:
    """Return the id of a tensor of the batch."""
    return f"batch.{name}" if name in ("x", "y") else f"batch/{name}"


def unset_ids(step: Step) -> frozenset[str]:
    """Return the ids of tensors of operations that hold no numbers (`Step.unset`)."""
    return frozenset(f"operations/{number}/{role}/{name}" for number, role, name in step.unset)


def images_of(x: Tensor, facts: Facts) -> Tensor | None:
    """Return a batch as images, before scaling; None if it is not one of images.

    x: (N, 1 or 3, H, W); facts: of the run.
    """
    shape = x.shape
    has_shape = len(shape) == 4 and shape[1] in (1, 3) and max(shape[2:]) <= _LARGEST_IMAGE
    if not (has_shape and x.is_floating_point()):
        return None
    preparation = facts.trained and facts.trained.preparation
    scaling = (preparation or {}).get("scaling") or {}
    try:
        mean, deviation = (x.new_tensor(scaling[key]).view(shape[1:]) for key in ("mean", "deviation"))
    except (KeyError, TypeError, ValueError, RuntimeError):  # they were not, or not as everystep does it
        return x
    return x * deviation + mean
