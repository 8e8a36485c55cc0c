"""The tensors of an opened step, by their ids."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everystep.errors import UsageError
from everystep.recording.facts import Facts
from everystep.replay.step import Step

__all__ = ["first_of", "id_of_batch", "images_of", "tensor_of", "unset_ids"]

#: Images are drawn as such up to this many pixels along a side.
_LARGEST_IMAGE = 512


def tensor_of(step: Step, id: str, facts: Facts) -> Tensor:
    """Return a tensor of a step by its id, such as `batch.x` or `operations/3/inputs/x`.

    facts: of the run.

    Raises:
        UsageError: the step has no such tensor.
    """
    kind, _, name = id.partition("/")
    found: Any = None
    of_batch = {id_of_batch(name): tensor for name, tensor in step.batch.tensors.items()}
    if id in of_batch:
        found = of_batch[id]
    elif id == "batch.images" and of_batch:
        found = images_of(next(iter(of_batch.values())), facts)
    elif kind in ("parameters", "dropped", "gradients", "activations"):
        found = first_of(getattr(step, kind).get(name))
    elif kind == "updates":
        parameter, _, which = name.rpartition("/")
        if parameter in step.updates and which in ("before", "after", "change"):
            found = getattr(step.updates[parameter], which)
    elif kind == "operations":
        found = _of_operation(step, name)
    if id in unset_ids(step):
        raise UsageError(
            f"{id} has no numbers: it is memory of the kernel, or nothing was written to it yet"
        )
    if not isinstance(found, Tensor):
        raise UsageError(f"step {step.number} has no tensor {id!r:.200}; see the step's list of tensors")
    return found


def id_of_batch(name: str) -> str:
    """Return the id of a tensor of the batch."""
    return f"batch.{name}" if name in ("x", "y") else f"batch/{name}"


def unset_ids(step: Step) -> frozenset[str]:
    """Return the ids of tensors of operations that hold no numbers (`Step.unset`)."""
    return frozenset(f"operations/{number}/{role}/{name}" for number, role, name in step.unset)


def images_of(x: Tensor, facts: Facts) -> Tensor | None:
    """Return the images that a batch is, as they were before they were scaled; None: it is none.

    Args:
        x: (N, 1 or 3, H, W).
        facts: of the run.
    """
    shape = x.shape
    if len(shape) != 4 or shape[1] not in (1, 3) or max(shape[2:]) > _LARGEST_IMAGE:
        return None
    if not x.is_floating_point():
        return None
    preparation = facts.trained and facts.trained.preparation
    scaling = (preparation or {}).get("scaling") or {}
    try:
        mean, deviation = (x.new_tensor(scaling[key]).view(shape[1:]) for key in ("mean", "deviation"))
    except (KeyError, TypeError, ValueError, RuntimeError):  # they were not, or not as everystep does it
        return x
    return x * deviation + mean


def first_of(given: Any) -> Tensor | None:
    """Return what a module gave; of several tensors the first."""
    found: Tensor | None = given[0] if isinstance(given, tuple | list) and given else given
    return found


def _of_operation(step: Step, name: str) -> Tensor | None:
    number, _, rest = name.partition("/")
    role, _, own = rest.partition("/")
    known = {str(place): seen for place, seen in enumerate(step.operations)}
    if number not in known or role not in ("inputs", "results"):
        return None
    named: dict[str, Tensor] = getattr(known[number], role)
    return named.get(own)
