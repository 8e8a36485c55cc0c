"""Expressions: their values, as in Python, and their names and targets."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from everystep.step.purity.attributes import NotProvenError, name_of
from everystep.step.purity.calls import Calls
from everystep.step.purity.frame import Frame
from everystep.step.purity.guards import ABSENT, Guards, is_a, is_plain, kind_of, mro_of
from everystep.step.purity.source import FunctionNode
from everystep.step.purity.values import Interpreted, SuperOf

__all__ = ["Expressions"]

#: Maximum number of nodes of the syntax tree that are visited.
MOST_PARTS = 2_000_000


class Expressions:
    """Evaluates expressions of the user.

    Args:
        guards: collects what was read.
        is_state: tells whether a tensor belongs to the state of the training.
    """

    def __init__(self, guards: Guards, is_state: Callable[[Tensor], bool]) -> None:
        self.values: Calls = Calls(guards, is_state, self._call_function)
        self._guards = guards
        self._left = MOST_PARTS
        self._current: tuple[ast.stmt | ast.expr, str] | None = None

    def _value(self, node: ast.expr, frame: Frame) -> Any:
        self._left -= 1
        if self._left < 0:
            raise NotProvenError("is too long to analyze")
        evaluate = getattr(self, f"_of_{type(node).__name__}", None)
        if evaluate is None:
            raise NotProvenError("is an unsupported expression")
        self._at(node, frame)
        found: Any = evaluate(node, frame)
        return found

    def _truth(self, node: ast.expr, frame: Frame) -> bool:
        value = self._value(node, frame)
        self._at(node, frame)
        return self.values.truth(value)

    def _of_Constant(self, node: ast.Constant, frame: Frame) -> Any:  # noqa: N802
        return node.value

    def _of_Name(self, node: ast.Name, frame: Frame) -> Any:  # noqa: N802
        if node.id.startswith("__") and node.id != "__debug__":
            raise NotProvenError("reads a private name")
        return frame.lookup(node.id, self.free_value)

    def _of_Attribute(self, node: ast.Attribute, frame: Frame) -> Any:  # noqa: N802
        value = self._value(node.value, frame)
        self._at(node, frame)
        return self.values.attribute(value, node.attr)

    def _of_Subscript(self, node: ast.Subscript, frame: Frame) -> Any:  # noqa: N802
        value, index = self._value(node.value, frame), self._value(node.slice, frame)
        self._at(node, frame)
        return self.values.item(value, index)

    def _of_Slice(self, node: ast.Slice, frame: Frame) -> slice:  # noqa: N802
        parts = (node.lower, node.upper, node.step)
        return slice(*(None if part is None else self._value(part, frame) for part in parts))

    def _of_Tuple(self, node: ast.Tuple, frame: Frame) -> Any:  # noqa: N802
        return self.values.made(tuple(self._items(node.elts, frame)))

    def _of_List(self, node: ast.List, frame: Frame) -> Any:  # noqa: N802
        return self.values.made(list(self._items(node.elts, frame)))

    def _of_Dict(self, node: ast.Dict, frame: Frame) -> Any:  # noqa: N802
        found: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                within = self._value(value, frame)
                if type(within) is not dict:
                    raise NotProvenError("unpacks with ** something that is not a dict")
                found |= dict(zip(self.values.iterate(within), within.values(), strict=True))
                continue
            name = self._value(key, frame)
            if not is_plain(name):
                raise NotProvenError("makes a dict with a key that is not plain data")
            found[name] = self._value(value, frame)
        return self.values.made(found)

    def _items(self, nodes: list[ast.expr], frame: Frame) -> Iterator[Any]:
        for node in nodes:
            if isinstance(node, ast.Starred):
                yield from self.values.iterate(self._value(node.value, frame))
            else:
                yield self._value(node, frame)

    def _of_BinOp(self, node: ast.BinOp, frame: Frame) -> Any:  # noqa: N802
        one, two = self._value(node.left, frame), self._value(node.right, frame)
        self._at(node, frame)
        return self.values.binary(type(node.op).__name__, one, two)

    def _of_UnaryOp(self, node: ast.UnaryOp, frame: Frame) -> Any:  # noqa: N802
        return self.values.unary(type(node.op).__name__, self._value(node.operand, frame))

    def _of_BoolOp(self, node: ast.BoolOp, frame: Frame) -> Any:  # noqa: N802
        is_and = isinstance(node.op, ast.And)
        for part in node.values[:-1]:
            value = self._value(part, frame)
            if self.values.truth(value) != is_and:
                return value
        return self._value(node.values[-1], frame)

    def _of_Compare(self, node: ast.Compare, frame: Frame) -> Any:  # noqa: N802
        one, found = self._value(node.left, frame), None
        for index, (operator, other) in enumerate(zip(node.ops, node.comparators, strict=True)):
            two = self._value(other, frame)
            found = self.values.compare(type(operator).__name__, one, two)
            if index < len(node.ops) - 1 and not self.values.truth(found):
                return found
            one = two
        return found

    def _of_IfExp(self, node: ast.IfExp, frame: Frame) -> Any:  # noqa: N802
        return self._value(node.body if self._truth(node.test, frame) else node.orelse, frame)

    def _of_NamedExpr(self, node: ast.NamedExpr, frame: Frame) -> Any:  # noqa: N802
        if frame.is_comprehension:
            raise NotProvenError("assigns inside a comprehension")
        value = self._value(node.value, frame)
        self._assign(node.target, value, frame)
        return value

    def _of_JoinedStr(self, node: ast.JoinedStr, frame: Frame) -> str:  # noqa: N802
        return "".join(str(self._value(part, frame)) for part in node.values)

    def _of_FormattedValue(self, node: ast.FormattedValue, frame: Frame) -> str:  # noqa: N802
        value = self._value(node.value, frame)
        if not is_plain(value):
            raise NotProvenError(f"formats {name_of(value)} as text")
        spec = "" if node.format_spec is None else self._value(node.format_spec, frame)
        if node.conversion == ord("r"):
            value = repr(value)
        elif node.conversion != -1:
            value = str(value) if node.conversion == ord("s") else ascii(value)
        return format(value, spec)

    def _of_Lambda(self, node: ast.Lambda, frame: Frame) -> Interpreted:  # noqa: N802
        return self._function(node, frame)

    def _function(self, node: FunctionNode, frame: Frame) -> Interpreted:
        defaults = tuple(self._value(default, frame) for default in node.args.defaults)
        named = {
            parameter.arg: self._value(default, frame)
            for parameter, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            if default is not None
        }

        def call(args: list[Any], keywords: dict[str, Any]) -> Any:
            return self._run(Frame(node, frame.file, parent=frame), defaults, named, args, keywords)

        return Interpreted(call)

    def _of_Call(self, node: ast.Call, frame: Frame) -> Any:  # noqa: N802
        function = self._value(node.func, frame)
        if function is super:
            return self._super(node, frame)
        args = list(self._items(node.args, frame))
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self._value(keyword.value, frame)
            if keyword.arg is not None:
                keywords[keyword.arg] = value
            elif type(value) is dict:
                keywords |= dict(zip(self.values.iterate(value), value.values(), strict=True))
            else:
                raise NotProvenError("unpacks with ** something that is not a dict")
        self._at(node, frame)
        return self.values.call(function, args, keywords)

    def _super(self, node: ast.Call, frame: Frame) -> SuperOf:
        if node.args or node.keywords:
            given = [self._value(argument, frame) for argument in node.args]
        else:
            top = frame.top
            first = next(iter([*top.node.args.posonlyargs, *top.node.args.args]))
            given = [top.free("__class__", self.free_value), top.values[first.arg]]
        if len(given) != 2 or not is_a(given[0], type) or given[0] not in mro_of(kind_of(given[1])):
            raise NotProvenError("calls super in an unsupported way")
        return SuperOf(given[0], given[1])

    def _of_ListComp(self, node: ast.ListComp, frame: Frame) -> Any:  # noqa: N802
        return self.values.made(list(self._comprehended(node, frame)))

    def _of_GeneratorExp(self, node: ast.GeneratorExp, frame: Frame) -> Any:  # noqa: N802
        return self.values.made(self._comprehended(node, frame))

    def _of_DictComp(self, node: ast.DictComp, frame: Frame) -> Any:  # noqa: N802
        found = {}
        for key, value in self._comprehended(node, frame):
            if not is_plain(key):
                raise NotProvenError("makes a dict with a key that is not plain data")
            found[key] = value
        return self.values.made(found)

    def _comprehended(
        self, node: ast.ListComp | ast.GeneratorExp | ast.DictComp, frame: Frame
    ) -> Iterator[Any]:
        """Yield the items of a comprehension; its first iterable is evaluated at once, as in Python."""
        first = self.values.iterate(self._value(node.generators[0].iter, frame))
        inner = Frame(frame.node, frame.file, parent=frame, is_comprehension=True)
        return self._each(node, 0, first, inner)

    def _each(self, node: Any, depth: int, items: Iterator[Any], frame: Frame) -> Iterator[Any]:
        part = node.generators[depth]
        if part.is_async:
            raise NotProvenError("is asynchronous")
        for item in items:
            self._assign(part.target, item, frame)
            if not all(self._truth(test, frame) for test in part.ifs):
                continue
            if depth + 1 < len(node.generators):
                within = self.values.iterate(self._value(node.generators[depth + 1].iter, frame))
                yield from self._each(node, depth + 1, within, frame)
            elif isinstance(node, ast.DictComp):
                yield self._value(node.key, frame), self._value(node.value, frame)
            else:
                yield self._value(node.elt, frame)

    # Targets.

    def _assign(self, target: ast.expr, value: Any, frame: Frame) -> None:
        if isinstance(target, ast.Name):
            frame.set(target.id, value)
        elif isinstance(target, ast.Tuple | ast.List):
            self._unpack(target.elts, list(self.values.iterate(value)), frame)
        elif isinstance(target, ast.Subscript):
            owner = self._value(target.value, frame)
            self.values.set_item(owner, self._value(target.slice, frame), value)
        elif isinstance(target, ast.Attribute):
            self.values.set_attribute(self._value(target.value, frame), target.attr, value)
        else:
            raise NotProvenError("assigns in an unsupported way")

    def _unpack(self, targets: list[ast.expr], items: list[Any], frame: Frame) -> None:
        starred = [i for i, target in enumerate(targets) if isinstance(target, ast.Starred)]
        if starred:
            at, after = starred[0], len(targets) - starred[0] - 1
            middle = self.values.made(items[at : len(items) - after])
            items = [*items[:at], middle, *items[len(items) - after :]]
            targets = [t.value if isinstance(t, ast.Starred) else t for t in targets]
        for target, item in zip(targets, items, strict=True):
            self._assign(target, item, frame)

    # Names, and where the reading is.

    def free_value(self, function: types.FunctionType, name: str) -> Any:
        """Return what a function has closed over, or a global, or a builtin."""
        code, read = function.__code__, self._guards.read
        if name in code.co_freevars:
            cell = (function.__closure__ or ())[code.co_freevars.index(name)]
            where = f"{name}, a variable of the function around {function.__name__},"
            return self.values.outside(read((id(cell), "*cell"), where, _content, cell))
        places = (function.__globals__, getattr(function, "__builtins__", {}))
        for place in places:
            if type(place) is not dict:
                raise NotProvenError("has custom globals")
            found = read((id(place), name), f"the global {name}", place.get, name, ABSENT)
            if found is not ABSENT:
                return self.values.outside(found)
        raise NotProvenError(f"reads {name}, which does not exist")

    def _at(self, node: ast.stmt | ast.expr, frame: Frame) -> None:
        """Note the current position, for messages."""
        if frame.top.function is None or "/torch/" not in frame.file:
            self._current = node, frame.file

    @property
    def _place(self) -> str:
        if self._current is None:
            return ""
        node, file = self._current
        text = ast.unparse(node).partition("\n")[0]
        text = text if len(text) <= 60 else f"{text[:57]}..."
        return f"{Path(file).name}:{node.lineno}: `{text}` "

    # Functions.

    def _call_function(
        self, function: types.FunctionType, args: list[Any], keywords: dict[str, Any]
    ) -> Any:
        """Call a function of Python; see `Reader`."""
        raise NotImplementedError

    def _run(
        self,
        frame: Frame,
        defaults: tuple[Any, ...],
        named: dict[str, Any],
        args: list[Any],
        keywords: dict[str, Any],
    ) -> Any:
        """Run the body of a function; see `Reader`."""
        raise NotImplementedError


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return ABSENT
