"""Call checks: compare a call with the one that an earlier step made at the same point, and make it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import ref

import torch

from everystep.program.operators import flattened
from everystep.step.met_tensors import MetTensors

__all__ = ["MISS", "check_of"]

#: The result of a check for a call that does not match its entry.
MISS = object()


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
