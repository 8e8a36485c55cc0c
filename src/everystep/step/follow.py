"""Follow: which module, backward pass and optimizer is running, by torch's hooks.

torch has no hook where `backward` and `grad` start the engine (`torch.autograd._engine_run_backward`);
where `tensor.data = other` gives a tensor other memory; where `numpy` and `tolist` read memory within a
step; and where code between two steps takes `tensor.data` or `tensor.numpy()`, or passes a tensor to
other processes: torch does not count what is written into them. No call of the dispatcher shows these,
so the functions are replaced. They belong to the process, but a follower to its thread: in others, they
do what torch's do.

Each optimizer marks its time for a profiler. That is no operation, and no mode sees it meanwhile.
"""

from __future__ import annotations

import inspect
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from operator import itemgetter
from threading import Lock, get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from everystep.errors import Fault, UsageError
from everystep.ops.operators import leaves
from everystep.program.operation import Phase
from everystep.step.calling_code import is_called_in
from everystep.step.collective_calls import NotedCalls
from everystep.step.mode_formulas import ModeFormulas

__all__ = [
    "OF_WATCHES",
    "Follower",
    "is_compiled",
    "module_fault",
    "run_engine",
]

#: Methods of tensors that read memory; `numpy.asarray` calls the second.
_READING = "__dlpack__", "numpy", "tolist"
#: Names of the functions that are replaced; another thread may be the reason that they are.
OF_WATCHES = {"_engine_run_backward", "data", *_READING}

_DATA = torch._C.TensorBase.data
_next_node = torch._C._autograd._get_sequence_nr

#: The followers of each thread. The first one sets torch's hooks for all modules and optimizers, and
#: replaces functions; the last one removes them: other threads may be iterating over torch's tables.
_followers: dict[int, tuple[Follower, ...]] = {}
_hooks: list[Any] = []
_lock = Lock()


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of a module run a graph of torch.compile's."""
    is_around = type(module).__module__.startswith("torch._dynamo")
    return is_around or module._compiled_call_impl is not None


def module_fault(name: str, module: nn.Module) -> Fault | None:
    """Return what is wrong with a module that no run can hold, or None."""
    problem = "is scripted (torch.jit); its code is not Python's, so pass the module it was made from"
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        return Fault(name, problem)
    try:
        deque(module.named_modules(remove_duplicate=False), maxlen=0)
    except RecursionError:
        problem = (
            "has a module that lies within itself, which has no end; hold that one in a list: [self]"
        )
        return Fault(name, problem)
    return None


def _check_watchable(module: nn.Module) -> None:
    """Check a module that is called in a recorded loop.

    Raises:
        UsageError: it cannot be watched.
    """
    if is_compiled(module):
        raise UsageError(
            f"{type(module).__name__} is compiled (torch.compile); torch would run it uncompiled while "
            "everystep watches, with different results; use the uncompiled module in the loop"
        )
    if getattr(module, "_comm_hooks", None):  # of DistributedDataParallel
        raise UsageError(
            f"{type(module).__name__} has a hook that exchanges gradients (register_comm_hook); it "
            "runs in threads of torch's, which everystep cannot watch; record the loop without it"
        )
    if getattr(getattr(module, "_join_config", None), "enable", False):
        raise UsageError(
            f"{type(module).__name__} is trained within join(), where a process without batches "
            "takes part outside of steps, so they cannot be replayed; give each as many batches"
        )


class Listener(Protocol):
    """What a follower reports to."""

    def optimizer_begins(self, optimizer: torch.optim.Optimizer, has_arguments: bool) -> None:
        """An optimizer begins its step, called with arguments or without."""

    def optimizer_ends(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is done with its step."""

    def exposes(self, tensor: Tensor) -> None:
        """Code that no watch sees is about to take, or to exchange, the `data` of a tensor."""


class Follower:
    """Follows the thread that makes it, from `begin` to `finish`.

    where: the innermost module and optimizer that run, and the phase of what runs outside of them;
    watch: of the step in progress; it runs the backward passes, and learns of other memory of tensors;
    is_computed: while a batch is drawn, whether a module that is trained has run, else None.

    Args:
        is_torchs: returns whether the step of an optimizer runs only torch's code, and a closure first.
    """

    listener: Listener

    def __init__(self, is_torchs: Callable[[torch.optim.Optimizer], bool]) -> None:
        self.is_torchs = is_torchs
        self.watch: Any = None
        self.is_computed: bool | None = None
        self._thread = get_ident()
        #: Classes of modules that were found to be watchable.
        self._ordinary: set[type] = set()
        self._open: list[str | None] = []
        #: The optimizers that run, each with the file of its step, if that has a closure.
        self._updating: list[tuple[str | None, str | None]] = []
        # The modules that ran in turn, each with the number of the first node of the graph it made.
        self._made: list[tuple[int, str | None]] = []
        self.where: tuple[Any, ...] = ()
        self._phase: Phase | None = None

    def begin(
        self,
        listener: Listener,
        modules: Callable[[], Mapping[int, str]],
        name_of: Callable[[torch.optim.Optimizer], str | None],
    ) -> None:
        """Begin to follow, and to report to a listener; none of these is held after `finish`.

        Args:
            listener: that.
            modules: returns the paths of modules, by id.
            name_of: returns the name of an optimizer, which is the module of what it does.
        """
        self.listener, self.modules, self.name_of = listener, modules, name_of
        with _lock:
            _followers[self._thread] = (*_followers.get(self._thread, ()), self)
            if not _hooks:
                # What ends each, too: torch's hooks for all modules and optimizers, and replacements.
                _hooks[:] = (
                    register_module_forward_pre_hook(_told(Follower.opened)),
                    register_module_forward_hook(_told(Follower.closed), always_call=True),
                    register_optimizer_step_pre_hook(_update_begins),
                    register_optimizer_step_post_hook(_told(Follower.update_ends)),
                    *(_Replacement(), ModeFormulas()),
                )

    def finish(self) -> None:
        """Follow no longer."""
        with _lock:
            others = tuple(each for each in _followers.pop(self._thread, ()) if each is not self)
            if others:
                _followers[self._thread] = others
            if not _followers:
                while _hooks:
                    _hooks.pop().remove()
        del self.listener, self.modules, self.name_of

    def step_begins(self) -> None:
        """Begin another step: nothing runs."""
        self._open, self._updating, self._made = [], [], []
        self.enter(None)

    def enter(self, phase: Phase | None) -> None:
        """Begin a phase, where the step is known; None: it is found out."""
        self._phase = phase
        self._moved()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Let what runs inside, and in no module or optimizer, belong to a phase."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def _moved(self) -> None:
        module = self._open[-1] if self._open else None
        self.where = module, *self._updating, self._phase
        self._made.append((_next_node(), module))

    def _module_of(self, node: int) -> str | None:
        """Return the module that ran when a node of the graph was made, None if there was none."""
        place = bisect_right(self._made, node, key=itemgetter(0)) - 1
        return self._made[place][1] if place >= 0 and node < _next_node() else None

    def place(self, is_zeroing: bool) -> tuple[Phase, str | None]:
        """Return the phase, and the module or optimizer, of the current operation.

        is_zeroing: whether it sets gradients to zero.
        """
        node = torch._C._current_autograd_node()
        if node is not None:
            return "backward", self._module_of(node._sequence_nr())
        module = self._open[-1] if self._open else None
        if module is not None:  # the path of the model itself is empty
            return "forward", module or None
        # In a closure, an optimizer runs the user's forward and backward pass.
        if self._updating:
            name, file = self._updating[-1]
            if file is None or is_called_in(file):
                return "update", name
        if self._phase is not None:
            return self._phase, None
        if is_zeroing:
            return "zero_grad", None
        return ("loss" if torch.is_grad_enabled() else "other"), None

    def opened(self, module: nn.Module, inputs: Any) -> None:
        """Note that a module begins.

        Raises:
            UsageError: it cannot be watched.
        """
        # Each module can be compiled on its own, so its class does not show it.
        if type(module) not in self._ordinary or module._compiled_call_impl is not None:
            _check_watchable(module)
            if not hasattr(type(module), "join_hook"):  # what a wrapper does may change
                self._ordinary.add(type(module))
            elif self.watch is None:
                # DistributedDataParallel writes the buffers of rank 0, such as in a validation.
                for buffer in module.buffers():
                    self.listener.exposes(buffer)
        # A module that is not a part, such as a loss, belongs to the module around it.
        around = self._open[-1] if self._open else None
        path = self.modules().get(id(module), around)
        self._open.append(path)
        if path is not around:
            self._moved()
        if self.is_computed is False and path is not None:
            self.is_computed = any(parameter.requires_grad for parameter in module.parameters())

    def closed(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Note that a module is done."""
        if not self._open:
            return
        path = self._open.pop()
        # By identity: each path is one text, and a module outside the parts has the path around it.
        if path is not (self._open[-1] if self._open else None):
            self._moved()
        watch = self.watch
        is_seen = path and watch is not None and not watch.is_paused
        # Within a backward pass, checkpointed modules run again: their output was noted in the forward.
        if is_seen and id(module) in self.modules() and torch._C._current_autograd_node() is None:
            given = list(output.values()) if isinstance(output, dict) else output
            watch.module_done(path, [given] if type(given) is Tensor else leaves(given))

    def update_begins(self, optimizer: torch.optim.Optimizer, has_arguments: bool) -> None:
        """Note that an optimizer begins its step."""
        # The file tells code of the optimizer from that of its closure, see `place`.
        step = inspect.unwrap(type(optimizer).step) if has_arguments else None
        file = getattr(getattr(step, "__code__", None), "co_filename", None)
        self._updating.append((self.name_of(optimizer), file))
        self._moved()
        self.listener.optimizer_begins(optimizer, has_arguments)

    def update_ends(self, optimizer: torch.optim.Optimizer, *given: Any) -> None:
        """Note that an optimizer is done with its step."""
        if self._updating:
            self._updating.pop()
            self._moved()
            self.listener.optimizer_ends(optimizer)


def _told(note: Callable[..., None]) -> Callable[..., None]:
    """Return a hook by which the followers of a thread note something."""

    def hook(*given: Any) -> None:
        for follower in _followers.get(get_ident(), ()):
            note(follower, *given)

    return hook


def _update_begins(optimizer: torch.optim.Optimizer, args: Any, keywords: Any) -> Any:
    """Note that a step begins: with a closure that torch's code calls first, after the closure."""
    followers = _followers.get(get_ident(), ())
    # Wrappers pass on `closure=None`.
    given = [each for each in (*args[1:], *keywords.values()) if each is not None]
    if len(given) != 1 or not followers or not all(each.is_torchs(optimizer) for each in followers):
        for follower in followers:
            follower.update_begins(optimizer, bool(given))
        return None

    # What the closure computes is then watched, and the step alone is one operation.
    def closure() -> Any:
        loss = given[0]()
        for follower in followers:
            follower.update_begins(optimizer, False)
        return loss

    return (optimizer, closure), {}


def _watch() -> Any:
    """Return the innermost watch of this thread, None if it is in no step."""
    # Between two steps of a loop, another training may run, with a follower of its own.
    watches = (each.watch for each in reversed(_followers.get(get_ident(), ())))
    return next((watch for watch in watches if watch is not None), None)


#: torch's own, or a replacement by other code.
_engine: Any = None
_MARKS = "_record_function_enter_new", "_record_function_exit._RecordFunction"


class _Replacement:
    """Replaces the functions until it is removed; there is one at a time in the process.

    A change of `torch.Tensor` makes Python forget where it found the methods of all tensors, so a
    recording does this once, and not at each step.
    """

    def __init__(self) -> None:
        global _engine
        # "Python" is the key of modes: a mark falls through it to the kernel below.
        library: Any = torch.library.Library("profiler", "IMPL")  # type: ignore[no-untyped-call]
        for name in _MARKS:
            library.impl(name, torch.library.fallthrough_kernel, "Python")
        #: Keeps the marks of a profiler from modes, as long as it exists.
        self._unmarked = library
        _engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
        torch.autograd._engine_run_backward = _run  # type: ignore[attr-defined,assignment]
        torch.Tensor.data = property(_get_data, _set_data, _DATA.__delete__)  # type: ignore
        #: Those of `torch.Tensor` itself; others are of its base.
        self._own = {name: vars(torch.Tensor).get(name) for name in _READING}
        for name in _READING:
            setattr(torch.Tensor, name, _noted(getattr(torch.Tensor, name)))
        self._calls = NotedCalls(_exchanges)

    def remove(self) -> None:
        """Restore torch's functions."""
        self._unmarked = None
        for name, function in self._own.items():
            if function is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, function)
        self._calls.remove()
        torch.autograd._engine_run_backward = _engine  # type: ignore[attr-defined]
        del torch.Tensor.data


def run_engine(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a backward pass as torch does."""
    return _engine(outputs, *args, **kwargs)


def _run(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    watch = _watch()
    run = _engine if watch is None else watch.run_backward
    return run(outputs, *args, **kwargs)


def _expose(tensor: Tensor) -> None:
    for follower in _followers.get(get_ident(), ()):
        follower.listener.exposes(tensor)


def _get_data(tensor: Tensor) -> Tensor:
    # Within a step, the watch sees what is written through it.
    if _watch() is None:
        _expose(tensor)
    return _DATA.__get__(tensor)  # type: ignore[attr-defined,no-any-return]


def _noted(read: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of tensors that reports that it gives the memory of one to Python."""

    may_write = read.__name__ != "tolist"

    @wraps(read)
    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (watch := _watch()) is not None and not watch.is_paused:
            watch.reads(tensor, may_write=may_write)
        # everystep's own code writes into nothing that it reads.
        elif not str(sys._getframe(1).f_globals.get("__name__")).startswith("everystep."):
            _expose(tensor)
        return read(tensor, *args, **kwargs)

    return noted


def _exchanges(tensors: Sequence[Tensor], refusal: str | None) -> bool:
    """Report tensors that a call to other ranks may write into; return whether it is of this thread.

    refusal: why the call must not be in a step.

    Raises:
        UsageError: it is.
    """
    if get_ident() not in _followers:
        return False
    if (watch := _watch()) is not None and not watch.is_paused and refusal is not None:
        raise UsageError(refusal)
    if watch is None:
        for tensor in tensors:
            _expose(tensor)
    elif watch.is_paused:
        watch.exchanged += tensors
    return True


def _set_data(tensor: Tensor, value: Tensor) -> None:
    if (watch := _watch()) is None:
        _expose(tensor)
    _DATA.__set__(tensor, value)  # type: ignore[attr-defined]
    if watch is not None:
        watch.moved(tensor)
