"""Reader: interprets one step of the user's Python from its source, and notes everything it uses.

It evaluates the syntax tree on the real batch, value by value. Anything that is not known to be free of
effects other than tensor operations ends the reading: it is strict rather than clever.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._contextlib import _DecoratorContextManager

from everystep.step.purity.attributes import NotProvenError
from everystep.step.purity.expressions import Expressions
from everystep.step.purity.frame import Frame
from everystep.step.purity.guards import is_plain, kind_of
from everystep.step.purity.source import source_of

__all__ = ["Reader"]

#: Modes without settings.
_MODES = (torch.no_grad, torch.enable_grad)


class Reader(Expressions):
    """Interprets functions of the user.

    Args:
        guards: collects what was read.
        is_state: tells whether a tensor belongs to the state of the training.
    """

    def call(self, function: Any, *args: Any) -> Any:
        """Call a module, a function or an object as the step does.

        Raises:
            NotProvenError: it does something that is not known to be an operation; says where and what.
        """
        self.values.made(args)
        return self._located(self.values.call, function, list(args), {})

    def item(self, value: Any, index: Any) -> Any:
        """Return `value[index]`.

        Raises:
            as `call`.
        """
        return self._located(self.values.item, value, index)

    def _located(self, read: Callable[..., Any], *given: Any) -> Any:
        """Read, and add the position to the reason that ends the reading."""
        try:
            return read(*given)
        except NotProvenError as error:
            raise NotProvenError(f"{self._place}{error}") from None
        except Exception as error:  # what the step raises, it raises when Python runs it, too
            reason = str(error).strip().partition("\n")[0]
            raise NotProvenError(f"{self._place}{type(error).__name__}: {reason}") from None

    # Functions.

    def _call_function(
        self, function: types.FunctionType, args: list[Any], keywords: dict[str, Any]
    ) -> Any:
        read, name = self._guards.read, function.__name__
        code = read((id(function), "*code"), f"the code of {name}", getattr, function, "__code__")
        source = source_of(code)
        if source.node is None:
            raise NotProvenError(f"{name} {source.problem}")
        where = f"a default of {name}"
        defaults = read((id(function), "*defaults"), where, getattr, function, "__defaults__") or ()
        named = read((id(function), "*named"), where, getattr, function, "__kwdefaults__") or {}
        if named:
            self._guards.contents(named, where)
        for value in (*defaults, *named.values()):
            self.values.outside(value)
        frame = Frame(source.node, code.co_filename, function=function)
        frame.names |= {*code.co_varnames, *code.co_cellvars}
        return self._run(frame, defaults, named, args, keywords)

    def _run(
        self,
        frame: Frame,
        defaults: tuple[Any, ...],
        named: dict[str, Any],
        args: list[Any],
        keywords: dict[str, Any],
    ) -> Any:
        frame.bind(defaults, named, args, keywords, self.values.made)
        node = frame.node
        if isinstance(node, ast.Lambda):
            return self._value(node.body, frame)
        assert isinstance(node, ast.FunctionDef)
        ended = self._statements(node.body, frame)
        return ended.value if isinstance(ended, _Return) else None

    # Statements.

    def _statements(self, body: list[ast.stmt], frame: Frame) -> _Ended | None:
        for statement in body:
            self._at(statement, frame)
            run = getattr(self, f"_do_{type(statement).__name__}", None)
            if run is None:
                raise NotProvenError(_SAID.get(type(statement), "is an unsupported statement"))
            ended = run(statement, frame)
            if ended is not None:
                return ended  # type: ignore[no-any-return]
        return None

    def _do_Pass(self, node: ast.Pass, frame: Frame) -> None:  # noqa: N802
        """Do nothing."""

    def _do_Expr(self, node: ast.Expr, frame: Frame) -> None:  # noqa: N802
        self._value(node.value, frame)

    def _do_Return(self, node: ast.Return, frame: Frame) -> _Return:  # noqa: N802
        return _Return(None if node.value is None else self._value(node.value, frame))

    def _do_Break(self, node: ast.Break, frame: Frame) -> _Break:  # noqa: N802
        return _Break()

    def _do_Continue(self, node: ast.Continue, frame: Frame) -> _Continue:  # noqa: N802
        return _Continue()

    def _do_Assign(self, node: ast.Assign, frame: Frame) -> None:  # noqa: N802
        value = self._value(node.value, frame)
        self._at(node, frame)
        for target in node.targets:
            self._assign(target, value, frame)

    def _do_AnnAssign(self, node: ast.AnnAssign, frame: Frame) -> None:  # noqa: N802
        if node.value is not None:
            self._assign(node.target, self._value(node.value, frame), frame)

    def _do_AugAssign(self, node: ast.AugAssign, frame: Frame) -> None:  # noqa: N802
        operator, target = type(node.op).__name__, node.target
        if isinstance(target, ast.Name):
            old = frame.lookup(target.id, self.free_value)
            frame.set(target.id, self.values.in_place(operator, old, self._value(node.value, frame)))
        elif isinstance(target, ast.Subscript):
            owner, index = self._value(target.value, frame), self._value(target.slice, frame)
            old = self.values.item(owner, index)
            new = self.values.in_place(operator, old, self._value(node.value, frame))
            self.values.set_item(owner, index, new)
        else:
            owner = self._value(target.value, frame)
            old = self.values.attribute(owner, target.attr)
            new = self.values.in_place(operator, old, self._value(node.value, frame))
            self._at(node, frame)
            if new is not old or not self.values.is_buffer(owner, target.attr):
                self.values.set_attribute(owner, target.attr, new)

    def _do_Assert(self, node: ast.Assert, frame: Frame) -> None:  # noqa: N802
        if __debug__ and not self._truth(node.test, frame):
            raise NotProvenError("an assertion fails")

    def _do_If(self, node: ast.If, frame: Frame) -> _Ended | None:  # noqa: N802
        branch = node.body if self._truth(node.test, frame) else node.orelse
        return self._statements(branch, frame)

    def _do_While(self, node: ast.While, frame: Frame) -> _Ended | None:  # noqa: N802
        while self._truth(node.test, frame):
            ended = self._statements(node.body, frame)
            if isinstance(ended, _Return):
                return ended
            if isinstance(ended, _Break):
                return None
        return self._statements(node.orelse, frame)

    def _do_For(self, node: ast.For, frame: Frame) -> _Ended | None:  # noqa: N802
        for item in self.values.iterate(self._value(node.iter, frame)):
            self._assign(node.target, item, frame)
            ended = self._statements(node.body, frame)
            if isinstance(ended, _Return):
                return ended
            if isinstance(ended, _Break):
                return None
        return self._statements(node.orelse, frame)

    def _do_With(self, node: ast.With, frame: Frame) -> _Ended | None:  # noqa: N802
        contexts = self.values.contexts
        names = [f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in contexts]
        refused = NotProvenError(
            f"uses with, which is supported only for {' or '.join(dict.fromkeys(names))}"
        )
        with ExitStack() as entered:
            for item in node.items:
                made = item.context_expr
                mode = self._mode(made.func, frame) if isinstance(made, ast.Call) else None
                if not isinstance(made, ast.Call) or item.optional_vars is not None:
                    raise refused
                if not any(mode is each for each in contexts):
                    raise refused
                args = [self._value(argument, frame) for argument in made.args]
                keywords = {k.arg or "": self._value(k.value, frame) for k in made.keywords}
                if "" in keywords or not all(map(is_plain, (*args, *keywords.values()))):
                    raise refused
                entered.enter_context(mode(*args, **keywords))  # type: ignore[misc]
            return self._statements(node.body, frame)

    def _mode(self, node: ast.expr, frame: Frame) -> Any:
        """Return what a context is made with; a decorator makes its own by its method `clone`."""
        found = self._value(node, frame)
        is_clone = (
            kind_of(found) is types.MethodType and found.__func__ is _DecoratorContextManager.clone
        )
        return type(found.__self__) if is_clone and kind_of(found.__self__) in _MODES else found

    def _do_FunctionDef(self, node: ast.FunctionDef, frame: Frame) -> None:  # noqa: N802
        if node.decorator_list:
            raise NotProvenError("defines a function with a decorator")
        frame.set(node.name, self._function(node, frame))

    def _do_Delete(self, node: ast.Delete, frame: Frame) -> None:  # noqa: N802
        for target in node.targets:
            if not isinstance(target, ast.Name) or target.id not in frame.values:
                raise NotProvenError("deletes more than a local name")
            del frame.values[target.id]


class _Ended:
    """How a list of statements ended before its last."""


class _Return(_Ended):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Break(_Ended):
    pass


class _Continue(_Ended):
    pass


_SAID: dict[type, str] = {
    ast.Try: "uses try, which may hide a side effect",
    ast.Raise: "raises an exception",
    ast.Import: "imports a module",
    ast.ImportFrom: "imports a module",
    ast.ClassDef: "defines a class",
}
