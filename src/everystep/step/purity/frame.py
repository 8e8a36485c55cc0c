"""Frames: the local names of a call that is read, and the values of its parameters."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from typing import Any

from everystep.step.purity.attributes import NotProvenError
from everystep.step.purity.source import FunctionNode

__all__ = ["Frame"]

#: Returns what a name stands for outside of a function.
FreeValue = Callable[[types.FunctionType, str], Any]


class Frame:
    """The local names of one call, or of a comprehension within it."""

    def __init__(
        self,
        node: FunctionNode,
        file: str,
        *,
        function: types.FunctionType | None = None,
        parent: Frame | None = None,
        is_comprehension: bool = False,
    ) -> None:
        self.node = node
        self.file = file
        self.function = function
        self.parent = parent
        self.is_comprehension = is_comprehension
        self.values: dict[str, Any] = {}
        self.names = set() if is_comprehension else _local_names(node)

    @property
    def top(self) -> Frame:
        """The frame of the function with its own code object."""
        return self if self.parent is None else self.parent.top

    def bind(
        self,
        defaults: tuple[Any, ...],
        named: dict[str, Any],
        args: list[Any],
        keywords: dict[str, Any],
        made: Callable[[Any], Any],
    ) -> None:
        """Bind arguments to the parameters of a function, as a call does.

        made: notes that the step made a container.
        """
        given, found, left = self.node.args, self.values, dict(keywords)
        positional = [parameter.arg for parameter in (*given.posonlyargs, *given.args)]
        by_name = {*positional[len(given.posonlyargs) :], *(p.arg for p in given.kwonlyargs)}
        found |= dict(zip(positional, args, strict=False))
        for name in list(left):
            if name in by_name:
                if name in found:
                    raise TypeError(f"got multiple values for {name}")
                found[name] = left.pop(name)
        for name, value in zip(positional[len(positional) - len(defaults) :], defaults, strict=True):
            found.setdefault(name, value)
        for parameter in given.kwonlyargs:
            if parameter.arg in named:
                found.setdefault(parameter.arg, named[parameter.arg])
        if given.vararg is not None:
            found[given.vararg.arg] = made(tuple(args[len(positional) :]))
        elif len(args) > len(positional):
            raise TypeError("takes fewer arguments")
        if given.kwarg is not None:
            found[given.kwarg.arg] = made(left)
        elif left:
            raise TypeError(f"has no argument {min(left)}")
        missing = [name for name in (*positional, *by_name) if name not in found]
        if missing:
            raise TypeError(f"is missing the argument {missing[0]}")

    def set(self, name: str, value: Any) -> None:
        """Set a local name."""
        self.values[name] = value

    def lookup(self, name: str, free_value: FreeValue) -> Any:
        """Return the value of a name: local, of a frame around, or of the function's surroundings."""
        if name in self.values:
            return self.values[name]
        if name in self.names:
            raise NotProvenError(f"reads {name} before it is assigned")
        if self.parent is not None:
            return self.parent.lookup(name, free_value)
        return self.free(name, free_value)

    def free(self, name: str, free_value: FreeValue) -> Any:
        """Return the value of a name from outside the function."""
        assert self.function is not None
        return free_value(self.function, name)


def _local_names(node: FunctionNode) -> set[str]:
    """Return the names that a function within the step's own code sets."""
    found = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
    waiting: list[ast.AST] = list(node.body) if isinstance(node.body, list) else [node.body]
    while waiting:
        each = waiting.pop()
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store | ast.Del):
            found.add(each.id)
        elif isinstance(each, ast.FunctionDef | ast.ClassDef):
            found.add(each.name)
            continue
        elif isinstance(each, ast.Lambda | ast.ListComp | ast.DictComp | ast.GeneratorExp):
            continue
        waiting += ast.iter_child_nodes(each)
    return found
