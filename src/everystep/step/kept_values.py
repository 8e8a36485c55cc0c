"""The values that parts hold, as named tensors and plain data, to write and to restore.

Each value is stored by its path, so that a state can be restored into parts that were made by the same
code: where a value can be filled in, in place. A node is plain data, or a dict with the kind of a value,
its content and details.
"""

# Nodes of some values, of the part `state`:
#   5, "text", None, nan                 themselves
#   (1, 2)                               {"tuple": [1, 2]}
#   torch.ones(3)                        {"tensor": "own/state.best"}, and the numbers by this name
#   {"lr": 0.1, weight: m}               {"dict": [["lr", 0.1], [{"parameter": "0.weight"}, {...}]]}
#   Meter(count=3)                       {"object": {"count": 3}, "class": "script:Meter"}
#   an object that was met before        {"same": "state.first"}
#   a function, which stays as it is     {"left": "function", "text": "script.loss_of"}

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from everystep.ops.arguments import DTYPES
from everystep.program.memory import copy_into
from everystep.step.state import OWN, copy_of, same_bits

__all__ = [
    "GENERATORS",
    "HELD",
    "Encoded",
    "decoded",
    "encoded",
    "has_graph",
    "is_aside",
    "is_code",
    "is_dense",
    "is_plain_value",
    "is_written_alike",
]

#: Dtypes that safetensors holds.
HELD = {dtype for dtype in DTYPES.values() if dtype not in (torch.complex128, torch.complex32)}
#: Random generators that parts may hold, or be.
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
#: Values that consist of others; one of a class derived from these is written with its class.
_COLLECTIONS: dict[str, Any] = {
    each.__name__: each for each in (dict, list, tuple, deque, set, frozenset)
}
#: What is written of a value besides its kind and content.
_DETAILS = {
    *("class", "attributes", "longest", "factory", "dtype", "shape", "strides", "is_trained", "text"),
    "on_device",
}
#: What a `defaultdict` that a run can make again makes its values with.
_FACTORIES = {each.__name__: each for each in (int, float, bool, str, list, dict, set)}
#: NumPy's numbers that a file of tensors can hold.
_AS_TENSORS = {np.dtype(each).str for each in ("?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")}
#: Attributes of torch's base class and its schedulers; no step depends on them.
_OF_TORCH = {
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_zero_grad_profile_name"),
    *("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks", "_patch_step_function"),
    *("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks", "step"),
    *("_warned_capturable_if_run_uncaptured", "_opt_called"),
}
#: Objects that are left unchanged: code, modules, and objects that cannot be copied.
_LEFT_ALONE = (type, nn.Module, torch.device)
#: Values that never change: their classes, their plain contents, and what makes such a value of these.
_CONSTANTS: dict[str, tuple[type, Callable[[Any], list[Any]], Callable[..., Any]]] = {
    "complex": (complex, lambda value: [value.real, value.imag], complex),
    "bytes": (bytes, lambda value: [value.hex()], bytes.fromhex),
    "range": (range, lambda value: [value.start, value.stop, value.step], range),
    "slice": (slice, lambda value: [value.start, value.stop, value.step], slice),
    "fraction": (Fraction, lambda value: [value.numerator, value.denominator], Fraction),
    "decimal": (Decimal, lambda value: [str(value)], Decimal),
    "duration": (timedelta, lambda value: [value.days, value.seconds, value.microseconds], timedelta),
    "date": (date, lambda value: [value.isoformat()], date.fromisoformat),
    "time": (
        datetime,  # a time zone is an object of any class
        lambda value: [value.isoformat() if value.tzinfo is None else value],
        datetime.fromisoformat,
    ),
    "size": (torch.Size, list, lambda *sizes: torch.Size(sizes)),
    "path": (type(Path()), lambda value: [str(value)], Path),
}
_NAMES_OF_CONSTANTS = {kind: name for name, (kind, _, _) in _CONSTANTS.items()}
#: Of these values, a state only shows whether there is another one.
_WITH_TEXTS = (slice, torch.dtype, torch.layout, torch.memory_format, torch.qscheme, np.dtype, PurePath)
#: Limits of an object in an attribute of a module: it may lead to a data set or a trainer.
MOST_OBJECTS, MOST_VALUES, MOST_BYTES = 10, 1000, 16_000_000
#: Of a collection and of tensors in what batches are drawn from, which may be the data itself.
_MOST_SMALL, _MOST_SMALL_BYTES = 100_000, 1_000_000
#: Values within values that are written; a chain of objects may be as long as it likes.
_DEEPEST = 100
#: Where the classes of locks, files, references, loggers, annotations and tokenizers are defined.
_WITHOUT_NUMBERS = {"_thread", "_io", "_csv", "weakref", "logging", "typing", "inspect", "tokenizers"}
_WITHOUT_NUMBERS |= {"torch.torch_version", "torch.distributed.distributed_c10d"}
_WITHOUT_NUMBERS |= {"torch._C._distributed_c10d"}  # the reducer of gradients: see `loop_start`
#: What shows or records a training.
_SHOWING = ("everystep", "logging", "rich", "tensorboard", "tqdm")
#: Where the classes of functions, methods and operators are defined.
_WITH_CODE = ("builtins", "functools", "torch", "types")


class Encoded(NamedTuple):
    """A value as it is written.

    data: as JSON can hold it; tensors: those in it, live, by name; objects: the paths of the classes of
    objects that only the user's code makes, by place; unkept: the classes of what cannot be written;
    is_large: whether something was left out since it is too large.
    """

    data: Any
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    objects: Mapping[str, str] = MappingProxyType({})
    unkept: frozenset[str] = frozenset()
    is_large: bool = False

    def copy(self) -> Encoded:
        """Return it with copies of its tensors."""
        return self._replace(tensors={name: copy_of(each) for name, each in self.tensors.items()})

    def is_same(self, other: Encoded) -> bool:
        """Return whether another value is equal."""
        if self.data is not other.data and not is_written_alike(self.data, other.data):
            return False
        are_named_alike = self.tensors.keys() == other.tensors.keys()
        return are_named_alike and all(same_bits(t, other.tensors[n]) for n, t in self.tensors.items())


def is_written_alike(one: Any, two: Any) -> bool:
    """Return whether two values are equal, as JSON can hold them."""
    # As texts, NaN equals NaN, and 1 differs from True.
    return json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


def encoded(
    value: Any,
    place: str,
    known: Mapping[str, Tensor] = MappingProxyType({}),
    names: Mapping[Tensor, str] = MappingProxyType({}),
    left_alone: Container[int] = (),
    limit: Literal["attribute", "source"] | None = None,
) -> Encoded:
    """Return the state of an object.

    Args:
        value: the object.
        place: the prefix of the names of its tensors.
        known: tensors that already have a name.
        names: of parameters, which are not among its tensors.
        left_alone: ids of objects inside it that are written separately.
        limit: what is left out: of an attribute of a module, what is large and has objects; of a source
            of batches, all that is large, so that data, and what was read of it, are not written. Then
            the classes of what was left are among `objects`.
    """
    walk = _Capturing(names, known, left_alone, limit)
    data = walk.encoded(value, place)
    return Encoded(data, walk.tensors, walk.objects, frozenset(walk.unkept), walk.is_large)


def decoded(
    value: Any,
    place: str,
    tensors: Mapping[str, Tensor],
    data: Any,
    names: Mapping[Tensor, str] = MappingProxyType({}),
    shared: dict[str, Tensor] | None = None,
) -> Any:
    """Restore in an object what `encoded` returned, as far as possible in place; return the object.

    shared: live tensors by name, which other objects may hold, too; gets those that are made.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    return _Restoring(parameters, tensors, shared).decoded(data, value, place)


class _Capturing:
    def __init__(
        self,
        names: Mapping[Tensor, str],
        known: Mapping[str, Tensor],
        left_alone: Container[int],
        limit: str | None,
    ) -> None:
        self._left_alone = left_alone
        self._limit = limit
        self._count = self._bytes = 0
        self.unkept: set[str] = set()
        #: The paths of the classes of objects that only the user's code makes, by place.
        self.objects: dict[str, str] = {}
        self.is_large = False
        self.tensors: dict[str, Tensor] = {}
        self._names = names
        self._known = {id(tensor): name for name, tensor in known.items()}
        self._ids = {id(parameter): name for parameter, name in names.items()}
        self._places: dict[int, tuple[str, Any]] = {}

    def encoded(self, value: Any, place: str) -> Any:
        """Return a value as JSON can hold it; other values are `left` unchanged."""
        if is_plain_value(value):
            return value
        if (written := _of_constant(value)) is not None:
            return written
        if type(value) is tuple and all(map(is_plain_value, value)):
            return {"tuple": [*value]}  # it never changes: two that are equal may be one, or not
        if id(value) in self._places:
            return {"same": self._places[id(value)][0]}
        if id(value) in self._left_alone:
            return {"left": type(value).__name__}
        # It holds the value, since a new object may get the id of one that is gone.
        self._places[id(value)] = place, value
        if self._limit is not None and self._is_much(value):
            self.is_large = True
            return self._left(value)
        if place.count(".") > _DEEPEST:
            return self._left(value)
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value, place)
        if isinstance(value, torch.Generator):
            return {"generator": self._kept(value.get_state(), place)}
        if (state := _numbers_of_generator(value)) is not None:
            return {"random": self.encoded(state, place)}
        if (kind := _kind_of(value)) is not None:
            return self._collection(kind, value, place)
        if isinstance(value, torch.optim.Optimizer) and value.state and not self._names:
            self.unkept.add(type(value).__name__)  # its state is by parameters, which have no names here
        # Its rows are not written, but a replay buffer that has grown must not pass for the first one.
        if isinstance(value, Dataset) and "." in place:
            self.objects[place] = f"{_sizes(value)} {_path_of(type(value))}"
            return {"left": type(value).__name__}
        is_left = is_code(value) or isinstance(value, _LEFT_ALONE) or _holds_more(value)
        if is_left or is_aside(value):
            return self._left(value)
        # A dataclass is made again from its attributes; other classes need the user's code.
        if not dataclasses.is_dataclass(value):
            self.objects[place] = _path_of(type(value))
        return {"object": self.attributes(value, f"{place}."), "class": _path_of(type(value))}

    def _is_much(self, value: Any) -> bool:
        """Return whether this is more than the limit."""
        has_bytes = is_dense(value) if isinstance(value, Tensor) else isinstance(value, np.ndarray)
        self._bytes += value.nbytes if has_bytes else 0
        if self._limit == "attribute":  # an object in it may lead to anything
            self._count += 1
            is_large = self._count > MOST_VALUES or self._bytes > MOST_BYTES
            return self.is_large or len(self.objects) > MOST_OBJECTS or (bool(self.objects) and is_large)
        if isinstance(value, Tensor | np.ndarray):
            return self._bytes > _MOST_SMALL_BYTES
        kind, items = _kind_of(value), [None]
        if kind is not None:
            if _COLLECTIONS[kind].__len__(value) > _MOST_SMALL:
                return True
            items = [*dict.values(value)] if kind == "dict" else _items(kind, value)
        # To look at numbers is fast, and at all else a hundred times slower.
        self._count += sum(not is_plain_value(each) for each in items) or 1
        return self._count > MOST_VALUES or isinstance(value, torch.optim.Optimizer)

    def _left(self, value: Any) -> dict[str, Any]:
        """Leave a value unchanged; note it if it may hold numbers."""
        kind = type(value)
        if self._limit == "source":
            self.objects[self._places[id(value)][0]] = kind.__name__
        if isinstance(value, _WITH_TEXTS):
            return {"left": kind.__name__, "text": repr(value)}
        # A loop may exchange a function, such as its loss: a resumed one must not go back to the first.
        if isinstance(value, FunctionType | BuiltinFunctionType):
            return {"left": kind.__name__, "text": f"{value.__module__}.{value.__qualname__}"}
        if isinstance(value, nn.Module):
            is_known = all(id(each) in self._known for each in value.parameters())
        else:
            is_known = is_code(value) or isinstance(value, _LEFT_ALONE) or is_aside(value)
        if not is_known and kind.__module__ not in _WITHOUT_NUMBERS:
            self.unkept.add(kind.__name__)
        return {"left": kind.__name__}

    def _tensor(self, value: Tensor, place: str) -> dict[str, Any]:
        if not is_dense(value) or value.dtype not in HELD:
            return self._left(value)
        if value in self._names:
            return {"parameter": self._names[value]}
        known = self._known.get(id(value))
        node: dict[str, Any] = {"tensor": self._kept(value, place) if known is None else known}
        # A copy lies row after row, but a kernel may sum a transposed tensor in another order.
        if (strides := _strides(value)) is not None:
            node["strides"] = strides
        if value.device.type != "cpu":
            node["on_device"] = True
        if has_graph(value):
            # A module may have its last activations, which its next forward pass replaces.
            self.unkept |= {"Tensor with a graph"} if self._limit is None else set()
        elif value.requires_grad:
            node["is_trained"] = True
        return node

    def _collection(self, kind: str, value: Any, place: str) -> dict[str, Any]:
        node: dict[str, Any] = {}
        if kind == "dict":
            if not all(map(self._is_key, dict.keys(value))):
                return self._left(value)
            items = enumerate([*dict.items(value)])  # another thread may change it
            # By number: a key may be any value, and several have the same text, such as 1 and "1".
            node[kind] = [[self._key(k), self.encoded(v, f"{place}.{i}")] for i, (k, v) in items]
        else:
            inner = _items(kind, value)
            # The order of a set of texts is different in each process.
            inner = sorted(inner, key=repr) if kind in ("set", "frozenset") else inner
            node[kind] = [self.encoded(item, f"{place}.{i}") for i, item in enumerate(inner)]
        if isinstance(value, deque):
            node["longest"] = value.maxlen
        if isinstance(value, defaultdict):
            node["factory"] = getattr(value.default_factory, "__name__", None)
            for index in range(len(value)):  # the factory makes these again
                self.objects.pop(f"{place}.{index}", None)
        if type(value) is not _COLLECTIONS[kind]:
            node["class"] = _path_of(type(value))
            if more := getattr(value, "__dict__", None):
                node["attributes"] = {n: self.encoded(v, f"{place}.{n}") for n, v in more.items()}
        return node

    def attributes(self, value: Any, prefix: str) -> dict[str, Any]:
        """Return the attributes of an object. prefix: of the names of its tensors."""
        skipped = _OF_TORCH if isinstance(value, torch.optim.Optimizer) else ()
        own = [(n, each) for n, each in vars(value).items() if n not in skipped and not is_aside(each)]
        return {n: self.encoded(each, f"{prefix}{n}") for n, each in own}

    def _kept(self, tensor: Tensor, place: str) -> str:
        self.tensors[f"{OWN}{place}"] = tensor
        return f"{OWN}{place}"

    def _array(self, value: Any, place: str) -> dict[str, Any]:
        kind = "scalar" if isinstance(value, np.generic) else "array"
        # A class of arrays may hold more, such as a mask, or compute in its own way.
        if kind == "array" and type(value) not in (np.ndarray, np.memmap):
            return self._left(value)
        array = np.array(value, order="C")
        if array.dtype.str in _AS_TENSORS:
            return {kind: self._kept(torch.from_numpy(array), place)}
        if array.dtype.hasobject or array.dtype.names is not None:
            return self._left(value)
        # The bytes of complex numbers, texts and dates.
        held = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
        return {kind: self._kept(held, place), "dtype": array.dtype.str, "shape": [*array.shape]}

    # Some optimizers have dicts by parameter, or by its id, which is another one in each process.
    def _is_key(self, key: Any) -> bool:
        is_known = isinstance(key, Tensor) and key in self._names
        return is_known or is_plain_value(key) or (type(key) is tuple and all(map(is_plain_value, key)))

    def _key(self, key: Any) -> Any:
        if isinstance(key, Tensor):
            return {"parameter": self._names[key]}
        if type(key) is tuple:
            return {"tuple": list(key)}
        return {"id": self._ids[key]} if type(key) is int and key in self._ids else key


def _of_constant(value: Any) -> dict[str, Any] | None:
    """Return a value that never changes, as JSON can hold it; None of all else."""
    if (name := _NAMES_OF_CONSTANTS.get(type(value))) is not None:
        content = _CONSTANTS[name][1](value)
        return {name: content} if all(map(is_plain_value, content)) else None
    if isinstance(value, Enum):
        # Several flags together may have no name; other members may have values that JSON cannot hold.
        by_value = is_plain_value(value.value)
        held = {"enum": value.value} if by_value else {"member": value.name}
        return held | {"class": _path_of(type(value))}
    return None


def _strides(tensor: Tensor) -> list[int] | None:
    """Return the strides of a tensor that fills its memory in another order than row after row."""
    # Such as channels_last: sorted by stride, its dimensions are those of a contiguous tensor.
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    is_other = not tensor.is_contiguous() and tensor.permute(order).is_contiguous()
    return [*tensor.stride()] if is_other else None


def _kind_of(value: Any) -> str | None:
    """Return what a collection is written as, None for all else."""
    if isinstance(value, torch.Size) or hasattr(type(value), "n_sequence_fields"):
        return None  # torch's own tuples, also of several results
    return next((kind for kind, each in _COLLECTIONS.items() if isinstance(value, each)), None)


def _items(kind: str, value: Any) -> list[Any]:
    """Return the items of a collection, whatever a class does that is derived from it."""
    return [*_COLLECTIONS[kind].__iter__(value)]


def _path_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class_of(path: str, there: Any, base: type, place: str) -> Any:
    """Return the class at a path: that of the value in its place, or one that is imported.

    Raises:
        ValueError: there is none, or it is not derived from `base`.
    """
    if isinstance(there, base) and _path_of(type(there)) == path:
        return type(there)
    module, _, names = path.partition(":")
    # Nothing is imported: the path may come from a stranger's snapshot.
    found: Any = sys.modules.get(module)
    for name in names.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    if isinstance(found, type) and issubclass(found, base):
        return found
    raise ValueError(f"{place} is a {names}, and {module} has no such class at its top")


def _numbers_of_generator(value: Any) -> Any:
    """Return the state of a generator of NumPy or of Python; None of all else."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    return value.getstate() if type(value) is random.Random else None


def is_code(value: Any) -> bool:
    """Return whether a value is like a function; an object of another class may count its calls.

    A module of Python, such as NumPy, is code, too.
    """
    if isinstance(value, ModuleType):
        return True
    return callable(value) and type(value).__module__.partition(".")[0] in _WITH_CODE


class _Plain:
    """Its objects hold attributes alone."""


class _PlainNamespace(SimpleNamespace):
    """The same of a class that CPython itself defines."""


def _holds_more(value: Any) -> bool:
    """Return whether an object holds anything besides its attributes, which `vars` returns.

    That is in slots, or in what a class that is not written in Python has: `class Count(int)`.
    """
    if not hasattr(value, "__dict__"):
        return True
    kind, plain = type(value), _PlainNamespace if isinstance(value, SimpleNamespace) else _Plain
    return kind.__basicsize__ > plain.__basicsize__ or bool(kind.__itemsize__)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor has its numbers one by one in memory of its own."""
    is_strided = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"
    return is_strided and not hasattr(type(tensor), "__tensor_flatten__")


def has_graph(tensor: Tensor) -> bool:
    """Return whether autograd knows how a tensor was computed."""
    try:
        return tensor.requires_grad and not tensor.is_leaf
    # Of a view that was made under no_grad, of a tensor that was later changed with gradients.
    except RuntimeError:
        return True


def is_aside(value: Any) -> bool:
    """Return whether no step depends on what a value holds, or the run has it in another way."""
    # Even one of everystep, which is GradientDescent.
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        return False
    package, _, module = type(value).__module__.partition(".")
    if package in _SHOWING or module in ("arrow_dataset", "utils.tensorboard.writer"):
        return True
    # The place in the batches is recorded. A wrapper of torch's loader copies the loader's attributes.
    of_loader = {"dataset", "sampler", "batch_sampler"}
    wraps = hasattr(type(value), "__iter__") and of_loader <= getattr(value, "__dict__", {}).keys()
    return wraps or isinstance(value, DataLoader)


def _sizes(data: Dataset[Any]) -> str:
    """Return what shows that a data set has changed, as a replay buffer does, without reading it."""
    # Of a buffer, e.g. its write position, and the length of its list of transitions.
    own = vars(data).items()
    numbers = {name: value for name, value in own if type(value) is int}
    return str(numbers | {name: len(v) for name, v in own if isinstance(v, list | dict | set | deque)})


def is_plain_value(value: Any) -> bool:
    """Return whether a value is itself in JSON."""
    return value is None or type(value) in (bool, int, float, str)


class _Restoring:
    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        shared: dict[str, Tensor] | None,
    ) -> None:
        self._shared = {} if shared is None else shared
        self._parameters = parameters
        self._tensors = tensors
        self._made: dict[str, Any] = {}
        #: Live objects that have a value already: another value needs another object.
        self._taken: dict[int, Any] = {id(each): each for each in self._shared.values()}

    def decoded(self, node: Any, there: Any, place: str) -> Any:
        """Return the value of a node; `there`: the current value in its place.

        Raises:
            ValueError: only the user's code can make it.
        """
        if not isinstance(node, dict):
            return node
        kind = next(key for key in node if key not in _DETAILS)
        found = self._decoded(kind, node[kind], node, there, place)
        self._made[place] = found
        return found

    def _decoded(self, kind: str, content: Any, node: Mapping[str, Any], there: Any, place: str) -> Any:
        # The place is missing where only the user's code could make the object.
        if kind == "same":
            return self._made.get(content, there)
        if kind == "parameter":
            return self._parameters.get(content, there)
        if kind in _CONSTANTS:
            return _CONSTANTS[kind][2](*content)
        if kind == "enum":
            return _class_of(node["class"], there, Enum, place)(content)
        if kind == "member":
            return _class_of(node["class"], there, Enum, place)[content]
        if kind == "tensor":
            if content not in self._shared:
                found = self._tensor(self._tensors[content], self._free(there), node)
                self._shared[content] = found
            return self._shared[content]
        if kind in ("array", "scalar"):
            array = self._tensors[content].numpy()
            if "dtype" in node:
                array = np.frombuffer(array.tobytes(), np.dtype(node["dtype"])).reshape(node["shape"])
            return self._array(array, self._free(there)) if kind == "array" else array[()]
        if kind == "generator":
            if isinstance(there, torch.Generator):
                there.set_state(self._tensors[content])
            return there
        if kind == "random":
            self._set_generator(there, self.decoded(content, None, place))
            return there
        if kind in _COLLECTIONS:
            return self._collection(kind, node, self._free(there), place)
        return self._object(content, node, there, place) if kind == "object" else there

    def _free(self, there: Any) -> Any:
        """Take a live object; return None if another value was restored in it."""
        # Two attributes may be one object at first, `first = second = best`, and two objects later.
        if id(there) in self._taken:
            return None
        self._taken[id(there)] = there
        return there

    def _object(self, nodes: Mapping[str, Any], node: Mapping[str, Any], there: Any, place: str) -> Any:
        kind = _class_of(node.get("class", _path_of(type(there))), there, object, place)
        parameters = getattr(kind, "__dataclass_params__", None)
        # Other code may share a frozen object, so a restored one is an object of its own.
        found = None if parameters is not None and parameters.frozen else self._free(there)
        if type(found) is not kind:
            if parameters is None:
                raise ValueError(
                    f"{place} is a {kind.__name__}, which only your code can make: make it before "
                    "everystep.record, or keep what it holds in a dict"
                )
            found = object.__new__(kind)
        # Before its attributes, which may refer to it.
        self._made[place] = found
        self.set_attributes(found, nodes, f"{place}.")
        return found

    def set_attributes(self, value: Any, nodes: Mapping[str, Any], prefix: str) -> None:
        """Set the attributes of an object to the values of nodes."""
        # Through `vars`, since a frozen dataclass refuses `setattr`.
        own = vars(value)
        if isinstance(value, torch.optim.Optimizer):
            for name in own.keys() - nodes.keys() - _OF_TORCH:
                del own[name]  # it came later; its class may have a default
        for name, node in nodes.items():
            own[name] = self.decoded(node, own.get(name), f"{prefix}{name}")

    def _tensor(self, saved: Tensor, there: Any, node: Mapping[str, Any]) -> Tensor:
        fits = isinstance(there, Tensor) and (there.shape, there.dtype) == (saved.shape, saved.dtype)
        fits = fits and there.requires_grad == node.get("is_trained", there.requires_grad)
        strides = node.get("strides")
        if fits and _strides(there) == strides:
            with torch.no_grad():
                copy_into(there, saved)
            return there  # type: ignore[no-any-return]
        # Where the parameters are, which may be another device than that of the recording. A count of
        # steps may have been on the CPU.
        is_there = node.get("on_device", saved.ndim > 0)
        like = next((p for p in self._parameters.values() if p.shape == saved.shape), None)
        if "on_device" in node and like is None:
            like = next(iter(self._parameters.values()), None)
        device = like.device if like is not None and is_there else saved.device
        found = torch.empty(saved.shape, dtype=saved.dtype, device=device)
        if strides is not None:
            found = torch.empty_strided(saved.shape, strides, dtype=saved.dtype, device=device)
        return found.copy_(saved).requires_grad_(node.get("is_trained", False))

    def _array(self, saved: Any, there: Any) -> Any:
        fits = type(there) is np.ndarray and (there.shape, there.dtype) == (saved.shape, saved.dtype)
        if not fits or not there.flags.writeable:
            return saved.copy()
        np.copyto(there, saved)
        return there

    def _set_generator(self, there: Any, state: Any) -> None:
        if isinstance(there, np.random.Generator):
            there.bit_generator.state = state
        elif isinstance(there, np.random.RandomState):
            there.set_state(state)
        elif type(there) is random.Random:
            there.setstate(state)

    def _collection(self, kind: str, node: Mapping[str, Any], there: Any, place: str) -> Any:
        base: Any = _COLLECTIONS[kind]
        wanted = type(there) if isinstance(there, base) else base
        if "class" in node:
            wanted = _class_of(node["class"], there, base, place)
        longest = node.get("longest")
        fits = type(there) is wanted and (kind != "deque" or there.maxlen == longest)
        if kind == "dict":
            found = self._dict(node, there if fits else None, wanted, place)
        else:
            known = _kind_of(there)
            before = _items(known, there) if known in ("list", "tuple", "deque") else []
            before += [None] * (len(node[kind]) - len(before))
            items = [
                self.decoded(each, old, f"{place}.{i}")
                for i, (each, old) in enumerate(zip(node[kind], before, strict=False))
            ]
            # Those never change, so nothing can be filled in.
            if kind in ("tuple", "frozenset"):
                found = base.__new__(wanted, items)
            else:
                found = there if fits else base.__new__(wanted)
                base.__init__(found, items, *([longest] if kind == "deque" else []))
        if "attributes" in node:
            self.set_attributes(found, node["attributes"], f"{place}.")
        return found

    def _dict(self, node: Mapping[str, Any], there: Any, wanted: Any, place: str) -> Any:
        before, found = dict(there or {}), there
        # The methods of the builtin class, since a derived one may do anything in its own.
        base: Any = OrderedDict if issubclass(wanted, OrderedDict) else dict
        if found is None:
            found = wanted.__new__(wanted)
            if (factory := node.get("factory")) is not None:
                if factory not in _FACTORIES:
                    raise ValueError(f"{place} is a defaultdict with a function of yours")
                found.default_factory = _FACTORIES[factory]
        base.clear(found)
        make = found.default_factory if isinstance(found, defaultdict) else None
        # In the order of the snapshot, since code may iterate over a dict.
        for index, (key, each) in enumerate(node["dict"]):
            name = self._key(key)
            old = before.get(name)
            # Without the user's code, only the factory can make an object that came later.
            if make and isinstance(each, dict) and "object" in each and name not in before:
                with suppress(Exception):  # without one, the object is named as missing
                    old = make()
            base.__setitem__(found, name, self.decoded(each, old, f"{place}.{index}"))
        return found

    def _key(self, key: Any) -> Any:
        if not isinstance(key, dict):
            return key
        if "tuple" in key:
            return tuple(key["tuple"])
        parameter = self._parameters[next(iter(key.values()))]
        return id(parameter) if "id" in key else parameter
