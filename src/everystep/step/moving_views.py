"""Moving views: those that lie at another place of the same memory in each step.

Each place of `x[:, i:i+28]` would be a path, and a program, of its own. So where a slice lies at another
place than in a step before, any place follows the path from then on, and the *offset* of the view is one
of the step. The same holds of the views of such a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from everystep.program.operators import flattened
from everystep.step.call_checks import MISS
from everystep.step.met_tensors import MetTensors, tensor_tokens
from everystep.step.path import Entry, extent_of

__all__ = ["MovingViews", "check_of_views", "loosened"]

#: Operators with integers that only place their result; of a list of them, each is compared.
_PLACING = {"as_strided", "select", "slice"}


class MovingViews:
    """Finds the views that move, in all steps of a recording.

    tensors: of the step in progress.
    """

    def __init__(self, tensors: MetTensors) -> None:
        self._tensors = tensors
        #: The kinds of views that have moved; where one has, more of its kind often follow.
        self._moved: set[tuple[Any, ...]] = set()

    def are_moving(
        self, at: Entry, func: Any, tokens: Sequence[Any], made: Sequence[tuple[int, int]]
    ) -> bool:
        """Tell whether the views that a call returns move.

        Args:
            at: the point at which it was made.
            func, tokens: the call.
            made: the places of the views among its results, and their numbers.
        """
        known = self._tensors.known
        given = [known[token[1]] for token in tensor_tokens(tokens)]
        if any(tensor.moves is not None for tensor in given):
            return True
        if func.overloadpacket.__name__ not in _PLACING:
            return False
        lies = known[made[0][1]].geometry[:3]
        kind = func, given[0].origin, lies
        if any(
            each.func is func and loosened(each.key[2]) == loosened(tokens) and _lie_as(each, lies)
            for each in at.children.values()
        ):
            self._moved.add(kind)
        return kind in self._moved


def loosened(tokens: Sequence[Any]) -> tuple[Any, ...]:
    """Return the tokens of a call, with any integers in the place of its own."""
    return tuple([("i",) if token[0] == "c" and type(token[1]) is int else token for token in tokens])


def _lie_as(entry: Entry, lies: tuple[Any, ...]) -> bool:
    return [known.geometry[:3] for known in entry.new] == [lies]


def check_of_views(
    func: Any,
    tokens: Sequence[Any],
    named: Sequence[tuple[str, Any]],
    made: Sequence[tuple[int, int]],
    tensors: MetTensors,
) -> Callable[[Any, Any], Any]:
    """Return a function of the arguments of a call that returns moving views; see `check_of`.

    The call is made first, since it shows where they lie; it computes nothing.
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
        result = func._op(*args, **keywords)
        flat = flattened(result)
        lie = [
            tensors.geometry(flat[place], each.origin)
            for (place, _), each in zip(made, known, strict=True)
        ]
        for own, each, within in zip(lie, known, limits, strict=True):
            begin, end = extent_of(own)
            if own[:3] != each.geometry[:3] or (
                within and not any(first <= begin and end <= last for first, last in within)
            ):
                return MISS
        for (place, number), own in zip(made, lie, strict=True):
            view = flat[place]
            tensors.met[number], tensors.lies[number] = ref(view), view.data_ptr()
            tensors.offsets.append(own[3])
        return result

    return check
