"""Learner: notes the calls of a fully watched step, so that later steps can be recognized by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from everystep.program.plain import READ
from everystep.step.path import Path
from everystep.step.recognition.call import (
    StrangeError,
    is_free,
    is_readable,
    mode_of,
    moves,
    reads,
    scalars,
    signature_of,
    tensors_in,
)
from everystep.step.recognition.memory import Ending, Learned, Memory, Node
from everystep.step.recognition.optimizer_numbers import Predicted
from everystep.step.recognition.references import References
from everystep.step.watch import Watch

__all__ = ["BACKWARD", "Learner", "likeness_of", "optimizer_signature"]

BACKWARD = {"backward", "grad"}


class Learner:
    """Follows one step beside the watch that sees its operations.

    Args:
        watch: has begun.
        references: of the step.

    strange: why the step cannot be recognized by its calls, in words, or None; references: of the step.
    """

    def __init__(self, watch: Watch, references: References) -> None:
        self.strange: str | None = None
        self._watch = watch
        self.references = references
        self._root = Node(watch.marks())
        self._trail: list[tuple[Any, Node]] = []
        self._places: list[int | None] = []
        self._moved: set[int] = set()
        self._predicted: Predicted | None = None
        self._optimizer: Any = None
        self._changed: dict[int, int] = {}
        self._note_places()

    def happened(self, signature: Any) -> bool:
        """Note an event other than a call of torch; a StrangeError if it cannot be compared.

        The watch already has its effect.
        """
        if isinstance(signature, StrangeError):
            self._give_up(signature)
        elif signature[0] == "optimizer ends" and self._predicted is not None:
            self._optimizer_ends(signature[1])
        elif self.strange is None:
            self._note_places()
            self._trail.append((signature, Node(self._watch.marks())))
        return True

    def call(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any], place: Any) -> Any:
        """Call a function of torch's, and note it. place: of the call in the modules."""
        if self.strange is not None:
            return func(*args, **keywords)
        count = self.references.count
        try:
            self._check_between()
            of, nodes = self.references.of, self.references.nodes()
            signature = signature_of(func, args, keywords, place, of, nodes, 1)
            if func.__name__ in BACKWARD:
                _check_graph(tensors_in([args, keywords]))
            if moves(func) and isinstance(args[0], Tensor):
                known = self.references.lookup(args[0])
                self._moved |= {known.number} if known is not None else set()
        except StrangeError as error:
            self._give_up(error)
            return func(*args, **keywords)
        result = func(*args, **keywords)
        if self.strange is None:
            try:
                node = self._node(func, args, keywords, result)
                self._check_new(args, keywords, count)
                self._trail.append((signature, node))
            except StrangeError as error:
                self._give_up(error)
        return result

    def optimizer_begins(
        self, name: str | None, predicted: Predicted | None, optimizer: torch.optim.Optimizer
    ) -> bool:
        """Note that an optimizer starts a step; return whether it is seen as a whole.

        predicted: the prediction of its step, if there is one.
        """
        if self.strange is not None:
            return False
        if predicted is None:
            self.happened(("optimizer begins", name))
            return False
        try:
            self._check_between()
            self._optimizer = optimizer_signature(name, predicted, optimizer, self.references, 1)
        except StrangeError as error:
            self._give_up(error)
            return False
        self._predicted = predicted
        return True

    def _optimizer_ends(self, name: str | None) -> None:
        """Note that an optimizer ended a step that is seen as a whole."""
        predicted, self._predicted = self._predicted, None
        assert predicted is not None
        before, marks = self._marks(), self._watch.marks()
        seen = self._watch.operators(before.operations, marks.operations)
        way = next((w for w in ("loop", "list") if _same(predicted.operators(w), seen)), None)
        if way is None or marks.unseen > before.unseen or marks.draws > before.draws:
            self._give_up(
                StrangeError(f"the numbers of {name or 'the optimizer'} differ from the prediction")
            )
            return
        constants = {
            place: self._watch.content(place)
            for place in self._watch.kept_places(before.storages, marks.storages)
        }
        numbers = tuple(n for _, own in seen for n in own)
        node = Node(marks, numbers, way=way, constants=constants)  # type: ignore[arg-type]
        self._note_places()
        node.changed = self._newly_changed()
        self._trail.append((self._optimizer, node))

    def remember(self, memory: Memory, state: Mapping[str, Tensor], loss: Any, path: Path) -> bool:
        """Remember the completed step; return whether it matches what was known of such steps.

        state: afterwards; loss: the logged loss; path: from the watch.
        """
        if self.strange is None:
            try:
                self._check_between()
            except StrangeError as error:
                self._give_up(error)
        if self.strange is not None:
            memory.failed()
            return True
        places = tuple(None if n in self._moved else place for n, place in enumerate(self._places))
        learned = Learned(self._watch.tables(), places)
        for node in (self._root, *[node for _, node in self._trail]):
            node.learned = learned
        last = self._trail[-1][1] if self._trail else self._root
        last.ending = self._ending(state, loss, path)
        return memory.learned(self.references.structure, self._root, self._trail)

    def _ending(self, state: Mapping[str, Tensor], loss: Any, path: Path) -> Ending | None:
        """Return how the step ended, None if that cannot be compared."""
        bound = self.references.bound(state.values())
        unknown = [name for name, each in zip(state, bound, strict=True) if each is None]
        if not all(name.startswith("gradient/") for name in unknown):
            return None
        reads = tuple(path.places_of_reads())
        logged: Any = None
        if path.loss is not None:
            if isinstance(loss, Tensor):
                logged = self.references.lookup(loss)
            else:
                numbers = self._watch.numbers
                logged = next((p for p in reversed(reads) if numbers[p] == loss), None)
            if logged is None:
                return None
        changes = self.references.changes(state.values(), bound)
        return Ending(path, tuple(state), bound, changes, logged, reads)

    def _marks(self) -> Any:
        return (self._trail[-1][1] if self._trail else self._root).marks

    def _check_between(self) -> None:
        """Check that nothing was computed since the last call.

        Raises:
            StrangeError: something was, outside a call of a torch function.
        """
        before, now = self._marks(), self._watch.marks()
        if (now.operations, now.unseen, now.draws) != (before.operations, before.unseen, before.draws):
            raise StrangeError("something other than torch functions computes")

    def _node(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> Node:
        """Return what to know about a call that was made.

        Raises:
            StrangeError: an equal call need not do the same.
        """
        before, marks = self._marks(), self._watch.marks()
        if marks.unseen > before.unseen:
            raise StrangeError("an operator runs that a program cannot hold")
        seen = self._watch.operators(before.operations, marks.operations)
        given = [*tensors_in([args, keywords])]
        node = Node(marks, tuple(self._watch.numbers[before.numbers : marks.numbers]))
        node.draws = marks.draws > before.draws
        tags = [tag for operator, _ in seen for tag in operator.tags]
        is_shaped = torch.Tag.dynamic_output_shape in tags
        if any(str(operator) == READ for operator, _ in seen):
            if len(seen) > 1 or not reads(func) or isinstance(result, Tensor):
                raise StrangeError("a function reads numbers")
            node.reads = True
        elif len(seen) > 1 and (is_shaped or torch.Tag.data_dependent_output in tags):
            raise StrangeError("a function depends on values of tensors")
        elif is_free(func, args, keywords):
            node.floats = _places_of_floats(scalars(args, keywords), node.numbers)
        results = _results(result)
        kept = self._watch.kept_places(before.storages, marks.storages)
        node.contents = tuple(self._brought(place, given) for place in kept)
        for reference, place in node.contents:
            self._places[reference.number] = place
        node.returns = self.references.results(results)
        if func.__name__ in BACKWARD:
            self.references.note_gradients()
        self._note_places()
        if is_shaped or not given:
            node.likeness = tuple(map(likeness_of, results))
        node.changed = self._newly_changed()
        return node

    def _newly_changed(self) -> tuple[tuple[int, int], ...]:
        now = self.references.changed()
        found = tuple((n, count) for n, count in now.items() if self._changed.get(n) != count)
        self._changed.update(found)
        return found

    def _brought(self, place: int, given: Iterable[Tensor]) -> Any:
        """Return the reference of the argument that brought a storage from elsewhere.

        Raises:
            StrangeError: no argument did.
        """
        for tensor in given:
            reference = self.references.lookup(tensor)
            if reference is not None and self._watch.place_of(tensor) == place:
                self._note_places()
                return reference, place
        raise StrangeError("a function reads tensors from elsewhere by itself")

    def _check_new(self, args: tuple[Any, ...], keywords: dict[str, Any], count: int) -> None:
        """Check that what a call brought from elsewhere was not made unseen in the step.

        count: the number of references before it.

        Raises:
            StrangeError: it did.
        """
        for tensor in tensors_in([args, keywords]):
            reference = self.references.lookup(tensor)
            if reference is None or reference.number < count or self.references.is_made(reference):
                continue
            place = self._watch.place_of(tensor)
            if place is not None and self._watch.is_made(place):
                raise StrangeError("a function uses a tensor that no function returned")

    def _note_places(self) -> None:
        """Note the storages of tensors that the step first used since the last call."""
        count = self.references.count
        if len(self._places) == count:
            return
        new = [None] * (count - len(self._places))
        self._places += new
        for reference, tensor in self.references.alive():
            if reference.number >= count - len(new):
                self._places[reference.number] = self._watch.place_of(tensor)

    def _give_up(self, error: StrangeError) -> None:
        self.strange = str(error)


def likeness_of(tensor: Tensor) -> Any:
    """Return the properties of a result, without its values."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def optimizer_signature(
    name: str | None,
    predicted: Predicted,
    optimizer: torch.optim.Optimizer,
    references: References,
    modes: int,
) -> Any:
    """Return a step of an optimizer as something that can be compared.

    Raises:
        StrangeError: it cannot be.
    """
    used = tuple(
        (references.of(parameter), references.of(parameter.grad))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )
    return "optimizer", name, predicted.structure, used, references.nodes(), mode_of(modes)


def _results(result: Any) -> list[Tensor]:
    """Return the tensors in a result.

    Raises:
        StrangeError: there is something in it that Python can use behind torch's back.
    """
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, list | tuple) and any(isinstance(item, Tensor) for item in result):
        return [tensor for item in result for tensor in _results(item)]
    if isinstance(result, list | tuple | dict) and any(True for _ in tensors_in(result)):
        return [*tensors_in(result)]
    if not is_readable(result):
        raise StrangeError(f"a function returns a {type(result).__name__}")
    return []


def _places_of_floats(given: list[Any], numbers: tuple[Any, ...]) -> tuple[int, ...]:
    """Return which numbers of an operation are the float arguments of its function, in order.

    Raises:
        StrangeError: its numbers are not those passed to the function.
    """
    floats = tuple(place for place, number in enumerate(given) if type(number) is float)
    if floats and list(map(repr, given)) != list(map(repr, numbers)):
        raise StrangeError("a function changes the numbers passed to it")
    return floats


def _same(one: list[Any], two: list[Any]) -> bool:
    """Tell whether operators and their numbers are equal; NaN equals NaN."""
    return len(one) == len(two) and all(
        a is b and list(map(repr, m)) == list(map(repr, n))
        for (a, m), (b, n) in zip(one, two, strict=True)
    )


def _check_graph(tensors: Iterable[Tensor]) -> None:
    """Check that a backward pass runs no custom Python.

    Raises:
        StrangeError: the graph contains an autograd function written in Python.
    """
    with torch._C.DisableTorchFunction():
        waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        met = set(waiting)
        while waiting:
            node = waiting.pop()
            if hasattr(node, "_forward_cls"):
                raise StrangeError(f"the backward pass uses {type(node).__name__}")
            following = {each for each, _ in node.next_functions if each is not None} - met
            met |= following
            waiting += following
