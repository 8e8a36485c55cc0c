"""The program of a step: its operations as data, read from JSON and written to it.

A program says which tensors there are (`tensors`, each on a `storage`, so that a view costs nothing),
and which operators are applied to them in which order. Nothing in it is code: operators are looked up
in an allow-list of torch's own. It may come from a stranger, so that everything is checked when it is
read: what it says, and, by a run on torch's meta device, which has shapes but no numbers, that
each operator takes the tensors that it is given and gives the results that are named.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor

from everystep.errors import ProgramError
from everystep.step.operators import NotAllowedError, computes, parameters, resolve, writes

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
#: More bytes, or numbers, than any machine has.
LIMIT = 2**48
Natural = Annotated[int, Field(ge=0, le=LIMIT)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.complex128, torch.complex64, torch.complex32),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
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
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:[0-9]{1,3})?")


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
        if 0 in self.shape:
            return self.offset * self.torch_dtype.itemsize
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
    operator: Name
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

    @field_validator("groups")
    @classmethod
    def _with_special_floats(cls, groups: tuple[dict[str, Any], ...]) -> Any:
        return tuple(map(_special_floats_read, groups))


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
        return _readable(_special_floats_written(always | dumped | {"tensors": tensors}))

    @classmethod
    def from_json(cls, text: str | bytes) -> Program:
        """Read a program.

        Raises:
            ProgramError: it is no program, one of a newer everystep, or one that uses an operator
                which is not allowed; names what is wrong.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
            completed = json.dumps(_completed(data))
        except (ValueError, RecursionError) as error:
            raise ProgramError(f"this is no program: not JSON ({error!s:.200})") from None
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ProgramError(
                f"the program has format {version}, and this everystep reads {FORMAT_VERSION}; "
                "update everystep"
            )
        try:
            program = cls.model_validate_json(completed)
            _check_on_meta(program)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            problem = f"{place:.200}: {message:.400}" if place else f"{message:.400}"
        except ValueError as error:
            problem = f"{error!s:.400}"
        else:
            return program
        raise ProgramError(f"this is no program that can be run: {problem}")

    @model_validator(mode="after")
    def _check(self) -> Program:
        if sum(storage.bytes for storage in self.storages.values()) > LIMIT:
            raise ValueError("the storages have more bytes than any machine")
        for name, tensor in self.tensors.items():
            _check_tensor(name, tensor, self.storages)
        for place, operation in self._placed_operations():
            try:
                _check_operation(operation, self.tensors)
            except ValueError as error:  # NotAllowedError is one
                raise ValueError(f"{place}: {error}") from None
        shown = [name for names in self.activations.values() for name in names]
        for name in (self.loss, *self.gradients.values(), *shown):
            _check_known(name, self.tensors)
        if math.prod(self.tensors[self.loss].shape) != 1:
            raise ValueError(f"the loss {self.loss} is not one number")
        if self.optimizer_step is not None:
            _check_optimizer_step(self.optimizer_step, self.tensors)
        return self

    def _placed_operations(self) -> Iterator[tuple[str, Operation]]:
        for table, operations in (("once", self.once), ("operations", self.operations)):
            for index, operation in enumerate(operations):
                yield f"{table}.{index}", operation


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
    if key == "device" and _DEVICE.fullmatch(name):
        return torch.device(name)
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


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _special_floats_written(value: Any) -> Any:
    """Return JSON data with floats that are none of JSON's numbers as `encode` writes them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, dict):
        return {key: _special_floats_written(item) for key, item in value.items()}
    return [*map(_special_floats_written, value)] if isinstance(value, list | tuple) else value


def _special_floats_read(value: Any) -> Any:
    """Return what `_special_floats_written` was given."""
    if isinstance(value, dict):
        name = value.get("float") if len(value) == 1 else None
        if isinstance(name, str) and name in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[name]
        return {key: _special_floats_read(item) for key, item in value.items()}
    return [*map(_special_floats_read, value)] if isinstance(value, list | tuple) else value


def _check_tensor(name: str, tensor: TensorSpec, storages: Mapping[str, Storage]) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: {tensor.dtype!r:.80} is no dtype")
    if len(tensor.shape) != len(tensor.stride) or len(tensor.shape) > 64:
        raise ValueError(f"{name}: {len(tensor.shape)} sizes and {len(tensor.stride)} strides")
    if math.prod(max(size, 1) for size in tensor.shape) > LIMIT:
        raise ValueError(f"{name} has more numbers than any machine")
    storage = storages.get(tensor.storage)
    if storage is None:
        raise ValueError(f"{name}: there is no storage {tensor.storage!r}")
    if tensor.end > storage.bytes:
        raise ValueError(
            f"{name} needs {tensor.end} bytes of {tensor.storage}, which has {storage.bytes}"
        )


def _check_known(name: str, tensors: Mapping[str, TensorSpec]) -> None:
    if name not in tensors:
        raise ValueError(f"there is no tensor {name!r}")


def _check_operation(operation: Operation, tensors: Mapping[str, TensorSpec]) -> None:
    operator = operation.resolved
    if not computes(operator):
        raise ValueError(f"{operator} computes nothing: tensors are written with their shapes")
    _check_arguments(operation)
    for name in (*operation.reads(), *filter(None, operation.results)):
        try:
            _check_known(name, tensors)
        except ValueError as error:
            raise ValueError(f"{operator}: {error}") from None
    kinds = [str(result.type) for result in operator._schema.returns]
    if len(operation.results) != len(kinds) and "List[Tensor]" not in kinds:
        raise ValueError(f"{operator} gives {len(kinds)} results, not {len(operation.results)}")
    if operator.overloadpacket.__name__ == "index" and any(
        tensors[name].dtype in ("bool", "uint8") for name in references(operation.arguments[1:2])
    ):
        raise ValueError(f"{operator} selects by a mask: the shape of the result depends on numbers")


def _check_arguments(operation: Operation) -> None:
    operator = operation.resolved
    known = parameters(operator)
    positional = [p.name for p in known if p.is_positional]
    if len(operation.arguments) > len(positional):
        raise ValueError(f"{operator} takes at most {len(positional)} arguments")
    given = dict(zip(positional, operation.arguments, strict=False))
    doubled = given.keys() & operation.keywords.keys()
    unknown = operation.keywords.keys() - {p.name for p in known}
    if doubled or unknown:
        raise ValueError(f"{operator} does not take {sorted(doubled | unknown)} so")
    given |= operation.keywords
    # Kernels of the backward pass take no tensor where nothing was kept in the forward pass.
    may_be_none = "backward" in operation.operator
    for parameter in known:
        if parameter.name not in given:
            if parameter.is_required:
                raise ValueError(f"{operator} lacks {parameter.name}")
            continue
        value = given[parameter.name]
        is_none = value is None and may_be_none and parameter.kind == "Tensor"
        if not is_none and not _fits(parameter.kind, value, parameter.size):
            raise ValueError(f"{operator}: {parameter.name} is no {parameter.kind}")


def _fits(kind: str, value: Any, size: int | None = None) -> bool:
    """Tell whether an encoded argument is of a kind, as schemas write it."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value, size)
    if kind.startswith("List["):
        inner = kind[5:-1]
        if isinstance(value, list | tuple):
            as_numbers = inner == "Tensor" and not all(isinstance(item, str) for item in value)
            return not as_numbers and all(_fits(inner, item) for item in value)
        return size is not None and inner != "Tensor" and _fits(inner, value)
    if kind == "Tensor":
        return isinstance(value, str) or _is_number(value)
    if kind in ("int", "bool"):
        return isinstance(value, bool) if kind == "bool" else _is_int(value)
    if kind in ("float", "number"):
        return _is_number(value)
    names = {"str": "text", "ScalarType": "dtype", "Layout": "layout", "MemoryFormat": "memory_format"}
    return kind != "Generator" and _is_special(value) == names.get(kind, "device")


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | float) or _is_int(value) or _is_special(value) == "float"


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


def _check_optimizer_step(step: OptimizerStep, tensors: Mapping[str, TensorSpec]) -> None:
    optimizer = getattr(torch.optim, step.name, None)
    is_optimizer = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    if not is_optimizer or optimizer in (torch.optim.Optimizer, torch.optim.LBFGS):
        raise ValueError(f"torch.optim has no optimizer {step.name!r:.80} that steps by itself")
    for group in step.groups:
        names = group.get("params")
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{step.name}: a group without the names of its params")
        for name in names:
            _check_known(f"parameter/{name}", tensors)


def _check_on_meta(program: Program) -> None:
    """Run the program where tensors have shapes, but neither memory nor numbers.

    Raises:
        ValueError: an operator does not take what it is given, or does not give what is named.
    """
    meta = torch.device("meta")
    memory = {
        name: torch.empty(storage.bytes, dtype=torch.uint8, device=meta).untyped_storage()
        for name, storage in program.storages.items()
    }
    limit = sum(storage.bytes for storage in program.storages.values())
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {
            name: torch.empty(0, dtype=spec.torch_dtype, device=meta).set_(
                memory[spec.storage], spec.offset, spec.shape, spec.stride
            )
            for name, spec in program.tensors.items()
        }
        for place, operation in program._placed_operations():
            try:
                _check_results(operation, _results_on_meta(operation, tensors), program.tensors, limit)
            except NotImplementedError:  # a kernel that has none for shapes alone
                continue
            except Exception as error:  # whatever torch makes of what it is given
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise ValueError(f"{place}: {operation.operator}: {reason:.200}") from None


def _results_on_meta(operation: Operation, tensors: Mapping[str, Tensor]) -> list[Any]:
    operator = operation.resolved
    arguments = [decode(value, tensors.__getitem__) for value in operation.arguments]
    keywords = {k: decode(v, tensors.__getitem__) for k, v in operation.keywords.items()}
    known = parameters(operator)
    devices = [place for place, p in enumerate(known) if p.kind == "Optional[Device]"]
    if not devices and not any(True for _ in operation.reads()):
        raise ValueError("has no tensor")
    for place in devices:
        if place < len(arguments):
            arguments[place] = torch.device("meta")
        else:
            keywords[known[place].name] = torch.device("meta")
    found = operator(*arguments, **keywords)
    if not operator._schema.returns:
        return []
    flat: list[Any] = []
    for item in found if isinstance(found, list | tuple) else [found]:
        flat += item if isinstance(item, list | tuple) else [item]
    return flat


def _check_results(
    operation: Operation, found: list[Any], specs: Mapping[str, TensorSpec], limit: int
) -> None:
    if len(found) != len(operation.results):
        raise ValueError(f"gives {len(found)} results, not {len(operation.results)}")
    # What they give besides their result depends on the device.
    is_private = operation.operator.startswith(("aten._", "aten.cudnn", "aten.miopen", "aten.mkldnn"))
    for name, tensor in zip(operation.results, found, strict=True):
        if tensor is None:
            if name is not None:
                raise ValueError(f"gives nothing as {name}")
            continue
        if tensor.numel() * tensor.itemsize > limit:
            raise ValueError("gives more than all tensors of the program together")
        if name is not None and not is_private and tensor.numel():
            made = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            if made != (specs[name].dtype, specs[name].shape):
                raise ValueError(
                    f"gives {made[0]} {list(made[1])} as {name}, which is "
                    f"{specs[name].dtype} {list(specs[name].shape)}"
                )


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
