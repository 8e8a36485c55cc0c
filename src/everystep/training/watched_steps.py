"""Watched steps: those of a training as they run, and what repeats each of them.

There is one way for a recorded loop, a step function and a model: a cursor watches the steps that Python
takes, torch's hooks tell which module and optimizer runs, and each step becomes a row of the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep import clock
from everystep.device import drawing_state
from everystep.errors import UsageError, say
from everystep.ops.operators import NotAllowedError
from everystep.program.sizes import packed_sizes, sizes_of
from everystep.program.soundness import note_sound
from everystep.recording.contents import PROGRAM, SIZES, digest_of, packed_program
from everystep.recording.input_writer import Taken
from everystep.recording.recorder import Recorder
from everystep.step.build import BuiltPath, NotCapturableError, Origins, build_path
from everystep.step.collective_calls import finish_calls, receiving
from everystep.step.cursor import Cursor
from everystep.step.follow import Follower
from everystep.step.gradient_copies import GradientCopies
from everystep.step.known_paths import KnownPaths
from everystep.step.met_tensors import is_plain
from everystep.step.outside_tensors import OutsideTensors
from everystep.step.parts import Parts
from everystep.step.path import Ending, Path
from everystep.step.replaceable import Around
from everystep.step.stand_in import TakenByProgram
from everystep.step.state import copy_of, same_bits
from everystep.step.versions import Versions
from everystep.training.batch import BatchCopies
from everystep.training.notices import Notices
from everystep.training.step_under_way import AnyWatch, StepUnderWay

__all__ = ["WatchedSteps"]

#: Paths with a known program, some kB each; forms of them, some ten; programs in memory, of those that
#: somebody asks for.
MOST_PATHS, MOST_FORMS, MOST_PROGRAMS = 2000, 2000, 200
#: Programs with a file of their own; others are inputs of their steps, within the budget of batches.
MOST_FILES = 64
#: Digests of the state are computed if that takes at most this share of the time so far, at so many
#: bytes per second.
DIGEST_SHARE = 0.01
DIGESTED_A_SECOND = 2e9


class WrittenProgram(NamedTuple):
    """A program of the run: its number, and what the rows of its steps need of it.

    numbers_kept: as of `BuiltPath`; inputs: the number of each input's storage in the path, and how many
    bytes the program has of it; dropped: the gradients of steps before that it drops or replaces
    unused; shared: the program and its sizes as inputs of a step, where the run keeps them so (bytes,)
    uint8.
    """

    number: int
    numbers_kept: tuple[int, ...]
    inputs: dict[str, tuple[int, int]]
    dropped: frozenset[str]
    shared: Mapping[str, Tensor] = MappingProxyType({})


class Form(NamedTuple):
    """What all paths of one form have in common.

    program: of the first of them; origins: of its parts; sizes: those of the first path, in its order;
    key: stands for the program, see `resized`.
    """

    program: WrittenProgram
    origins: Origins
    sizes: Sequence[int]
    key: bytes

    def resized(self, path: Path) -> WrittenProgram:
        """Return the program of another path of the form."""
        sizes, storages = self.origins.sizes(path), self.origins.storages
        size_of = {place: size for (place, _), size in zip(storages, sizes, strict=False)}
        inputs = {name: (place, size_of[place]) for name, (place, _) in self.program.inputs.items()}
        packed = packed_sizes(sizes, self.sizes)
        note_sound(self.key + packed)  # it comes from torch itself, not from a stranger
        content = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        return self.program._replace(inputs=inputs, shared={**self.program.shared, SIZES: content})


class WatchedSteps:
    """Watches the steps of a training, and keeps what repeats each step.

    Args:
        parts: what is carried from step to step.
        writer: of the run; None: nothing is written.

    programs: the numbers of the programs written so far; copies: of the tensors of batches; notices:
    about the steps; state: between steps, the live tensors after the last one; under_way: the step in
    progress; follower: of modules and optimizers; around: what it does besides operations, and
    gradient_copies: of its gradients, where somebody asks for them; last: the path of the last step, and
    its watch.
    """

    last: tuple[Path, AnyWatch]
    _newest: tuple[Path, BuiltPath]

    def __init__(self, parts: Parts, writer: Recorder | None) -> None:
        self.parts = parts
        self.copies = BatchCopies()
        self.state: dict[str, Tensor] | None = None
        self.under_way: StepUnderWay[Cursor] | None = None
        self.around: Around | None = None
        self.gradient_copies: GradientCopies | None = None
        self._writer = writer
        self.programs: list[int] = []
        #: The program of each path, by its digest, or why it has none.
        self._of_paths: dict[bytes, WrittenProgram | str] = {}
        #: By the form of their paths.
        self._forms: dict[bytes, Form] = {}
        #: Programs that somebody has asked for.
        self._asked: dict[Path, BuiltPath] = {}
        #: Memory from outside, by the name of its input, and as much of it as a program uses.
        self._beginnings: dict[str, tuple[Tensor, Tensor]] = {}
        #: The random generators as the last row left it.
        self._generator = drawing_state(parts.device)
        #: Bytes from outside that were copied up to the last row.
        self._copied = 0
        self._began = clock.now()
        self.notices = Notices()
        self._paths = KnownPaths()
        self._outside = OutsideTensors()
        self._versions = Versions.of(parts.state())
        #: Of tensors that code between two steps may write into without a count: their digests, by name.
        self._pieces = [name for name, each in parts.state().items() if _is_piece(name, each)]
        self._exposed = self._uncounted(parts.state())
        #: The tensors of the state between two steps, by their memory.
        self._lying: dict[int, list[tuple[str, Tensor]]] = {}
        self._is_still = False
        #: Whether changes after the last step were stored.
        self._is_changed = False
        #: How the last step ended, unless its state has changed since.
        self._ending: Ending | None = None
        self.follower = Follower(self._paths.calls.is_torchs)
        self._follows = False

    @property
    def unseen(self) -> tuple[str, ...]:
        """What no program holds, in words."""
        return tuple(sorted(self.notices.unseen))

    def follow(self) -> None:
        """Follow modules and optimizers, until `finish`."""
        if not self._follows:
            self.follower.begin(self, self.parts.module_paths, self.parts.name_of)
            self._follows = True

    def finish(self) -> None:
        """Follow modules and optimizers no longer."""
        if self._follows:
            self.follower.finish()
            self._follows = False
        self._paths.let_go()

    def begin(self, state: dict[str, Tensor]) -> StepUnderWay[Cursor]:
        """Begin to watch a step. state: the live tensors of the parts, which `note_changes` has seen."""
        # A cursor for each step; the paths, and the tensors that they have met, are the recording's.
        watch = Cursor(self._paths, self.parts.device, self.follower, self._outside)
        step = StepUnderWay(watch, self.parts.rates())
        watch.begin(state, self._versions, self._ending)
        self.state = None  # it would hold gradients that the step drops
        watch.gradient_copies = self.gradient_copies
        watch.pending = None if self.parts.optimizers else self.parts.pending
        self.follower.step_begins()
        watch.__enter__()
        self.under_way = step
        return step

    def close(self) -> StepUnderWay[Cursor] | None:
        """Watch the step in progress no longer; return it."""
        step, self.under_way = self.under_way, None
        if step is not None:
            step.watch.__exit__(None, None, None)
        self._paths.pause.end()
        return step

    def end(
        self,
        number: int,
        step: StepUnderWay[AnyWatch],
        after: dict[str, Tensor],
        inputs: dict[str, Tensor],
    ) -> Taken:
        """Return the row of a step that is over.

        step: closed, or taken by a program; after: the live tensors of the parts; inputs: what it was
        given that the watch does not know, by the names that rows have.
        """
        watch = step.watch
        self._is_still, self._is_changed = isinstance(watch, TakenByProgram) and watch.is_still, False
        if not self._is_still:
            self._versions = Versions.of(after)
            self._exposed = self._uncounted(after)
        # A step that is not followed has a path to be written, which makes many objects.
        if isinstance(watch, Cursor) and not watch.is_followed:
            self._paths.pause.begin()
        try:
            path = step.end(after, self._versions)
            self.last, self.state = (path, watch), after
            self._ending = watch.ending if isinstance(watch, Cursor) else None
            # No operation makes these changes in a replay, so the run keeps the tensors.
            if watch.changed_unseen and self._writer is not None:
                changed = {name: copy_of(after[name]) for name in watch.changed_unseen}
                self._writer.change(number, changed)
            row = self._row(number, watch, path, after, inputs, step.nested)
        finally:
            self._paths.pause.end()
        self.notices.of_step(number, watch)
        self._outside.clean()
        return row

    def ran(
        self, first: int, count: int, taken: TakenByProgram, after: dict[str, Tensor], nesting: Any
    ) -> list[Taken]:
        """Return the rows of `count` steps from `first` on that a program ran with the same numbers.

        after: the live tensors of the parts.
        """
        self.state, self._ending = after, None
        if not taken.is_still:
            self._versions = Versions.of(after)
        row = self._row(first, taken, taken.end({}, {}, None), {}, {}, nesting)
        if count > 1 and taken.generators:  # they are those before the first step
            # A replay draws in the later steps from where the first one has left the generator.
            inputs = {n: t for n, t in row.inputs.items() if not n.startswith("generator/")}
            return [row, row._replace(step=first + 1, inputs=inputs, count=count - 1)]
        return [row._replace(count=count)]

    def _row(
        self,
        step: int,
        watch: AnyWatch,
        path: Path,
        state: dict[str, Tensor],
        inputs: dict[str, Tensor],
        nesting: Any,
    ) -> Taken:
        """Return the row of a finished step; write its program if that is new.

        state: the live tensors after it; inputs: those that the watch does not know.
        """
        # The same path has the same program; the same form with other sizes, that one resized.
        known = self._of_paths.get(path.digest)
        if known is None:
            form = self._forms.get(path.form)
            known = self._write(step, path, watch) if form is None else form.resized(path)
            self._of_paths[path.digest] = known
            if len(self._of_paths) > MOST_PATHS:  # one that occurs again may then have two programs
                del self._of_paths[next(iter(self._of_paths))]
        size = sum(t.nbytes for n, t in inputs.items() if n.startswith("batch/"))
        copied = self._outside.copied
        size, self._copied = size + copied - self._copied, copied
        if isinstance(known, str):  # without a program: only the loss and the batch are kept
            return Taken(step, None, None, inputs, nesting, size, {})
        cuts = {}
        for name, (storage, bytes_used) in known.inputs.items():
            brought = watch.from_outside(storage)
            if brought is not None and f"batch/{name}" not in inputs:
                content, cut, rows = brought  # each row is kept once
                if cut is None and rows == 1:
                    content = self._beginning(name, content, bytes_used)
                inputs[f"input/{name}"] = content if rows == 1 else content.view(rows, -1)
                if cut is not None:
                    cuts[f"input/{name}"] = cut
        # The program and its sizes, where no file has them; the content of equal ones is written once.
        inputs |= known.shared
        for draw, generator in watch.generators.items():
            # A replay has the generator as the last draw left it, in this step or one before.
            if draw or not same_bits(generator, self._generator):
                inputs[f"generator/{draw}"] = generator
        self._generator = watch.drawn if watch.drawn is not None else self._generator
        numbers = [watch.numbers[place] for place in known.numbers_kept]
        digests = self._digests(step, state)
        return Taken(step, known.number, numbers, inputs, nesting, size, digests, cuts=cuts)

    def _beginning(self, name: str, content: Tensor, size: int) -> Tensor:
        """Return the first bytes of memory, which a program uses: what comes after may be anything.

        Of the same content, it is the same object, which is written once.
        """
        if len(content) == size:
            return content
        known = self._beginnings.get(name)
        if known is None or known[0] is not content or len(known[1]) != size:
            known = self._beginnings[name] = content, content[:size]
        return known[1]

    def _write(self, step: int, path: Path, watch: AnyWatch) -> WrittenProgram | str:
        """Write the program of a new path; return it, or why there is none."""
        try:
            built = build_path(path, watch.numbers)
        except (NotCapturableError, NotAllowedError) as error:
            say(f"step {step} cannot be replayed without your code: {error}")
            return str(error)
        self._newest = path, built
        program, count = built.program, len(self.programs) + 1
        self.notices.of_program(step, built)
        text, shared = program.to_json(), dict[str, Tensor]()
        note_sound(text.encode())
        if count > MOST_FILES:
            number, shared = 0, {PROGRAM: packed_program(text)}
        else:
            number = count if self._writer is None else self._writer.program(text)
            self.programs.append(number)
        inputs = {name: (place, program.storages[name].bytes) for name, place in built.inputs.items()}
        written = WrittenProgram(number, built.numbers_kept, inputs, _dropped(path), shared)
        sizes = sizes_of(program)
        # Only where the sizes of a program follow from its path can those of another path be put in.
        if built.origins.sizes(path) == sizes:
            key = hashlib.sha256(text.encode()).digest()
            self._forms[path.form] = Form(written, built.origins, sizes, key)
            if len(self._forms) > MOST_FORMS:
                del self._forms[next(iter(self._forms))]
        return written

    def _digests(self, step: int, state: dict[str, Tensor]) -> dict[str, str]:
        """Return digests of the state after step 1, 2, 4, 8, ..., except gradients, which may be gone.

        They show between which steps something wrote where torch does not see it.
        """
        if step & (step - 1):  # not a power of 2
            return {}
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("gradient/")}
        seconds = sum(tensor.nbytes for tensor in kept.values()) / DIGESTED_A_SECOND
        if seconds > DIGEST_SHARE * (clock.now() - self._began):
            return {}
        return {name: digest_of(tensor) for name, tensor in kept.items()}

    def last_program(self) -> BuiltPath | str:
        """Return the program of the last step, or why it has none."""
        path, watch = self.last
        known = self._of_paths[path.digest]
        if isinstance(known, str):
            return known
        # Built again, since a program takes more memory than its path, and few are asked for.
        if path not in self._asked:
            if len(self._asked) >= MOST_PROGRAMS:
                del self._asked[next(iter(self._asked))]
            newest, built = self._newest
            self._asked[path] = built if newest == path else build_path(path, watch.numbers)
        return self._asked[path]

    def dropped_gradients(self) -> Collection[str]:
        """Return the gradients from before the last step that neither it nor a later step can use."""
        known = self._of_paths[self.last[0].digest]
        return () if isinstance(known, str) else known.dropped

    def note_changes(
        self,
        step: int,
        state: dict[str, Tensor],
        known: Collection[str] = (),
        drawn: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> str | None:
        """Store what was changed after a step, outside of any; return the name of a tensor that was.

        step: the last one; state: the live tensors of the parts; known: the names of tensors that were
        changed although torch may not count it; drawn: the states of generators from which other code
        has drawn, by `generator/name`.
        """
        before, now = self._versions, Versions.of(state)
        known = {*known, *self._written_unseen(state)}
        # Within the step, the watch sees all writes.
        self._exposed, self._lying = {}, {}
        if before == now and not known and not drawn:
            return None  # the next step begins as the last one ended
        self._ending, self._versions = None, now
        then, here = before.by_name(), now.by_name()
        names = {name for name in here if name in known or then.get(name) != here[name]}
        # A batch normalization counts its batches, but torch does not count the changes of its averages.
        counted = {_module_of(name) for name in names} - {None}
        names |= {name for name in here if _module_of(name) in counted}
        # Where `tensor.data = other` put two on one memory, torch counts a change for one of them only.
        memory = {state[name].untyped_storage()._cdata for name in names}
        changed = {n: copy_of(state[n]) for n in here if state[n].untyped_storage()._cdata in memory}
        gone = [name for name in then.keys() - here.keys() if not name.startswith("gradient/")]
        self._is_changed |= bool(changed or gone)
        if (changed or gone or drawn) and self._writer is not None:
            self._writer.change(step, changed | dict(drawn), gone)
        return next(iter((*changed, *gone)), None) if then else None

    def exposes(self, tensor: Tensor) -> None:
        """Note a tensor as it is before code between two steps may write or exchange its memory."""
        if not is_plain(tensor):
            return
        with torch._C._DisableTorchDispatch():
            if not self._lying:
                state = self.parts.state() if self.state is None else self.state
                for name, each in state.items():
                    self._lying.setdefault(each.untyped_storage()._cdata, []).append((name, each))
            memory = tensor.untyped_storage()._cdata
            # torch does not count what is written through `data`, so a copy could be outdated.
            self._outside.forget(memory)
            for name, each in self._lying.get(memory, ()):
                # Other memory may lie at the same address, as after `model.half()` and `model.float()`.
                self._ending = None
                # A later digest could be of what the code has written already.
                if name not in self._exposed:
                    self._exposed[name] = digest_of(each)

    def finish_calls(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Wait for the end of collectives, which write into the state after a step.

        Raises:
            UsageError: a receive is under way into a tensor of the state.
        """
        finish_calls()
        memory = receiving()
        for name, tensor in state().items() if memory else ():
            if tensor.untyped_storage()._cdata in memory:
                raise UsageError(
                    f"a receive (irecv) into {name.replace('/', ' ', 1)} is still under way between two "
                    "steps; wait for it first, or receive into another tensor, and copy that in a step"
                )

    def _uncounted(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """Return digests of the tensors of the state with changes that torch may not count, by name.

        They were made in inference mode, or are pieces of a larger tensor that other code may write to.
        """
        counts = self._versions.counts
        names = [self._versions.names[n] for n, count in enumerate(counts) if count is None]
        return {name: digest_of(state[name]) for name in (*names, *self._pieces) if name in state}

    def _written_unseen(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return the names of tensors that code between two steps has written into without a count."""
        self.finish_calls(lambda: state)
        return self._written_since_exposed(state)

    def _written_since_exposed(self, state: Mapping[str, Tensor]) -> list[str]:
        exposed = [(name, digest) for name, digest in self._exposed.items() if name in state]
        return [name for name, digest in exposed if digest_of(state[name]) != digest]

    def is_as_after(self, state: dict[str, Tensor]) -> bool:
        """Return whether the state is still that after the last step."""
        # Gradients that lie in the memory of a program count its writes, but nothing else has run.
        is_counted = self._is_still or self._versions == Versions.of(state)
        return is_counted and not self._is_changed and not self._written_unseen(state)

    def note_versions(self) -> None:
        """Note that the state equals that after the last step, although tensors were written since."""
        state = self.parts.state()
        self._versions, self._lying = Versions.of(state), {}
        self._exposed = self._uncounted(state)
        self._ending, self._is_changed = None, False

    def forget_versions(self) -> None:
        """Discard an incomplete step: no snapshot may hold the current state."""
        self._versions, self._is_still, self._ending = Versions.of({}), False, None

    def forget_generator(self) -> None:
        """Note the random generator again at the next draw: training continues after another state."""
        self._generator = torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what runs within from the step in progress."""
        watch = self.under_way.watch if self.under_way is not None else None
        if watch is None or watch.is_paused:
            yield
            return
        watch.is_paused = True
        before, self._exposed, self._lying = self._exposed, {}, {}
        try:
            yield
        finally:
            with torch._C._DisableTorchDispatch():
                state = self.parts.state() if self._exposed else {}
                written = [state[name] for name in self._written_since_exposed(state)]
            self._exposed, self._lying = before, {}
            watch.resume(written)

    def _watch(self) -> Cursor | None:
        """Return what watches the step in progress, None if nothing does."""
        watch = self.under_way.watch if self.under_way is not None else None
        return None if watch is None or watch.is_paused else watch

    def optimizer_begins(self, optimizer: torch.optim.Optimizer, has_arguments: bool) -> None:
        """Note that an optimizer begins its step, called with arguments or without."""
        if self.under_way is not None and self.around is not None:
            self.around.optimizer_begins(optimizer)
        if (watch := self._watch()) is not None:
            assert self.under_way is not None
            if self.gradient_copies is not None:
                self.gradient_copies.optimizer_begins(self.parts.gradients(optimizer))
            with torch._C._DisableTorchDispatch():
                # The rates that the update uses: a scheduler may set others before the step ends.
                self.under_way.rates |= self.parts.rates(optimizer)
                # A program could not name another one, and its settings are not those of a part.
                is_part = self.parts.owner_of(optimizer) is not None
                given = self.parts.name_of(optimizer), self._gradients_of(optimizer)
                watch.optimizers.begins(optimizer, *given, may_be_one=is_part and not has_arguments)

    def optimizer_ends(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that an optimizer is done with its step."""
        if (watch := self._watch()) is not None:
            if self.gradient_copies is not None:
                self.gradient_copies.optimizer_ends()
            with torch._C._DisableTorchDispatch():
                watch.optimizers.ends(self.parts.name_of(optimizer), self._gradients_of(optimizer))

    def _gradients_of(self, optimizer: torch.optim.Optimizer) -> Any:
        return lambda: self.parts.gradients(optimizer)


def _dropped(path: Path) -> frozenset[str]:
    """Return the gradients of steps before that a step drops or replaces, and does not use."""
    # What Python has read, no operation shows.
    is_sure = not path.read_unseen
    return frozenset(path.unused_gradients() & {*path.gone, *dict(path.ends)} if is_sure else ())


def _module_of(name: str) -> str | None:
    """Return the path of the module that has a tensor as a buffer, None for other tensors."""
    return name.rpartition(".")[0] if name.startswith("buffer/") else None


def _is_piece(name: str, tensor: Tensor) -> bool:
    """Return whether a parameter is a piece of larger memory: one tensor may hold them all."""
    is_larger = name.startswith("parameter/") and tensor.untyped_storage().nbytes() > tensor.nbytes
    return is_larger and tensor.is_cpu  # on a device, torch lays the weights of an LSTM together itself
