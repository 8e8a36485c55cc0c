"""Call checks: compare a call with the one that an earlier step made at the same point, and make it.

A view may lie at another place of the same memory in each step. Each place of `x[:, i:i+28]` would be a
path, and a program, of its own. So where a slice lies at another place than in a step before, any place
follows the path from then on, and the *offset* of the view is one of the step. The same holds of the
views of such a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import ref

import torch

from everystep.ops.operators import flattened, leaves
from everystep.program.operation import extent_of
from everystep.step.met_tensors import MET, MetTensors, leaf_tokens
from everystep.step.path import Entry, MetTensor

__all__ = ["MISS", "check_of", "check_of_views", "loose_tokens"]

#: The result of a check for a call that does not match its entry.
MISS = object()
#: Operators with integers that only place their result, and which of the arguments these are.
_PLACING = {"as_strided": (3,), "select": (2,), "slice": (2, 3)}


def check_of(
    tokens: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
    made: Sequence[tuple[int, int]],
    call: Callable[..., Any],
    tensors: MetTensors,
    *,
    before: Callable[..., Any] | None,
    after: Callable[..., Any] | None,
) -> Callable[[Any, Any], Any]:
    """Return a function of the arguments of a call: it makes the call, or returns MISS.

    It compares each argument with its token, and notes numbers and new tensors.

    Args:
        tokens, named: of the arguments.
        made: the places of new tensors among the results, -1 if there is but one, and their numbers.
        call: makes the call.
        tensors: of the step under way.
        before: called with the arguments, after they were compared.
        after: called with the result.
    """
    codes = "".join(map(_code, tokens))
    are_same = all(token[0] == "c" and _is_plainly_equal(token[1]) for _, token in named)
    words = "none" if not named else "same" if are_same else "fit"
    results = "none" if not made else "one" if made[0][0] < 0 else "many"
    check = _check_of_shape(codes, words, results, before is not None, after is not None)
    keywords = {k: token[1] for k, token in named} if words == "same" else dict(named)
    values = [t if code == "g" else t[1] for t, code in zip(tokens, codes, strict=True)]
    known = tensors.met, tensors.lies, tensors.numbers, tensors.fits
    # A function within a function would be some twenty objects, which Python looks through for cycles.
    return partial(check, *known, call, keywords, made, before, after, *values)


def _code(token: Any) -> str:
    """Return r: a known tensor; k: None or a bool; c: compared by ==; f, i: a slot; g: others."""
    kind = token[0]
    if kind == "r":
        return "r"
    if kind == "n":
        return "f" if token[1] is float else "i"
    if kind == "c":
        value = token[1]
        if value is None or value is True or value is False:
            return "k"
        return "c" if _is_plainly_equal(value) else "g"
    return "g"


def _is_plainly_equal(value: Any) -> bool:
    """Return whether == and the same type mean the same value: not of 0.0 and -0.0, nor of NaN."""
    return value is None or type(value) in (
        *(bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format),
    )


# The source of `_check_of_shape("rf", "none", "one", False, False)`, such as of `mul(w, 0.5)`:
#
#   def check(R, P, N, fits, call, KW, MADE, before, after, v0, v1, args, kwargs):
#       if len(args) != 2: return MISS
#       a0, a1, = args
#       count = len(N)
#       if R[v0]() is not a0 or P[v0] != a0.data_ptr(): del N[count:]; return MISS
#       if type(a1) is not float: del N[count:]; return MISS
#       N.append(a1)
#       if kwargs: del N[count:]; return MISS
#       try: result = call(a0, a1)
#       except BaseException: del N[count:]; raise
#       K = MADE[0][1]; R[K] = ref(result); P[K] = result.data_ptr()
#       return result
#
# R, P, N are `met`, `lies` and `numbers` of the step; v0, v1 stand for what an earlier step was given.
@cache
def _check_of_shape(codes: str, words: str, results: str, has_before: bool, has_after: bool) -> Any:
    """Return the function of all checks of one shape; what differs comes before the arguments.

    Generated, because a step compares some hundred arguments, and a loop over them takes three times as
    long; the source depends on these letters only.
    """
    names = [f"a{place}" for place in range(len(codes))]
    fail = "del N[count:]; return MISS"
    lines = []
    for place, (name, code) in enumerate(zip(names, codes, strict=True)):
        if code == "r":
            lines.append(f"if R[v{place}]() is not {name} or P[v{place}] != {name}.data_ptr(): {fail}")
        elif code == "k":
            lines.append(f"if {name} is not v{place}: {fail}")
        elif code == "c":
            lines.append(f"if type({name}) is not type(v{place}) or {name} != v{place}: {fail}")
        elif code in "fi":
            lines.append(f"if type({name}) is not {'float' if code == 'f' else 'int'}: {fail}")
            lines.append(f"N.append({name})")
        else:
            lines.append(f"if not fits(v{place}, {name}): {fail}")
    if words == "none":
        lines.append(f"if kwargs: {fail}")
    elif words == "same":
        lines.append(f"if not kwargs or kwargs != KW: {fail}")
    else:
        lines.append(f"if not kwargs or kwargs.keys() != KW.keys(): {fail}")
        lines.append(f"if not all([fits(KW[k], v) for k, v in kwargs.items()]): {fail}")
    if has_before:
        lines.append("before(args, kwargs)")
    given = ", ".join([*names, *(["**kwargs"] if words != "none" else [])])
    lines.append(f"try: result = call({given})")
    lines.append("except BaseException: del N[count:]; raise")
    if has_after:
        lines.append("after(result)")
    if results == "one":
        lines.append("K = MADE[0][1]; R[K] = ref(result); P[K] = result.data_ptr()")
    elif results == "many":
        lines.append("flat = flattened(result)")
        lines.append("for place, k in MADE: t = flat[place]; R[k] = ref(t); P[k] = t.data_ptr()")
    unpack = (
        f"if len(args) != {len(names)}: return MISS\n    {', '.join(names)}, = args"
        if names
        else "if args: return MISS"
    )
    body = "\n    ".join([unpack, "count = len(N)", *lines, "return result"])
    values = "".join(f"v{place}, " for place in range(len(codes)))
    given = f"R, P, N, fits, call, KW, MADE, before, after, {values}args, kwargs"
    source = f"def check({given}):\n    {body}\n"
    space: dict[str, Any] = {"MISS": MISS, "ref": ref, "flattened": flattened}
    exec(source, space)
    return space["check"]


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
    # A view of a view that moves lies at another place with it, whatever its own integers are.
    if any(tensor.moves is not None for tensor in given):
        return loose
    if loose == tokens:
        return None
    # An earlier step has cut the same shape here from another place: so this is a window that moves.
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

    geometry: of the tensor that it is a view of.
    """
    # e.g. of x[i:i+8]: (("r", 3), ("c", 0, ...), ("i",), ("i",))
    name, (_, _, stride, _) = func.overloadpacket.__name__, geometry
    places = _PLACING.get(name, ())
    if not places or len(tokens) < 2:  # torch omits arguments that have their defaults
        return tokens
    if name != "as_strided":
        # In an expanded dimension, the offset of the result does not show the integers.
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
