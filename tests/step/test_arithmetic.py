"""Functions that a schedule may call at every step, although only one call of them is read."""

import builtins
import functools
import math

import pytest

from everystep.step.purity.arithmetic import is_arithmetic

seen = []
rate = 0.9
table = [1.0, 0.5]


def free(function, name):
    if name in function.__code__.co_freevars:
        return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
    return function.__globals__.get(name, getattr(builtins, name, None))


def half(step):
    return step / 2


def with_closure(decay):
    def factor(step):
        return decay**step

    return factor


def by_branches(step, *, warm_up=5):
    """Rise, then fall."""
    if step < warm_up:
        return float(step) / max(1, warm_up)
    left = 1 - step / 100
    left *= rate
    return 0.5 * (1 + math.cos(math.pi * left)) if left > 0 else math.exp(-1)


def recursive(step):
    return recursive(step - 1) if step else 1


FINE = {
    "lambda": lambda step: 0.9**step,
    "global": lambda step: rate**step,
    "closure": with_closure(0.5),
    "branches": by_branches,
    "another": lambda step: half(step) + 1,
    "partial": functools.partial(by_branches, warm_up=3),
}
REFUSED = {
    "effect": lambda step: seen.append(step),
    "effect on a branch": lambda step: 1.0 if step < 10**9 else seen.append(step),
    "call of what is given": lambda step: step(),
    "attribute of what is given": lambda step: step.real,
    "item": lambda step: table[step > 1],
    "print": lambda step: print(step) or 1.0,
    "builtin with effects": lambda step: setattr(math, "pi", 3) or 1.0,
    "object": with_closure([]),
    "default": lambda step, given=table: step,
    "partial of an object": functools.partial(by_branches, warm_up=table),
    "name in place of a function": lambda step: rate(step),
    "function as a value": lambda step: half,
    "comprehension": lambda step: max(each for each in (step, 1)),
    "walrus": lambda step: (other := step) + other,
    "another with an effect": lambda step: with_effect(step),
    "endless": recursive,
    "no function": max,
    "object with a call": type("Factor", (), {"__call__": lambda self, step: 1.0})(),
}


def with_effect(step):
    seen.append(step)
    return 1.0


@pytest.mark.parametrize("name", FINE)
def test_arithmetic_is_known(name):
    assert is_arithmetic(FINE[name], free)


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_not(name):
    assert not is_arithmetic(REFUSED[name], free)
