"""Stand-in: a program that runs a step in place of its Python.

The step is torch's own code, or the user vouches that it runs the same operations each time. Visible
conditions are checked (see `replaceable`): its numbers are those of torch's optimizers, are read from
tensors and only logged, or stay the same. The program is compared with Python's step on a copy of the
state, at first and at steps that a `CheckPlan` names, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from everystep.errors import ProgramError
from everystep.ops.operators import draws_random_numbers, without_autograd
from everystep.program.bound import BoundProgram
from everystep.program.memory import copied_together, copy_into, lies_as
from everystep.program.number_slots import Number
from everystep.program.operation import TensorSpec
from everystep.step.build import BuiltPath
from everystep.step.cursor import Cursor
from everystep.step.generators import different, generator_states
from everystep.step.optimizer_call import OptimizerCalls
from everystep.step.outside_tensors import Brought
from everystep.step.parts import Parts
from everystep.step.path import Path, places_of_reads
from everystep.step.replaceable import NotReplaceableError, check_optimizers, check_replaceable
from everystep.step.state import same_bits

__all__ = ["PartsCopy", "StandIn", "TakenByProgram"]

#: Bytes up to which a copy of the state and of the program's memory is kept for the next comparison.
SMALL_BYTES = 16_000_000
_CPU = torch.device("cpu")
CURE = "return the tensor instead of a Python number"


class TakenByProgram:
    """A step that a program ran, as a watch would have observed it.

    numbers, generators, drawn: as in `UnderWay`; is_still: no tensor of the parts was exchanged, or has
    another version than before, although it may have other values.
    """

    changed_outside = None
    is_paused = is_empty = is_compiled = False

    def __init__(
        self, path: Path, numbers: Sequence[int | float], contents: Mapping[int, Tensor]
    ) -> None:
        self.is_still = False
        self.numbers = numbers
        self.generators: dict[int, Tensor] = {}
        self.drawn: Tensor | None = None
        self.unseen: dict[str, int] = {}
        self.changed_unseen: list[str] = []
        self._path = path
        self._contents = contents

    def from_outside(self, storage: int) -> Brought | None:
        """Return an input that is not in the batch; its content does not change from step to step."""
        content = self._contents.get(storage)
        return None if content is None else Brought(content)

    def end(self, state: Mapping[str, Tensor], versions: Any, loss: Any) -> Path:
        """Return the path of the step."""
        return self._path


class PartsCopy(NamedTuple):
    """What a step begins with: copies of the tensors of the parts and of the batch, by name, and the
    random generators.
    """

    tensors: dict[str, Tensor]
    batch: dict[str, Tensor]
    generators: dict[str, Any]

    @classmethod
    def of(cls, parts: Parts, batch: Mapping[str, Tensor]) -> PartsCopy:
        """Copy the current state of the parts, and a batch."""
        copies = {name: tensor.detach().clone() for name, tensor in batch.items()}
        return cls(copied_together(parts.state()), copies, generator_states(_CPU))

    def has_python_drawn(self) -> bool:
        """Return whether the step has drawn from Python's or NumPy's generator, as no program does."""
        return bool(different(self.generators, generator_states(_CPU)) - {"torch"})


class StandIn:
    """Runs the steps with a batch of one kind.

    Args:
        parts: of the training.
        built: the program.
        path: of each step.
        seen: the Python step that it was built from.
        optimizers: those that stepped in it, in order.
        schedulers: those that it advanced.
        batch: the tensors of the batch, by name.
        plain: logged values of this step that are not tensors.
        is_quiet: whether only torch's code runs between two steps.

    path: of each step; schedulers: those that it advances; live: the program on the last tensors of
    `is_ready`; is_steady: whether a step leaves the gradients that it begins with as it found them.

    Raises:
        NotReplaceableError: the next step may differ; gives the reason.
    """

    def __init__(
        self,
        parts: Parts,
        built: BuiltPath,
        path: Path,
        seen: Cursor,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[LRScheduler],
        batch: Mapping[str, Tensor],
        plain: Mapping[str, Any],
        *,
        is_quiet: bool,
    ) -> None:
        self._parts = parts
        self._built = built
        self.path = path
        self._numbers = [*seen.numbers]
        brought = ((place, seen.from_outside(place)) for place in range(len(path.storages)))
        self._contents = {place: each.content for place, each in brought if each is not None}
        self._batch = [*batch]
        self._plain = plain
        self._optimizer_steps = [*seen.optimizers.seen]
        check_optimizers(self._optimizer_steps, optimizers)
        self._calls = OptimizerCalls()
        self.schedulers = [*schedulers]
        self._draws = any(draws_random_numbers(each.operator) for each in path.operations)
        self._leaves = parts.leaves()
        tensors, names = built.program.tensors, built.program.state_names
        self._state = {name: spec for name, spec in tensors.items() if name in names}
        #: Gradients that a step begins with: they are other tensors after each step that makes new ones.
        self._moves = [name for name in self._state if name.startswith("gradient/")]
        before, ends = _gradients(path, path.named), _gradients(path, path.ends)
        after = {name: lies for name, lies in (before | ends).items() if name not in path.gone}
        self.is_steady = after == before and ends.keys().isdisjoint(self._moves)
        self._is_quiet = is_quiet
        self._places: list[int] = []
        self._era: int | None = None
        self.live: BoundProgram | None = None
        #: The batch in the program's memory, until other code runs.
        self._loaded: list[Tensor] = []
        #: The places of the numbers that Python reads, by the name under which it logs them.
        self._logged_reads = self._places_of_logged()
        #: Of these places: those among the numbers that the program has.
        self._read = {place: built.numbers_kept.index(place) for place in self._logged_reads.values()}
        check_replaceable(built.program, path, seen, batch, parts.device)
        #: The program on a copy of a state, to be compared.
        self._copy: BoundProgram | None = None
        lying = {path.tensors[number].storage: name for name, number in path.named}
        self._written = [
            lying[storage] for each in path.operations for storage in each.writes if storage in lying
        ]

    def _places_of_logged(self) -> dict[str, int]:
        """Return which logged numbers Python has read, and where.

        Raises:
            NotReplaceableError: it reads a number that it does not log, or one of several equal ones.
        """
        read = [*places_of_reads(self.path.operations)]
        found: dict[str, int] = {}
        for name, value in self._plain.items():
            # As texts, -0.0 differs from 0.0, and NaN equals itself.
            places = [place for place in read if repr(self._numbers[place]) == repr(value)]
            if len(places) > 1:
                raise NotReplaceableError(f"it is unclear which number {name} is; {CURE}")
            # The program omits what no result needs, so it would not compute this number.
            if places and places[0] not in self._built.numbers_kept:
                raise NotReplaceableError(f"{name} is returned as a Python number; return the tensor")
            if places:
                found[name] = places[0]
        if {*read} - {*found.values()}:
            raise NotReplaceableError(
                "Python, or a function of torch, reads a number from a tensor, and may branch on it; "
                "compute with the tensor, or only return the number"
            )
        return found

    def is_ready(self, state: Mapping[str, Tensor], era: int) -> bool:
        """Return whether the tensors of the state have the layout of the program; bind it to them.

        era: within the same era, only programs have run.
        """
        if era != self._era:
            self._loaded = []
        # In the same era, only programs have run, and they exchange no tensors but gradients.
        elif self.live is not None and not self._moves:
            return True
        found = {name: state[name] for name in self._state if name in state}
        if len(found) < len(self._state):
            return False
        places = [tensor.untyped_storage().data_ptr() for tensor in found.values()]
        for name, tensor in found.items():
            is_known = era == self._era and not name.startswith("gradient/")
            if not is_known and not lies_as(tensor, self._state[name]):
                return False
        # The program runs on these addresses, so tensors that have moved need it bound again.
        if self.live is None or places != self._places:
            # A write into shared memory changes several tensors, so the program must know of it.
            if not _share_as(found, self._state):
                return False
            try:
                self.live = self._bind(found)
            except ProgramError:
                return False
            self._places, self._loaded = places, []
        self._era = era
        return True

    @property
    def bytes(self) -> int:
        """The memory of the program without the state and the batch."""
        return 0 if self.live is None else self.live.temporary_bytes

    def let_go(self) -> None:
        """Free the memory of the program; `is_ready` binds it again."""
        self.live = None

    def take(
        self,
        state: dict[str, Tensor],
        numbers: list[Number],
        batch: Mapping[str, Tensor],
        *,
        is_settled: bool,
    ) -> tuple[TakenByProgram, dict[str, Any]]:
        """Run a step on the live tensors that `is_ready` checked; return it, and what it logs.

        Args:
            state: these tensors; updated to those after the step.
            numbers: of the step; what it reads is put among them.
            batch: its tensors, by name.
            is_settled: nothing has run since the last step, which a program ran.

        Raises:
            RuntimeError: a kernel refuses its arguments.
        """
        live = self.live
        assert live is not None
        taken = self.begin(numbers)
        self.load(batch)
        # The operations of the backward pass are in the program, so autograd has nothing to note.
        with without_autograd():
            live.run()
            # The next step overwrites the memory of the program, and the caller may keep the values.
            found = {name: tensor.clone() for name, tensor in live.logged.items()}
        self.end(taken, state, is_settled=is_settled)
        for scheduler in self.schedulers:
            scheduler.step()
        for place, index in self._read.items():
            numbers[place] = live.numbers[index]
        logged = {name: numbers[place] for name, place in self._logged_reads.items()}
        return taken, {**found, **self._plain, **logged}

    def load(self, batch: Mapping[str, Tensor]) -> None:
        """Put a batch where the program reads it, unless it is there already."""
        assert self.live is not None
        tensors = [*batch.values()]
        # The same objects have the same numbers: once other code has run, none counts as loaded.
        if [*map(id, tensors)] != [*map(id, self._loaded)]:
            with without_autograd():
                self.live.load(batch)
            self._loaded = tensors

    def begin(self, numbers: list[Number]) -> TakenByProgram:
        """Get ready for steps with these numbers, which `live` runs; `end` ends them."""
        assert self.live is not None
        self.live.put(self._built.numbers(numbers))
        taken = TakenByProgram(self.path, numbers, self._contents)
        if self._draws:
            # Later draws begin where the first one leaves the generator.
            taken.generators[0] = torch.get_rng_state()
        return taken

    def end(self, taken: TakenByProgram, state: dict[str, Tensor], *, is_settled: bool) -> None:
        """Note what steps have left that `begin` began, and set the gradients.

        Args:
            taken: returned by `begin`.
            state: the live tensors; updated to those after the steps.
            is_settled: nothing has run since the step before, which a program ran.
        """
        assert self.live is not None
        taken.is_still = is_settled
        if self._draws:
            taken.drawn = torch.get_rng_state()
        ends = self.live.ends
        if any(state.get(name) is not tensor for name, tensor in ends.items()):
            # Other code may keep them, and a step that begins with them must not write into them.
            own = ends if self._is_quiet and not self._moves else copied_together(ends)
            for name, tensor in own.items():
                self._set_gradient(state, name, tensor)
            taken.is_still = False
        for name in self.path.gone:
            if name in state:
                self._set_gradient(state, name, None)
                taken.is_still = False
        if not is_settled:  # a graph that other code keeps must notice the writes
            written = [state[name] for name in self._written if name in state]
            torch.autograd.graph.increment_version(written)

    @property
    def places(self) -> list[Tensor]:
        """Where the program reads the tensors of a batch, in their order."""
        assert self.live is not None
        return [self.live.tensor(name) for name in self._batch]

    def release(self, state: dict[str, Tensor]) -> bool:
        """Give the parts copies of the gradients that the program writes into; return whether it did.

        To be called before other code runs, which may keep them.
        """
        ends = {} if self.live is None else self.live.ends
        lent = {name: tensor for name, tensor in ends.items() if state.get(name) is tensor}
        for name, tensor in copied_together(lent).items():
            self._set_gradient(state, name, tensor)
        return bool(lent)

    def _set_gradient(self, state: dict[str, Tensor], name: str, gradient: Tensor | None) -> None:
        self._leaves[name.removeprefix("gradient/")].grad = gradient
        if gradient is None:
            state.pop(name, None)
        else:
            state[name] = gradient

    def _bind(self, state: Mapping[str, Tensor]) -> BoundProgram:
        given = self._built.program, state, self._inputs(), self._batch, self._parts.device
        return BoundProgram(*given)

    def _inputs(self) -> dict[str, Tensor]:
        """Return the bytes of inputs that are not in the batch, by the name of their storage."""
        storages, contents = self._built.program.storages, self._contents
        known = {name: contents[n] for name, n in self._built.inputs.items() if n in contents}
        device = self._parts.device
        return {n: each if storages[n].host else each.to(device) for n, each in known.items()}

    def difference(
        self,
        numbers: Sequence[Number],
        seen: Cursor,
        before: PartsCopy,
        logged: Mapping[str, Any],
    ) -> str | None:
        """Compare the program with a step of Python on the same path; describe the difference.

        Args:
            numbers: predicted for that step.
            seen: the step.
            before: the parts before it, and its batch.
            logged: by the step.
        """
        if not self._foresees(numbers, seen.numbers):
            return "a Python number in the step changes from step to step; compute it with tensors"
        # The program has constants in their place.
        for storage, content in self._contents.items():
            now = seen.from_outside(storage)
            # An unchanged tensor has the same copy, which needs no comparison.
            if now is None or not (now.content is content or same_bits(now.content, content)):
                return "a tensor from outside changes; make it a part, or pass it in the batch"
        plain = {name: value for name, value in logged.items() if not isinstance(value, Tensor)}
        read = {name: seen.numbers[place] for name, place in self._logged_reads.items()}
        expected = {**self._plain, **read}
        for name in {**plain, **expected}:
            if name not in plain or name not in expected or repr(plain[name]) != repr(expected[name]):
                return f"{name} is computed by Python; {CURE}"
        return self._computed_difference(before, seen.numbers, logged)

    def _computed_difference(
        self, before: PartsCopy, numbers: Sequence[Number], logged: Mapping[str, Any]
    ) -> str | None:
        """Run a step that Python just ran, on a copy; describe the difference, or return None."""
        try:
            live = self._bound_to_copies(before.tensors)
        except ProgramError as error:  # there is not enough memory for both
            return str(error)
        # A comparison must leave the generator of the training as it is.
        after = torch.get_rng_state()
        torch.set_rng_state(before.generators["torch"])
        try:
            with without_autograd():
                for leaf, tensor in before.batch.items():
                    if leaf in self._built.program.tensors:
                        copy_into(live.tensor(leaf), tensor)  # the copy may have other strides
                live.put(self._built.numbers(numbers))
                live.run()
            is_drawn_alike = not self._draws or same_bits(torch.get_rng_state(), after)
        finally:
            torch.set_rng_state(after)
        # Python has taken the step on the live tensors, the program on copies of those before it.
        state = self._parts.state()
        now = {name: live.tensor(name) for name in self._state if name in state} | live.ends
        other = (n for n, tensor in now.items() if n not in state or not same_bits(state[n], tensor))
        name = next(other, None)
        if name is not None:
            return f"the program computes different values of {name.partition('/')[2]} than Python"
        for place, index in self._read.items():
            if repr(live.numbers[index]) != repr(numbers[place]):
                return "the program reads another number than Python"
        for name, tensor in live.logged.items():
            value = logged.get(name)
            if isinstance(value, Tensor) and not same_bits(
                value.detach().reshape(()), tensor.reshape(())
            ):
                return f"the program computes another {name} than Python"
        return None if is_drawn_alike else "the program draws different random numbers than Python"

    def _bound_to_copies(self, state: Mapping[str, Tensor]) -> BoundProgram:
        """Return the program on copies of a state; on its own, if they are small, which serve again."""
        if self._copy is not None:
            with torch.no_grad():
                for name in self._state:
                    copy_into(self._copy.tensor(name), state[name])
            return self._copy
        live = self._bind(state)
        if sum(state[name].nbytes for name in self._state) + live.temporary_bytes <= SMALL_BYTES:
            self._copy = live
        return live

    def _foresees(self, numbers: Sequence[Number], seen: Sequence[Number]) -> bool:
        """Return whether the numbers of a Python step were predicted, except those that it reads."""
        own = {place for each in self.path.operations for place in each.numbers} - self._read.keys()
        return len(numbers) == len(seen) and all(repr(numbers[n]) == repr(seen[n]) for n in own)

    def numbers(self) -> list[Number]:
        """Return the numbers of the next step.

        Raises:
            NotReplaceableError: an optimizer runs another step than before.
        """
        numbers = self._numbers.copy()
        for step in self._optimizer_steps:
            call = self._calls.of(step.optimizer)
            # The user may have set a flag, or added a param group, since.
            if call is None or call.layout != step.layout:
                raise NotReplaceableError("the optimizer runs another step than before")
            numbers[step.begin : step.end] = call.numbers
        return numbers


def _gradients(path: Path, named: Sequence[tuple[str, int]]) -> dict[str, tuple[Any, ...]]:
    """Return dtype, shape and strides of each gradient among some tensors of a path, by name."""
    found = ((n, path.tensors[number]) for n, number in named if n.startswith("gradient/"))
    return {name: (tensor.dtype, tensor.shape, tensor.stride) for name, tensor in found}


def _share_as(state: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> bool:
    """Return whether the tensors of a state share memory exactly as in a program."""
    # Pairs of a storage of the program and memory: each must come in one pair only.
    places = {(specs[name].storage, t.untyped_storage()._cdata) for name, t in state.items()}
    storages, memories = zip(*places, strict=True) if places else ((), ())
    return len(set(storages)) == len(set(memories)) == len(places)
