"""Arithmetic: functions that compute a number from numbers, on every branch, and do nothing else.

A schedule calls such a function with another number at each step, so a reading of one call proves
nothing about the next. Here all of the source is checked, whatever path a call takes.
"""

from __future__ import annotations

import ast
import functools
import math
import types
from collections.abc import Callable
from typing import Any

from everystep.step.purity.guards import is_plain, kind_of
from everystep.step.purity.source import source_of

__all__ = ["is_arithmetic"]

#: Returns what a name in a function stands for outside of it, and notes it.
_FreeValue = Callable[[types.FunctionType, str], Any]

_NODES: tuple[type[ast.AST], ...] = (
    *(ast.Return, ast.If, ast.Assign, ast.AugAssign, ast.Pass, ast.Expr),
    *(ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.keyword),
)
_FUNCTIONS = (abs, min, max, round, pow, divmod, int, float, bool)
_OF_MATH = tuple(f for f in vars(math).values() if isinstance(f, types.BuiltinFunctionType))
_DEEPEST = 4


def is_arithmetic(function: Any, free_value: _FreeValue, depth: int = 0) -> bool:
    """Tell whether a function of Python does nothing but arithmetic, if it is called with numbers."""
    if kind_of(function) is functools.partial:
        bound = (*function.args, *function.keywords.values())
        return all(map(_is_number, bound)) and is_arithmetic(function.func, free_value, depth)
    if kind_of(function) is not types.FunctionType or depth > _DEEPEST:
        return False
    node = source_of(function.__code__).node
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if node is None or not all(map(_is_number, defaults)):
        return False
    body = node.body if isinstance(node.body, list) else [node.body]
    nodes = [each for statement in body for each in ast.walk(statement)]
    called = {id(each.func): each for each in nodes if isinstance(each, ast.Call)}
    local = {each.id for each in nodes if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    local |= {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
    attributes = {id(each.value) for each in nodes if isinstance(each, ast.Attribute)}

    def is_fine(each: ast.AST) -> bool:
        if isinstance(each, ast.Attribute):
            return _constant_of_math(each, function, local, free_value, is_called=id(each) in called)
        if isinstance(each, ast.Assign) and not all(isinstance(t, ast.Name) for t in each.targets):
            return False
        if isinstance(each, ast.Name) and id(each) in called:
            return each.id not in local and _may_call(free_value(function, each.id), free_value, depth)
        if isinstance(each, ast.Name) and each.id not in local and id(each) not in attributes:
            return _is_number(free_value(function, each.id))
        if isinstance(each, ast.Call) and not isinstance(each.func, ast.Name | ast.Attribute):
            return False
        return isinstance(each, _NODES)

    return all(map(is_fine, nodes))


def _may_call(function: Any, free_value: _FreeValue, depth: int) -> bool:
    if any(function is each for each in (*_FUNCTIONS, *_OF_MATH)):
        return True
    return is_arithmetic(function, free_value, depth + 1)


def _constant_of_math(
    node: ast.Attribute,
    function: types.FunctionType,
    local: set[str],
    free_value: _FreeValue,
    *,
    is_called: bool,
) -> bool:
    """Tell whether an attribute is one of `math`: a function that is called, or a number."""
    if not isinstance(node.value, ast.Name) or node.value.id in local:
        return False
    if free_value(function, node.value.id) is not math:
        return False
    found = vars(math).get(node.attr)
    return any(found is each for each in _OF_MATH) if is_called else _is_number(found)


def _is_number(value: Any) -> bool:
    return value is None or (is_plain(value) and type(value) in (int, float, bool))
