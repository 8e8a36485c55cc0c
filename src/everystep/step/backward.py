"""Backward: a backward pass of a known graph runs unwatched, as one, and as without everystep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from everystep.step.entries import Entry
from everystep.step.graph import Graph, graph_of, leaves_if_other
from everystep.step.hooks import handles
from everystep.step.replaced import run_engine

if TYPE_CHECKING:
    from everystep.step.cursor import Cursor

__all__ = ["BackwardPasses"]


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
