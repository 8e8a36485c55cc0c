"""Execute: a program bound to memory, run as is or with every value observable.

Binding does everything that is the same at every step: place the tensors on their storages, look up the
operators, fill in the arguments. What remains is a list of calls without arguments, each of which writes
into existing memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.program.calls import Call, prebuilt_calls
from everystep.program.memory import copy_into, copy_on_cpu, plan_memory
from everystep.program.program import Operation, Program, TensorSpec, decode
from everystep.program.unset import unread_inputs, unset_results

__all__ = ["BoundProgram", "Copies", "Memory", "Observed", "allocate", "without_autograd"]


class Observed(NamedTuple):
    """An operation that just ran: its inputs before it ran, and its results, by name.

    written: inputs that it wrote into besides its results, such as running statistics, after it ran.

    The tensors are copies and do not change. What several operations use is copied once.
    """

    operation: Operation
    inputs: dict[str, Tensor]
    results: dict[str, Tensor]
    written: dict[str, Tensor] = {}  # noqa: RUF012  # a default that nothing changes

    @property
    def read(self) -> dict[str, Tensor]:
        """The inputs of which it reads the numbers."""
        unread = unread_inputs(self.operation)
        return {name: tensor for name, tensor in self.inputs.items() if name not in unread}

    @property
    def made(self) -> dict[str, Tensor]:
        """The results that have numbers, and what else it wrote into."""
        unset = unset_results(self.operation)
        both = (*self.results.items(), *self.written.items())
        return {name: tensor for name, tensor in both if name not in unset}

    def __repr__(self) -> str:
        given, made = (
            ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
            for named in (self.inputs, self.results)
        )
        module = f" of {self.operation.module}" if self.operation.module else ""
        return f"<{self.operation.operator}, {self.operation.phase}{module}: {given} -> {made}>"


class without_autograd:  # noqa: N801  # used as a function, and much faster than a generator
    """Bypass autograd within: programs hold its operations already."""

    __slots__ = ("_before", "_guard")

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._guard = torch._C._AutoDispatchBelowAutograd()
        self._guard.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(None, None, None)
        torch._C._set_grad_enabled(self._before)


class BoundProgram:
    """A program and its memory.

    Args:
        program: the program to run.
        memory: a tensor on each storage that is not temporary, by the storage's name. State is
            changed in place.
        device: the device of temporary tensors.
        optimizer_step: called if the program has an optimizer step; the gradients are in `gradients` by
            then.
        own: other memory of storages that are not temporary, by name.
        steady: places of operations that have the same results at every step: they run once, when the
            program is bound. Nothing else may write what they write.

    `loss` and `gradients` are the live tensors that hold them after each step; `temporary_bytes` is the
    memory that the program itself uses.

    Raises:
        ProgramError: memory is missing, too small, of another kind, or exhausted.
    """

    is_plain = False
    #: Whether its calls do the same at every step, so that a graph of CUDA may replay them.
    _repeats = True

    def __init__(
        self,
        program: Program,
        memory: Mapping[str, Tensor],
        device: torch.device,
        optimizer_step: Callable[[], Any] | None = None,
        *,
        own: Mapping[str, Memory] = MappingProxyType({}),
        steady: Collection[int] = (),
    ) -> None:
        self.program = program
        once = [program.operations[place] for place in sorted(steady)]
        temporary = _temporary_memory(program, device, once)
        self._places = _given_memory(program, memory, own) | temporary
        self._tensors = {
            name: _tensor_on(self._places[spec.storage], spec) for name, spec in program.tensors.items()
        }
        sizes = {place.storage.data_ptr(): place.storage.nbytes() for place in temporary.values()}
        self.temporary_bytes = sum(sizes.values())
        self.loss = torch.empty(0) if program.loss is None else self._tensors[program.loss]
        self.gradients = {name: self._tensors[tensor] for name, tensor in program.gradients.items()}
        self._optimizer_step = optimizer_step
        with without_autograd():
            for operation in once:
                self._run_once(operation)
            self._calls_of = [
                [] if place in steady else self._calls(operation)
                for place, operation in enumerate(program.operations)
            ]
            self.calls = list(chain.from_iterable(self._calls_of))
            if (
                device.type == "cuda"
                and self._repeats
                and not any(s.host for s in program.storages.values())
            ):
                self.calls = _as_graph(self.calls)

    def run(self) -> None:
        """Run the step on what the memory holds; call it inside `without_autograd`.

        Raises:
            RuntimeError: a kernel refuses its arguments (or IndexError, ValueError, TypeError).
        """
        _run(self.calls)

    def copies(self) -> Copies:
        """Return what copies tensors while the step is observed."""
        return Copies(self.program, self._places)

    def observe(self, copies: Copies | None = None) -> Iterator[Observed]:
        """Run the step, and yield each operation after it ran, with inputs and results.

        copies: provides other tensors meanwhile. The step is bit-identical to `run`; call it inside
        `without_autograd`.
        """
        copies = copies or self.copies()
        for operation, calls in zip(self.program.operations, self._calls_of, strict=True):
            inputs = {name: copies.tensor(name) for name in operation.reads()}
            _run(calls)
            written = operation.written()
            names = [name for name in operation.results if name] or written
            copies.forget({*names, *written})
            results = {name: copies.tensor(name) for name in names}
            others = {name: copies.tensor(name) for name in written if name not in results}
            yield Observed(operation, inputs, results, others)

    def calls_with(self, after: Mapping[int, Sequence[Call]]) -> list[Call]:
        """Return the calls of an observed step: `after` runs after operation i (-1: before all)."""
        found = list(after.get(-1, ()))
        for index, calls in enumerate(self._calls_of):
            found += [*calls, *after.get(index, ())]
        return found

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the program, on its live memory."""
        return self._tensors[name]

    def _run_once(self, operation: Operation) -> None:
        try:
            _run(self._calls(operation))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise ProgramError(f"{operation.operator}: {error}") from None

    def _calls(self, operation: Operation) -> list[Call]:
        operator = operation.resolved
        try:
            arguments = [decode(value, self._tensors.__getitem__) for value in operation.arguments]
            keywords = {k: decode(v, self._tensors.__getitem__) for k, v in operation.keywords.items()}
        except ValueError as error:
            raise ProgramError(f"{operation.operator}: {error}") from None
        results = [None if name is None else self._tensors[name] for name in operation.results]
        return prebuilt_calls(operator, arguments, keywords, results)


class Copies:
    """Copies of the memory of a program on the CPU, each made on first access."""

    def __init__(self, program: Program, places: Mapping[str, Memory]) -> None:
        self._program = program
        self._places = places
        self._storages: dict[str, Memory] = {}
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as it is now, or as it was when its memory was last written."""
        spec = self._program.tensors[name]
        if spec.storage not in self._storages:
            self._storages[spec.storage] = self._copy(spec.storage)
            self._tensors = {n: t for n, t in self._tensors.items() if self._on(n) != spec.storage}
        if name not in self._tensors:
            self._tensors[name] = _tensor_on(self._storages[spec.storage], spec)
        return self._tensors[name]

    def forget(self, names: Collection[str]) -> None:
        """Drop the copies of memory that was just written."""
        for storage in {self._on(name) for name in names}:
            self._storages.pop(storage, None)

    def _on(self, name: str) -> str:
        return self._program.tensors[name].storage

    def _copy(self, storage: str) -> Memory:
        place = self._places[storage]
        whole = torch.empty(0, dtype=torch.uint8, device=place.storage.device)
        whole.set_(place.storage, place.start, (self._program.storages[storage].bytes,), (1,))
        return Memory(copy_on_cpu(whole).untyped_storage())


def _run(calls: list[Call]) -> None:
    for call in calls:
        call()


def allocate(program: Program, values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return new memory for everything that a program reads from outside, by the storage's name.

    Args:
        program: the program to bind.
        values: initial values of tensors, by name: state from a snapshot, or the bytes of a constant.
            Missing values are zero.
        device: where the program will run.

    Raises:
        ProgramError: there is not enough memory.
    """
    memory = {}
    for name, storage in program.storages.items():
        if storage.kind != "temporary":
            place = torch.device("cpu") if storage.host else device
            try:
                memory[name] = torch.zeros(storage.bytes, dtype=torch.uint8, device=place)
            except RuntimeError as error:
                raise ProgramError(f"not enough memory for {name}: {error}") from None
    for name, spec in program.tensors.items():
        if name in values and program.storages[spec.storage].kind != "temporary":
            given = Memory(memory[spec.storage].untyped_storage())
            copy_into(_tensor_on(given, spec), values[name])
    return memory


def _as_graph(calls: list[Call]) -> list[Call]:
    """Return the calls as one that replays a CUDA graph; unchanged if that is not possible."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _run(calls)
    except RuntimeError:  # a kernel that waits for the CPU
        return calls
    return [graph.replay]


class Memory(NamedTuple):
    """Where a storage of the program begins (in bytes) on a storage of torch, perhaps before it."""

    storage: torch.UntypedStorage
    start: int = 0


def _given_memory(
    program: Program, memory: Mapping[str, Tensor], own: Mapping[str, Memory]
) -> dict[str, Memory]:
    found = dict(own)
    for name, storage in program.storages.items():
        if storage.kind == "temporary" or name in own:
            continue
        if name not in memory:
            raise ProgramError(f"{name} is missing, but the program needs it")
        given = memory[name].untyped_storage()
        if given.nbytes() < storage.bytes:
            raise ProgramError(
                f"the program needs {storage.bytes} bytes of {name}, which has only {given.nbytes()}"
            )
        found[name] = Memory(given)
    return found


def _temporary_memory(
    program: Program, device: torch.device, once: Sequence[Operation]
) -> dict[str, Memory]:
    """Return memory for the temporary storages: one block for all that need not persist.

    once: operations that do not run at each step.
    """
    names = program.of_kind("temporary")
    shown = filter(
        None,
        (program.loss, *program.gradients.values(), *program.ends.values(), *program.logged.values()),
    )
    kept = {program.tensors[name].storage for name in shown}
    kept |= {program.tensors[n].storage for operation in once for n in _written(operation)}
    alone = {name for name in names if name in kept or program.storages[name].host}
    plan = plan_memory(program, [name for name in names if name not in alone])
    cpu = torch.device("cpu")
    try:
        shared = _allocate(plan.size, device)
        own = {
            name: Memory(_allocate(storage.bytes, cpu if storage.host else device))
            for name in alone
            for storage in [program.storages[name]]
        }
    except RuntimeError as error:
        raise ProgramError(f"not enough memory for the program: {error}") from None
    return own | {name: Memory(shared, start) for name, start in plan.offsets.items()}


def _written(operation: Operation) -> list[str]:
    return [*filter(None, operation.results), *operation.written()]


def _allocate(size: int, device: torch.device) -> torch.UntypedStorage:
    return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()


def _tensor_on(memory: Memory, spec: TensorSpec) -> Tensor:
    dtype = spec.torch_dtype
    offset = spec.offset + memory.start // dtype.itemsize
    tensor = torch.empty(0, dtype=dtype, device=memory.storage.device)
    return tensor.set_(memory.storage, offset, spec.shape, spec.stride)
