"""What autograd keeps of a step for its backward pass, and no call has returned: statistics, indices."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from everystep.step.path import SeenOperation, SeenTensor

__all__ = ["saved_results"]

_NODE = re.compile(r"Backward\d+$")


def saved_results(
    alive: Iterable[Tensor],
    before: int,
    operations: Sequence[SeenOperation],
    tensors: Sequence[SeenTensor],
    hidden: Collection[int],
) -> dict[int, Tensor]:
    """Return a tensor on each storage that only autograd still knows, by the storage's number.

    Autograd makes at most one node for each operation, in their order. So the nodes of a kind are the
    operations of that kind, one by one, where there are as many of both.

    Args:
        alive: tensors of the step, from which the graph is reached.
        before: the sequence number that autograd's next node had after these operations.
        operations: of the step so far.
        tensors: that they name.
        hidden: storages that the operations have made, and no call has returned.
    """
    by_kind: dict[str, list[SeenOperation]] = {}
    for seen in operations:
        by_kind.setdefault(_kind_of(seen.operator), []).append(seen)
    found: dict[int, Tensor] = {}
    for kind, own in _nodes(alive, before).items():
        made = by_kind.get(kind, [])
        if len(own) == len(made):
            for node, seen in zip(own, made, strict=True):
                found |= _kept(node, seen, tensors, hidden)
    return found


def _kept(
    node: Any, seen: SeenOperation, tensors: Sequence[SeenTensor], hidden: Collection[int]
) -> dict[int, Tensor]:
    """Return what the node of an operation keeps of its arguments and results."""
    found = {}
    for name, value in _named(seen):
        if not (isinstance(value, str) and value.startswith("%")):
            continue
        expected = tensors[int(value[1:])]
        if expected.storage not in hidden:
            continue
        try:
            kept = getattr(node, f"_saved_{name}", None)
        except RuntimeError:  # a backward pass has freed it, or something has changed it
            continue
        if isinstance(kept, Tensor) and _likeness(kept) == expected[1:]:
            found[expected.storage] = kept
    return found


def _named(seen: SeenOperation) -> Iterator[tuple[str, Any]]:
    """Yield the arguments and results of an operation with the names by which its node keeps them."""
    schema = seen.operator._schema
    yield from zip((argument.name for argument in schema.arguments), seen.arguments, strict=False)
    yield from seen.keywords
    for place, (result, declared) in enumerate(zip(seen.results, schema.returns, strict=False)):
        yield declared.name or ("result" if len(schema.returns) == 1 else f"result{place}"), result


def _likeness(tensor: Tensor) -> tuple[Any, ...]:
    shape, stride = tuple(tensor.shape), tensor.stride()
    return tensor.dtype, shape, stride, tensor.storage_offset()


def _nodes(alive: Iterable[Tensor], before: int) -> dict[str, list[Any]]:
    """Return the nodes of the graph that tensors are reached by, by their kind, in order."""
    left = [tensor.grad_fn for tensor in alive if tensor.grad_fn is not None]
    met: set[Any] = set()
    while left:
        node = left.pop()
        if node not in met:
            met.add(node)
            left += [following for following, _ in node.next_functions if following is not None]
    found: dict[str, list[Any]] = {}
    for node in sorted(met, key=lambda node: node._sequence_nr()):
        name = node.name()
        if node._sequence_nr() < before and _NODE.search(name):
            found.setdefault(_NODE.sub("", name).lower(), []).append(node)
    return found


def _kind_of(operator: Any) -> str:
    """Return the name of an operator as that of its node has it, in lower case."""
    name = getattr(operator, "overloadpacket", torch.ops.aten.add).__name__
    return name.removesuffix("_forward").replace("_", "").lower()
