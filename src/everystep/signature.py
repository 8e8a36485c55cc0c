"""The arguments of public functions: whether they fit the signature, by one rule for all functions.

@checked
def verify(self, *, processes: int | None = None, ...): ...

run.verify(processes="x")            UsageError: processes: must be an integer of at least 1 ...
run.verify(processes=np.int64(2))    is called with 2
"""

from __future__ import annotations

import ast
import inspect
import operator
import os
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from everystep.errors import Fault, UsageError, value_text

__all__ = ["checked"]

P = ParamSpec("P")
T = TypeVar("T")
Kind = tuple[str, Callable[[Any], Any]]

#: The smallest number that an argument of this name may be, in every function that has one. A table of
#: fewer rows would be useless.
_LEAST = {
    **{"processes": 1, "threads": 1, "every": 1, "depth": 1, "terms": 1, "rows": 100},
    **{"back": 0, "snapshot_budget": 0, "batch_budget": 0, "dataset_limit": 0},
}


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function refuse arguments that do not fit its signature.

    Numbers of NumPy and torch become those of Python. What a signature names that is not among the kinds
    below, such as a class of torch, is checked where it is used.

    Raises:
        UsageError: lists every argument that does not fit, and what it must be.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # an argument is missing or unknown: Python's own error names it best
            return function(*args, **kwargs)
        faults = []
        for name, value in bound.arguments.items():
            kinds, least = _kinds(signature.parameters[name].annotation), _LEAST.get(name)
            fitting = [found for _, take in kinds if (found := take(value)) is not _NOT]
            # NaN is not at least anything.
            if fitting and (least is None or fitting[0] is None or fitting[0] >= least):
                bound.arguments[name] = fitting[0]
            elif kinds:
                first, *others = dict.fromkeys(text for text, _ in kinds)
                first += "" if least is None else f" of at least {least}"
                wanted = ", ".join([first, *others[:-1]]) + "".join(
                    f" or {last}" for last in others[-1:]
                )
                faults.append(Fault(name, f"must be {wanted}, not {value_text(value)}"))
        if faults:
            raise UsageError(faults)
        return function(*bound.args, **bound.kwargs)

    return called


#: Stands for a value that is not of a kind.
_NOT: Any = object()


def _bool(value: Any) -> Any:
    # NumPy's has one of these names, depending on its version.
    return bool(value) if type(value).__name__ in ("bool", "bool_") else _NOT


def _integer(value: Any) -> Any:
    try:
        return _NOT if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return _NOT


def _number(value: Any) -> Any:
    # A tensor or an array without dimensions is a number, too; its type is kept if it is Python's.
    is_none = (
        isinstance(value, bool) or not hasattr(value, "__float__") or bool(getattr(value, "ndim", 0))
    )
    return _NOT if is_none else value if isinstance(value, int | float) else float(value)


def _if(is_one: Callable[[Any], bool]) -> Callable[[Any], Any]:
    return lambda value: value if is_one(value) else _NOT


def _is_list(value: Any) -> bool:
    # As `iter` takes it; the items of a text would be its letters.
    is_one = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return is_one and not isinstance(value, str | bytes | type)


def _are_runs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_KINDS["Run"][1](each) is each for each in value)


def _names_all(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _word(wanted: str) -> Callable[[Any], Any]:
    return _if(lambda value: isinstance(value, str) and value == wanted)


def _of_class(name: str) -> Callable[[Any], Any]:
    # By name: importing the classes would take longer than many a command.
    return _if(lambda value: name in (each.__name__ for each in type(value).__mro__))


#: How an error names what a word of a signature stands for, and a function that returns a value of this
#: kind, or `_NOT`.
_KINDS: dict[str, Kind] = {
    "None": ("None", _if(lambda value: value is None)),
    "bool": ("True or False", _bool),
    "Counting": ("True, False or a function", lambda value: value if callable(value) else _bool(value)),
    "int": ("an integer", _integer),
    "float": ("a number", _number),
    "str": ("a text", _of_class("str")),
    "Path": ("a path", _if(lambda value: isinstance(value, os.PathLike))),
    "Callable": ("a function", _if(callable)),
    "Callable[[Any, Any], Tensor]": ("a loss, such as torch.nn.MSELoss()", _if(callable)),
    "Mapping": ("a dict", _if(lambda value: isinstance(value, Mapping))),
    "Iterable": ("a list", _if(_is_list)),
    "Run": ("a run: everystep.open(RUN)", _of_class("Run")),
    "Experiment": ("an experiment", _of_class("Experiment")),
    "Progress": ("an object that watches the training", _if(lambda value: hasattr(value, "begin"))),
}
_KINDS["Mapping[str, Any]"] = "a dict with text keys", _if(_names_all)
_KINDS["Sequence[Run]"] = "a list of runs", _if(_are_runs)
_KINDS["Sequence"] = _KINDS["Iterable"]


@cache
def _kinds(annotation: Any) -> tuple[Kind, ...]:
    """Return the kinds that an annotation allows; none if one is unknown."""
    if not isinstance(annotation, str):  # there is none
        return ()
    found, nodes = list[Kind](), [ast.parse(annotation, mode="eval").body]
    while nodes:
        node = nodes.pop()
        text = ast.unparse(node)
        name, _, inside = text.partition("[")
        if isinstance(node, ast.BinOp):
            nodes += [node.right, node.left]
        elif name == "Literal":
            found += [(repr(each), _word(each)) for each in ast.literal_eval(f"[{inside}")]
        elif kind := _KINDS.get(text, _KINDS.get(name)):
            found.append(kind)
        else:
            return ()
    return tuple(found)
