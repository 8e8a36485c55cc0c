"""Backward: a backward pass of a known graph runs unwatched, as one, and as without everystep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from everystep.device import kinds
from everystep.step.follow import run_engine
from everystep.step.path import Entry, places_of_reads
from everystep.step.torchs_own import handles
from everystep.step.under_way import UnderWay

__all__ = ["BackwardPasses", "Graph", "graph_of"]

with torch.enable_grad():  # a recording may begin where gradients are off
    _sum: Any = torch.ones(1, requires_grad=True).expand(2)
_ACCUMULATE = type(_sum.grad_fn.next_functions[0][0])
_NOTHING: AbstractContextManager[None] = nullcontext()
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
#: Of classes of nodes: whether they are torch's own, written in C++, and whether `_has_other_bits` asks.
_kinds: dict[type, tuple[bool, bool]] = {}
#: A node of a C++ extension's own function: it may keep anything.
_OF_EXTENSION = "CppFunction"
#: Cases of a backward pass, by numbers in its graph, in which it can run unwatched.
_MOST_CASES = 64
_OTHER_KINDS = {"MaskedFillBackward1", "ProdBackward0", "ProdBackward1"}
if torch.__version__ < "2.13":  # compared as versions; tested with 2.9
    _OTHER_KINDS.add("CumprodBackward0")
#: The same, where the gradients have a graph of their own (`create_graph`).
_OTHER_WITH_GRAPH = {"CumprodBackward0", "LinalgDetBackward0"}
#: The node of an operation in place on a view, which hides its own, and the operations that matter.
_OF_VIEW = "CopySlices"
_OTHER_IN_PLACE = {torch.ops.aten.masked_fill_.Tensor, torch.ops.aten.cumprod_.default}
#: Why a pass is not watched.
_OTHER_BITS = (
    "the gradient of prod, cumprod or det, or of the value of masked_fill, is not bit-identical when it "
    "is watched"
)


class Jump(NamedTuple):
    """What a backward pass does that can run unwatched.

    end: the entry after it; numbers: the places of those before it that its graph may have; known: its
    own numbers, by these.
    """

    end: Entry
    numbers: list[int]
    known: dict[tuple[str, ...], list[int | float]]

    def case(self, cursor: UnderWay) -> tuple[str, ...]:
        """Return the numbers that the graph may have, as texts: -0.0 is not 0.0, and NaN is equal."""
        return tuple([repr(cursor.numbers[place]) for place in self.numbers])


class Graph(NamedTuple):
    """The graph of a backward pass.

    key: its nodes and edges, and the settings of the pass, None if its operations may depend on anything
    else; leaves: the tensors with gradients that it adds to; given: other tensors that it starts from;
    is_other: whether torch computes different bits if the pass is watched; writes_into_views: whether
    the nodes of some operations are hidden.
    """

    key: Any
    leaves: list[Tensor]
    given: tuple[Tensor | None, ...]
    is_other: bool
    writes_into_views: bool


def graph_of(outputs: Any, args: Any, kwargs: Any, since: int, known_handles: int) -> Graph:
    """Return the graph of a backward pass.

    Its operations may also depend on Python (hooks, custom functions, a second derivative), or on nodes
    from before the step, with unknown arguments.

    Args:
        outputs, args, kwargs: of `torch.autograd._engine_run_backward`.
        since: the sequence number of autograd's nodes when the step began.
        known_handles: the number of hooks registered when the step began; none of them matter.
    """
    gradients, retain, create, inputs = (*args, (), ())[:4]
    accumulates = kwargs.get("accumulate_grad", True)
    roots = [output.grad_fn if isinstance(output, Tensor) else None for output in outputs]
    # With `create_graph`, the pass makes nodes of its own; since new handles, a hook may be anywhere;
    # with `inputs`, only some of the leaves get gradients. A root without a node is a leaf itself.
    is_sure = not create and known_handles == handles() and not (accumulates and inputs)
    is_sure = is_sure and _top_hooks(True) is None and None not in roots
    number: dict[Any, int] = {None: -1}
    order: list[Any] = []
    for root in roots:
        if root not in number:
            number[root] = len(order)
            order.append(root)
    # e.g. of (w * x).sum(): (SumBackward0, MulBackward0, AccumulateGrad), and the edges
    # ((0,), ((1, 0),), ((2, 0), (-1, 0))): the roots, then where each node leads; -1 is nowhere.
    classes: list[type] = []
    edges: list[Any] = [tuple([number[root] for root in roots])]
    leaves: list[Tensor] = []
    is_other = False
    # The list is the queue of the search, and grows on the way.
    for node in order:
        kind = type(node)
        classes.append(kind)
        if kind is _ACCUMULATE:
            leaves.append(node.variable)
            continue
        if (known_kind := _kinds.get(kind)) is None:
            is_torchs = kind.__module__ == "builtins" and kind.__name__ != _OF_EXTENSION
            known_kind = _kinds[kind] = is_torchs, kind.__name__ in _OTHER_KINDS | _OTHER_WITH_GRAPH
        is_own, may_be_other = known_kind
        # A node from before the step has arguments that no comparison of this step has seen.
        if not is_own or node._sequence_nr() < since:
            is_sure = False
        is_other = is_other or (may_be_other and _has_other_bits(node, has_graph=bool(create)))
        following = node.next_functions
        for other, _ in following:
            if other not in number:
                number[other] = len(order)
                order.append(other)
        edges.append(tuple([(number[other], place) for other, place in following]))
    is_sure = is_sure and not any(map(_is_special, leaves))
    casts: list[Any] = []
    if torch._C._is_any_autocast_enabled():  # in it, products of matrices have its dtype, as in any code
        casts = [torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k) for k in kinds()]
    settings = retain, accumulates, *casts, len(outputs), len(gradients)
    key = (tuple(classes), tuple(edges), settings) if is_sure else None
    writes_into_views = any(kind.__name__ == _OF_VIEW for kind in classes)
    return Graph(key, leaves, (*outputs, *gradients, *(inputs or ())), is_other, writes_into_views)


def _is_special(leaf: Tensor) -> bool:
    """Return whether Python runs where a leaf gets its gradient, it is sparse, or it gets none."""
    has_hooks = leaf._backward_hooks or leaf._post_accumulate_grad_hooks
    # One that was frozen since the forward pass has a node in the graph, and gets no gradient.
    return bool(has_hooks) or leaf.layout is not torch.strided or not leaf.requires_grad


def _has_other_bits(node: Any, *, has_graph: bool) -> bool:
    """Return whether the formula of a node is another one under a dispatch mode, with other bits.

    has_graph: whether the gradients have one.
    """
    # torch asks there whether a tensor is like one of a subclass (isTensorSubclassLike), as any is while
    # a mode is in force: prod, and the value of masked_fill, take a way that works for those.
    kind = type(node).__name__
    if kind in _OTHER_WITH_GRAPH - _OTHER_KINDS:
        return has_graph
    return kind != "MaskedFillBackward1" or node.next_functions[1][0] is not None


class BackwardPasses:
    """Runs the backward passes of a step while it is watched, in place of torch's own call.

    Args:
        cursor: the step under way, and the mode that watches it.
    """

    def __init__(self, cursor: UnderWay) -> None:
        self._cursor = cursor
        self._since = torch._C._autograd._get_sequence_nr()
        self._handles = handles()
        #: DistributedDataParallel exchanges gradients within a pass, or does not, by hooks of its own.
        self._has_ranks = cursor.paths.has_ranks

    def run(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass; see `torch.autograd._engine_run_backward`."""
        cursor = self._cursor
        copies = None if cursor.is_paused else cursor.gradient_copies
        # torch exchanges gradients after the last node.
        phase = cursor.follower.during("backward") if self._has_ranks else _NOTHING
        accumulates = kwargs.get("accumulate_grad", True)
        with phase, copies.around_backward(accumulates) if copies else _NOTHING:
            result = self._run(outputs, args, kwargs)
        if accumulates and cursor.pending is not None and not cursor.is_paused:
            with torch._C._DisableTorchDispatch():
                cursor.uses("backward ends", None, cursor.pending())
        return result

    def _run(self, outputs: Any, args: Any, kwargs: Any) -> Any:
        cursor = self._cursor
        if not cursor.is_paused:
            cursor.recover()
        # `_unwatched` takes the innermost mode from the stack, which must be the cursor.
        if cursor.is_paused or _get_current_dispatch_mode() is not cursor:
            return run_engine(outputs, *args, **kwargs)
        graph = graph_of(outputs, args, kwargs, self._since, self._handles)
        is_sure = graph.key is not None and not cursor.has_saved_hooks and not self._has_ranks
        runs_python = not is_sure or cursor.paths.have_hooks(graph.leaves)
        if not runs_python:
            self._handles = handles()  # looking for hooks has registered some
        if graph.is_other or (graph.writes_into_views and self._has_written_others()):
            return self._run_by_content(graph.leaves, outputs, args, kwargs, runs_python)
        if runs_python or not cursor.is_remembered:
            return run_engine(outputs, *args, **kwargs)
        return self._run_graph(graph, outputs, args, kwargs)

    def _has_written_others(self) -> bool:
        """Return whether the step has run an operation in place with bits that depend on the watch."""
        seen = (entry.operation for entry in self._cursor.at.from_root())
        return any(each is not None and each.operator in _OTHER_IN_PLACE for each in seen)

    def _run_graph(self, graph: Graph, outputs: Any, args: Any, kwargs: Any) -> Any:
        """Run a pass that a path can hold: unwatched if its operations are known."""
        cursor, begin = self._cursor, len(self._cursor.numbers)
        if cursor.exposed:
            cursor.check_exposed()
        if not self._begins(graph):
            return run_engine(outputs, *args, **kwargs)
        entry = cursor.at
        jump = entry.jump
        # Numbers of the forward pass, such as an exponent, are in the nodes, and not in the key.
        case = () if jump is None else jump.case(cursor)
        if jump is not None and case in jump.known:
            result = self._unwatched(graph.leaves, outputs, args, kwargs)
            cursor.numbers += jump.known[case]
            self._jump(entry, jump.end, _left(graph.leaves, result))
            return result
        result = run_engine(outputs, *args, **kwargs)
        if cursor.is_remembered:
            self._ends(entry, begin, case, _left(graph.leaves, result))
        return result

    def _begins(self, graph: Graph) -> bool:
        """Note that a pass begins; return whether a path can hold it."""
        # Held no longer than here: autograd adds in place only to a gradient that nobody else holds.
        before = [leaf.grad for leaf in graph.leaves]
        nones = tuple([gradient is None for gradient in before])
        started = [each for each in (*graph.given, *graph.leaves, *before) if each is not None]
        return self._cursor.happens("backward", graph.key, nones, tensors=started)

    def _ends(self, entry: Entry, begin: int, case: tuple[str, ...], left: list[Any]) -> None:
        """Note the results of a watched pass, and whether it can run unwatched the next time."""
        cursor, jump = self._cursor, entry.jump
        known = cursor.happens("end of backward", tensors=left)
        end = cursor.at
        # A pass with other operations needs a path of its own, not another case of this one.
        if jump is not None and jump.end is end and len(jump.known) < _MOST_CASES:
            jump.known[case] = cursor.numbers[begin:]
        if not known or jump is not None or not _can_jump(entry, end):
            return
        exports = {number for number in end.key[-1] if number is not None}
        # A tensor of the pass that outlives it would have no number after an unwatched pass.
        if exports.issuperset(cursor.tensors.alive(entry.met, end.met)):
            # These are in no node of the graph, and would make a case of almost every step.
            others = {*places_of_reads(entry.operations()), *_offsets_in_no_graph(entry)}
            numbers = [place for place in range(begin) if place not in others]
            entry.jump = jump = Jump(end, numbers, {})
            jump.known[jump.case(cursor)] = cursor.numbers[begin:]

    def _jump(self, entry: Entry, end: Entry, left: list[Any]) -> None:
        """Note what an unwatched pass has left."""
        cursor = self._cursor
        tensors = cursor.tensors
        tensors.drop_between(entry.met, end.met)
        for number, tensor in zip(end.key[-1], left, strict=True):
            # Those with lower numbers were met before the pass.
            if number is not None and number >= entry.met and tensor is not None:
                tensors.met[number], tensors.lies[number] = ref(tensor), tensor.data_ptr()
        cursor.at = end

    def _run_by_content(
        self, leaves: list[Tensor], outputs: Any, args: Any, kwargs: Any, runs_python: bool
    ) -> Any:
        """Run a pass that would have different bits if it were watched; its results are kept by content.

        runs_python: whether hooks or functions of the user may run in it, and change anything.
        """
        cursor = self._cursor
        before = [leaf.grad for leaf in leaves]
        versions = cursor.state_versions() if runs_python else None
        result = self._unwatched(leaves, outputs, args, kwargs)
        cursor.note_unwatched(_OTHER_BITS, before, _left(leaves, result), versions)
        return result

    def _unwatched(self, leaves: list[Tensor], outputs: Any, args: Any, kwargs: Any) -> Any:
        _pop_mode()
        try:
            return run_engine(outputs, *args, **kwargs)
        except BaseException:  # such as that of anomaly detection: some leaves have their gradients
            left = _left(leaves, ())
            self._cursor.note_unwatched("a backward pass raises", left, left)
            raise
        finally:
            _push_mode(self._cursor)


def _left(leaves: list[Tensor], result: Any) -> list[Tensor | None]:
    """Return the tensors that a pass leaves: gradients of leaves, and results."""
    return [*[leaf.grad for leaf in leaves], *(result or ())]


def _offsets_in_no_graph(entry: Entry) -> Iterator[int]:
    """Yield the places, among the numbers of a step, of offsets that no graph made so far may have."""
    written = {origin for operation in entry.operations() for origin in operation.writes}
    for before in entry.from_root():
        for known in before.new:
            if known.moves is not None and not before.in_graph and known.origin not in written:
                yield known.moves


def _can_jump(entry: Entry, end: Entry) -> bool:
    """Return whether everything between two points depends only on what was compared before."""
    at = end.parent
    while at is not None and at is not entry:
        # Calls alone, without content from outside, random numbers, or shapes that depend on numbers.
        if at.key[0] != "call" or at.contents or at.draws > entry.draws or at.shaped:
            return False
        if any(known.moves is not None for known in at.new):
            return False
        if torch.Tag.data_dependent_output in at.func.tags:
            return False
        at = at.parent
    return at is entry
