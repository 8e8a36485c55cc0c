"""Under way: a step that is watched, on the paths of the steps before it.

What a program cannot hold (a custom operator, a sparse tensor, an explicit generator) runs unseen, and
the tensors that it returns or changes are *inputs* of the step, kept by content. So are all tensors that
the loop uses from outside. Such a step is not remembered: no later step follows it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from operator import call, is_
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from everystep.device import drawing_state
from everystep.errors import UsageError
from everystep.ops.operators import OperatorMode
from everystep.program.memory import whole_memory
from everystep.program.number_slots import READ, read_difference
from everystep.step.calling_code import Calls, calls_here, is_in_backward, named_here
from everystep.step.follow import Follower
from everystep.step.gradient_copies import GradientCopies
from everystep.step.known_paths import KnownPaths
from everystep.step.met_tensors import UnseenError, is_plain
from everystep.step.outside_tensors import (
    MOST_BYTES,
    Brought,
    OutsideTensors,
    places_read,
)
from everystep.step.path import (
    READ_UNSEEN,
    Ending,
    Entry,
    Mark,
    Path,
    PathWriter,
    SeenOperation,
    places_of_reads,
)
from everystep.step.state import same_bits
from everystep.step.versions import Versions, counts_of

__all__ = ["UnderWay", "as_gradients"]

_next_node = torch._C._autograd._get_sequence_nr
#: Stands for a logged tensor that the step has not met: its content is kept each time.
_UNKNOWN = ("unknown",)
#: Tensors that have a name: the kind, the name, and the tensors.
Marked = Iterable[tuple[str, str, Iterable[Tensor]]]


class UnderWay(OperatorMode):  # type: ignore[no-untyped-call]
    """Notes what one step does, from `begin` to `end`; a `Cursor` shows it each call.

    Args:
        paths: of the recording.
        device: of the training.
        follower: knows which module and which optimizer runs.
        outside: copies of what steps before brought from outside.

    numbers: of the step, as `MetTensors` has them; generators: states of torch's generators before
    draws, by their number from 0, where they differ from what the previous draw left; drawn:
    that state after the last draw, None if there was none; unseen: what was not seen, in words, and how
    often; changed_outside: a tensor that the step has changed and that is in no part, in words, or
    None; changed_unseen: names of the state that something has changed which the dispatcher did not
    show; has_saved_hooks: whether a hook of the user's packs what autograd saves; is_compiled: whether
    it calls a function of torch.compile; exchanged: what a pause under way may have received from other
    ranks.

    at: the point of the path at which the step is; loss_at: where its loss was logged; is_remembered:
    whether later steps may follow it;
    is_followed: whether the step is like one before, so far; followed: up to where it was, once it is
    not; tensors: that it has met; brought: from outside, by the number of the first tensor there;
    gradient_copies: of the gradients that somebody asks for; pending: returns the gradients by the names
    of their parameters, None if the steps of an optimizer show them.
    """

    def __init__(
        self, paths: KnownPaths, device: torch.device, follower: Follower, outside: OutsideTensors
    ) -> None:
        super().__init__()
        self.paths = paths
        self.numbers = paths.tensors.numbers
        self.generators: dict[int, Tensor] = {}
        self.drawn: Tensor | None = None
        self.unseen: dict[str, int] = {}
        self.changed_outside: str | None = None
        self.changed_unseen: list[str] = []
        self.is_paused = self.is_remembered = self.is_followed = self.has_saved_hooks = False
        self.is_compiled = False
        self.exchanged: list[Tensor] = []
        self._remembers_new = True
        self.at: Entry
        self.loss_at: Entry | None = None
        self.followed: Entry | None = None
        self._device = device
        self.follower = follower
        self.outside = outside
        self.tensors = paths.tensors
        self.brought: dict[int, Brought] = {}
        #: Memory that NumPy may change before an operation reads it, by its `_cdata`: tensors on it,
        #: copies, and the points at which these were made.
        self.exposed: dict[int, list[tuple[Tensor, Tensor, Entry]]] = {}
        #: The calls that cut data out of tensors, by the memory of their results.
        self.gathered: dict[int, tuple[Any, Sequence[Any]]] = {}
        self.written_outside: dict[int, str] = {}
        self.ending: Ending | None = None
        self.gradient_copies: GradientCopies | None = None
        self.pending: Callable[[], Mapping[str, Tensor]] | None = None
        self._origins: tuple[int, ...] = ()
        self._versions: list[int | None] = []
        self._first_node = _next_node()
        #: The number of the next node; how many there were after each operation so far, and its code.
        self._graph: tuple[int, list[int], list[Calls]] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed."""
        return not self.unseen and all(entry.operation is None for entry in self.at.from_root())

    def from_outside(self, storage: int) -> Brought | None:
        """Return an input that is not in the batch. storage: its number in the path of the step."""
        return self.brought.get(self._origins[storage])

    def begin(self, state: Mapping[str, Tensor], versions: Versions, left: Ending | None = None) -> None:
        """Note the tensors of the state before the step, and their versions.

        left: how the step before ended, if nothing has changed the state since.
        """
        self.paths.step = self
        self.is_remembered, self._remembers_new = True, self.paths.remembers_next()
        known = self.paths.beginning_after(left)
        if known is not None:
            # If nothing has changed since the last step, the tensors need not be compared again.
            root, same = known
        else:
            same = self.tensors.same(state)
            # No path can compare tensors that a program cannot hold.
            if not all(map(is_plain, [*state.values()][same:])):
                self.is_remembered = False
                state = {name: tensor for name, tensor in state.items() if is_plain(tensor)}
                same, versions = self.tensors.same(state), Versions.of(state)
            root = self.paths.root(state, same, is_remembered=self.is_remembered)
            if left is not None and self.is_remembered:
                self.paths.begins_after(left, root, same)
        self.at = root
        self.tensors.begin(state, same, root)
        self._versions = versions.counts
        self.is_followed = self.is_remembered and (bool(root.children) or root.ending is not None)

    # What happens besides calls.

    def add_batch(
        self, tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Note the tensors of the batch, which nothing has used yet. copies: of them, by name."""
        with torch._C._DisableTorchDispatch():
            plain = {name: tensor for name, tensor in tensors.items() if is_plain(tensor)}
            if len(plain) < len(tensors):
                self.leave()
            self.tensors.catch_up(self.at)
            key, numbers, new = self.tensors.batch(plain)
            if not self.goes_on(key, new):
                known = {mark.name for mark in self.at.from_root()[0].marks}
                if taken := sorted(plain.keys() & known):
                    problem = f"the batch has {taken[0]}, and so have the parts; rename it in the batch"
                    raise UsageError(problem)
                for tensor in new:
                    self.tensors.meet(tensor, "batch", is_named=True)
                names = zip(plain, numbers, strict=True)
                self.add(key, marks=[Mark("batch", name, (number,)) for name, number in names])
            for name, tensor in plain.items():
                if name in copies:
                    self.expose(tensor.detach(), copies[name])

    def expose(self, tensor: Tensor, copy: Tensor) -> None:
        """Note memory of the CPU that NumPy may change before an operation reads it."""
        if tensor.is_cpu:
            place = tensor.untyped_storage()._cdata
            self.exposed.setdefault(place, []).append((tensor, copy, self.at))

    def check_exposed(self, read: Iterable[Tensor] | None = None) -> None:
        """Keep what NumPy has changed before an operation reads it: no operation shows that.

        read: by the operation; None: anything.
        """
        plain = (each for each in read or () if is_plain(each, may_be_conjugated=True))
        places = {each.untyped_storage()._cdata for each in plain}
        if read is not None and places.isdisjoint(self.exposed):
            return
        with torch._C._DisableTorchDispatch():
            self.tensors.catch_up(self.at)
            changed: list[Tensor] = []
            for place, known in [*self.exposed.items()]:
                storage = known[0][0].untyped_storage()
                # What torch alone has cannot change between two operations: NumPy had it before.
                is_shared = not storage.resizable()
                if is_shared and read is not None and place not in places:
                    continue
                other = [(tensor, since) for tensor, copy, since in known if not same_bits(tensor, copy)]
                if other or not is_shared:
                    del self.exposed[place]
                origin = self.tensors.place(storage)
                for tensor, since in other:
                    if origin is not None and not self._is_written_since(origin, since):
                        what = "the batch" if self.tensors.known[origin].kind == "batch" else "a tensor"
                        text = f"NumPy, or other code that torch does not show, changes {what}"
                        self.unseen[text] = self.unseen.get(text, 0) + 1
                        changed.append(tensor)
                    elif is_shared:  # an operation has changed it
                        self.expose(tensor, tensor.clone())
            if changed:
                self.note_unseen(changed, ())

    def module_done(self, path: str, outputs: list[Tensor]) -> None:
        """Note the output of a module; of several calls, the last that gradients flow through."""
        has_gradients = torch.is_grad_enabled()
        # A pass without gradients, such as an evaluation, is not the one that is trained.
        kind = "output" if has_gradients else "last output"
        self.happens(
            *("module", path, has_gradients), tensors=outputs, marked=lambda: [(kind, path, outputs)]
        )

    def logged(self, name: str, tensor: Tensor | None) -> None:
        """Note that a number besides the loss was logged; None: one that Python has."""
        found = [] if tensor is None else [("logged", name, [tensor])]
        self.happens(*("logged", name), tensors=[tensor], marked=lambda: found)

    def uses(self, kind: str, name: str | None, gradients: Mapping[str, Tensor]) -> None:
        """Note which gradients an optimizer uses that is watched, or a backward pass leaves.

        This step did not make what remains from the step before.
        """
        self.happens(
            *(kind, name, (*gradients,)),
            tensors=gradients.values(),
            marked=lambda: as_gradients(gradients),
        )

    def happens(
        self,
        *what: Any,
        tensors: Collection[Tensor | None],
        marked: Callable[[], Marked] = lambda: (),
    ) -> bool:
        """Follow or note something besides calls; return whether a path can hold it.

        Args:
            what: is compared with other steps.
            tensors: that have a part in it; the step must have met them, unless they are only logged.
            marked: returns those of them that have a name.
        """
        # Nothing happens within a step of torch's optimizers: one that is still open has raised.
        self.recover()
        expected = self.at.next
        # Mostly it is as in the step before: compared by identity alone, without a list of numbers.
        if self.is_remembered and expected is not None and expected.key[:-1] == what:
            met, known = self.tensors.met, expected.key[-1]
            if len(known) == len(tensors):
                for number, tensor in zip(known, tensors, strict=True):
                    if tensor is not (None if number is None else met[number]()):
                        break
                else:
                    self.at = expected
                    return True
        # Copies of tensors that are made here do not belong to the step.
        with torch._C._DisableTorchDispatch():
            self.tensors.catch_up(self.at)
            numbers = tuple([None if t is None else self.tensors.number(t) for t in tensors])
            strange = [t for n, t in zip(numbers, tensors, strict=True) if n is None and t is not None]
            # No later operation depends on a logged tensor from outside: the next step may log another.
            if strange and not (what[0] == "logged" and not any(map(self.is_on_known, strange))):
                self.leave()
            key = *what, numbers
            if not self.goes_on(key):
                brought, marks = len(self.brought), self.marks(marked())
                if len(self.brought) > brought:  # a step that follows would not bring it
                    self.leave()
                self.add(key, marks=marks)
        return self.is_remembered

    def recover(self) -> None:
        """Watch again if what ran unwatched has raised."""

    def is_on_known(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on memory that the step knows, or on none."""
        return not is_plain(tensor) or self.tensors.place(tensor.untyped_storage()) is not None

    def marks(self, marked: Marked) -> list[Mark]:
        """Return the marks of tensors that have a name."""
        found = []
        for kind, name, tensors in marked:
            plain = [tensor for tensor in tensors if is_plain(tensor)]
            if kind in ("gradient", "logged"):  # what is from outside is the result of no operation
                plain = [t for t in plain if self._is_made(t) and (kind != "logged" or t.numel() == 1)]
            if plain:
                found.append(Mark(kind, name, tuple(map(self.number, plain))))
        return found

    def _is_made(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on memory that operations of the step have read or written."""
        number = self.tensors.number(tensor)
        return self.is_on_known(tensor) if number is None else not self.is_unread(number)

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor; what is on memory from outside is kept by content."""
        number = self.tensors.number(tensor)
        number = self.tensors.meet(tensor, "input") if number is None else number
        if self.is_unread(number):
            self.bring(self.tensors.known[number].origin, tensor)
        return number

    def is_unread(self, number: int, unread: Container[int] = ()) -> bool:
        """Return whether a tensor is on memory from outside that no operation has read yet.

        So is memory that was only allocated: if no operation has written there, code that torch does
        not show has. unread: the first tensors on memory of which the operation under way reads nothing.
        """
        origin = self.tensors.known[number].origin
        kind = self.tensors.known[origin].kind
        if origin in self.brought or kind not in ("input", "part", "allocated"):
            return False
        return kind != "allocated" or not (origin in unread or self._is_written_since(origin, None))

    def note_written(self, numbers: Sequence[int]) -> None:
        """Note that a call writes into memory from outside: it is copied again."""
        for number in numbers:
            origin = self.tensors.known[number].origin
            tensor = self.tensors.met[number]()
            if tensor is None:
                continue
            if (kind := self.tensors.known[origin].kind) == "scratch" or origin in self.brought:
                self.outside.forget(tensor.untyped_storage()._cdata)
            # What the step has made itself is no state that a resumed loop could lack.
            if kind not in ("scratch", "allocated") and origin in self.brought:
                if tensor.numel() == 1:  # such as a sum of losses, which takes no room
                    continue
                where = named_here()
                what = "parameter" if isinstance(tensor, torch.nn.Parameter) else "tensor"
                text = f"a {what} {tuple(tensor.shape)} of {tensor.dtype}"
                self.written_outside[origin] = f"{text} ({where})" if where else text

    def check_readable(self, number: int, unread: Container[int] = ()) -> None:
        """Check that a program can hold a tensor as an argument. unread: as `is_unread` has it.

        Raises:
            UnseenError: it cannot; gives the reason.
        """
        size = self.tensors.known[self.tensors.known[number].origin].bytes
        if size > MOST_BYTES and self.is_unread(number, unread):
            raise UnseenError(f"uses a slice of {size / 1e6:,.0f} MB that is not in any part")
        if not self.tensors.is_within(number):
            met = self.tensors.known[number]
            if met.kind == "scratch":  # from the next step on, it is kept by content
                self.paths.partly_read.add((met.bytes, met.geometry[0]))
            raise UnseenError("uses memory next to a tensor of the batch or the state")

    def bring(self, origin: int, tensor: Tensor) -> None:
        """Keep the content of memory from outside. origin: the number of the first tensor there."""
        base, outside = self.tensors.bases.get(origin), self.outside
        if base is not None:
            content, call = outside.of_part(tensor, base), None
            # With gaps, its bytes are not one piece of the data.
            read = (tensor, [base]) if tensor.is_contiguous() else None
        else:
            content = outside.of(tensor)
            if not tensor.untyped_storage().resizable():
                with torch._C._DisableTorchDispatch():
                    self.expose(whole_memory(tensor), content)
            call = self.gathered.get(tensor.untyped_storage()._cdata)
            read = None if call is None else places_read(*call)
        cut = None if read is None else outside.cut(*read, content.nbytes)
        # The tensor may be a view of another shape: only one of all the bytes shows their rows.
        has_rows = call is not None and read is None and tensor.dim() and content.nbytes == tensor.nbytes
        self.brought[origin] = Brought(content, cut, max(len(tensor), 1) if has_rows else 1)

    def keep_place_of(self, number: int) -> None:
        """From now on, note the memory of a result when it is made: it is met again without it."""
        entry = self.at
        while entry.parent is not None and number < entry.parent.met:
            entry = entry.parent
        # A check notes the tensors of results alone: most memory is met again with its tensor.
        if entry.check is not None:
            new = [each for each in entry.key[4] if each[1] == number and each not in entry.kept]
            entry.kept = tuple(sorted((*entry.kept, *new)))

    def goes_on(self, key: Any, new: Sequence[Tensor] = ()) -> bool:
        """Go to the point after something that an earlier step did here, too; return whether one did.

        new: the tensors that it brings.
        """
        entry = self.at.children.get(key) if self.is_remembered else None
        if entry is None:
            return False
        known = enumerate(zip(new, entry.new, strict=True), start=self.at.met)
        for number, (tensor, as_met) in known:
            self.tensors.put(tensor, number, as_met.origin)
        self.at.next = self.at = entry
        return True

    def add(self, key: Any, operation: SeenOperation | None = None, marks: Sequence[Mark] = ()) -> Entry:
        """Add what has just happened to the path, and go there."""
        at, tensors = self.at, self.tensors
        tensors.keep_brought()
        # A program has the module of each operation, so the same call in another module branches.
        place = (self.follower.where, key) if key[0] == "call" else key
        entry = at.children.get(place) if self.is_remembered else None
        # The numbers of all later entries count on from `met`.
        if entry is not None and entry.met != len(tensors.known):
            self.leave()
            entry = None
        if entry is None:
            if self.is_followed:
                self.is_followed, self.followed = False, at
            if not self._remembers_new:
                self.leave()
            self.paths.pause.begin()
            entry = Entry(key, at, tuple(tensors.known[at.met :]), operation, tuple(marks))
            if operation is not None:
                entry.lines = self._lines()
                entry.nodes = _next_node() - self._first_node
            if self.is_remembered:
                at.children[place] = entry
                self.paths.size += 1
        if self.is_remembered:
            at.next = entry
        self.at = entry
        return entry

    def _lines(self) -> Calls:
        """Return the code that calls the current operation.

        One of a backward pass belongs to that of the forward pass which made its node of the graph.
        """
        node = torch._C._current_autograd_node()
        if node is not None and is_in_backward():
            # A backward pass has many operations, and adds nodes only where gradients have a graph.
            if self._graph is None or self._graph[0] != _next_node():
                made = [e for e in self.at.from_root() if e.nodes and e.lines]
                self._graph = _next_node(), [e.nodes for e in made], [e.lines for e in made]
            _, nodes, lines = self._graph
            place = bisect_right(nodes, node._sequence_nr() - self._first_node)
            if place < len(nodes):
                return lines[place]
        calls, is_compiled = calls_here()
        self.is_compiled = self.is_compiled or is_compiled
        return calls

    def undo(self) -> None:
        """Forget what a call has brought that raised; the loop may catch it, and continue."""
        self.tensors.catch_up(self.at)
        self.tensors.forget_brought(self.at.met)
        known: Container[int] = range(self.at.met)
        if self.is_remembered:
            known = {origin for entry in self.at.from_root() for _, origin in entry.contents}
        self.brought = {origin: each for origin, each in self.brought.items() if origin in known}

    def leave(self) -> None:
        """Watch the rest of the step without following or remembering it."""
        self.is_remembered = self.is_followed = False

    def note_generator(self, draw: int) -> None:
        """Note the state of torch's generators before a draw, if the last draw left another.

        draw: the number of draws before.
        """
        now = drawing_state(self._device)
        # A replay has the state that its last draw left; only a different one must be kept.
        if self.drawn is None or not same_bits(now, self.drawn):
            self.generators[draw] = now

    def allow_changes(self, since: Sequence[int | None]) -> None:
        """Do not count the changes of the state since `state_versions` returned `since`."""
        # The base moves by these changes alone, so that all others still count.
        counts = zip(self._versions, since, self.state_versions(), strict=True)
        self._versions = [n if n is None or a is None or b is None else n + b - a for n, a, b in counts]

    def state_versions(self) -> list[int | None]:
        """Return how often each tensor of the state before the step was changed, None if it is gone.

        They are not held: a gradient that the step drops gives its memory back at once.
        """
        return counts_of(map(call, self.tensors.met[: len(self._versions)]))

    def note_unwatched(
        self,
        reason: str,
        before: Iterable[Tensor | None],
        left: Iterable[Tensor | None],
        versions: Iterable[int | None] | None = None,
    ) -> None:
        """Note that what ran unwatched is unknown: the tensors that it has left are from outside.

        reason: why; before: gradients before it; left: those after it, and its results; versions: what
        `state_versions` returned before it, if it may have changed anything.
        """
        with torch._C._DisableTorchDispatch():
            self.unseen[reason] = self.unseen.get(reason, 0) + 1
            changed, others = [gradient for gradient in before if gradient is not None], list[int]()
            self.tensors.catch_up(self.at)
            if versions is not None:
                counts = zip(self.tensors.met, versions, self.state_versions(), strict=False)
                known = [each() for each, before_it, now in counts if now != before_it]
                changed += [tensor for tensor in known if tensor is not None]
                others = self.tensors.all_but_state()
            self.note_unseen(changed, left, others)

    def note_unseen(
        self,
        changed: Iterable[Tensor],
        made: Iterable[Any],
        storages: Iterable[int] = (),
        *,
        is_read: bool = False,
    ) -> None:
        """Note what ran unseen: what it has changed and made is kept by content.

        made: its results; Python may branch on a number, which no content shows.
        storages: more memory that it may have changed.
        is_read: whether Python has got numbers in another way.
        """
        self.leave()
        changed, made = [tensor for tensor in changed if is_plain(tensor)], [*made]
        storages = {*storages, *[tensor.untyped_storage()._cdata for tensor in changed]}
        self.tensors.catch_up(self.at)
        self.tensors.forget(storages)
        for storage in storages:
            self.outside.forget(storage)  # a kernel may not count its changes
        # They get an entry below, or `catch_up` would forget that they were met.
        for tensor in (*changed, *made):
            if isinstance(tensor, Tensor) and is_plain(tensor):
                self.number(tensor)
        is_read = is_read or any(isinstance(each, int | float) for each in made)
        self.add(READ_UNSEEN if is_read else ("unseen",))

    # The end.

    def end(self, state: Mapping[str, Tensor], versions: Versions, loss: Any) -> Path:
        """Return what the step did.

        Args:
            state, versions: afterwards.
            loss: what was logged as the loss: a tensor, or a number that Python has read from one.
        """
        if self.exposed:  # later steps read the state
            self.check_exposed(state.values())
            self.exposed = {}
        with torch._C._DisableTorchDispatch():
            ending = self.at.ending if self.is_remembered else None
            if ending is not None and self._ends_as(ending, state, versions, loss):
                changes = self._changes(versions, ending.bound)
                # The operations are known, so a different count means a write that no call showed.
                if changes != ending.changes:
                    pairs = zip(state, changes, ending.changes, strict=True)
                    self.changed_unseen = [name for name, one, two in pairs if one != two]
                self.paths.was_followed()
            else:
                known = 0 if self.followed is None else len(self.followed.from_root())
                if 2 * known > len(self.at.from_root()):
                    self.paths.was_followed()
                self.is_followed = False
                ending = self._write(state, versions, loss)
        self._origins = ending.origins
        # Only an ending that later steps may reach shows how the next step begins.
        self.ending = ending if ending is self.at.ending else None
        self.numbers = self.numbers.copy()  # the list itself belongs to the recording
        return ending.path

    def _ends_as(
        self, ending: Ending, state: Mapping[str, Tensor], versions: Versions, loss: Any
    ) -> bool:
        """Tell whether the step has ended as an earlier one."""
        lies_as, known = self.tensors.lies_as, ending.loss
        if ending.names != tuple(state):
            return False
        if ending.is_met:  # as `lies_as`, of all at once
            met, lies = self.tensors.met, self.tensors.lies
            if [lies[number] for number in ending.bound] != versions.places:
                return False
            if not all(map(is_, state.values(), [met[number]() for number in ending.bound])):
                return False
        elif not all(map(lies_as, state.values(), ending.bound)):
            return False
        # e.g. ("tensor", 7), or ("read", 2): the loss is the number at this place of the step's.
        if isinstance(loss, Tensor) and known is not None and known[0] == "tensor" and known[1]:
            return lies_as(loss, known[1])
        return bool(self._loss_token(loss, ending.path, ending.reads) == known)

    def _write(self, state: Mapping[str, Tensor], versions: Versions, loss: Any) -> Ending:
        tensors, at = self.tensors, self.at
        tensors.catch_up(at)
        brought = len(self.brought)
        # Before `after`, which gives a number to each tensor that has none.
        bound = tuple(map(self._bound, state.values())) if self.is_remembered else ()
        after = {name: self.number(tensor) for name, tensor in state.items() if is_plain(tensor)}
        logged, since = None, self.loss_at
        if not isinstance(loss, Tensor):
            logged, since = self._read_from(loss)
        elif loss.numel() == 1 and is_plain(loss):
            logged = self.number(loss)
        # A replay reads the loss at the end of a step, when the tensor may have another value.
        if logged is not None and self._is_written_since(logged, since):
            logged = None
        writer = PathWriter(tensors.known, self.brought, has_host=self._device.type != "cpu")
        path = writer.path(at, after, logged)
        # What has become state is in snapshots, so it needs no notice.
        written = self.written_outside.keys() - self.tensors.origins_of(after.values())
        # What is gone by now was of this step alone, such as torch's own list of buckets of gradients.
        written &= {number for _, number in self.tensors.alive_memory()} if written else set()
        texts = [text for origin, text in self.written_outside.items() if origin in written]
        self.changed_outside = texts[0] if texts else None
        ending = Ending(path, tuple(writer.origins))
        if self.is_remembered:
            reads = tuple(places_of_reads(path.operations))
            token = self._loss_token(loss, path, reads)
            # A later step skips all this if it ends alike, so nothing here may read a content.
            if None not in bound and token != _UNKNOWN and len(self.brought) == brought:
                changes = self._changes(versions, bound)
                is_met = all(type(each) is int for each in bound)
                ending = Ending(path, ending.origins, tuple(state), bound, changes, token, reads, is_met)
                at.ending = ending
            else:
                at.ending = None
            self.paths.make_room()
        return ending

    def _is_written_since(self, number: int, since: Entry | None) -> bool:
        """Return whether an operation after an entry has written into the memory of a tensor.

        since: None for the beginning of the step.
        """
        entry, origin = self.at, self.tensors.known[number].origin
        while entry is not since and entry.parent is not None:
            if entry.operation is not None and origin in entry.operation.writes:
                return True
            entry = entry.parent
        return False

    def _read_from(self, loss: Any) -> tuple[int | None, Entry | None]:
        """Return the tensor from which Python read what was logged as the loss, by number, and where."""
        for entry in reversed(self.at.from_root()):
            seen = entry.operation
            if seen is None or str(seen.operator) != READ:
                continue
            if not read_difference(self.numbers[seen.numbers[0]], loss):
                return int(seen.arguments[0][1:]), entry
        return None, None

    def _bound(self, tensor: Tensor) -> Any:
        """Return the number of a tensor of the state, or the memory that it got in the step."""
        number = self.tensors.number(tensor)
        if number is not None or not is_plain(tensor):
            return number
        # Such as a new gradient: autograd has made another tensor of the result of an operation.
        place = self.tensors.place(tensor.untyped_storage())
        if place is None:
            return None
        self.keep_place_of(place)
        return place, self.tensors.geometry(tensor, place)

    def _loss_token(self, loss: Any, path: Path, reads: Sequence[int]) -> Any:
        """Return the number of the logged tensor, or the place of the logged number among those read."""
        if isinstance(loss, Tensor):
            self.tensors.catch_up(self.at)
            number = self.tensors.number(loss)
            return _UNKNOWN if number is None and path.loss is not None else ("tensor", number)
        if loss is None or path.loss is None:
            return None
        found = [place for place in reads if not read_difference(self.numbers[place], loss)]
        return ("read", found[-1]) if found else None

    def _changes(self, versions: Versions, bound: tuple[Any, ...]) -> tuple[int | None, ...]:
        """Return how often each tensor was changed that was in the state at the beginning."""
        before, count = self._versions, len(self._versions)
        return tuple(
            [
                # A tensor that came in this step has no count from before it.
                None if type(n) is tuple or n >= count or now is None else now - (before[n] or 0)
                for now, n in zip(versions.counts, bound, strict=True)
            ]
        )


def as_gradients(gradients: Mapping[str, Tensor]) -> Marked:
    """Return gradients, by the name of their parameter, as tensors that have a name."""
    return [("gradient", name, [tensor]) for name, tensor in gradients.items()]
