"""The tensors of an opened step, by their ids."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everystep.errors import UsageError
from everystep.recording.facts import Facts
from everystep.replay.step import Step
from everystep.views.notation import kind_of

__all__ = ["first_of", "id_of_batch", "images_of", "tensor_of", "unset_ids"]

#: Images are drawn as such up to this many pixels along a side.
_LARGEST_IMAGE = 512
#: Operations that give memory as they find it.
_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
#: Operations that write to all of what they are given without a look at it.
_OVERWRITING = {
    "bernoulli",
    "cauchy",
    "copy",
    "exponential",
    "fill",
    "geometric",
    "log_normal",
    "normal",
    "random",
    "uniform",
    "zero",
}
#: From which of their results on operations give the workspace of a library, not all of it written.
_WORKSPACES = {"mkldnn_rnn_layer": 3, "cudnn_rnn": 3, "miopen_rnn": 3, "cudnn_batch_norm": 3}


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
        raise UsageError(f"nothing was written to {id} yet, so it has no numbers")
    if not isinstance(found, Tensor):
        raise UsageError(
            f"step {step.number} has no tensor {id!r:.200}; the step's own list says which there are"
        )
    return found


def id_of_batch(name: str) -> str:
    """Return the id of a tensor of the batch."""
    return f"batch.{name}" if name in ("x", "y") else f"batch/{name}"


def unset_ids(step: Step) -> frozenset[str]:
    """Return the ids of tensors that nothing was written to yet: their numbers are of no meaning.

    What lies in such memory may be of anything that was computed before, and is shown to nobody.
    """
    found: set[str] = set()
    unset: dict[str, bool] = {}  # by name, as the operations have been run so far
    for number, seen in enumerate(step.operations):
        kind = kind_of(seen.operation)
        for name in seen.inputs:
            base = name.partition("~")[0]
            # A program has no operation that only asks for memory.
            is_first = base not in unset and "/" not in base and name in seen.results
            if unset.get(base) or (is_first and kind in _OVERWRITING):
                found.add(f"operations/{number}/inputs/{name}")
        for place, name in enumerate(seen.results):
            is_unset = kind in _UNWRITTEN or place >= _WORKSPACES.get(kind, len(seen.results))
            unset[name.partition("~")[0]] = is_unset
            if is_unset:
                found.add(f"operations/{number}/results/{name}")
    return frozenset(found)


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
