"""Cursor: watches the calls of a step, without changing it.

Each call of the dispatcher is compared with the one that came next in an earlier step: the operator, the
tensors by identity and memory, the constants. So every operation is seen at every step. Where no known
call fits, the path branches, and the call is written down. A backward pass of a known graph runs
unwatched, as one (see `backward`).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from everystep.device import drawing_state
from everystep.ops.operators import (
    flattened,
    has_shape_of_values,
    leaves,
    parameters,
    writes,
)
from everystep.program.collectives import taking_part
from everystep.program.memory import geometry
from everystep.program.observed import OVERWRITING
from everystep.program.operation import fills
from everystep.step.backward import BackwardPasses
from everystep.step.call_checks import MISS, check_of, check_of_views, loose_tokens
from everystep.step.collective_calls import CollectiveCall, finish_calls, how_collective, receiving
from everystep.step.follow import Follower
from everystep.step.known_operators import (
    JOINING,
    PICKING,
    KnownOperator,
    known_operator,
    run_counted,
)
from everystep.step.known_paths import KnownPaths
from everystep.step.met_tensors import MET, NEW, UnseenError, held, is_plain, leaf_tokens
from everystep.step.mode_formulas import of_mode
from everystep.step.optimizer_steps import OptimizerSteps
from everystep.step.outside_tensors import MOST_BYTES, OutsideTensors
from everystep.step.path import READ_UNSEEN, Entry, SeenOperation
from everystep.step.under_way import UnderWay
from everystep.step.versions import version_of

__all__ = ["Cursor"]

#: They mark a stretch of time for a profiler.
_NO_OPERATIONS = ("profiler", "prim")
_ZEROING = {"zero_", "_foreach_zero_"}
_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Cursor(UnderWay):
    """Watches one step, from `begin` to `end`; in force while it is entered.

    Args:
        paths, device, follower, outside: as `UnderWay` has them.

    optimizers: their steps.
    """

    def __init__(
        self, paths: KnownPaths, device: torch.device, follower: Follower, outside: OutsideTensors
    ) -> None:
        super().__init__(paths, device, follower, outside)
        self.optimizers = OptimizerSteps(self)
        self._backward = BackwardPasses(self)
        self._depth = 0
        self._stance: Any = None

    def run_backward(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass; see `torch.autograd._engine_run_backward`."""
        return self._backward.run(outputs, *args, **kwargs)

    def recover(self) -> None:
        """Watch again if an optimizer's step has raised that ran unwatched."""
        self.optimizers.recover()

    # Calls.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Until an operation reads it, NumPy may change memory. A view reads nothing.
        if self.exposed and known_operator(func).how != "pass":
            self.check_exposed(leaves([*args, *(kwargs or {}).values()]))
        at, expected = self.at, self.at.next
        # A call that the path expects needs no questions about its kind: this runs at every call.
        is_new = expected is None or expected.func is not func
        if self.is_paused or (is_new and func.namespace in _NO_OPERATIONS):
            try:
                return func._op(*args, **(kwargs or {}))  # without a call of Python's between
            finally:
                # A replay does not repeat a pause, so what it changes is kept by content.
                if self.is_paused and writes(func) and "c10d" not in func.namespace:
                    self._note_aside(func, args, kwargs or {})
        # Such hooks may be in force for a few calls only, but a later backward pass runs their Python.
        if _saved_hooks(True) is not None:
            self.has_saved_hooks = True
        if is_new and func.namespace == "c10d":  # a program has operators of its own for them
            if (how := how_collective(func, self.paths.has_ranks)) == "pass":
                return func(*args, **(kwargs or {}))
            if how == "known":
                call = CollectiveCall(func, args, kwargs or {})
                with taking_part(call):
                    self.__torch_dispatch__(call.operator, types, call.arguments)
                return call.result
        try:
            if self.is_remembered:
                # The usual call is checked here, without the loop of `_followed`: each step makes many.
                if (
                    expected is not None
                    and expected.func is func
                    and not (expected.brings or expected.kept or expected.shaped)
                    and expected.where == self.follower.where
                ):
                    result = expected.check(args, kwargs)  # type: ignore[misc]
                    if result is not MISS:
                        self.at = expected
                        return result
                result = self._followed(at, func, args, kwargs)
                if result is not MISS:
                    return result
            return self._unknown(at, func, args, kwargs or {})
        except BaseException:  # the loop may catch it, and continue
            self.undo()
            # A kernel may have written some of its numbers by then, and torch counts no such change.
            if self._note_aside(func, args, kwargs or {}):
                self.unseen[f"{func} raises"] = 1
            raise

    def _unknown(self, at: Entry, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Make a call that no earlier step has made here."""
        known = known_operator(func)
        if known.how == "decompose":
            # The mode is off within its own handler; with it, the component operations arrive here.
            with self:
                return of_mode(func)(*args, **keywords)
        # A view is known by its memory; it needs an entry only where later steps compare the call.
        if known.how == "pass" and not self.is_remembered:
            return func(*args, **keywords)
        self.tensors.catch_up(at)
        given = leaves([*args, *keywords.values()]) if known.may_gather or known.draws else []
        if known.may_gather and self._gathers_data(known, given):
            result = func(*args, **keywords)
            if known.name == "copy_":  # a write through `tensor.data` is not counted
                self.outside.forget(given[0].untyped_storage()._cdata)
            # If the result is read, the run may keep the places of the pieces, not their bytes.
            if known.name in PICKING | JOINING:
                self.gathered[result.untyped_storage()._cdata] = func, args
            return result
        is_own = known.draws and not any(map(self._is_met, given))
        # What the step has read already is an input; after such a write, it is another one.
        written = _written(func, known.writes, args, keywords) if is_own else ()
        is_own = is_own and all(self.tensors.place(t.untyped_storage()) is None for t in written)
        if is_own and any(isinstance(each, torch.Generator) for each in (*args, *keywords.values())):
            # Its result is from outside, as what Python or NumPy has drawn: later steps may follow.
            text = f"{func} takes a Generator"
            self.unseen[text] = self.unseen.get(text, 0) + 1
            return func(*args, **keywords)
        return self._learn(func, known, args, keywords)

    def _followed(self, at: Entry, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a call that an earlier step has made here, too; return MISS if none has."""
        where, expected = self.follower.where, at.next
        # First what came next in the step before, then all others that a step has done here.
        entry, others = expected, iter(at.children.values())
        while entry is not None:
            if entry.func is func and entry.where == where:
                # The check must know what the step has made itself: that is not from outside.
                if entry.brings:
                    self.tensors.catch_up(at)
                result = entry.check(args, kwargs)  # type: ignore[misc]
                if result is not MISS:
                    at.next = self.at = entry
                    self.tensors.keep_brought()
                    if entry.kept:
                        flat = flattened(result)
                        for place, number in entry.kept:
                            self.tensors.keep_place(flat[place], number)
                    if entry.shaped:
                        self._add_shapes(entry, result)
                    return result
                # The failed check may have noted memory that this call does not bring.
                self.tensors.forget_brought(at.met)
            entry = next((each for each in others if each is not expected), None)
        return MISS

    def _is_met(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on memory that the step knows, and not as data from outside."""
        place = self.tensors.place(tensor.untyped_storage())
        return place is not None and not self._is_data(place)

    def _gathers_data(self, known: KnownOperator, tensors: Sequence[Tensor]) -> bool:
        """Return whether a call cuts numbers out of data from outside, or writes into a part of it.

        A loop without a loader cuts its batches out of one long tensor, at other places in each step.
        The result is an input of the step, kept by content as a batch is, and the operation is left out:
        so steps that read different places have one path, and the long tensor itself is not kept.

        A read counts if its places may change: numbers picked by an index; or tensors that are joined,
        most of them from outside, as samples out of a memory are. A view does not: what reads it has a
        part of the data.
        """
        copies = known.name == "copy_"
        read = tensors[:1] if copies else tensors
        if any(not is_plain(tensor) or tensor.requires_grad for tensor in read):
            return False
        if copies:
            # So a loop puts rows into a replay buffer. A write into data that the step has partly read
            # changes an input, so it must be noted.
            storage = read[0].untyped_storage()
            is_known = storage._cdata in self.tensors.parts or self.tensors.place(storage) is not None
            return not is_known and storage.nbytes() > read[0].numel() * read[0].itemsize
        met = [tensor for tensor in read if self._is_met(tensor)]
        if known.name in JOINING:
            return 2 * len(met) < len(read) and all(map(self._is_drawn, met))
        indices = [each for each in met if not (each.is_floating_point() or each.is_complex())]
        are_drawn = known.name in PICKING and len(indices) == len(met) and all(map(self._is_drawn, met))
        return len(met) < len(read) and (are_drawn or not met)

    def _is_data(self, place: int) -> bool:
        """Return whether memory is from outside, and the step has not changed it."""
        if self.tensors.known[place].kind != "input":
            return False
        operations = [entry.operation for entry in self.at.from_root() if entry.operation is not None]
        return not any(place in operation.writes for operation in operations)

    def _is_part(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a part of data from outside, which the step has not changed."""
        is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize
        return is_part and not self._is_met(tensor) and not tensor.requires_grad

    def _is_drawn(self, tensor: Tensor) -> bool:
        """Return whether the step has drawn a tensor at random, from nothing else."""
        # Back to the entry that has met the tensor: the first after which the step had met so many.
        number, entry = self.tensors.number(tensor), self.at
        while number is not None and entry.parent is not None and number < entry.parent.met:
            entry = entry.parent
        # The results of a call with an unknown shape are met in the entry after it.
        if entry.key[0] == "shape" and entry.parent is not None:
            entry = entry.parent
        if number is None or entry.operation is None or entry.parent is None:
            return False
        return entry.draws > entry.parent.draws and not entry.operation.tensors_read()

    def _add_shapes(self, call: Entry, result: Any) -> None:
        """Go to the point after a call with results of a shape that the call does not determine."""
        # Such as of `nonzero`: each shape is an entry of its own, after the one of the call.
        made = flattened(result)
        key = "shape", *map(geometry, made)
        if not self.goes_on(key, made):
            self.tensors.catch_up(call)
            known = call.operation
            kind = "allocated" if known is None else "temporary"
            numbers = [self.tensors.meet(each, kind) for each in made]
            if known is not None:
                given = known_operator(known.operator), known.keywords, known.writes
                keywords, results, writes = self._results_of(*given, numbers, made)
                known = known._replace(keywords=keywords, results=results, writes=writes)
            self.add(key, known)

    def _met_results(self, made: Sequence[Any], kind: str) -> list[int | None]:
        """Return the numbers of results, None for what is not a tensor that a program can hold.

        kind: of memory that the call has made.
        """
        tensors, found = self.tensors, list[int | None]()
        for each in made:
            number = tensors.number(each) if isinstance(each, Tensor) else None
            if number is None and isinstance(each, Tensor):
                if tensors.holds(each):
                    number = tensors.meet(each, kind)
                else:  # it has no number by which a later step could compare it
                    self.leave()
            found.append(number)
        return found

    def _results_of(
        self,
        known: KnownOperator,
        keywords: tuple[tuple[str, Any], ...],
        writes: tuple[int, ...],
        numbers: Sequence[int | None],
        made: Sequence[Any],
    ) -> tuple[tuple[tuple[str, Any], ...], tuple[str | None, ...], tuple[int, ...]]:
        """Return keywords, results and writes of an operation, once its results are known.

        keywords, writes: before; numbers, made: the results.
        """
        # The memory of a result counts as written, also where the result is new.
        if not known.gives:
            return keywords, (), writes
        if known.makes_dtype and not any(name == "dtype" for name, _ in keywords):
            keywords = (*keywords, ("dtype", made[0].dtype))  # a replay may have another default dtype
        written = self.tensors.origins_of([number for number in numbers if number is not None])
        results = tuple([None if number is None else f"%{number}" for number in numbers])
        return keywords, results, tuple(dict.fromkeys((*writes, *written)))

    def _learn(
        self, func: Any, known: KnownOperator, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Run a call, and write it down."""
        at, tensors, count = self.at, self.tensors, len(self.numbers)
        is_seen = known.how == "see"
        try:
            tokens, named = self._tokens(known, args, keywords)
            given = [*leaf_tokens((*tokens, *[token for _, token in named]))]
            met = [token[1] for token in given if token[0] in MET]
            into = map(tensors.number, _written(func, known.writes, args, keywords))
            written = [number for number in into if number is not None]
            if is_seen:
                self._check(known, met, written)
        except UnseenError as error:
            # Forget the numbers and the tensors of the arguments before the one that has no token.
            del self.numbers[count:]
            tensors.catch_up(at)
            # It computes nothing, so nothing is unseen; but later steps could not compare the call.
            if known.how in ("pass", "make"):
                self.leave()
                return func(*args, **keywords)
            return self._run_unseen(func, known, args, keywords, str(error))
        is_bringing = any(token[0] in NEW for token in given)
        if self.is_remembered and is_bringing:
            self._remember_places(given)
        # The shape that its `out` gets depends on numbers, so later steps could not compare it.
        if known.resizes:
            self.leave()
        # Before the call, which may overwrite what it reads.
        # What computes in place, as `mul_`, reads what code that torch does not show has put there.
        unread = [] if known.computes_in_place else written
        unread = [met[0], *unread] if met and known.reads_only_shape else unread
        contents = self._bring(given, unread) if is_seen else ()
        if known.draws:
            self.note_generator(at.draws)
        self.note_written(written)
        call = partial(run_counted, func) if known.writes_list else func._op
        try:
            result = call(*args, **keywords)
        except BaseException:
            del self.numbers[count:]
            raise
        self._note_result(known, result)
        made, before = flattened(result), len(tensors.known)
        is_shaped = self.is_remembered and _has_unknown_shape(func, known, args, keywords)
        is_shaped = is_shaped and all(tensors.holds(each) for each in made if isinstance(each, Tensor))
        numbers = [] if is_shaped else self._met_results(made, "temporary" if is_seen else "allocated")
        places = tuple([(n, k) for n, k in enumerate(numbers) if k is not None and k >= before])
        operation = None
        if is_seen:
            phase, module = self.follower.place(known.name in _ZEROING and self._are_gradients(written))
            outcome: tuple[str | None, ...] = ()
            words = tuple([(name, held(token)) for name, token in named])
            writes = tensors.origins_of(written)
            if not is_shaped:
                words, outcome, writes = self._results_of(known, words, writes, numbers, made)
            operation = SeenOperation(
                phase=phase,
                module=module,
                operator=func,
                arguments=tuple(map(held, tokens)),
                keywords=words,
                results=outcome,
                writes=writes,
                numbers=range(count, len(self.numbers)),
                has_gradients=torch.is_grad_enabled(),
            )
        key: tuple[Any, ...] = "call", func, tokens, named, places
        moving = self._moving(func, known, tokens, met, places) if self.is_remembered else None
        if moving is not None:
            in_graph = any(tensor.requires_grad for tensor in leaves(args))
            lie = [tensors.known[number].geometry[:3] for _, number in places]
            # A graph depends on where its views lie, so a call with gradients is another one.
            key = "call", func, moving, named, places, in_graph, *lie
            for _, number in places:
                tensors.note_moving(number)
        entry = self.add(key, operation)
        # Else an earlier step has made it, and only its check has failed this time.
        if entry.func is None:
            entry.func, entry.where, entry.shaped = func, self.follower.where, is_shaped
            entry.contents, entry.draws = contents, at.draws + known.draws
            entry.brings = any(token[0] in ("p", "x") for token in given)
            if moving is not None:
                entry.in_graph = in_graph
                entry.check = check_of_views(func, moving, named, places, tensors, in_graph=in_graph)
            elif self.is_remembered:
                is_alone = isinstance(result, Tensor)
                entry.check = partial(_check_first, entry, known, is_alone, self.paths)
        if is_shaped:
            self._add_shapes(entry, result)
        return result

    def _moving(
        self,
        func: Any,
        known: KnownOperator,
        tokens: tuple[Any, ...],
        given: Iterable[int],
        made: Sequence[tuple[int, int]],
    ) -> tuple[Any, ...] | None:
        """Return the tokens of a call whose results lie at another place in each step, or None."""
        met = self.tensors.known
        views = [number for _, number in made if met[number].origin != number]
        if not views:
            return None
        if known.how == "pass" and len(views) == len(made):
            return loose_tokens((func, tokens, made), self.at, met, self.paths.moved_views)
        if any(met[number].moves is not None for number in given):
            self.leave()  # the place of a result is not compared
        return None

    def _tokens(
        self, known: KnownOperator, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        """Return the tokens of arguments.

        Raises:
            UnseenError: a path cannot hold the call.
        """
        if known.how not in ("pass", "make", "see"):
            raise UnseenError(known.how)
        is_seen = known.how == "see"  # the numbers of a view belong to its geometry
        token, slots = self.tensors.token, known.places if is_seen else {}
        self.tensors.overwritten = self._overwritten(known, args, keywords) if is_seen else ()
        # A part counts as memory of its own, so a write into it would not reach the data.
        is_part = self._is_part if is_seen and not known.writes else None
        given = zip(args, known.places, strict=False)
        tokens = tuple([token(value, slots.get(name, False), is_part) for value, name in given])
        named = [(n, token(value, slots.get(n, False), is_part)) for n, value in keywords.items()]
        return tokens, tuple(named)

    def _overwritten(
        self, known: KnownOperator, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> list[Tensor]:
        """Return the arguments that a call writes to as a whole, without reading their memory."""
        if not known.writes or known.resizes or not (known.has_out or known.name in OVERWRITING):
            return []
        given = dict(zip(known.places, args, strict=False)) | keywords
        targets = leaves([given.get(name) for name in known.writes])
        others = leaves([value for name, value in given.items() if name not in known.writes])
        # A sparse tensor, for which the call cannot be held, has no memory of its own.
        read = {t.untyped_storage()._cdata for t in others if t.layout == torch.strided}

        def is_unread(target: Tensor) -> bool:
            memory = target.untyped_storage()
            is_part = memory.nbytes() > target.nbytes
            # Earlier steps read more of such memory than calls overwrite: it must be kept by content.
            may_be_read = is_part and (memory.nbytes(), target.dtype) in self.paths.partly_read
            return memory._cdata not in read and not may_be_read

        return [t for t in targets if is_plain(t) and fills(geometry(t)) and is_unread(t)]

    def _check(self, known: KnownOperator, given: Iterable[int], written: Iterable[int]) -> None:
        """Check that a program can hold an operation with these tensors.

        Raises:
            UnseenError: it cannot.
        """
        origins, met = self.tensors.origins_of(written), self.tensors.met
        for number in given:
            self.check_readable(number, origins)
        # A part is an input of its own, so a replay would not see the write in the other parts.
        changed = [met[origin]() for origin in origins]
        if any(t is not None and t.untyped_storage()._cdata in self.tensors.parts for t in changed):
            raise UnseenError("changes memory that the step has read a part of")
        if known.has_out and not all(self.tensors.known[origin].bytes for origin in origins):
            raise UnseenError("allocates memory for an empty tensor")

    def _note_result(self, known: KnownOperator, result: Any) -> None:
        """Note what a call gives to Python, or how it leaves torch's generator."""
        if known.draws:
            self.drawn = drawing_state(self._device)
        if known.is_read:
            self.numbers.append(result)

    def _remember_places(self, tokens: Iterable[Any]) -> None:
        """From now on, note the memory of results when they are made that is met again without them."""
        for token in tokens:
            if token[0] == "a":
                self.keep_place_of(token[2])
        is_backward = torch._C._current_autograd_node() is not None
        if is_backward and self.followed is not None and any(t[0] in ("p", "x") for t in tokens):
            # Autograd may have kept the result of a followed call that Python no longer holds.
            known = self.tensors.known
            made = [entry for entry in self.followed.from_root() if entry.check is not None]
            kept = [tuple(each for each in e.key[4] if known[each[1]].origin == each[1]) for e in made]
            if [entry.kept for entry in made] != kept:
                for entry, places in zip(made, kept, strict=True):
                    entry.kept = places
                # This step has passed these calls without noting the memory; only later steps will.
                self.leave()

    def _bring(self, given: Iterable[Any], unread: Iterable[int]) -> tuple[tuple[int, int], ...]:
        """Keep the memory from outside that a call is the first to read.

        Returns the places of the arguments that bring it, and the numbers of the first tensors there.

        given: the tokens of all arguments, those in lists one by one; unread: tensors that the call only
        writes into, or of which it uses only the shape.
        """
        found, origins = [], self.tensors.origins_of(unread)
        for place, (kind, number, *_) in enumerate(given):
            # Later steps bring theirs by these places, see `Entry.contents`.
            if kind in MET and self.is_unread(number, origins):
                origin, tensor = self.tensors.known[number].origin, self.tensors.met[number]()
                self.bring(origin, tensor)
                found.append((place, origin))
        return tuple(found)

    def _are_gradients(self, numbers: Sequence[int]) -> bool:
        """Return whether tensors are on the memory of gradients from before the step."""
        marks = self.at.from_root()[0].marks
        gradients = [m.numbers[0] for m in marks if m.name.startswith("gradient/")]
        return {*self.tensors.origins_of(numbers)} <= {*self.tensors.origins_of(gradients)}

    def _run_unseen(
        self, func: Any, known: KnownOperator, args: tuple[Any, ...], keywords: Any, reason: str
    ) -> Any:
        """Run an operation that a program cannot hold; its results and changes become inputs."""
        # A custom operator may write into arguments that its schema does not declare.
        before = [tensor for tensor in leaves([*args, *keywords.values()]) if is_plain(tensor)]
        versions = [(tensor, version_of(tensor)) for tensor in before]
        result = func(*args, **keywords)
        finish_calls()  # its tensors are read next
        changed = _written(func, known.writes or writes(func), args, keywords)
        changed += [tensor for tensor, version in versions if version_of(tensor) != version]
        if changed or func._schema.returns:  # an assertion leaves nothing to keep
            self.unseen[f"{func} {reason}"] = self.unseen.get(f"{func} {reason}", 0) + 1
        # A tensor made of others may write into them below autograd, where torch does not count.
        made: list[Any] = [each for each in changed if hasattr(type(each), "__tensor_flatten__")]
        inner = [getattr(each, name) for each in made for name in each.__tensor_flatten__()[0]]
        # Python sees the shapes of results.
        is_read = func.namespace != "aten" or has_shape_of_values(func, (t.dtype for t in before[1:]))
        storages = [t.untyped_storage()._cdata for t in inner]
        self.note_unseen(changed, pytree.tree_leaves(result), storages, is_read=is_read)
        return result

    def _note_aside(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        """Note what a call has written unseen into memory that the step knows; return whether it has."""
        return self._written_aside(_written(func, writes(func), args, keywords))

    def _written_aside(self, tensors: Iterable[Tensor], later: Collection[int] = ()) -> bool:
        """Note what was written unseen. later: memory that may be, until a receive was waited for."""
        with torch._C._DisableTorchDispatch():
            self.tensors.catch_up(self.at)
            plain = [(tensor, tensor.untyped_storage()) for tensor in tensors if is_plain(tensor)]
            parts, place = self.tensors.parts, self.tensors.place
            known = [(t, m._cdata) for t, m in plain if m._cdata in parts or place(m) is not None]
            if known:
                now = [tensor for tensor, memory in known if memory not in later]
                self.note_unseen(now, (), [memory for _, memory in known])
        return bool(known)

    def resume(self, written: Iterable[Tensor]) -> None:
        """End a pause; read what ranks have exchanged in it, which all have begun by now.

        written: tensors that it has changed where torch does not show it.
        """
        self.is_paused = False
        self._written_aside(written)
        exchanged, self.exchanged = self.exchanged, []
        if exchanged:
            finish_calls()
            self._written_aside(exchanged, receiving())

    # In force.

    def __enter__(self) -> Cursor:
        # The user's modes stay above the watch, which then sees what they call, not only the result.
        above = [] if self._depth else [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
        super().__enter__()  # type: ignore[no-untyped-call]
        _push_again(above)
        self._depth += 1
        if self._depth == 1:
            self.follower.watch = self
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes a second
                # Below a mode, torch compiles nothing, and raises if it was to compile a whole function.
                self._stance = torch.compiler.set_stance("force_eager")
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        above = []
        if self._depth == 0:
            self.recover()
            self.follower.watch = None
            if self._stance is not None:
                self._stance.__exit__(*error)
            # A mode that the user entered in the step may outlast it, and `__exit__` pops the innermost.
            while _get_current_dispatch_mode() is not self:
                above.append(_pop_mode())
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _push_again(above)
        if self._depth == 0:
            # They refer to this object: without a cycle, each step is freed as soon as it is written.
            self.optimizers.close()
            del self._backward

    def moved(self, tensor: Tensor) -> None:
        """Forget a tensor that has got other memory."""
        tensors = self.tensors
        tensors.catch_up(self.at)
        number = tensors.number(tensor)
        # `p.data -= x` sets the memory that the tensor has.
        if number is None or tensors.place(tensor.untyped_storage()) != tensors.known[number].origin:
            tensors.drop(tensor)

    def reads(self, tensor: Tensor, *, may_write: bool) -> None:
        """Note that Python reads the numbers of a tensor from its memory, or gets the memory itself."""
        # Its own code reads tensors, too, but not while it watches: torch suspends it in its handler.
        depth = torch._C._len_torch_dispatch_stack()
        is_watching = any(torch._C._get_dispatch_stack_at(place) is self for place in range(depth))
        if not is_watching or self.is_paused:
            return
        expected = self.at.next
        if expected is None or expected.key[:2] != READ_UNSEEN:
            with torch._C._DisableTorchDispatch():
                self.tensors.catch_up(self.at)
                if not self.is_on_known(tensor):  # data from outside that no operation has used yet
                    return
        self.happens(*READ_UNSEEN, tensors=[tensor])
        if may_write and is_plain(tensor) and tensor.nbytes <= MOST_BYTES:
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                self.tensors.catch_up(self.at)
                number = self.tensors.number(tensor)
                # What no operation has read yet is kept by content once one does.
                if number is None or not self.is_unread(number):
                    self.expose(tensor.detach(), tensor.clone())


def _push_again(modes: Sequence[Any]) -> None:
    """Put modes in force that were taken from the stack, the innermost first."""
    for mode in reversed(modes):
        _push_mode(mode)


def _has_unknown_shape(
    func: Any, known: KnownOperator, args: tuple[Any, ...], keywords: dict[str, Any]
) -> bool:
    """Return whether no token of a call shows the shape or the dtype of its results."""
    if known.may_be_shaped and has_shape_of_values(func, (t.dtype for t in leaves(args[1:2]))):
        return True
    # A result without a given dtype has the process's default.
    return known.makes_dtype and keywords.get("dtype") is None


def _written(func: Any, names: Collection[str], args: Any, keywords: Any) -> list[Tensor]:
    """Return the tensors that a call was given by the names of arguments that it writes into."""
    given = {p.name: v for p, v in zip(parameters(func), args, strict=False)} | keywords
    return [tensor for name in names for tensor in leaves(given.get(name))]


def _keep_from_compiler() -> None:
    """Keep torch.compile from compiling what watches its functions; it would take seconds."""
    compiler = torch._C._dynamo.eval_frame
    # Not every torch has it; without it, the first call of a compiled function takes longer.
    if hasattr(compiler, "set_code_exec_strategy"):
        skip = compiler._FrameAction.SKIP
        strategy = compiler._FrameExecStrategy(skip, skip)  # the frame, and those that it calls
        compiler.set_code_exec_strategy(Cursor.__torch_dispatch__.__code__, strategy)


_keep_from_compiler()


def _check_first(
    entry: Entry, known: KnownOperator, is_alone: bool, paths: KnownPaths, args: Any, kwargs: Any
) -> Any:
    """Make the check of a call, and check it; most calls of a first step come never again.

    is_alone: whether the call returns one tensor.
    """
    _, func, tokens, named, places = entry.key
    draws = entry.parent.draws  # type: ignore[union-attr]

    def before(args: Any, kwargs: Any) -> None:
        # The entry outlives the step that made it, so the step under way is looked up.
        step: Cursor = paths.step
        given = flattened([args, kwargs]) if entry.contents else []
        for place, origin in entry.contents:
            step.bring(origin, given[place])
        if known.draws:
            step.note_generator(draws)

    def after(result: Any) -> None:
        paths.step._note_result(known, result)

    entry.check = check_of(
        *(tokens, named, [(-1, places[0][1])] if is_alone and places else places),
        partial(run_counted, func) if known.writes_list else func._op,
        paths.tensors,
        before=before if entry.contents or known.draws else None,
        after=after if known.is_read or known.draws else None,
    )
    return entry.check(args, kwargs)
