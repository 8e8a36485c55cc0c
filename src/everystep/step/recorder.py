"""The recorder of a step: records the operations that reach torch's dispatcher, as they run.

It identifies a tensor by its memory: views are other shapes of the same memory and need no operation. It
holds no references while the step runs, since autograd clones a gradient that somebody else holds.
Autograd's sequence numbers tell which module a backward operation belongs to: the running node has the
number of the forward operation that made it.
"""

from __future__ import annotations

import gc
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import _pop_mode, _push_mode

from everystep.program.operator_mode import OperatorMode
from everystep.program.operators import NotAllowedError, leaves, resolve, writes
from everystep.program.program import Phase, encode

__all__ = ["CapturedOperation", "CapturedStorage", "CapturedTensor", "Refusal", "StepRecorder"]

_EVERYSTEP = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)
_PLAIN_TENSORS = {Tensor, nn.Parameter, nn.Buffer}
_NONE: frozenset[int] = frozenset()
#: Methods of tensors that return numbers to Python without an operation.
_TAKING = ("tolist", "numpy", "__array__", "__dlpack__")
_STANDARD_LIBRARY = str(Path(threading.__file__).parent)
#: It puts functions of its own into the standard library's typing; torch imports it.
_TYPING = str(sys.modules["typing_extensions"].__file__)
#: They only allocate memory, which a program has already.
_MEMORY_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
#: They change a tensor's geometry on the same memory, which its next use shows.
_OTHER_GEOMETRY = {
    *("as_strided_", "detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_")
}


class CapturedTensor(NamedTuple):
    """An observed tensor: its storage, and its geometry in elements."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class CapturedStorage:
    """An observed storage. content: of one from elsewhere, when it was first read."""

    kind: str
    bytes: int
    host: bool
    reference: StorageWeakRef
    content: Tensor | None = None


class CapturedOperation(NamedTuple):
    """An observed operation; tensors in arguments are `%3`, the number of a CapturedTensor."""

    phase: Phase
    module: str | None
    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: tuple[str | None, ...]
    reads: frozenset[int]
    writes: frozenset[int]


class Refusal(NamedTuple):
    """Something that cannot be in a program.

    where: the phase, or `optimizer`; reads: the storages with values that Python read, None if the
    reason is another.
    """

    where: str
    reason: str
    reads: frozenset[int] | None = None


class StepRecorder(OperatorMode):  # type: ignore[no-untyped-call]
    """Records every operation while it runs, without changing what it does."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.tensors: list[CapturedTensor] = []
        self.storages: list[CapturedStorage] = []
        self.operations: list[CapturedOperation] = []
        self.refusals: list[Refusal] = []
        self.activations: dict[str, tuple[int, ...]] = {}
        self.in_optimizer = False
        self._device = device
        self._phase: Phase = "forward"
        self.is_paused = False
        self._tensor_numbers: dict[CapturedTensor, int] = {}
        self._storage_numbers: dict[int, int] = {}
        self._open_modules: list[str] = []
        self._module_of_node: dict[int, str | None] = {}
        #: Sees which functions are called, while hooks are seen.
        self._on_call: Callable[[types.FrameType, str, Any], None] | None = None

    def enter(self, phase: Phase) -> None:
        """Begin the next phase."""
        self._phase = phase

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing within."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    @contextmanager
    def left(self) -> Iterator[None]:
        """Let torch compute within as it does without a mode."""
        _pop_mode()
        try:
            yield
        finally:
            _push_mode(self)

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Follow which module of the model runs, and note its outputs."""
        paths = {id(module): path for path, module in model.named_modules()}
        thread = threading.get_ident()  # hooks on all modules see those of other threads too

        def opened(module: nn.Module, inputs: Any) -> None:
            if threading.get_ident() == thread:
                self._open_modules.append(paths.get(id(module), ""))

        def closed(module: nn.Module, inputs: Any, output: Any) -> None:
            if threading.get_ident() != thread:
                return
            path = self._open_modules.pop()
            if path and self._phase == "forward":
                outputs = list(leaves(list(output.values()) if isinstance(output, dict) else output))
                # The tensors of torch.vmap and the like have no memory of their own.
                with self.paused(), suppress(NotImplementedError):
                    self.module_done(path, outputs)

        hooks = [
            register_module_forward_pre_hook(opened),
            register_module_forward_hook(closed, always_call=False),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def module_done(self, path: str, outputs: list[Tensor]) -> None:
        """Note the output of a module; of several calls, the last."""
        numbers = tuple(map(self.number, outputs))
        self.activations.pop(path, None)
        self.activations[path] = numbers

    @contextmanager
    def numbers_seen(self) -> Iterator[None]:
        """Detect when Python reads numbers of a tensor bypassing the dispatcher.

        Methods are exchanged, because torch computes in other ways under a mode for its functions.
        """
        own = {name: vars(Tensor).get(name) for name in _TAKING}
        for name in _TAKING:
            setattr(Tensor, name, self._noting(getattr(Tensor, name), f"Tensor.{name}"))
        try:
            yield
        finally:
            for name, usual in own.items():
                if usual is None:  # a base of Tensor has it
                    delattr(Tensor, name)
                else:
                    setattr(Tensor, name, usual)

    def _noting(self, usual: Any, name: str) -> Any:
        watched = threading.get_ident()

        def taking(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
            if threading.get_ident() == watched:
                self.numbers_taken(tensor, name)
            return usual(tensor, *args, **keywords)

        return taking

    @contextmanager
    def hooks_seen(self) -> Iterator[None]:
        """Detect functions of Python in the backward pass that are neither torch's nor everystep's.

        Such a function is a hook on a node of the graph, which is not visible otherwise.
        """
        if sys.getprofile() is not None:  # there is only one, and a profiler uses it
            yield
            return

        def called(frame: types.FrameType, event: str, argument: Any) -> None:
            if event == "call" and not _is_known(frame):
                name = frame.f_code.co_qualname
                self.refusals.append(Refusal("backward", f"calls {name}, a hook on the graph"))

        # What the garbage collector calls is not a hook.
        is_collecting = gc.isenabled()
        gc.disable()
        self._on_call = called
        sys.setprofile(called)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._on_call = None
            if is_collecting:
                gc.enable()

    def gradients(self, gradients: dict[str, Tensor]) -> dict[str, int]:
        """Note the gradients that the backward phase has left."""
        for name, gradient in gradients.items():
            if gradient.layout != torch.strided:
                self.refusals.append(Refusal("backward", f"the gradient of {name} is sparse"))
                return {}
        return {name: self.number(gradient) for name, gradient in gradients.items()}

    def numbers_taken(self, tensor: Tensor, how: str) -> None:
        """Python has read all numbers of a tensor."""
        if not self.is_paused:
            where = "optimizer" if self.in_optimizer else self._phase
            reads = frozenset({self.tensors[self.number(tensor)].storage})
            reason = f"{how} returns numbers to Python, which may branch on them"
            self.refusals.append(Refusal(where, reason, reads))

    def know(self, tensor: Tensor, kind: str) -> int:
        """Note a tensor that exists before the step."""
        return self.number(tensor, kind)

    def number(self, tensor: Tensor, kind: str = "constant") -> int:
        """Return the number of a tensor; on memory not seen before, it is of that kind."""
        storage = tensor.untyped_storage()
        number = self._storage_numbers.get(storage._cdata)
        if number is None:
            # As long as there is a weak reference, no other storage gets the same place.
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            number = self._storage_numbers[storage._cdata] = len(self.storages)
            host = tensor.device.type == "cpu" and self._device.type != "cpu"
            self.storages.append(CapturedStorage(kind, storage.nbytes(), host, reference))
            if kind == "constant":
                self.storages[number].content = _copy_of_storage(tensor)
        seen = CapturedTensor(
            number,
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
        )
        known = self._tensor_numbers.setdefault(seen, len(self.tensors))
        if known == len(self.tensors):
            self.tensors.append(seen)
        return known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._on_call is None:
            return self._see(func, args, kwargs or {})
        sys.setprofile(None)  # no hook is called while an operation runs
        try:
            return self._see(func, args, kwargs or {})
        finally:
            sys.setprofile(self._on_call)

    def _see(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Run an operation, and record it."""
        known = _known(func)
        if self.is_paused or known.is_passed:
            return func(*args, **keywords)
        module = self._module()
        try:
            resolve(known.text)
            arguments = self._encoded(known, args, keywords)
        except (NotAllowedError, NotImplementedError, RuntimeError) as error:
            self._refuse(func, error, args)
            return func(*args, **keywords)
        count = len(self.storages)
        written = self._written(known, args, keywords) if known.writes else _NONE
        result = func(*args, **keywords)
        try:
            results = self._results(result) if known.gives else []
        except (NotImplementedError, RuntimeError) as error:
            self._refuse(func, error)
            return result
        places = [self.tensors[n].storage for n in results if n is not None]
        new = frozenset([place for place in places if place >= count])
        if (new or written) and not known.is_memory:
            reads = frozenset([self.tensors[n].storage for n in arguments.reads])
            names = tuple([None if n is None else f"%{n}" for n in results])
            self.operations.append(
                CapturedOperation(
                    self._phase,
                    module,
                    func,
                    arguments.positional,
                    arguments.keywords,
                    names,
                    reads,
                    new | written,
                )
            )
        return result

    def _module(self) -> str | None:
        """Return the path of the module of the current operation."""
        node = torch._C._current_autograd_node()
        if self._phase == "backward":
            return self._module_of_node.get(node._sequence_nr()) if node is not None else None
        path = self._open_modules[-1] if self._open_modules else None
        module = path if self._phase == "forward" and path else None
        # The node that autograd has just made for this operation, if it made one.
        self._module_of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
        return module

    def _encoded(
        self, known: _KnownOperator, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> _Encoded:
        reads: list[int] = []

        def name_of(tensor: Tensor) -> str:
            if tensor.is_conj() or tensor.is_neg():
                raise NotAllowedError("takes a lazily conjugated tensor")
            if type(tensor) not in _PLAIN_TENSORS:
                raise NotAllowedError(f"takes a {type(tensor).__name__}, a tensor subclass")
            number = self.number(tensor)
            reads.append(number)
            return f"%{number}"

        if known.is_index and any(t.dtype in (torch.bool, torch.uint8) for t in leaves(args[1])):
            raise NotAllowedError("selects by a mask: the shape of the result depends on values")
        positional = tuple([encode(value, name_of) for value in args])
        named = {key: encode(value, name_of) for key, value in keywords.items()}
        return _Encoded(positional, named, reads)

    def _written(
        self, known: _KnownOperator, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> frozenset[int]:
        given = dict(zip(known.names, args, strict=False)) | keywords
        tensors = [t for name in known.writes for t in leaves(given.get(name))]
        return frozenset([self.tensors[self.number(tensor)].storage for tensor in tensors])

    def _results(self, result: Any) -> list[int | None]:
        if isinstance(result, Tensor):
            return [self.number(result, "temporary")]
        flat: list[int | None] = []
        for item in result if isinstance(result, list | tuple) else [result]:
            for part in item if isinstance(item, list | tuple) else [item]:
                flat.append(self.number(part, "temporary") if isinstance(part, Tensor) else None)
        return flat

    def _refuse(self, func: Any, error: Exception, args: tuple[Any, ...] = ()) -> None:
        where = "optimizer" if self.in_optimizer else self._phase
        module = self._module()
        reason = str(error).splitlines()[0]
        name = str(func)
        problem = reason if isinstance(error, NotAllowedError) else f"{name}: {reason}"
        reads = None
        if torch.Tag.data_dependent_output in func.tags:
            reads = frozenset(self.tensors[self.number(t)].storage for t in leaves(args))
        problem = problem if name in problem else f"{name} {problem}"
        self.refusals.append(
            Refusal(where, f"{problem} (module {module})" if module else problem, reads)
        )


class _KnownOperator(NamedTuple):
    """What is known of an operator, looked up once.

    is_passed: it computes nothing; is_memory: it only allocates memory; text: its name with its
    overload; names: of its arguments; writes: those that it writes to; gives: whether it has results.
    """

    is_passed: bool
    is_memory: bool
    is_index: bool
    text: str
    names: tuple[str, ...]
    writes: frozenset[str]
    gives: bool


@cache
def _known(func: Any) -> _KnownOperator:
    name = func.overloadpacket.__name__
    return _KnownOperator(
        func.namespace in ("prim", "profiler") or name in _OTHER_GEOMETRY,
        name in _MEMORY_ONLY,
        name == "index",
        str(func),
        tuple(argument.name for argument in func._schema.arguments),
        writes(func),
        bool(func._schema.returns),
    )


def _is_known(frame: types.FrameType) -> bool:
    """Tell whether a function that runs is torch's, everystep's or the standard library's."""
    file = frame.f_code.co_filename
    if file.startswith((_EVERYSTEP, _TORCH, _TYPING, "<frozen")):
        return True
    if file.startswith(_STANDARD_LIBRARY):
        return "site-packages" not in file and "dist-packages" not in file
    # What dataclasses and named tuples generate has no file.
    caller = frame.f_back
    return (
        file == "<string>" and caller is not None and (caller.f_code.co_filename.startswith(_EVERYSTEP))
    )


class _Encoded(NamedTuple):
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    reads: list[int]


def _copy_of_storage(tensor: Tensor) -> Tensor:
    """Return all bytes of a tensor's storage."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage()).clone()
