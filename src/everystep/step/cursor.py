"""Cursor: follows a step on the paths of earlier steps, and watches it in full where it leaves them.

Each call of the dispatcher is compared with the one that came next in an earlier step: the operator, the
tensors by identity and memory, the constants. So every operation is seen at every step, and only those
that are new are written down. A backward pass of a known graph runs unwatched, as one (see `backward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from everystep.program.operators import leaves
from everystep.step import replaced
from everystep.step.backward import OTHER_WHEN_WATCHED, BackwardPasses
from everystep.step.checks import MISS, check_of
from everystep.step.elsewhere import Elsewhere, version_of, versions_of
from everystep.step.follow import Follower
from everystep.step.known_operators import KnownOperator, gathers_data, known_operator
from everystep.step.known_paths import KnownPaths
from everystep.step.met_tensors import StrangeError
from everystep.step.optimizer_call import OptimizerCall
from everystep.step.optimizer_steps import OptimizerSteps
from everystep.step.path import Ending, Entry, Learned, Marks, Path, flattened, geometry
from everystep.step.saved import saved_results
from everystep.step.seen_tensors import is_plain
from everystep.step.watch import Kept, Made, Watch, run_counted

__all__ = ["Cursor"]

#: They mark a stretch of time for a profiler.
_NO_OPERATIONS = ("profiler", "prim")
#: Stands for a logged tensor that the step has not met: its content is kept each time.
_UNKNOWN = ("unknown",)
_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Cursor(Watch):  # type: ignore[no-untyped-call]
    """Watches one step of a loop, from `begin` to `end`; in force while it is entered.

    Args:
        paths: of the recording.
        device, follower, elsewhere: as `Watch` has them.

    at: the point of the path at which the step is, None if it cannot be remembered; is_followed: whether
    the step is like one before, so far; contents: the bytes of what the step brought from elsewhere, by
    the number of the storage; changed_unseen: names of the state that something has changed which the
    dispatcher did not show; optimizers: their steps; has_saved_hooks: whether a hook of the user's packs
    what autograd saves.
    """

    def __init__(
        self,
        paths: KnownPaths,
        device: torch.device,
        follower: Follower,
        elsewhere: Elsewhere,
    ) -> None:
        super().__init__(device, follower, elsewhere)
        self.paths = paths
        self.at: Entry | None = None
        self.is_followed = self.has_saved_hooks = False
        self.contents: dict[int, Tensor] = {}
        self.changed_unseen: list[str] = []
        self.numbers = paths.tensors.numbers
        self._outside = elsewhere
        self._tensors = paths.tensors
        self._storage_of: list[int | None] = []
        self._unplaced: list[int] = []
        self._trail: list[Entry] = []
        self._batch_offsets: dict[str, int] = {}
        self._state: Mapping[str, Tensor] = {}
        self._versions: list[int | None] = []
        self._backward = BackwardPasses(self)
        self.optimizers = OptimizerSteps(self)
        self._depth = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed."""
        return not self.at.marks.operations if self.is_followed and self.at else super().is_empty

    def content(self, storage: int) -> Tensor | None:
        """Return the bytes of an input that is not in the batch, as first seen."""
        return self.contents.get(storage) if self.is_followed else super().content(storage)

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Note the tensors of the state before the step."""
        self._state, self.paths.step = state, self
        same = self._tensors.same(state)
        may_follow = self.paths.may_follow() and all(map(is_plain, [*state.values()][same:]))
        self._tensors.begin(state if may_follow else {}, same if may_follow else 0)
        if not may_follow:
            super().begin(state)
            return
        self.at = root = self.paths.root(state, same)
        self._versions = versions_of(state.values())
        self.is_followed = bool(root.children) or root.ending is not None
        if not self.is_followed:
            self._begin_watching()

    def _begin_watching(self) -> None:
        Watch.begin(self, self._state)
        self._storage_of = [self.place_of(tensor) for tensor in self._state.values()]

    # What happens besides calls.

    def add_batch(self, tensors: Mapping[str, Tensor]) -> None:
        """Note the tensors of the batch, which nothing has used yet; they are copied elsewhere."""
        for name, tensor in tensors.items():
            self._batch_offsets[name] = int(tensor.storage_offset()) if is_plain(tensor) else 0
        with torch._C._DisableTorchDispatch():
            try:
                key, new = self._tensors.batch(tensors) if self.at else (None, [])
            except StrangeError:
                self.leave()
                key, new = None, []
            self._go(key, new, lambda: Watch.add_batch(self, tensors))

    def module_done(self, path: str, outputs: list[Tensor]) -> None:
        """Note the output of a module."""
        note = partial(Watch.module_done, self, path, outputs)
        self.happens("module", path, torch.is_grad_enabled(), tensors=outputs, note=note)

    def logged(self, name: str, tensor: Tensor) -> None:
        """Note that a number besides the loss was logged."""
        is_unknown = self._known(tensor) is None and not self._lies_on_known(tensor)
        note = partial(Watch.logged, self, name, tensor)
        self.happens("logged", name, tensors=[None if is_unknown else tensor], note=note)

    def _lies_on_known(self, tensor: Tensor) -> bool:
        return not is_plain(tensor) or self._tensors.place(tensor.untyped_storage()) is not None

    def uses(self, kind: str, name: str | None, gradients: Mapping[str, Tensor]) -> None:
        """Note which gradients an optimizer uses that is watched."""
        note = partial(self.optimizer_uses, gradients)
        self.happens(kind, name, (*gradients,), tensors=gradients.values(), note=note)

    def may_have_met(self, call: OptimizerCall) -> bool:
        """Tell whether the step knows what an optimizer uses, unless one like it is expected anyway."""
        expected = None if self.at is None or not self.is_followed else self.at.next
        if self.at is None or (expected is not None and expected.key[0] == "optimizer"):
            return True
        return all(self._known(tensor) is not None for tensor in call.tensors())

    def optimizer_stepped(
        self,
        step: OptimizerCall,
        kept: Kept,
        made: Made,
        name: str | None,
        gradients: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Note a step of an optimizer that has run unwatched; see `add_optimizer_step`."""

        def note() -> None:
            self.add_optimizer_step(step, kept, made, name)
            self.optimizer_uses(gradients())

        if self.is_followed:
            self.numbers += step.settings.numbers
        new = [each[3] for each in made]
        self._go(("optimizer ends", *[each[:3] for each in made]), new, note)

    def allow_changes(self, since: list[tuple[Tensor, int | None]]) -> None:
        """Do not count the changes of the state since `state_versions` returned `since`."""
        for place, ((_, before), (_, now)) in enumerate(zip(since, self.state_versions(), strict=True)):
            known = self._versions[place] if place < len(self._versions) else None
            if before is not None and now is not None and known is not None:
                self._versions[place] = known + now - before

    def happens(
        self,
        *what: Any,
        tensors: Iterable[Tensor | None],
        note: Callable[[], None] = lambda: None,
    ) -> bool:
        """Follow or note something besides calls; return whether a path can hold it.

        Args:
            what: is compared with other steps.
            tensors: that have a part in it; the step must have met them.
            note: notes it in the watch.
        """
        self.optimizers.recover()
        at = self.at
        if at is None:
            with torch._C._DisableTorchDispatch():
                note()
            return False
        expected = at.next
        if self.is_followed and expected is not None and expected.key[:-1] == what:
            met = self._tensors.met
            known = expected.key[-1]
            if len(known) == len(tensors) and all(  # type: ignore[arg-type]
                t is None if k is None else met[k]() is t for k, t in zip(known, tensors, strict=True)
            ):
                self.at = expected
                return True
        with torch._C._DisableTorchDispatch():
            numbers = tuple([None if tensor is None else self._known(tensor) for tensor in tensors])
            if any(n is None and t is not None for n, t in zip(numbers, tensors, strict=True)):
                self.leave()
                note()
                return False
            self._go((*what, numbers), [], note)
        return True

    def _go(self, key: Any, new: list[Tensor], note: Callable[[], None]) -> None:
        """Go to the point after something besides calls. new: the tensors that it brings."""
        at = self.at
        if at is not None and self.is_followed:
            entry = at.children.get(key)
            if entry is not None:
                for number, tensor in enumerate(new, start=at.met):
                    self._tensors.meet(tensor, number)
                at.next = self.at = entry
                return
            self._watch_on()
        storages = self.marks().storages
        note()
        if self.at is not None:
            if key[0] != "batch" and self._has_brought(storages):
                self.leave()  # its content is kept each time
            else:
                self._add(key, new)

    def _has_brought(self, storages: int) -> bool:
        """Tell whether memory from elsewhere was noted since there were so many storages."""
        return bool(self.kept_places(storages, self.marks().storages))

    # Calls.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        at = self.at
        if at is None or self.is_paused:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace in _NO_OPERATIONS:
            return func(*args, **(kwargs or {}))
        if _saved_hooks(True) is not None:
            self.has_saved_hooks = True
        if self.is_followed:
            where, expected = self._follower.where, at.next
            if expected is not None and expected.func is func and expected.where == where:
                result = expected.check(args, kwargs)  # type: ignore[misc]
                if result is not MISS:
                    return self._went(expected, func, args, kwargs, result)
            for entry in at.children.values():
                self._tensors.forget_brought()
                if entry.func is func and entry is not expected and entry.where == where:
                    result = entry.check(args, kwargs)  # type: ignore[misc]
                    if result is not MISS:
                        at.next = entry
                        return self._went(entry, func, args, kwargs, result)
            self._tensors.forget_brought()
        known = known_operator(func)
        if known.how == "decompose":
            return super().__torch_dispatch__(func, types, args, kwargs)
        if self._gathers(known, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        if self.is_followed:
            self._watch_on()
        return self._learn(func, types, args, kwargs or {})

    def _gathers(self, known: KnownOperator, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
        """Tell whether an operation only reads data from outside, which is kept as its result."""
        if self.at is None:
            return super()._gathers(known, args, keywords)
        given = leaves([*args, *keywords.values()])
        return gathers_data(known, given, self._is_met, self._is_drawn)

    def _is_met(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is on memory that the step knows."""
        storage, met = tensor.untyped_storage(), self._tensors
        if self._known(tensor) is not None or met.place(storage) is not None:
            return True
        others = (each for each in met.alive(0, met.count).values() if is_plain(each))
        return any(each.untyped_storage()._cdata == storage._cdata for each in others)

    def _is_drawn(self, tensor: Tensor) -> bool:
        """Tell whether the step has drawn a tensor at random, from nothing else."""
        entry = self.at
        if entry is None:
            return super()._is_drawn(tensor)
        number = self._known(tensor)
        while number is not None and entry.parent is not None and number < entry.parent.met:
            entry = entry.parent
        if entry.key[0] == "shape" and entry.parent is not None:
            entry = entry.parent
        if number is None or entry.key[0] != "call":
            return False
        _, _, tokens, named, _ = entry.key
        given = _all_tokens((*tokens, *(token for _, token in named)))
        return entry.draws and not any(token[0] in ("r", "a", "x") for token in given)

    def _went(self, entry: Entry, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Go to the point after a call that was compared and made."""
        self.at = entry
        self._tensors.keep_brought()
        if entry.kept:
            flat = flattened(result)
            for place, number in entry.kept:
                self._tensors.keep_place(flat[place], number)
        return self._shaped(entry, func, args, kwargs or {}, result) if entry.shaped else result

    def _shaped(self, entry: Entry, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Go to the point after a call with results of a shape that the call does not determine."""
        made = flattened(result)
        key = "shape", *map(geometry, made)
        if key in entry.children:
            self._go(key, made, lambda: None)
            return result
        assert entry.parent is not None
        self.at = entry.parent
        self._watch_on()
        self.at, self._tensors.count = entry, entry.met
        self._see(func, known_operator(func), args, kwargs, lambda *_, **__: result)
        self._add(key, made)
        return result

    def _learn(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a call watched, and write it down."""
        known, tensors = known_operator(func), self._tensors
        try:
            if known.how not in ("pass", "make", "see") or (known.has_out and _resizes(func)):
                raise StrangeError
            is_seen = known.how == "see"  # the numbers of a view belong to its geometry
            pairs = zip(args, known.places, strict=False)
            tokens = tuple([tensors.token(v, s and is_seen) for v, (_, s) in pairs])
            slots = known.slots if is_seen else ()
            named = tuple([(k, tensors.token(v, k in slots)) for k, v in kwargs.items()])
        except StrangeError:
            self.leave()
            return super().__torch_dispatch__(func, types, args, kwargs)
        for token in _all_tokens((*tokens, *[token for _, token in named])):
            if token[0] == "a":
                self._keep(token[2])
        self._note_storages()
        before, unseen = self.marks(), sum(self.unseen.values())
        result = super().__torch_dispatch__(func, types, args, kwargs)
        flat = flattened(result)
        made = [t for t in flat if isinstance(t, Tensor)]
        contents = self._brought(before, args, kwargs)
        if contents is None or sum(self.unseen.values()) > unseen or not all(map(is_plain, made)):
            self.leave()
            return result
        is_shaped = _is_shaped(func, args) or (known.makes_dtype and kwargs.get("dtype") is None)
        places: list[tuple[int, int]] = []
        for place, each in enumerate(flat if not is_shaped else ()):
            if isinstance(each, Tensor) and self._known(each) is None:
                places.append((place, self._new(each, tensors.place(each.untyped_storage()))))
        entry = self._add(("call", func, tokens, named, tuple(places)), [])
        if entry.check is None:
            entry.func, entry.where, entry.shaped = func, self._follower.where, is_shaped
            entry.contents, entry.draws = contents, known.draws
            self._compile(entry, known, is_alone=isinstance(result, Tensor))
        if is_shaped:
            self._add(("shape", *map(geometry, made)), made)
        return result

    def _compile(self, entry: Entry, known: KnownOperator, *, is_alone: bool) -> None:
        """Make the check of a call. is_alone: whether it returns one tensor."""
        _, func, tokens, named, places = entry.key
        paths, draws = self.paths, entry.parent.marks.draws  # type: ignore[union-attr]

        def before(args: Any, kwargs: Any) -> None:
            step: Cursor = paths.step
            given = _all_items([args, kwargs]) if entry.contents else []
            for place, storage in entry.contents:
                step.contents[storage] = step._outside.of(given[place])
            if entry.draws:
                now = torch.get_rng_state()
                if step._drawn is None or not torch.equal(now, step._drawn):
                    step.generators[draws] = now

        def after(result: Any) -> None:
            step: Cursor = paths.step
            if known.is_read:
                step.numbers.append(result)
            else:
                step._drawn = torch.get_rng_state()

        entry.check = check_of(
            *(tokens, named, [(-1, places[0][1])] if is_alone and places else places),
            partial(run_counted, func) if known.writes_list else func,
            self._tensors,
            before=before if entry.contents or entry.draws else None,
            after=after if known.is_read or entry.draws else None,
        )

    def _brought(self, before: Marks, args: Any, kwargs: Any) -> tuple[tuple[int, int], ...] | None:
        """Return which arguments brought memory from elsewhere, None if no argument did."""
        kept = self.kept_places(before.storages, self.marks().storages)
        given = _all_items([args, kwargs]) if kept else []
        found = []
        for storage in kept:
            is_its = (isinstance(t, Tensor) and self.place_of(t) == storage for t in given)
            place = next((place for place, is_one in enumerate(is_its) if is_one), None)
            if place is None:
                return None
            found.append((place, storage))
        return tuple(found)

    def _keep(self, number: int) -> None:
        """From now on, note the memory of a result when it is made: it is met again without it."""
        entry = self.at
        while entry is not None and entry.parent is not None and number < entry.parent.met:
            entry = entry.parent
        if entry is not None and entry.check is not None:
            new = [pair for pair in entry.key[4] if pair[1] == number and pair not in entry.kept]
            entry.kept += tuple(new)

    # Tensors.

    def _known(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor that the step has met, None if it has not."""
        if self.at is None:
            return None
        if self.is_followed:
            self._tensors.count = self.at.met
        return self._tensors.known(tensor)

    def _new(self, tensor: Tensor, origin: int | None) -> int:
        number = self._tensors.new(tensor, origin)
        self._unplaced.append(number)
        return number

    def _note_storages(self) -> None:
        """Note the storages of new tensors, as the watch has numbered them."""
        first = len(self._storage_of)
        count = self._tensors.count
        self._storage_of += [None] * (count - first)
        waiting = [*self._unplaced, *(n for n in range(first, count) if n not in self._unplaced)]
        self._unplaced = []
        for number in waiting:
            tensor = self._tensors.met[number]()
            if tensor is not None:
                place = self._storage_of[number] = self.place_of(tensor)
                if place is None:  # nothing has read it yet
                    self._unplaced.append(number)

    # The path.

    def _add(self, key: Any, new: list[Tensor]) -> Entry:
        """Add what has just happened to the path, and go there. new: tensors that it brings."""
        at = self.at
        assert at is not None
        for tensor in new:
            self._new(tensor, None)
        self._note_storages()
        place = (self._follower.where, key) if key[0] == "call" else key
        entry = at.children.get(place)
        if entry is None:
            entry = at.children[place] = Entry(key, at, self.marks(), self._tensors.count)
        at.next = self.at = entry
        self._trail.append(entry)
        return entry

    def leave(self) -> None:
        """Watch the rest of the step without following or remembering it."""
        if self.at is not None:
            if self.is_followed:
                self._watch_on()
            self._close_trail()
            self.at = None

    def _close_trail(self) -> None:
        """Let later steps continue from each entry that this one has made."""
        if self._trail:
            learned = Learned(self.tables(), tuple(self._storage_of))
            for entry in self._trail:
                entry.learned = entry.learned or learned
            self._trail = []

    def _watch_on(self) -> None:
        """Watch the rest of the step in full, because it is unknown from here on."""
        at = self.at
        assert at is not None
        self._tensors.count = at.met
        self.is_followed = False
        del self.numbers[at.marks.numbers :]  # those of a call that has failed
        if at.parent is None:  # nothing has happened yet
            self._begin_watching()
            return
        learned = at.learned
        assert learned is not None
        self._storage_of = list(learned.places[: at.met])
        tables, marks, tensors = learned.tables, at.marks, self._tensors
        alive = tensors.alive(0, at.met)
        lying: dict[int, Tensor] = {}
        for number, tensor in alive.items():
            place = self._storage_of[number]
            if place is not None and place < marks.storages and tensors.lies_as(tensor, number):
                lying.setdefault(place, tensor)
        hidden = {
            place
            for place, storage in enumerate(tables.storages[: marks.storages])
            if storage.kind == "temporary" and place not in lying
        }
        operations, next_node = (
            tables.operations[: marks.operations],
            torch._C._autograd._get_sequence_nr(),
        )
        lying |= saved_results(alive.values(), next_node, operations, tables.tensors, hidden)
        self.resume(tables, marks, lying, self.contents, self._batch_offsets, self._drawn)
        for place, tensor in lying.items():
            if tensors.place(tensor.untyped_storage()) is None and place in self._storage_of:
                tensors.keep_place(tensor, self._storage_of.index(place))

    def state_versions(self) -> list[tuple[Tensor, int | None]]:
        """Return the tensors of the state, each with how often it was changed."""
        tensors = [*self._state.values()]
        return [*zip(tensors, versions_of(tensors), strict=True)]

    def note_unwatched(
        self,
        before: Iterable[Tensor | None],
        left: Iterable[Tensor | None],
        versions: Iterable[tuple[Tensor, int | None]],
        *,
        runs_python: bool,
    ) -> None:
        """Note that a backward pass ran unwatched: the tensors that it has left are from elsewhere.

        Args:
            before: the gradients before it.
            left: those after it, and its results.
            versions: what `state_versions` returned before it.
            runs_python: whether code of the user's may have run in it, and changed anything.
        """
        with torch._C._DisableTorchDispatch():
            self.leave()
            self.unseen[OTHER_WHEN_WATCHED] = self.unseen.get(OTHER_WHEN_WATCHED, 0) + 1
            changed = [gradient for gradient in before if gradient is not None]
            if runs_python:
                self._seen.forget_all_but_state()
                changed += [tensor for tensor, version in versions if version_of(tensor) != version]
            for tensor in changed:
                self._seen.note_changed_unseen(tensor)
            for each in left:
                if each is not None and is_plain(each):
                    self._number(each)

    # The end.

    def end(self, state: Mapping[str, Tensor], loss: Any) -> Path:
        """Return what the step did. state: afterwards; loss: the logged loss."""
        with torch._C._DisableTorchDispatch():
            path = self._followed_path(state, loss) if self.is_followed else None
            if path is None:
                storages = self.marks().storages
                path = super().end(state, loss)
                if self.at is not None:
                    is_same = not self._has_brought(storages)
                    self.at.ending = self._ending(state, loss, path) if is_same else None
                    self.paths.learned()
        self.numbers = self.numbers.copy()  # the list itself belongs to the recording
        return path

    def _followed_path(self, state: Mapping[str, Tensor], loss: Any) -> Path | None:
        """Return the path of a step that was followed, None if it ended like none before."""
        assert self.at is not None
        ending, lies_as = self.at.ending, self._tensors.lies_as
        if (
            ending is None
            or ending.names != tuple(state)
            or not all(map(lies_as, state.values(), ending.bound))
            or self._loss_token(loss, ending.path) != ending.loss
        ):
            self._watch_on()
            return None
        self.paths.followed()
        changes = self._changes(state, ending.bound)
        if changes != ending.changes:
            pairs = zip(state, changes, ending.changes, strict=True)
            self.changed_unseen = [name for name, one, two in pairs if one != two]
        return ending.path

    def _ending(self, state: Mapping[str, Tensor], loss: Any, path: Path) -> Ending | None:
        bound = tuple(map(self._bound, state.values()))
        token = self._loss_token(loss, path)
        if None in bound or token == _UNKNOWN:
            return None
        return Ending(path, tuple(state), bound, self._changes(state, bound), token)

    def _bound(self, tensor: Tensor) -> Any:
        """Return the number of a tensor of the state, or the memory that it got in the step."""
        number = self._known(tensor)
        if number is not None or not is_plain(tensor):
            return number
        place = self._tensors.place(tensor.untyped_storage())
        if place is None:
            return None
        self._keep(place)
        return place, geometry(tensor)

    def _loss_token(self, loss: Any, path: Path) -> Any:
        """Return the number of the logged tensor, or the place of the logged number among those read."""
        if isinstance(loss, Tensor):
            number = self._known(loss)
            return _UNKNOWN if number is None and path.loss is not None else ("tensor", number)
        if loss is None or path.loss is None:
            return None
        found = [place for place in path.places_of_reads() if self.numbers[place] == loss]
        return ("read", found[-1]) if found else None

    def _changes(self, state: Mapping[str, Tensor], bound: tuple[Any, ...]) -> tuple[int | None, ...]:
        """Return how often each tensor was changed that was in the state at the beginning."""
        before, count = self._versions, len(self._versions)
        return tuple(
            [
                None if type(n) is tuple or n >= count or now is None else now - (before[n] or 0)
                for now, n in zip(versions_of(state.values()), bound, strict=True)
            ]
        )

    # In force.

    def __enter__(self) -> Cursor:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth == 1:
            replaced.begin(self._backward.run, self._moved)
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.optimizers.recover()
            replaced.end()
            self._close_trail()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _moved(self, tensor: Tensor) -> None:
        """Forget a tensor that has got other memory."""
        if self.at is not None:
            if self.is_followed:
                self._tensors.count = self.at.met
            self._tensors.drop(tensor)


def _all_tokens(tokens: Iterable[Any]) -> Iterable[Any]:
    for token in tokens:
        if token[0] == "l":
            yield from _all_tokens(token[1])
        else:
            yield token


def _all_items(value: Any) -> list[Any]:
    """Return all items of arguments, in order."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return [each for item in value for each in _all_items(item)]
    return [value]


@cache
def _resizes(func: Any) -> bool:
    """Tell whether an operator gives its `out` a shape that depends on numbers."""
    packet = func.overloadpacket
    overloads = [getattr(packet, name) for name in packet.overloads()]
    return any(torch.Tag.dynamic_output_shape in each.tags for each in overloads)


def _is_shaped(func: Any, args: Any) -> bool:
    """Tell whether the shapes of an operation's results depend on numbers."""
    if func.overloadpacket.__name__ == "_pack_padded_sequence":  # torch has no tag on it
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func.overloadpacket.__name__ not in ("index", "_unsafe_index"):
        return True
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
