"""Watch: observes every operation of one step of a user's loop, without changing it.

It records a *path*: operators, their arguments except the step's own numbers, and the memory and layout
of each tensor. Steps with equal paths share a program. What a program cannot hold (a custom operator, a
sparse tensor, an explicit generator) runs unseen, and the tensors that it returns or changes are
*inputs* of the step, kept by content. So are all tensors that the loop uses from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from everystep.program.number_slots import READ
from everystep.program.operator_mode import OperatorMode
from everystep.program.operators import draws_random_numbers, leaves, parameters, writes
from everystep.step.elsewhere import Elsewhere, version_of
from everystep.step.follow import Follower
from everystep.step.known_operators import KnownOperator, gathers_data, known_operator
from everystep.step.optimizer_call import OptimizerCall
from everystep.step.path import FLOAT, INT, Marks, Path, SeenOperation, Tables, is_name
from everystep.step.seen_tensors import SeenTensors, UnseenError, is_plain

__all__ = ["Kept", "Made", "Watch", "run_counted"]

#: What an optimizer keeps of each parameter, by key.
Kept = list[dict[str, Tensor]]
#: What its step has created: the group, the place of the parameter in it, the key, and the tensor.
Made = list[tuple[int, int, str, Tensor]]

_CONSTANTS = {bool, int, float, torch.dtype, torch.layout, torch.memory_format, torch.device}


class Watch(OperatorMode):  # type: ignore[no-untyped-call]
    """Watches one step, from `begin` to `end`; in force while it is entered.

    Args:
        device: of the training.
        follower: knows which module and which optimizer runs.
        elsewhere: copies of what steps before brought from elsewhere.

    numbers: of the step; generators: states of torch's generator before draws, by their number from 0,
    where they differ from what the previous draw left; unseen: what was not seen, in words, and how
    often; changed_elsewhere: a tensor that the step has changed and that is in no part, in words, or
    None.
    """

    def __init__(self, device: torch.device, follower: Follower, elsewhere: Elsewhere) -> None:
        super().__init__()
        self.numbers: list[int | float] = []
        self.unseen: dict[str, int] = {}
        self.changed_elsewhere: str | None = None
        self.generators: dict[int, Tensor] = {}
        self.is_paused = False
        self._seen = SeenTensors(device, elsewhere)
        self._number = self._seen.number
        self._follower = follower
        self._operations: list[SeenOperation] = []
        self._written_elsewhere: dict[int, str] = {}
        self._drawn: Tensor | None = None
        self._draws = 0
        self._named: dict[str, int] = {}
        self._gradients: dict[str, int] = {}
        self._activations: dict[str, tuple[int, ...]] = {}
        self._logged: dict[str, int] = {}
        self._marked: list[tuple[str, str, tuple[int, ...]]] = []

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Note the tensors of the state before the step."""
        for name, tensor in state.items():
            if is_plain(tensor):
                number = self._named[name] = self._number(tensor, "state")
                self._seen.keep_extent(number)

    def add_batch(self, tensors: Mapping[str, Tensor]) -> None:
        """Note the tensors of the batch, which nothing has used yet; they are copied elsewhere."""
        for name, tensor in tensors.items():
            if not is_plain(tensor):
                continue
            number = self._number(tensor, "batch")
            if self._seen.is_input(number):  # and not of the state, which has it already
                self._named.setdefault(name, number)
                self._seen.keep_extent(number)

    def marks(self) -> Marks:
        """Return how far the watch has come."""
        return Marks(
            len(self._operations),
            len(self._seen.tensors),
            len(self._seen.storages),
            len(self.numbers),
            self._draws,
            sum(self.unseen.values()),
            len(self._marked),
        )

    def tables(self) -> Tables:
        """Return all that was noted so far."""
        return Tables(
            tuple(self._operations),
            tuple(self._seen.tensors),
            self._seen.kinds(),
            tuple(self._named.items()),
            tuple(self._marked),
        )

    def place_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage, None if it was not seen yet."""
        return self._seen.place_of(tensor)

    def is_made(self, place: int) -> bool:
        """Tell whether the step made a storage."""
        return self._seen.storages[place].kind == "temporary"

    def kept_places(self, begin: int, end: int) -> list[int]:
        """Return which storages, of those with numbers from `begin` to `end`, are kept by content."""
        return [p for p in range(begin, end) if self._seen.storages[p].content is not None]

    def resume(
        self,
        tables: Tables,
        marks: Marks,
        lying: Mapping[int, Tensor],
        contents: Mapping[int, Tensor],
        batch_offsets: Mapping[str, int],
        drawn: Tensor | None,
    ) -> None:
        """Continue from a point in a step that another watch observed in full, instead of `begin`.

        Args:
            tables, marks: what that watch noted, and up to where.
            lying: a live tensor on each storage by number, as far as there are any; the origin of the
                others is unknown, so that tensors on them are from elsewhere.
            contents: the bytes of inputs, by number of the storage.
            batch_offsets: the storage offsets of the tensors of this step's batch, in elements.
            drawn: the state of torch's generator after the last draw.
        """
        self._operations = list(tables.operations[: marks.operations])
        self._seen.resume(tables, marks, lying, contents, batch_offsets)
        self._draws, self._drawn = marks.draws, drawn
        self._named = {name: number for name, number in tables.named if number < marks.tensors}
        for number in self._named.values():
            self._seen.keep_extent(number)
        for mark in tables.marked[: marks.marked]:
            self._mark(*mark)

    def end(self, state: Mapping[str, Tensor], loss: Any) -> Path:
        """Note what is there after the step, and return its path.

        loss: what was logged as the loss: a tensor, or a number that Python has read from one.
        """
        with torch._C._DisableTorchDispatch():
            after = {name: self._number(t) for name, t in state.items() if is_plain(t)}
            loss_number = self._loss(loss)
        before = {n: number for n, number in self._named.items() if not self._seen.is_input(number)}
        of_state = {self._seen.tensors[number].storage for number in after.values()}
        elsewhere = (what for place, what in self._written_elsewhere.items() if place not in of_state)
        self.changed_elsewhere = next(elsewhere, None)
        tensors, storages = self._seen.with_batch_moved(self._named.values())
        return Path(
            operations=tuple(self._operations),
            tensors=tensors,
            storages=storages,
            named=tuple(self._named.items()),
            ends=tuple((n, number) for n, number in after.items() if before.get(n) != number),
            gone=tuple(name for name in before if name not in after),
            gradients=tuple(self._gradients.items()),
            loss=loss_number,
            activations=tuple(self._activations.items()),
            logged=tuple(self._logged.items()),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed."""
        return not self._operations and not self.unseen

    def _loss(self, loss: Any) -> int | None:
        if isinstance(loss, Tensor):
            return self._number(loss) if loss.numel() == 1 and is_plain(loss) else None
        place = len(self.numbers)
        for operation in reversed(self._operations):
            place -= operation.numbers
            if str(operation.operator) == READ and self.numbers[place] == loss:
                return int(operation.arguments[0][1:])
        return None

    def content(self, storage: int) -> Tensor | None:
        """Return the bytes of an input that is not in the batch, as first seen."""
        return self._seen.storages[storage].content

    def optimizer_uses(self, gradients: Mapping[str, Tensor]) -> None:
        """Note the gradients, by parameter, with which an optimizer starts or just ended a step.

        This step did not make what remains from the step before.
        """
        made = {storage for operation in self._operations for storage in operation.writes}
        for name, gradient in gradients.items():
            if name not in self._gradients and is_plain(gradient):
                number = self._number(gradient)
                if self._seen.tensors[number].storage in made:
                    self._mark("gradient", name, (number,))

    def logged(self, name: str, tensor: Tensor) -> None:
        """Note that a number besides the loss was logged."""
        if tensor.numel() == 1 and is_plain(tensor) and self.place_of(tensor) is not None:
            self._mark("logged", name, (self._number(tensor),))

    def module_done(self, path: str, outputs: list[Tensor]) -> None:
        """Note the output of a module; of several calls, the last that gradients flow through."""
        dense = [each for each in outputs if is_plain(each)]
        if dense and (torch.is_grad_enabled() or path not in self._activations):
            self._mark("activation", path, tuple(map(self._number, dense)))

    def _mark(self, kind: str, name: str, numbers: tuple[int, ...]) -> None:
        self._marked.append((kind, name, numbers))
        if kind == "gradient":
            self._gradients[name] = numbers[0]
        elif kind == "logged":
            self._logged[name] = numbers[0]
        else:
            self._activations.pop(name, None)
            self._activations[name] = numbers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        known = known_operator(func)
        if self.is_paused or known.how == "pass":
            return func(*args, **keywords)
        if known.how == "decompose":
            with self:
                return func.decompose(*args, **keywords)
        if known.how == "make":
            result = func(*args, **keywords)
            for tensor in leaves(result):
                self._number(tensor, "temporary")
            return result
        if self._gathers(known, args, keywords):
            return func(*args, **keywords)
        return self._see(func, known, args, keywords)

    def _gathers(self, known: KnownOperator, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
        """Tell whether an operation only reads data from outside, which is kept as its result."""
        tensors = leaves([*args, *keywords.values()])
        return gathers_data(known, tensors, lambda t: self.place_of(t) is not None, self._is_drawn)

    def _is_drawn(self, tensor: Tensor) -> bool:
        """Tell whether the step has drawn a tensor at random, from nothing else."""
        place = self.place_of(tensor)
        for seen in self._operations:
            if place in seen.writes:
                values = (*seen.arguments, *(value for _, value in seen.keywords))
                return draws_random_numbers(seen.operator) and not any(map(is_name, values))
        return False

    def _see(
        self,
        func: Any,
        known: KnownOperator,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
        run: Callable[..., Any] | None = None,
    ) -> Any:
        """Run an operation and note it; one that a program cannot hold runs unseen.

        run: returns its result, if it has run already.
        """
        count = len(self.numbers)
        try:
            if known.how != "see":
                raise UnseenError(known.how)
            arguments, named = self._encoded(known, args, keywords)
            written = self._written(known, args, keywords)
            if known.has_out and any(not self._seen.storages[place].bytes for place in written):
                raise UnseenError("allocates memory for an empty tensor")
        except UnseenError as error:
            del self.numbers[count:]
            return self._run_unseen(func, known, args, keywords, str(error))
        if known.draws:
            self._note_generator()
        call = run or (partial(run_counted, func) if known.writes_list else func)
        try:
            result = call(*args, **keywords)
        except BaseException:  # the loop may catch it, and continue
            del self.numbers[count:]
            raise
        if known.draws:
            self._drawn = torch.get_rng_state()
        if known.is_read:
            self.numbers.append(result)
        results, made = self._results(result) if known.gives else ((), ())
        writes = tuple(dict.fromkeys((*written, *made))) if written else made
        if known.makes_dtype and not any(name == "dtype" for name, _ in named):
            named = (*named, ("dtype", result.dtype))  # not that of the process, which may differ
        phase, module = self._follower.place(known.is_zeroing and self._are_gradients(written))
        numbers = len(self.numbers) - count
        self._operations.append(
            SeenOperation(phase, module, func, arguments, named, results, writes, numbers)
        )
        return result

    def _encoded(
        self, known: KnownOperator, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        encode = self._argument
        pairs = zip(args, known.places, strict=False)
        positional = tuple([encode(value, is_slot) for value, (_, is_slot) in pairs])
        if not keywords:
            return positional, ()
        return positional, tuple([(k, encode(v, k in known.slots)) for k, v in keywords.items()])

    def _argument(self, value: Any, is_slot: bool) -> Any:
        if isinstance(value, Tensor):
            return self._seen.names[self._seen.number_of_argument(value)]
        kind = type(value)
        if kind is list or kind is tuple or isinstance(value, list | tuple):
            return tuple([self._argument(item, is_slot) for item in value])
        if is_slot and (kind is int or kind is float):
            self.numbers.append(value)
            return INT if kind is int else FLOAT
        if kind is str:
            return ("text", value)
        if value is None or kind in _CONSTANTS:
            return value
        raise UnseenError(f"takes a {kind.__name__}")

    def encode(self, tensors: list[Tensor]) -> None:
        """Check that a program can hold tensors as arguments.

        Raises:
            UnseenError: it cannot; gives the reason.
        """
        self._argument(tensors, False)

    def add_optimizer_step(self, step: OptimizerCall, kept: Kept, made: Made, name: str | None) -> None:
        """Note a step of an optimizer, which has run unwatched, as one operation.

        Args:
            step: what it is.
            kept: what the optimizer kept before it, by parameter and key.
            made: what it has created: the group, the place of the parameter, the key, and the tensor.
            name: of the optimizer.
        """
        own = iter(kept)
        held = [[[x for pair in next(own).items() for x in pair] for _ in g] for g in step.parameters]
        gradients = [[parameter.grad for parameter in group] for group in step.parameters]
        places = [each[:3] for each in made]
        given = (step.parameters, gradients, held, places)
        arguments = tuple([self._argument(value, False) for value in given])
        count = len(self.numbers)
        settings = tuple([(key, self._argument(v, True)) for key, v in step.settings.values.items()])
        results, _ = self._results([each[3] for each in made])
        written = [p for group in step.parameters for p in group]
        written += [tensor for each in kept for tensor in each.values()]
        writes = tuple(dict.fromkeys(self._seen.tensors[self._number(t)].storage for t in written))
        numbers = len(self.numbers) - count
        operator = step.operator
        self._operations.append(
            SeenOperation("update", name, operator, arguments, settings, results, writes, numbers)
        )

    def _note_generator(self) -> None:
        """Note the state of torch's generator before a draw, if the last draw left it otherwise."""
        now = torch.get_rng_state()
        if self._drawn is None or not torch.equal(now, self._drawn):
            self.generators[self._draws] = now
        self._draws += 1

    @property
    def drawn(self) -> Tensor | None:
        """The state of torch's generator after the last draw, None if there was none."""
        return self._drawn

    def _written(
        self, known: KnownOperator, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[int, ...]:
        if not known.writes:
            return ()
        given = {name: v for (name, _), v in zip(known.places, args, strict=False)} | keywords
        tensors = (t for name in known.writes for t in leaves(given.get(name)))
        found = tuple(dict.fromkeys([self._seen.tensors[self._number(t)].storage for t in tensors]))
        for storage in found:
            if self._seen.storages[storage].content is not None:
                self._seen.note_written(storage)
                tensor = next(t for name in known.writes for t in leaves(given.get(name)))
                self._written_elsewhere[storage] = f"a tensor {tuple(tensor.shape)} of {tensor.dtype}"
        return found

    def _results(self, result: Any) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
        """Return the results by name, and their storages."""
        if isinstance(result, Tensor):
            flat: list[Any] = [result]
        else:
            flat = []
            for item in result if isinstance(result, list | tuple) else [result]:
                flat += item if isinstance(item, list | tuple) else [item]
        names: list[str | None] = []
        storages: dict[int, None] = {}
        for part in flat:
            if isinstance(part, Tensor) and self._seen.is_plain(part):
                number = self._number(part, "temporary")
                names.append(self._seen.names[number])
                storages[self._seen.tensors[number].storage] = None
            else:
                names.append(None)
        return tuple(names), tuple(storages)

    def _run_unseen(
        self,
        func: Any,
        known: KnownOperator,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
        reason: str,
    ) -> Any:
        """Run an operation that a program cannot hold; its results and changes become inputs."""
        self.unseen[f"{func} {reason}"] = self.unseen.get(f"{func} {reason}", 0) + 1
        # What an operation both reads for the first time and changes is noted as it was before.
        before = [tensor for tensor in leaves([*args, *keywords.values()]) if is_plain(tensor)]
        versions = [(tensor, version_of(tensor)) for tensor in before]
        result = func(*args, **keywords)
        names = {p.name for p in parameters(func)} & set(known.writes or writes(func))
        given = {p.name: v for p, v in zip(parameters(func), args, strict=False)} | keywords
        changed = [t for name in names for t in leaves(given.get(name)) if is_plain(t)]
        changed += [tensor for tensor, version in versions if version_of(tensor) != version]
        for tensor in changed:
            self._seen.note_changed_unseen(tensor)
        for tensor in (*changed, *leaves(result)):
            if is_plain(tensor):
                self._number(tensor)
        return result

    def _are_gradients(self, storages: tuple[int, ...]) -> bool:
        return set(storages) <= {
            self._seen.tensors[number].storage
            for name, number in self._named.items()
            if name.startswith("gradient/")
        }


def run_counted(func: Any, *args: Any, **keywords: Any) -> Any:
    """Run an operator on lists; torch counts its writes as it does without a watch.

    Its kernel may write each tensor by a separate operator, which torch does not count below a mode.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return func(*args, **keywords)
