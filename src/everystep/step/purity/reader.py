"""Reader: takes one step of the user's Python by its source, and notes all that it takes from outside.

The syntax tree is gone through on the real batch, value by value. Whatever is not known to have no
effect besides operations on tensors ends the reading: it is strict rather than clever.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from everystep.step.purity.attributes import NotProvenError, name_of
from everystep.step.purity.calls import Calls
from everystep.step.purity.guards import ABSENT, Guards, is_a, is_plain, kind_of, mro_of
from everystep.step.purity.source import FunctionNode, source_of
from everystep.step.purity.values import Interpreted, SuperOf

__all__ = ["Reader"]

#: How many parts of the syntax tree are gone through at most.
MOST_PARTS = 2_000_000


class Reader:
    """Interprets functions of the user.

    Args:
        guards: where what was read is noted.
        is_state: tells whether a tensor belongs to the state of the training.
    """

    def __init__(self, guards: Guards, is_state: Callable[[Tensor], bool]) -> None:
        self.values: Calls = Calls(guards, is_state, self._call_function)
        self._guards = guards
        self._left = MOST_PARTS
        self._current: tuple[ast.stmt | ast.expr, str] | None = None

    def call(self, function: Any, *args: Any) -> Any:
        """Call a module, a function or an object as the step does.

        Raises:
            NotProvenError: it does something that is not known to be an operation; says where and what.
        """
        self.values.made(args)
        return self._told(self.values.call, function, list(args), {})

    def item(self, value: Any, index: Any) -> Any:
        """Return `value[index]`.

        Raises:
            as `call`.
        """
        return self._told(self.values.item, value, index)

    def _told(self, read: Callable[..., Any], *given: Any) -> Any:
        """Read, and say of what ends the reading where it stands."""
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
        frame = _Frame(source.node, code.co_filename, function=function)
        frame.names |= {*code.co_varnames, *code.co_cellvars}
        return self._run(frame, defaults, named, args, keywords)

    def _run(
        self,
        frame: _Frame,
        defaults: tuple[Any, ...],
        named: dict[str, Any],
        args: list[Any],
        keywords: dict[str, Any],
    ) -> Any:
        self._bind(frame, defaults, named, args, keywords)
        node = frame.node
        if isinstance(node, ast.Lambda):
            return self._value(node.body, frame)
        assert isinstance(node, ast.FunctionDef)
        ended = self._statements(node.body, frame)
        return ended.value if isinstance(ended, _Return) else None

    def _bind(
        self,
        frame: _Frame,
        defaults: tuple[Any, ...],
        named: dict[str, Any],
        args: list[Any],
        keywords: dict[str, Any],
    ) -> None:
        """Give the parameters of a function their values, as a call does."""
        given, found, left = frame.node.args, frame.values, dict(keywords)
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
            found[given.vararg.arg] = self.values.made(tuple(args[len(positional) :]))
        elif len(args) > len(positional):
            raise TypeError("takes fewer arguments")
        if given.kwarg is not None:
            found[given.kwarg.arg] = self.values.made(left)
        elif left:
            raise TypeError(f"takes no argument {min(left)}")
        missing = [name for name in (*positional, *by_name) if name not in found]
        if missing:
            raise TypeError(f"misses {missing[0]}")

    # Statements.

    def _statements(self, body: list[ast.stmt], frame: _Frame) -> _Ended | None:
        for statement in body:
            self._at(statement, frame)
            run = getattr(self, f"_do_{type(statement).__name__}", None)
            if run is None:
                raise NotProvenError(f"{_SAID.get(type(statement), 'is a statement that is not read')}")
            ended = run(statement, frame)
            if ended is not None:
                return ended  # type: ignore[no-any-return]
        return None

    def _do_Pass(self, node: ast.Pass, frame: _Frame) -> None:  # noqa: N802
        """Do nothing."""

    def _do_Expr(self, node: ast.Expr, frame: _Frame) -> None:  # noqa: N802
        self._value(node.value, frame)

    def _do_Return(self, node: ast.Return, frame: _Frame) -> _Return:  # noqa: N802
        return _Return(None if node.value is None else self._value(node.value, frame))

    def _do_Break(self, node: ast.Break, frame: _Frame) -> _Break:  # noqa: N802
        return _Break()

    def _do_Continue(self, node: ast.Continue, frame: _Frame) -> _Continue:  # noqa: N802
        return _Continue()

    def _do_Assign(self, node: ast.Assign, frame: _Frame) -> None:  # noqa: N802
        value = self._value(node.value, frame)
        self._at(node, frame)
        for target in node.targets:
            self._assign(target, value, frame)

    def _do_AnnAssign(self, node: ast.AnnAssign, frame: _Frame) -> None:  # noqa: N802
        if node.value is not None:
            self._assign(node.target, self._value(node.value, frame), frame)

    def _do_AugAssign(self, node: ast.AugAssign, frame: _Frame) -> None:  # noqa: N802
        operator, target = type(node.op).__name__, node.target
        if isinstance(target, ast.Name):
            old = frame.lookup(target.id, self)
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

    def _do_Assert(self, node: ast.Assert, frame: _Frame) -> None:  # noqa: N802
        if __debug__ and not self._truth(node.test, frame):
            raise NotProvenError("an assertion fails")

    def _do_If(self, node: ast.If, frame: _Frame) -> _Ended | None:  # noqa: N802
        branch = node.body if self._truth(node.test, frame) else node.orelse
        return self._statements(branch, frame)

    def _do_While(self, node: ast.While, frame: _Frame) -> _Ended | None:  # noqa: N802
        while self._truth(node.test, frame):
            ended = self._statements(node.body, frame)
            if isinstance(ended, _Return):
                return ended
            if isinstance(ended, _Break):
                return None
        return self._statements(node.orelse, frame)

    def _do_For(self, node: ast.For, frame: _Frame) -> _Ended | None:  # noqa: N802
        for item in self.values.iterate(self._value(node.iter, frame)):
            self._assign(node.target, item, frame)
            ended = self._statements(node.body, frame)
            if isinstance(ended, _Return):
                return ended
            if isinstance(ended, _Break):
                return None
        return self._statements(node.orelse, frame)

    def _do_With(self, node: ast.With, frame: _Frame) -> _Ended | None:  # noqa: N802
        contexts = self.values.contexts
        names = [f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in contexts]
        refused = NotProvenError(f"with may only stand with {' or '.join(dict.fromkeys(names))}")
        with ExitStack() as entered:
            for item in node.items:
                made = item.context_expr
                mode = self._value(made.func, frame) if isinstance(made, ast.Call) else None
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

    def _do_FunctionDef(self, node: ast.FunctionDef, frame: _Frame) -> None:  # noqa: N802
        if node.decorator_list:
            raise NotProvenError("defines a function with a decorator")
        frame.set(node.name, self._function(node, frame))

    def _do_Delete(self, node: ast.Delete, frame: _Frame) -> None:  # noqa: N802
        for target in node.targets:
            if not isinstance(target, ast.Name) or target.id not in frame.values:
                raise NotProvenError("deletes more than a local name")
            del frame.values[target.id]

    def _assign(self, target: ast.expr, value: Any, frame: _Frame) -> None:
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
            raise NotProvenError("assigns in a way that is not read")

    def _unpack(self, targets: list[ast.expr], items: list[Any], frame: _Frame) -> None:
        starred = [i for i, target in enumerate(targets) if isinstance(target, ast.Starred)]
        if starred:
            at, after = starred[0], len(targets) - starred[0] - 1
            middle = self.values.made(items[at : len(items) - after])
            items = [*items[:at], middle, *items[len(items) - after :]]
            targets = [t.value if isinstance(t, ast.Starred) else t for t in targets]
        for target, item in zip(targets, items, strict=True):
            self._assign(target, item, frame)

    # Expressions.

    def _value(self, node: ast.expr, frame: _Frame) -> Any:
        self._left -= 1
        if self._left < 0:
            raise NotProvenError("takes too long to read")
        evaluate = getattr(self, f"_of_{type(node).__name__}", None)
        if evaluate is None:
            raise NotProvenError("is an expression that is not read")
        self._at(node, frame)
        found: Any = evaluate(node, frame)
        return found

    def _truth(self, node: ast.expr, frame: _Frame) -> bool:
        value = self._value(node, frame)
        self._at(node, frame)
        return self.values.truth(value)

    def _of_Constant(self, node: ast.Constant, frame: _Frame) -> Any:  # noqa: N802
        return node.value

    def _of_Name(self, node: ast.Name, frame: _Frame) -> Any:  # noqa: N802
        if node.id.startswith("__") and node.id != "__debug__":
            raise NotProvenError("reads a private name")
        return frame.lookup(node.id, self)

    def _of_Attribute(self, node: ast.Attribute, frame: _Frame) -> Any:  # noqa: N802
        value = self._value(node.value, frame)
        self._at(node, frame)
        return self.values.attribute(value, node.attr)

    def _of_Subscript(self, node: ast.Subscript, frame: _Frame) -> Any:  # noqa: N802
        value, index = self._value(node.value, frame), self._value(node.slice, frame)
        self._at(node, frame)
        return self.values.item(value, index)

    def _of_Slice(self, node: ast.Slice, frame: _Frame) -> slice:  # noqa: N802
        parts = (node.lower, node.upper, node.step)
        return slice(*(None if part is None else self._value(part, frame) for part in parts))

    def _of_Tuple(self, node: ast.Tuple, frame: _Frame) -> Any:  # noqa: N802
        return self.values.made(tuple(self._items(node.elts, frame)))

    def _of_List(self, node: ast.List, frame: _Frame) -> Any:  # noqa: N802
        return self.values.made(list(self._items(node.elts, frame)))

    def _of_Dict(self, node: ast.Dict, frame: _Frame) -> Any:  # noqa: N802
        found: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                within = self._value(value, frame)
                if type(within) is not dict:
                    raise NotProvenError("takes a dict apart that is none")
                found |= dict(zip(self.values.iterate(within), within.values(), strict=True))
                continue
            name = self._value(key, frame)
            if not is_plain(name):
                raise NotProvenError("makes a dict with a key that is not plain")
            found[name] = self._value(value, frame)
        return self.values.made(found)

    def _items(self, nodes: list[ast.expr], frame: _Frame) -> Iterator[Any]:
        for node in nodes:
            if isinstance(node, ast.Starred):
                yield from self.values.iterate(self._value(node.value, frame))
            else:
                yield self._value(node, frame)

    def _of_BinOp(self, node: ast.BinOp, frame: _Frame) -> Any:  # noqa: N802
        one, two = self._value(node.left, frame), self._value(node.right, frame)
        self._at(node, frame)
        return self.values.binary(type(node.op).__name__, one, two)

    def _of_UnaryOp(self, node: ast.UnaryOp, frame: _Frame) -> Any:  # noqa: N802
        return self.values.unary(type(node.op).__name__, self._value(node.operand, frame))

    def _of_BoolOp(self, node: ast.BoolOp, frame: _Frame) -> Any:  # noqa: N802
        is_and = isinstance(node.op, ast.And)
        for part in node.values[:-1]:
            value = self._value(part, frame)
            if self.values.truth(value) != is_and:
                return value
        return self._value(node.values[-1], frame)

    def _of_Compare(self, node: ast.Compare, frame: _Frame) -> Any:  # noqa: N802
        one, found = self._value(node.left, frame), None
        for index, (operator, other) in enumerate(zip(node.ops, node.comparators, strict=True)):
            two = self._value(other, frame)
            found = self.values.compare(type(operator).__name__, one, two)
            if index < len(node.ops) - 1 and not self.values.truth(found):
                return found
            one = two
        return found

    def _of_IfExp(self, node: ast.IfExp, frame: _Frame) -> Any:  # noqa: N802
        return self._value(node.body if self._truth(node.test, frame) else node.orelse, frame)

    def _of_NamedExpr(self, node: ast.NamedExpr, frame: _Frame) -> Any:  # noqa: N802
        if frame.is_comprehension:
            raise NotProvenError("assigns within a comprehension")
        value = self._value(node.value, frame)
        self._assign(node.target, value, frame)
        return value

    def _of_JoinedStr(self, node: ast.JoinedStr, frame: _Frame) -> str:  # noqa: N802
        return "".join(str(self._value(part, frame)) for part in node.values)

    def _of_FormattedValue(self, node: ast.FormattedValue, frame: _Frame) -> str:  # noqa: N802
        value = self._value(node.value, frame)
        if not is_plain(value):
            raise NotProvenError(f"makes a text of {name_of(value)}")
        spec = "" if node.format_spec is None else self._value(node.format_spec, frame)
        if node.conversion == ord("r"):
            value = repr(value)
        elif node.conversion != -1:
            value = str(value) if node.conversion == ord("s") else ascii(value)
        return format(value, spec)

    def _of_Lambda(self, node: ast.Lambda, frame: _Frame) -> Interpreted:  # noqa: N802
        return self._function(node, frame)

    def _function(self, node: FunctionNode, frame: _Frame) -> Interpreted:
        defaults = tuple(self._value(default, frame) for default in node.args.defaults)
        named = {
            parameter.arg: self._value(default, frame)
            for parameter, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            if default is not None
        }

        def call(args: list[Any], keywords: dict[str, Any]) -> Any:
            return self._run(_Frame(node, frame.file, parent=frame), defaults, named, args, keywords)

        return Interpreted(call)

    def _of_Call(self, node: ast.Call, frame: _Frame) -> Any:  # noqa: N802
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
                raise NotProvenError("takes keywords apart that are no dict")
        self._at(node, frame)
        return self.values.call(function, args, keywords)

    def _super(self, node: ast.Call, frame: _Frame) -> SuperOf:
        if node.args or node.keywords:
            given = [self._value(argument, frame) for argument in node.args]
        else:
            top = frame.top
            first = next(iter([*top.node.args.posonlyargs, *top.node.args.args]))
            given = [top.free("__class__", self), top.values[first.arg]]
        if len(given) != 2 or not is_a(given[0], type) or given[0] not in mro_of(kind_of(given[1])):
            raise NotProvenError("calls super in a way that is not read")
        return SuperOf(given[0], given[1])

    def _of_ListComp(self, node: ast.ListComp, frame: _Frame) -> Any:  # noqa: N802
        return self.values.made(list(self._comprehended(node, frame)))

    def _of_GeneratorExp(self, node: ast.GeneratorExp, frame: _Frame) -> Any:  # noqa: N802
        return self.values.made(self._comprehended(node, frame))

    def _of_DictComp(self, node: ast.DictComp, frame: _Frame) -> Any:  # noqa: N802
        found = {}
        for key, value in self._comprehended(node, frame):
            if not is_plain(key):
                raise NotProvenError("makes a dict with a key that is not plain")
            found[key] = value
        return self.values.made(found)

    def _comprehended(
        self, node: ast.ListComp | ast.GeneratorExp | ast.DictComp, frame: _Frame
    ) -> Iterator[Any]:
        """Yield the items of a comprehension; its first iterable is evaluated at once, as in Python."""
        first = self.values.iterate(self._value(node.generators[0].iter, frame))
        inner = _Frame(frame.node, frame.file, parent=frame, is_comprehension=True)
        return self._each(node, 0, first, inner)

    def _each(self, node: Any, depth: int, items: Iterator[Any], frame: _Frame) -> Iterator[Any]:
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

    # Names.

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
                raise NotProvenError("has globals of its own kind")
            found = read((id(place), name), f"the global {name}", place.get, name, ABSENT)
            if found is not ABSENT:
                return self.values.outside(found)
        raise NotProvenError(f"reads {name}, which is not there")

    def _at(self, node: ast.stmt | ast.expr, frame: _Frame) -> None:
        """Note where the reading is, for what it says when it ends."""
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


class _Frame:
    """The local names of one call, or of a comprehension within it."""

    def __init__(
        self,
        node: FunctionNode,
        file: str,
        *,
        function: types.FunctionType | None = None,
        parent: _Frame | None = None,
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
    def top(self) -> _Frame:
        """The frame of the function that has a code object of its own."""
        return self if self.parent is None else self.parent.top

    def set(self, name: str, value: Any) -> None:
        """Set a local name."""
        self.values[name] = value

    def lookup(self, name: str, reader: Reader) -> Any:
        """Return the value of a name: local, of a frame around, or of the function's surroundings."""
        if name in self.values:
            return self.values[name]
        if name in self.names:
            raise NotProvenError(f"reads {name} before it is set")
        if self.parent is not None:
            return self.parent.lookup(name, reader)
        return self.free(name, reader)

    def free(self, name: str, reader: Reader) -> Any:
        """Return the value of a name from outside the function."""
        assert self.function is not None
        return reader.free_value(self.function, name)


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
    ast.Try: "uses try, which may hide an effect",
    ast.Raise: "raises an exception",
    ast.Import: "imports a module",
    ast.ImportFrom: "imports a module",
    ast.ClassDef: "defines a class",
}


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


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return ABSENT
