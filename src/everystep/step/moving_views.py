"""Moving views: those that lie at another place of the same memory in each step.

Each place of `x[:, i:i+28]` would be a path, and a program, of its own. So where a slice lies at another
place than in a step before, any place follows the path from then on, and the *offset* of the view is one
of the step. The same holds of the views of such a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from everystep.program.operation import extent_of
from everystep.program.operators import flattened, leaves
from everystep.step.call_checks import MISS
from everystep.step.met_tensors import MET, MetTensors, leaf_tokens
from everystep.step.path import Entry, MetTensor

__all__ = ["check_of_views", "loose_tokens"]

#: Operators with integers that only place their result, and which of the arguments these are.
_PLACING = {"as_strided": (3,), "select": (2,), "slice": (2, 3)}


def loose_tokens(
    call: tuple[Any, ...], at: Entry, known: Sequence[MetTensor], moved: set[tuple[Any, ...]]
) -> tuple[Any, ...] | None:
    """Return the tokens of a call that returns views which move, None if they do not.

    Args:
        call: the operator, its tokens, and the places of the views among its results, and their numbers.
        at: the point at which it was made.
        known: of the tensors that the step has met.
        moved: the operators, and their dimensions, of views that have moved: more of them often follow.
    """
    func, tokens, made = call
    given = [known[token[1]] for token in leaf_tokens(tokens) if token[0] in MET]
    loose = _loosened(func, tokens, given[0].geometry)
    if any(tensor.moves is not None for tensor in given):
        return loose
    if loose == tokens:
        return None
    lies = [known[number].geometry[:3] for _, number in made]
    if any(
        each.func is func
        and _loosened(func, each.key[2], given[0].geometry) == loose
        and [view.geometry[:3] for view in each.new] == lies
        for each in at.children.values()
    ):
        moved.add((func, tokens[1]))
    return loose if (func, tokens[1]) in moved else None


def _loosened(func: Any, tokens: tuple[Any, ...], geometry: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the tokens of a call, with any integers in place of those that place its result.

    Not where the offset of the result does not show them, as in an expanded dimension.

    geometry: of the tensor that it is a view of.
    """
    name, (_, _, stride, _) = func.overloadpacket.__name__, geometry
    places = _PLACING.get(name, ())
    if not places or len(tokens) < 2:  # torch omits arguments that have their defaults
        return tokens
    if name != "as_strided":
        dimension = tokens[1][1]  # perhaps of another call, on a tensor of more dimensions
        if not -len(stride) <= dimension < len(stride) or stride[dimension] == 0:
            return tokens
    return tuple(
        ("i",) if place in places and token[0] == "c" and type(token[1]) is int else token
        for place, token in enumerate(tokens)
    )


def check_of_views(
    func: Any,
    tokens: Sequence[Any],
    named: Sequence[tuple[str, Any]],
    made: Sequence[tuple[int, int]],
    tensors: MetTensors,
    *,
    in_graph: bool,
) -> Callable[[Any, Any], Any]:
    """Return a function of the arguments of a call that returns moving views; see `check_of`.

    The call is made first, since it shows where they lie; it computes nothing.

    in_graph: whether gradients may flow through the views: then a graph depends on where they lie.
    """
    known = [tensors.known[number] for _, number in made]
    limits = [tensors.limits(number) for _, number in made]

    def check(args: Any, kwargs: Any) -> Any:
        keywords = kwargs or {}
        if len(args) != len(tokens) or [*keywords] != [name for name, _ in named]:
            return MISS
        expected = (*tokens, *(token for _, token in named))
        if not all(map(tensors.fits, expected, (*args, *keywords.values()))):
            return MISS
        if in_graph is not any(tensor.requires_grad for tensor in leaves(args)):
            return MISS
        result = func._op(*args, **keywords)
        flat = flattened(result)
        lie = [
            tensors.geometry(flat[place], each.origin)
            for (place, _), each in zip(made, known, strict=True)
        ]
        for own, each, within in zip(lie, known, limits, strict=True):
            # The view must stay within memory that the run keeps.
            begin, end = extent_of(own)
            if own[:3] != each.geometry[:3] or (
                within and not any(first <= begin and end <= last for first, last in within)
            ):
                return MISS
        for (place, number), own in zip(made, lie, strict=True):
            view = flat[place]
            tensors.met[number], tensors.lies[number] = ref(view), view.data_ptr()
            tensors.numbers.append(own[3])
        return result

    return check
