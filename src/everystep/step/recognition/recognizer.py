"""Recognizer: matches the calls of a step with those of earlier steps.

Watching every operation of a step costs more than some steps do. A step that makes exactly the calls of
an earlier step, on corresponding tensors, from a state of the same structure, runs the same operations:
everything that torch's own functions depend on is compared (see `call` and `references`), and none of
the user's Python runs within them, because steps with hooks in the backward pass, custom autograd
functions or checkpoints are not learned. A step is watched in full from the first call that no earlier
step made at that point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.step.elsewhere import Elsewhere
from everystep.step.path import Path
from everystep.step.recognition.call import StrangeError, scalars, signature_of, tensors_in
from everystep.step.recognition.learner import BACKWARD, likeness_of, optimizer_signature
from everystep.step.recognition.memory import Node
from everystep.step.recognition.optimizer_numbers import Predicted
from everystep.step.recognition.references import References
from everystep.step.recognition.saved import saved_results
from everystep.step.watch import Watch

__all__ = ["OptimizerStep", "Recognizer"]

Number = int | float
_next_node = torch._C._autograd._get_sequence_nr


class OptimizerStep(NamedTuple):
    """The step of an optimizer, seen as a whole.

    begin, end: the range of its numbers among those of the step; way, structure: as in `Predicted`;
    gradients: the dtypes of those that it used, by the id of their parameter.
    """

    optimizer: torch.optim.Optimizer
    begin: int
    end: int
    way: str
    structure: Any
    gradients: dict[int, torch.dtype]


class Recognizer:
    """Follows one step.

    Args:
        root: where steps begin that have such a state.
        references: of the step.
        elsewhere: copies of what steps before brought from elsewhere.
        diverged: called when the step does what is not known, before it does it, or before it does
            anything else.

    numbers, generators, drawn: of the step, as `Watch` has them; contents: the bytes of what it brought
    from elsewhere, by the number of the storage; references: of the step; optimizer_steps: those that
    were seen as a whole; lacks_variant: the step departed as a call had results of other properties.
    """

    def __init__(
        self, root: Node, references: References, elsewhere: Elsewhere, diverged: Callable[[], None]
    ) -> None:
        self.numbers: list[Number] = []
        self.generators: dict[int, Tensor] = {}
        self.drawn: Tensor | None = None
        self.contents: dict[int, Tensor] = {}
        self.optimizer_steps: list[OptimizerStep] = []
        self.lacks_variant = False
        self._root = self._node = root
        self.references = references
        self._elsewhere = elsewhere
        self._diverged = diverged
        self._met = (
            references.count
        )  # what was first used later may differ from what it was in earlier steps
        self._changed: dict[int, int] = {}
        self._before = _next_node()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed."""
        return not self._node.marks.operations

    @property
    def is_at_root(self) -> bool:
        """Whether nothing has happened yet."""
        return self._node is self._root

    def happened(self, signature: Any) -> bool:
        """Note something besides calls of torch's functions; return whether it was to be expected."""
        node = None if isinstance(signature, StrangeError) else self._node.next.get(signature)
        if node is None:
            self._diverged()
            return False
        self._go_to(node)
        return True

    def _go_to(self, node: Node) -> None:
        self._node, self._met = node, self.references.count
        self._before = _next_node()

    def call(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any], place: Any) -> Any:
        """Call a function of torch's. place: of the call in the modules."""
        try:
            of, nodes = self.references.of, self.references.nodes()
            node = self._node.next.get(signature_of(func, args, keywords, place, of, nodes, 0))
        except StrangeError:
            node = None
        if node is None:
            self._diverged()
            return func(*args, **keywords)
        if node.contents:
            self._keep_contents(node, args, keywords)
        if node.draws:
            self._note_generator(self._node.marks.draws)
        result = func(*args, **keywords)
        if node.draws:
            self.drawn = torch.get_rng_state()
        if isinstance(result, Tensor):
            tensors = [result]
        else:
            tensors = [] if result is None else [*tensors_in(result)]
        returns = self.references.results(tensors)
        if node.likeness is not None:
            node = node.variant(tuple(map(likeness_of, tensors)))
            self.lacks_variant = node is None
        if node is None or returns != node.returns:
            self._diverged()  # its result is from elsewhere: it writes nothing
            return result
        if node.reads:
            self.numbers.append(args[0].detach().item())
        elif node.floats:
            given = scalars(args, keywords)
            numbers = [*node.numbers]
            for each in node.floats:
                numbers[each] = given[each]
            self.numbers += numbers
        else:
            self.numbers += node.numbers
        if node.changed:
            self._changed.update(node.changed)
        if func.__name__ in BACKWARD:
            self.references.note_gradients()
        self._go_to(node)
        return result

    def optimizer_begins(
        self, name: str | None, predicted: Predicted | None, optimizer: torch.optim.Optimizer
    ) -> bool:
        """Note that an optimizer starts a step; return whether it is seen as a whole."""
        if predicted is None:
            self.happened(("optimizer begins", name))
            return False
        try:
            signature = optimizer_signature(name, predicted, optimizer, self.references, 0)
        except StrangeError:
            signature = None
        node = self._node.next.get(signature)
        if node is None or node.way is None:
            self._diverged()
            return False
        begin = len(self.numbers)
        self.numbers += [n for _, own in predicted.operators(node.way) for n in own]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = {id(p): p.grad.dtype for p in parameters if p.grad is not None}
        seen = begin, len(self.numbers), node.way, predicted.structure, gradients
        self.optimizer_steps.append(OptimizerStep(optimizer, *seen))
        self.contents |= node.constants
        self._changed.update(node.changed)
        self._go_to(node)
        return True

    def path(self, state: Mapping[str, Tensor], loss: Any) -> Path | None:
        """Return the path of the completed step, or None if it ended like none before.

        state: afterwards; loss: the logged loss.
        """
        ending = self._node.ending
        if ending is None or ending.names != tuple(state):
            return None
        if self.references.bound(state.values()) != ending.bound:
            return None
        logged: Any = None
        if ending.loss is not None:
            if isinstance(loss, Tensor):
                logged = self.references.lookup(loss)
            else:
                logged = next((p for p in reversed(ending.reads) if self.numbers[p] == loss), None)
        if logged != ending.loss or (ending.loss is None and isinstance(loss, Tensor)):
            return None
        return ending.path

    def changed_unseen(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return the names of tensors that were changed more or less often than the operations say."""
        ending = self._node.ending
        assert ending is not None
        changes = self.references.changes(state.values(), ending.bound)
        if changes == ending.changes:
            return []
        return [n for n, one, two in zip(state, changes, ending.changes, strict=True) if one != two]

    def resume(self, watch: Watch) -> None:
        """Continue with a watch from the current point of the step."""
        learned = self._node.learned
        assert learned is not None
        lying, changed_unseen = {}, set()
        changed = self.references.changed()
        for reference, tensor in self.references.alive():
            number = reference.number
            if number >= min(self._met, len(learned.places)):
                continue
            place = learned.places[number]
            if place is not None and place < self._node.marks.storages:
                lying[place] = tensor
                if changed.get(number, 0) != self._changed.get(number, 0):
                    changed_unseen.add(place)  # what it is now is from elsewhere
        tables, marks = learned.tables, self._node.marks
        alive = [tensor for _, tensor in self.references.alive()]
        hidden = {
            place
            for place, storage in enumerate(tables.storages[: marks.storages])
            if storage.kind == "temporary" and place not in lying
        }
        operations = tables.operations[: marks.operations]
        lying |= saved_results(alive, self._before, operations, tables.tensors, hidden)
        for place in changed_unseen:
            del lying[place]
        watch.resume(
            *(tables, marks, lying, self.contents),
            *(self.references.batch_offsets, self.drawn),
        )
        watch.numbers, watch.generators = self.numbers, self.generators

    def _keep_contents(self, node: Node, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = {self.references.lookup(tensor): tensor for tensor in tensors_in([args, keywords])}
        for reference, place in node.contents:
            self.contents[place] = self._elsewhere.of(given[reference])

    def _note_generator(self, draws: int) -> None:
        """Note the state of torch's generator before a draw, if the last draw left it otherwise."""
        now = torch.get_rng_state()
        if self.drawn is None or not torch.equal(now, self.drawn):
            self.generators[draws] = now
