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
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

from everystep.errors import Fault, UsageError, short_text

__all__ = ["checked"]

P = ParamSpec("P")
T = TypeVar("T")
#: How an error names what a word of a signature stands for, and whether a value is one.
Kind = tuple[str, Callable[[Any], bool]]

#: The smallest number that an argument of this name may be, in every function that has one. A table of
#: fewer rows would be useless.
_LEAST = {
    **{"processes": 1, "threads": 1, "every": 1, "depth": 1, "terms": 1, "rows": 100},
    **{"back": 0, "snapshot_budget": 0, "batch_budget": 0, "dataset_limit": 0},
}
_ARE_BYTES = {"snapshot_budget", "batch_budget", "dataset_limit"}


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
            plain = _plain(value) if kinds else value
            # NaN is not at least anything.
            is_enough = least is None or not _is_number(plain) or plain >= least
            if is_enough and any(is_one(plain) for _, is_one in kinds):
                bound.arguments[name] = plain
            elif kinds:
                first, *others = dict.fromkeys(text for text, _ in kinds)
                first = "a number of bytes, such as 2e9," if name in _ARE_BYTES else first
                first += "" if least is None else f" of at least {least}"
                wanted = " or ".join([", ".join([first, *others[:-1]]), *others[-1:]])
                faults.append(Fault(name, f"must be {wanted}, not {short_text(value)}"))
        if faults:
            raise UsageError(faults)
        return function(*bound.args, **bound.kwargs)

    return called


def _plain(value: Any) -> Any:
    """Return a number of another library as an integer, a float or a bool of Python."""
    # A tensor or an array without dimensions is a number, too.
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, int | float) or getattr(value, "ndim", None):
        return value
    if hasattr(type(value), "__index__"):
        return operator.index(value)
    return float(value) if hasattr(type(value), "__float__") else value


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    # As `iter` takes it; the items of a text would be its letters.
    is_one = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return is_one and not isinstance(value, str | bytes | type)


def _is_of(name: str, value: Any) -> bool:
    # By name: importing the classes would take longer than many a command.
    return name in (each.__name__ for each in type(value).__mro__)


def _is_word(wanted: str, value: Any) -> bool:
    return isinstance(value, str) and value == wanted


def _are_runs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_of("Run", each) for each in value)


def _names_all(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


_KINDS: dict[str, Kind] = {
    "None": ("None", lambda value: value is None),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "Counting": ("True, False or a function", lambda value: isinstance(value, bool) or callable(value)),
    "int": ("an integer", partial(_is_number, kind=int)),
    "float": ("a number", _is_number),
    "str": ("a text", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
    "Callable": ("a function", callable),
    "Callable[[Any, Any], Tensor]": ("a loss, such as torch.nn.MSELoss()", callable),
    "Mapping": ("a dict", lambda value: isinstance(value, Mapping)),
    "Mapping[str, Any]": ("a dict with text keys", _names_all),
    "Iterable": ("a list", _is_list),
    "Iterable[Any]": ("iterable, such as a DataLoader or range(100)", _is_list),
    "Sequence": ("a list", _is_list),
    "Sequence[Run]": ("a list of runs", _are_runs),
    "Sequence[tuple[int, int]]": ("a list of windows, such as [(0, 500)]", _is_list),
    "Run": ("a run: everystep.open(RUN)", partial(_is_of, "Run")),
    "Experiment": ("an experiment", partial(_is_of, "Experiment")),
    "Progress": ("an object that watches the training", lambda value: hasattr(value, "begin")),
}


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
            found += [(repr(each), partial(_is_word, each)) for each in ast.literal_eval(f"[{inside}")]
        elif kind := _KINDS.get(text, _KINDS.get(name)):
            found.append(kind)
        else:
            return ()
    return tuple(found)
