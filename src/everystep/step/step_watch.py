"""Step watch: observes one step of a loop, by its calls if they are known, else in full."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
)
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _pop_mode, _push_mode

from everystep import clock
from everystep.step.elsewhere import Elsewhere
from everystep.step.follow import Follower
from everystep.step.hooks import has_hooks_on_node
from everystep.step.path import Path
from everystep.step.recognition.call import StrangeError, are_methods_torchs_own, kind_of
from everystep.step.recognition.learner import Learner
from everystep.step.recognition.memory import Memory
from everystep.step.recognition.recognizer import Recognizer
from everystep.step.recognition.references import References
from everystep.step.watch import Watch

__all__ = ["StepWatch"]

_kinds: dict[Any, str] = {}


class StepWatch(TorchFunctionMode):
    """Watches one step of a loop, from `begin` to `end`; in force while it is entered.

    Args:
        number: of the step.
        memory: of the recording.
        device, follower, elsewhere: as `Watch` has them.

    changed_unseen: names of the state that something has changed which torch's functions do not do;
    surprise: why no step is recognized any more, in words, where this one has shown it.
    """

    def __init__(
        self, number: int, memory: Memory, device: torch.device, follower: Follower, elsewhere: Elsewhere
    ) -> None:
        super().__init__()
        self.changed_unseen: list[str] = []
        self.surprise: str | None = None
        self._number = number
        self._memory = memory
        self._state: Mapping[str, Tensor] = {}
        self._device = device
        self._follower = follower
        self._elsewhere = elsewhere
        self._watch: Watch | None = None
        self._learner: Learner | None = None
        self._recognizer: Recognizer | None = None
        self._is_paused = self._is_entered = False
        self._made_before_pause = 0
        self._began = 0.0
        # Within an optimizer's step that is seen as a whole, and not among torch's modes.
        self._is_within = self._is_out = False

    @property
    def _source(self) -> Watch | Recognizer:
        """What knows the numbers and generators of the step."""
        source = self._recognizer if self._watch is None else self._watch
        assert source is not None, "the step has not begun"
        return source

    @property
    def recognized(self) -> Recognizer | None:
        """The recognizer of the step, None if it was watched in full."""
        return self._recognizer if self._watch is None else None

    @property
    def numbers(self) -> list[int | float]:
        """The numbers of the step."""
        return self._source.numbers

    @property
    def generators(self) -> dict[int, Tensor]:
        """States of torch's generator before draws, as `Watch` has them."""
        return self._source.generators

    @property
    def drawn(self) -> Tensor | None:
        """The state of torch's generator after the last draw, None if there was none."""
        return self._source.drawn

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed."""
        return self._source.is_empty

    @property
    def unseen(self) -> dict[str, int]:
        """What was not seen, in words, and how often."""
        return {} if self._watch is None else self._watch.unseen

    @property
    def changed_elsewhere(self) -> str | None:
        """A tensor that the step has changed and that is in no part, in words, or None."""
        return None if self._watch is None else self._watch.changed_elsewhere

    @property
    def is_paused(self) -> bool:
        """Whether what runs does not belong to the step."""
        return self._is_paused

    @is_paused.setter
    def is_paused(self, is_paused: bool) -> None:
        if is_paused != self._is_paused:
            follower = self._learner or self._recognizer
            made = torch._C._autograd._get_sequence_nr()
            if is_paused:
                self._made_before_pause = made
            elif follower is not None:
                follower.references.skip_nodes(made - self._made_before_pause)
        self._is_paused = is_paused
        if self._watch is not None:
            self._watch.is_paused = is_paused

    def content(self, storage: int) -> Tensor | None:
        """Return the bytes of an input that is not in the batch, as first seen."""
        if self._watch is not None:
            return self._watch.content(storage)
        assert self._recognizer is not None
        return self._recognizer.contents.get(storage)

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Note the tensors of the state before the step."""
        self._began = clock.now()
        plan = self._memory.plan(self._number)
        references = None if plan == "watch" else self._references_of(state)
        root = self._memory.root(references.structure) if references is not None else None
        self._state = state
        if plan == "recognize" and references is not None and root is not None:
            self._recognizer = Recognizer(root, references, self._elsewhere, self._go_on_watching)
            return
        self._watch = Watch(self._device, self._follower, self._elsewhere)
        self._watch.begin(state)
        if references is not None:
            self._learner = Learner(self._watch, references)

    def _references_of(self, state: Mapping[str, Tensor]) -> References | None:
        """Return references to the state, None if a step from it cannot be recognized."""
        is_quiet = self._memory.is_quiet or not any(map(has_hooks_on_node, state.values()))
        if is_quiet and _are_torchs_own(besides=self) and are_methods_torchs_own():
            self._memory.found_no_hooks()
            try:
                return References(state)
            except StrangeError:
                pass
        self._memory.failed()
        return None

    def add_batch(self, tensors: Mapping[str, Tensor]) -> None:
        """Note the tensors of the batch, which nothing has used yet; they are copied elsewhere."""

        def signature(references: References) -> Any:
            return references.add_batch(tensors)

        self._happened(signature, lambda watch: watch.add_batch(tensors))

    def module_done(self, path: str, outputs: list[Tensor]) -> None:
        """Note the output of a module."""

        if self._recognizer is not None:
            known = tuple(map(self._recognizer.references.lookup, outputs))
            if None not in known and self._recognizer.happened(("module", path, *known)):
                return

        def signature(references: References) -> Any:
            known = tuple(map(references.lookup, outputs))
            if None in known:
                raise StrangeError("a module returns a tensor that no call returned")
            return "module", path, *known

        self._happened(signature, lambda watch: watch.module_done(path, outputs))

    def logged(self, name: str, tensor: Tensor) -> None:
        """Note that a number besides the loss was logged."""
        self._happened(
            lambda references: ("logged", name, references.lookup(tensor)),
            lambda watch: watch.logged(name, tensor),
        )

    def _happened(self, signature: Callable[[References], Any], note: Callable[[Watch], None]) -> None:
        """Note something besides calls of torch's functions, by its signature and in a watch."""
        with torch._C.DisableTorchFunction():
            if self._watch is not None:
                note(self._watch)
            follower = self._learner or self._recognizer
            if follower is None:
                return
            found = _likeness(signature, follower.references)
            if not follower.happened(found):
                assert self._watch is not None
                note(self._watch)
                if self._learner is not None:
                    self._learner.happened(_likeness(signature, self._learner.references))

    def optimizer_begins(
        self,
        optimizer: torch.optim.Optimizer,
        name: str | None,
        has_arguments: bool,
        gradients: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Note that an optimizer starts a step.

        Args:
            name: of the optimizer.
            has_arguments: whether it is given a closure, or something else.
            gradients: returns those of its parameters, by name.
        """
        with torch._C.DisableTorchFunction():
            if self._watch is not None:
                self._watch.optimizer_uses(gradients())
            follower = self._learner or self._recognizer
            if follower is None:
                return
            predicted = None
            if not has_arguments and follower.references.knows(optimizer):
                predicted = self._memory.optimizers.predict(optimizer)
            self._is_within = follower.optimizer_begins(name, predicted, optimizer)
            if follower is not self._learner and self._watch is not None:  # it goes on from here
                self._watch.optimizer_uses(gradients())
        if self._is_within and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._is_out = True

    def optimizer_ends(self, name: str | None, gradients: Callable[[], Mapping[str, Tensor]]) -> None:
        """Note that an optimizer ended a step."""
        if self._is_out:
            super().__enter__()  # type: ignore[no-untyped-call]
            self._is_out = False
        was_within, self._is_within = self._is_within, False
        if was_within and self._learner is None:
            return

        self._happened(
            lambda _: ("optimizer ends", name), lambda watch: watch.optimizer_uses(gradients())
        )

    def end(self, state: Mapping[str, Tensor], loss: Any) -> Path:
        """Return what the step did. state: afterwards; loss: the logged loss."""
        path = self._end(state, loss)
        is_recognized = self.recognized is not None
        self._memory.timed(self._number, clock.now() - self._began, is_recognized=is_recognized)
        return path

    def _end(self, state: Mapping[str, Tensor], loss: Any) -> Path:
        if self._recognizer is not None:
            path = self._recognizer.path(state, loss)
            if path is not None:
                self._memory.recognized()
                self.changed_unseen = self._recognizer.changed_unseen(state)
                if self.changed_unseen:
                    name = self.changed_unseen[0].partition("/")[2]
                    self._be_surprised(f"something other than torch functions changes {name}")
                return path
            self._go_on_watching()
        assert self._watch is not None
        path = self._watch.end(state, loss)
        if self._learner is not None:
            is_fine = self._learner.remember(self._memory, state, loss, path)
            if not is_fine:
                self._be_surprised("the same calls of torch functions run other operations than before")
        return path

    def _be_surprised(self, surprise: str) -> None:
        self.surprise = self._memory.given_up = surprise

    def _go_on_watching(self) -> None:
        """Watch the rest of the step in full, because it is unknown.

        If nothing was computed before, learn it.
        """
        assert self._recognizer is not None
        watch = Watch(self._device, self._follower, self._elsewhere)
        with torch._C.DisableTorchFunction():
            references = self._references_of(self._state) if self._recognizer.is_at_root else None
            if references is not None:
                self._memory.met_another()
                watch.begin(self._state)
                self._learner = Learner(watch, references)
            else:
                self._recognizer.resume(watch)
                self._memory.failed(lacks_variant=self._recognizer.lacks_variant)
        watch.is_paused = self._is_paused
        self._watch, self._recognizer = watch, None
        if self._is_entered:
            above = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
            watch.__enter__()  # type: ignore[no-untyped-call]
            for mode in reversed(above):
                _push_mode(mode)

    def __enter__(self) -> StepWatch:
        self._is_entered = True
        if self._watch is not None:
            self._watch.__enter__()  # type: ignore[no-untyped-call]
        self._is_out = self._learner is None and self._recognizer is None
        if not self._is_out:
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_entered = False
        if not self._is_out:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._watch is not None:
            self._watch.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        kind = _kinds.get(func)
        if kind is None:
            kind = _kinds[func] = kind_of(func)
        if kind == "look" or self._is_paused or self._is_within:
            return func(*args, **keywords)
        follower = self._recognizer or self._learner
        if follower is None:
            return func(*args, **keywords)
        if kind == "call":
            return follower.call(func, args, keywords, self._follower.where)
        self.is_paused = True  # it returns a text to Python
        try:
            return func(*args, **keywords)
        finally:
            self.is_paused = False


def _likeness(signature: Callable[[References], Any], references: References) -> Any:
    """Return an event in comparable form, or the error with the reason why there is none."""
    try:
        return signature(references)
    except StrangeError as error:
        return error


def _are_torchs_own(besides: StepWatch) -> bool:
    """Tell whether the modes around a step run no custom Python."""
    modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return all(type(mode) is DeviceContext or mode is besides for mode in modes)
