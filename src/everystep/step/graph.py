"""The graph of a backward pass, as data: two equal graphs run the same operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.step.hooks import handles

__all__ = ["OTHER_WHEN_WATCHED", "Graph", "graph_of", "leaves_if_other"]

_sum: Any = torch.ones(1, requires_grad=True).expand(2)
_ACCUMULATE = type(_sum.grad_fn.next_functions[0][0])
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
#: Classes of nodes, and whether they are torch's own, written in C++.
_kinds: dict[type, bool] = {}


#: What is said of a pass with such a node.
OTHER_WHEN_WATCHED = (
    "the gradient of prod, or of the value of masked_fill, is not bit-identical when it is watched"
)


class Graph(NamedTuple):
    """What a backward pass runs.

    key: its nodes and edges, and the settings of the pass; leaves: the tensors whose gradients it adds
    to; given: other tensors that it starts from; is_other: whether torch computes other bits where the
    pass is watched.
    """

    key: Any
    leaves: list[Tensor]
    given: tuple[Tensor | None, ...]
    is_other: bool


def graph_of(outputs: Any, args: Any, kwargs: Any, since: int, known_handles: int) -> Graph | None:
    """Return the graph of a backward pass, None if its operations may depend on something else.

    That is Python (hooks, functions of one's own, a second derivative), or nodes from before the step,
    whose arguments the step has not shown.

    Args:
        outputs, args, kwargs: of `torch.autograd._engine_run_backward`.
        since: the sequence number of autograd's nodes when the step began.
        known_handles: the number of hooks registered when the step began; none of them matter.
    """
    gradients, retain, create, inputs = (*args, (), ())[:4]
    accumulates = kwargs.get("accumulate_grad", True)
    if create or known_handles != handles() or (accumulates and inputs) or _top_hooks(True) is not None:
        return None
    order: list[Any] = []
    number: dict[Any, int] = {}
    kinds: list[type] = []
    edges: list[int] = []
    leaves: list[Tensor] = []
    is_other = False
    for output in outputs:
        node = output.grad_fn if isinstance(output, Tensor) else None
        if node is None:
            return None
        if node not in number:
            number[node] = len(order)
            order.append(node)
        edges.append(number[node])
    for node in order:
        kind = type(node)
        is_own = _kinds.get(kind)
        if is_own is None:
            is_own = _kinds[kind] = kind.__module__ == "builtins"
        if not is_own:
            return None
        kinds.append(kind)
        if kind is _ACCUMULATE:
            leaves.append(node.variable)
        elif node._sequence_nr() < since:
            return None
        elif _has_other_bits(node):
            is_other = True
        for other, place in node.next_functions:
            if other is None:
                edges.append(-1)
                continue
            known = number.get(other)
            if known is None:
                known = number[other] = len(order)
                order.append(other)
            edges.append(known)
            if place:
                edges.append(-2 - place)
        edges.append(-1000)
    for leaf in leaves:
        if leaf._backward_hooks or leaf._post_accumulate_grad_hooks or leaf.layout is not torch.strided:
            return None
    settings = retain, accumulates, torch._C._is_any_autocast_enabled(), len(outputs), len(gradients)
    given = (*outputs, *gradients, *(inputs or ()))
    return Graph((tuple(kinds), tuple(edges), settings), leaves, given, is_other)


def leaves_if_other(outputs: Iterable[Any]) -> list[Tensor] | None:
    """Return the leaves of a pass that has other bits where it is watched, None of any other."""
    roots = (output.grad_fn for output in outputs if isinstance(output, Tensor))
    waiting: list[Any] = [node for node in roots if node is not None]
    met: set[Any] = set(waiting)
    is_other, leaves = False, []
    while waiting:
        node = waiting.pop()
        is_other = is_other or _has_other_bits(node)
        if type(node) is _ACCUMULATE:
            leaves.append(node.variable)
        following = {each for each, _ in node.next_functions if each is not None} - met
        met |= following
        waiting += following
    return leaves if is_other else None


def _has_other_bits(node: Any) -> bool:
    """Tell whether the formula of a node is another one under a dispatch mode, with other bits.

    torch asks there whether a tensor is like one of a subclass (isTensorSubclassLike), as any is while a
    mode is in force: prod, and the value that masked_fill fills with, take a way that works for those.
    """
    kind = type(node).__name__
    if kind == "MaskedFillBackward1":
        return node.next_functions[1][0] is not None
    return kind in ("ProdBackward0", "ProdBackward1")
