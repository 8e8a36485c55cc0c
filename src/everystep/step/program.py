"""The program of a step: its operations as data, read from JSON and written to it.

A program says which tensors there are (`tensors`, each on a `storage`, so that a view costs nothing),
and which operators are applied to them in which order. Nothing in it is code: operators are looked up
in an allow-list of torch's own, and everything is checked when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from everystep.errors import ProgramError
from everystep.step.operators import NotAllowedError, resolve, writes

__all__ = [
    "FORMAT_VERSION",
    "Operation",
    "OptimizerStep",
    "Phase",
    "Program",
    "Storage",
    "TensorSpec",
    "decode",
    "encode",
    "hyperparameter",
    "references",
]

FORMAT_VERSION = 1

Phase = Literal["forward", "loss", "zero_grad", "backward", "update"]
PHASES: tuple[Phase, ...] = ("forward", "loss", "zero_grad", "backward", "update")
Natural = Annotated[int, Field(ge=0, le=2**62)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.complex64, torch.complex128),
    )
}
#: Arguments that are neither tensors nor numbers are objects with one of these keys.
_ENUMERATIONS: dict[str, dict[str, Any]] = {
    "dtype": _DTYPES,
    "layout": {"strided": torch.strided},
    "memory_format": {
        name: getattr(torch, name)
        for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    },
}
_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Storage(_Model):
    """A piece of memory.

    kind: where its content comes from. `input`: the batch; `state`: parameters, buffers, optimizer
    tensors; `constant`: tensors from elsewhere, stored beside the program; `hyperparameter`: numbers
    that may change from step to step, such as the lr; `temporary`: the step itself. host: in the CPU's
    memory although the step runs on another device.
    """

    kind: Literal["input", "state", "constant", "hyperparameter", "temporary"]
    bytes: Natural
    host: bool = False


class TensorSpec(_Model):
    """A tensor: shape, strides and offset (in elements) on a storage."""

    storage: Name
    dtype: str
    shape: tuple[Natural, ...]
    stride: tuple[Natural, ...]
    offset: Natural = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype: torch.dtype = _DTYPES[self.dtype]
        return dtype

    @property
    def end(self) -> int:
        """How many bytes of its storage it needs."""
        if math.prod(self.shape) == 0:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (self.offset + last + 1) * self.torch_dtype.itemsize


class Operation(_Model):
    """An operator applied to tensors.

    operator: `aten.name.overload`; arguments and keywords: as `encode` writes them; results: names
    of the tensors it gives, in order, null where it gives none; module: the path of the module that it
    belongs to, also in the backward phase; derived: runs only when the step is looked at, because
    another operation does its work in the update.
    """

    phase: Phase
    module: str | None = None
    operator: str
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    results: tuple[Name | None, ...] = ()
    derived: bool = False

    @property
    def resolved(self) -> Any:
        """The operator itself."""
        return resolve(self.operator)

    def reads(self) -> Iterator[str]:
        """Yield the names of the tensors among its arguments."""
        yield from references(self.arguments)
        yield from references(tuple(self.keywords.values()))

    def written(self) -> list[str]:
        """Return the names of the tensors among its arguments that it writes into."""
        operator = self.resolved
        named = {a.name: v for a, v in zip(operator._schema.arguments, self.arguments, strict=False)}
        named |= self.keywords
        return [n for name in writes(operator) for n in references(named.get(name))]


class OptimizerStep(_Model):
    """The step of an optimizer of `torch.optim`, which reads numbers and so is no list of operations.

    groups: the settings of each param group, with the names of its parameters under `params`.
    """

    name: Name
    groups: tuple[dict[str, Any], ...]


class Program(_Model):
    """The operations of a step, in order, and the tensors that they are applied to.

    once: operations whose results are the same at every step; they run when the program is bound.
    loss: the name of the loss; gradients: of each parameter's gradient; activations: of each module's
    output, by the module's path; optimizer_step: takes the place of operations of the update.
    """

    format: Literal["everystep program"] = "everystep program"
    version: Literal[1] = 1
    torch: str
    storages: dict[Name, Storage]
    tensors: dict[Name, TensorSpec]
    once: tuple[Operation, ...] = ()
    operations: tuple[Operation, ...]
    optimizer_step: OptimizerStep | None = None
    loss: Name
    gradients: dict[str, Name] = {}
    activations: dict[str, tuple[Name, ...]] = {}

    @property
    def derived_gradients(self) -> set[str]:
        """The parameters whose gradient is computed only when the step is looked at."""
        derived = {n for o in self.operations if o.derived for n in o.results if n}
        storages = {self.tensors[name].storage for name in derived}
        return {p for p, name in self.gradients.items() if self.tensors[name].storage in storages}

    def storage_of(self, tensor: str) -> Storage:
        """Return the storage that a tensor lies on."""
        return self.storages[self.tensors[tensor].storage]

    def of_kind(self, kind: str) -> list[str]:
        """Return the names of the storages of a kind."""
        return [name for name, storage in self.storages.items() if storage.kind == kind]

    def to_json(self) -> str:
        """Return the program as JSON: a line for each storage, tensor and operation."""
        always = {"format": self.format, "version": self.version, "torch": self.torch}
        dumped = self.model_dump(exclude_defaults=True)
        tensors = {
            name: {k: v for k, v in tensor.items() if v != _usual(name, tensor["shape"]).get(k)}
            for name, tensor in dumped["tensors"].items()
        }
        return _readable(always | dumped | {"tensors": tensors})

    @classmethod
    def from_json(cls, text: str | bytes) -> Program:
        """Read a program.

        Raises:
            ProgramError: it is no program, one of a newer everystep, or one that uses an operator
                which is not allowed; names what is wrong.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProgramError(f"this is no program: not JSON ({error})") from None
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ProgramError(
                f"the program has format {version}, and this everystep reads {FORMAT_VERSION}; "
                "update everystep"
            )
        try:
            return cls.model_validate_json(json.dumps(_completed(data)))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "program"
            message = first["msg"].removeprefix("Value error, ")
            raise ProgramError(f"this is no program that can be run: {place}: {message}") from None

    @model_validator(mode="after")
    def _check(self) -> Program:
        for name, tensor in self.tensors.items():
            _check_tensor(name, tensor, self.storages)
        known = set(self.tensors)
        for operation in (*self.once, *self.operations):
            _check_operation(operation, known)
        named = [
            self.loss,
            *self.gradients.values(),
            *(n for ns in self.activations.values() for n in ns),
        ]
        if self.optimizer_step is not None:
            _check_optimizer_step(self.optimizer_step)
        missing = next((name for name in named if name not in known), None)
        if missing is not None:
            raise ValueError(f"there is no tensor {missing!r}")
        return self


def hyperparameter(name: str, group: int, dtype: str) -> str:
    """Return the name of a number of the optimizer's param group that may change from step to step."""
    return f"hyperparameter/{group}/{name}/{dtype}"


def encode(value: Any, name_of: Callable[[torch.Tensor], str]) -> Any:
    """Return an argument as JSON holds it: a text is a tensor's name, other things say what they are.

    Raises:
        NotAllowedError: it is of a kind that a program does not hold.
    """
    if isinstance(value, torch.Tensor):
        return name_of(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list | tuple):
        return [encode(item, name_of) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, values in _ENUMERATIONS.items():
        for name, known in values.items():
            if value is known:
                return {key: name}
    raise NotAllowedError(f"takes a {type(value).__name__}, which a program cannot hold")


def decode(value: Any, tensor_of: Callable[[str], torch.Tensor]) -> Any:
    """Return the argument that `encode` was given.

    Raises:
        ValueError: it is nothing that `encode` writes.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return tensor_of(value)
    if isinstance(value, list | tuple):
        return [decode(item, tensor_of) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        [(key, name)] = value.items()
        if isinstance(name, str):
            return _decode_special(key, name)
    raise ValueError(f"{value!r:.80} is no argument")


def _decode_special(key: str, name: str) -> Any:
    if key == "text":
        return name
    if key == "device":
        try:
            return torch.device(name)
        except RuntimeError:
            raise ValueError(f"{name!r:.80} is no device") from None
    values = _SPECIAL_FLOATS if key == "float" else _ENUMERATIONS.get(key, {})
    if name not in values:
        raise ValueError(f"{name!r:.80} is no {key:.80}")
    return values[name]


def references(value: Any) -> Iterator[str]:
    """Yield the names of tensors in an argument as `encode` writes it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def _usual(name: str, shape: Sequence[int]) -> dict[str, Any]:
    """Return the storage and the strides of a tensor that lies alone, row after row."""
    stride, product = [], 1
    for size in reversed(shape):
        stride.append(product)
        product *= max(size, 1)
    return {"storage": name, "stride": tuple(reversed(stride))}


def _completed(data: Any) -> Any:
    """Return JSON data with what `to_json` leaves out of tensors."""
    tensors = data.get("tensors") if isinstance(data, dict) else None
    if not isinstance(tensors, dict):
        return data
    completed = {}
    for name, tensor in tensors.items():
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        if isinstance(shape, list) and all(map(_is_int, shape)) and len(shape) <= 64:
            tensor = _usual(name, shape) | tensor
        completed[name] = tensor
    return data | {"tensors": completed}


def _check_tensor(name: str, tensor: TensorSpec, storages: Mapping[str, Storage]) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: {tensor.dtype!r:.80} is no dtype")
    if len(tensor.shape) != len(tensor.stride) or len(tensor.shape) > 64:
        raise ValueError(f"{name}: {len(tensor.shape)} sizes and {len(tensor.stride)} strides")
    storage = storages.get(tensor.storage)
    if storage is None:
        raise ValueError(f"{name}: there is no storage {tensor.storage!r}")
    if tensor.end > storage.bytes:
        raise ValueError(
            f"{name} needs {tensor.end} bytes of {tensor.storage}, which has {storage.bytes}"
        )


def _check_operation(operation: Operation, known: set[str]) -> None:
    operator = resolve(operation.operator)  # NotAllowedError is a ValueError
    parameters = operator._schema.arguments
    positional = [p for p in parameters if not p.kwarg_only]
    if len(operation.arguments) > len(positional):
        raise ValueError(f"{operation.operator} takes at most {len(positional)} arguments")
    given = dict(zip((p.name for p in positional), operation.arguments, strict=False))
    doubled = given.keys() & operation.keywords.keys()
    unknown = operation.keywords.keys() - {p.name for p in parameters}
    if doubled or unknown:
        raise ValueError(f"{operation.operator} does not take {sorted(doubled | unknown)} so")
    given |= operation.keywords
    for parameter in parameters:
        if parameter.name not in given:
            if not parameter.has_default_value():
                raise ValueError(f"{operation.operator} lacks {parameter.name}")
        elif not _fits(str(parameter.real_type), given[parameter.name], parameter.N):
            raise ValueError(f"{operation.operator}: {parameter.name} is no {parameter.real_type}")
    missing = next((n for n in (*operation.reads(), *operation.results) if n and n not in known), None)
    if missing is not None:
        raise ValueError(f"{operation.operator}: there is no tensor {missing!r}")


def _fits(kind: str, value: Any, size: int | None = None) -> bool:
    """Tell whether an encoded argument is of a kind, as schemas write it."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value, size)
    if kind.startswith("List["):
        if size is not None and isinstance(value, bool | int | float):
            return _fits(kind[5:-1], value)
        return isinstance(value, list | tuple) and all(_fits(kind[5:-1], item) for item in value)
    if kind == "Tensor":
        return value is None or isinstance(value, str | int | float)
    if kind in ("int", "bool"):
        return isinstance(value, bool) if kind == "bool" else _is_int(value)
    if kind in ("float", "number"):
        is_number = isinstance(value, bool | float) or _is_int(value)
        return is_number or (_is_special(value) == "float")
    names = {"str": "text", "ScalarType": "dtype", "Layout": "layout", "MemoryFormat": "memory_format"}
    return kind != "Generator" and _is_special(value) == names.get(kind, "device")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_special(value: Any) -> str | None:
    """Return the key of an argument that is neither a tensor nor a number."""
    if not isinstance(value, dict):
        return None
    try:
        decode(value, lambda name: torch.empty(0))
    except ValueError:
        return None
    return str(next(iter(value)))


def _check_optimizer_step(step: OptimizerStep) -> None:
    optimizer = getattr(torch.optim, step.name, None)
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ValueError(f"torch.optim has no optimizer {step.name!r:.80}")


def _readable(data: dict[str, Any]) -> str:
    """Return JSON with a line for each entry of the large tables."""
    lines = []
    for key, value in data.items():
        entries: list[str] = []
        if isinstance(value, dict) and key in ("storages", "tensors", "gradients", "activations"):
            entries = [f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()]
        elif isinstance(value, list | tuple):
            entries = [json.dumps(item) for item in value]
        if entries:
            opening, closing = "{}" if isinstance(value, dict) else "[]"
            text = opening + "\n  " + ",\n  ".join(entries) + "\n " + closing
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
