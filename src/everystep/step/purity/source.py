"""The source of a function: its syntax tree, if the function was compiled from exactly that text."""

from __future__ import annotations
import __future__

import ast
import linecache
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

__all__ = ["FunctionNode", "Source", "source_of"]

FunctionNode = ast.FunctionDef | ast.Lambda
#: The flag of `from __future__ import annotations`, which may stand in another cell of a notebook.
_FUTURE = __future__.annotations.compiler_flag


#: What a function that is read must not contain, because it has an effect wherever it stands.
_PROBLEMS: dict[type[ast.AST], str] = {
    ast.Global: "declares a global",
    ast.Nonlocal: "declares a nonlocal variable",
    ast.Yield: "is a generator",
    ast.YieldFrom: "is a generator",
    ast.Await: "is a coroutine",
    ast.AsyncFunctionDef: "defines a coroutine",
}


class Source(NamedTuple):
    """A function's node in the syntax tree of its file, or why no such node can be trusted."""

    node: FunctionNode | None
    problem: str = ""


@cache
def source_of(code: types.CodeType) -> Source:
    """Return the source that compiles to this very code object."""
    text = "".join(linecache.getlines(code.co_filename))
    if not text:
        return Source(None, "has no source")
    found = _functions_of(code.co_filename, text, code.co_flags & _FUTURE)
    nodes = [node for other, node in found if other == code]
    if len(nodes) != 1 or nodes[0] is None:
        return Source(None, "does not match its source file any more")
    for kind, problem in _PROBLEMS.items():
        if any(isinstance(each, kind) for each in ast.walk(nodes[0])):
            return Source(None, problem)
    return Source(nodes[0])


@cache
def _functions_of(
    filename: str, text: str, flags: int
) -> tuple[tuple[types.CodeType, FunctionNode | None], ...]:
    """Return each function in a file: its code object and its node."""
    try:
        tree = ast.parse(text, filename)
        module = compile(text, filename, "exec", flags=flags, dont_inherit=True)
    except (SyntaxError, ValueError):
        return ()
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    return tuple((code, _node_of(code, nodes)) for code in _codes(module))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _node_of(code: types.CodeType, nodes: list[FunctionNode]) -> FunctionNode | None:
    """Return the node of a code object: of its name, with all its instructions within."""
    places = [place for place in code.co_positions() if None not in place and place[2:] != (0, 0)]
    fitting = [node for node in nodes if _named(node) == code.co_name and _has_all(node, places, code)]
    # The innermost: a lambda may lie within another.
    fitting.sort(key=lambda node: (node.lineno, node.col_offset))
    return fitting[-1] if fitting else None


def _named(node: FunctionNode) -> str:
    return node.name if isinstance(node, ast.FunctionDef) else "<lambda>"


def _has_all(node: FunctionNode, places: list[Any], code: types.CodeType) -> bool:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    if first != code.co_firstlineno or [a.arg for a in _arguments(node)] != list(
        code.co_varnames[: len(_arguments(node))]
    ):
        return False
    body = node.body if isinstance(node.body, list) else [node.body]
    start = body[0].lineno, body[0].col_offset
    end = body[-1].end_lineno, body[-1].end_col_offset
    return all(start <= (line, column) and (last, until) <= end for line, last, column, until in places)


def _arguments(node: FunctionNode) -> list[ast.arg]:
    given = node.args
    return [*given.posonlyargs, *given.args, *given.kwonlyargs]
