"""Backward: a backward pass of a known graph runs unwatched, as one, and as without everystep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from everystep.step.hooks import handles
from everystep.step.path import Entry
from everystep.step.replaced import run_engine

if TYPE_CHECKING:
    from everystep.step.cursor import Cursor

__all__ = ["OTHER_WHEN_WATCHED", "BackwardPasses", "Graph", "graph_of", "leaves_if_other"]

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


class BackwardPasses:
    """Runs the backward passes of a step while it is watched, in place of torch's own call."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._since = torch._C._autograd._get_sequence_nr()
        self._handles = handles()

    def run(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass; see `torch.autograd._engine_run_backward`."""
        cursor = self._cursor
        if not cursor.is_paused:
            cursor.optimizers.recover()
        if cursor.is_paused or _get_current_dispatch_mode() is not cursor:
            return run_engine(outputs, *args, **kwargs)
        graph = None
        if not cursor.has_saved_hooks:
            graph = graph_of(outputs, args, kwargs, self._since, self._handles)
        if graph is None or cursor.paths.have_hooks(graph.leaves):
            leaves = leaves_if_other(outputs)
            if leaves is None:
                return run_engine(outputs, *args, **kwargs)
            return self._run_by_content(leaves, outputs, args, kwargs, runs_python=True)
        self._handles = handles()  # looking for hooks has registered some
        if graph.is_other:
            return self._run_by_content(graph.leaves, outputs, args, kwargs)
        if cursor.at is None:
            return run_engine(outputs, *args, **kwargs)
        return self._run_graph(graph, outputs, args, kwargs)

    def _run_graph(self, graph: Graph, outputs: Any, args: Any, kwargs: Any) -> Any:
        """Run a pass that a path can hold: unwatched if its operations are known."""
        cursor, begin = self._cursor, len(self._cursor.numbers)
        if not self._begins(graph):
            return run_engine(outputs, *args, **kwargs)
        entry = cursor.at
        assert entry is not None
        jump = entry.jump if cursor.is_followed else None
        # Numbers that the graph was made with are in its nodes, and not in its key.
        if jump is not None and [*map(repr, cursor.numbers)] == jump[2]:
            result = self._unwatched(outputs, args, kwargs)
            self._jump(entry, graph, result)
            return result
        result = run_engine(outputs, *args, **kwargs)
        if cursor.at is not None:
            self._ends(entry, begin, _left(graph.leaves, result))
        return result

    def _begins(self, graph: Graph) -> bool:
        """Note that a pass begins; return whether a path can hold it.

        No gradient may be held while it runs, since autograd would not add to it in place.
        """
        before = [leaf.grad for leaf in graph.leaves]
        nones = tuple(gradient is None for gradient in before)
        started = [each for each in (*graph.given, *graph.leaves, *before) if each is not None]
        return self._cursor.happens("backward", graph.key, nones, tensors=started)

    def _ends(self, entry: Entry, begin: int, left: list[Any]) -> None:
        """Note what a watched pass has left, and whether it can run unwatched the next time."""
        cursor = self._cursor
        known = cursor.happens("end of backward", tensors=left)
        end = cursor.at
        if not known or end is None or entry.jump is not None or not _can_jump(entry, end):
            return
        exports = {number for number in end.key[-1] if number is not None}
        if exports.issuperset(cursor.paths.tensors.alive(entry.met, end.met)):
            numbers = cursor.numbers
            entry.jump = end, numbers[begin:], [*map(repr, numbers[:begin])]

    def _jump(self, entry: Entry, graph: Graph, result: Any) -> None:
        """Note what an unwatched pass has left."""
        cursor = self._cursor
        end, numbers, _ = entry.jump
        cursor.numbers += numbers
        tensors = cursor.paths.tensors
        tensors.drop_between(entry.met, end.met)
        for number, tensor in zip(end.key[-1], _left(graph.leaves, result), strict=True):
            if number is not None and number >= entry.met and tensor is not None:
                tensors.met[number], tensors.lies[number] = ref(tensor), tensor.data_ptr()
        cursor.at = end

    def _run_by_content(
        self, leaves: list[Tensor], outputs: Any, args: Any, kwargs: Any, *, runs_python: bool = False
    ) -> Any:
        """Run a pass that has other bits where it is watched; what it leaves is kept by content.

        runs_python: whether hooks or functions of the user's may run in it, and change anything.
        """
        cursor = self._cursor
        before = [leaf.grad for leaf in leaves]
        versions = cursor.state_versions()
        result = self._unwatched(outputs, args, kwargs)
        cursor.note_unwatched(before, _left(leaves, result), versions, runs_python=runs_python)
        return result

    def _unwatched(self, outputs: Any, args: Any, kwargs: Any) -> Any:
        _pop_mode()
        try:
            return run_engine(outputs, *args, **kwargs)
        finally:
            _push_mode(self._cursor)


def _left(leaves: list[Tensor], result: Any) -> list[Tensor | None]:
    """Return the tensors that a pass leaves: gradients of leaves, and results."""
    return [*(leaf.grad for leaf in leaves), *(result or ())]


def _can_jump(entry: Entry, end: Entry) -> bool:
    """Tell whether what is between two points depends on nothing but what was compared before."""
    at = end.parent
    while at is not None and at is not entry:
        if at.key[0] != "call" or at.contents or at.draws or at.shaped:
            return False
        if torch.Tag.data_dependent_output in at.func.tags:
            return False
        at = at.parent
    return at is entry
