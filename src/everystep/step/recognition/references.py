"""References: identify the tensors of a step by the order in which the step meets them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from everystep.program.memory import ALIGNMENT
from everystep.step.elsewhere import version_of, versions_of
from everystep.step.hooks import handles, has_hooks_on_node
from everystep.step.recognition.call import PLAIN_TENSORS, Reference, StrangeError

__all__ = ["References"]

_references: list[Reference] = []
_nodes_made = torch._C._autograd._get_sequence_nr


class References:
    """The tensors of one step.

    structure: everything in the initial state that the operations of a step depend on, except values:
    comparable; batch_offsets: the storage offsets of the tensors of the batch, in elements, by name;
    count: the number of references so far.

    Args:
        state: the live tensors at the beginning, by name.

    Raises:
        StrangeError: the effect of a step on one of them cannot be predicted.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.batch_offsets: dict[str, int] = {}
        self._of: dict[int, tuple[weakref.ref[Tensor], Reference, int]] = {}
        self._nodes_before = _nodes_made()
        self._handles_before = handles()
        self.count = 0
        self._made: set[int] = set()
        self._elsewhere: dict[int, tuple[Reference, Any]] = {}
        self._names = tuple(state)
        tensors = [*state.values()]
        self._versions = versions_of(tensors)
        likeness = [self._likeness(tensor) for tensor in tensors]
        storages = [tensor.untyped_storage() for tensor in tensors]
        places: dict[int, int] = {}
        shared = [places.setdefault(storage._cdata, place) for place, storage in enumerate(storages)]
        sizes = [int(storage.nbytes()) for storage in storages]
        self._places = places
        for tensor in tensors:
            self._add(tensor)
        gradients = [self._gradient(t) for t in tensors if t.requires_grad]
        self._count_before = self.count
        self.structure = self._names, tuple(likeness), tuple(shared), tuple(sizes), tuple(gradients)

    def nodes(self) -> int:
        """Return the number of nodes that autograd has made in the step.

        Raises:
            StrangeError: a hook was registered in the step, on an unknown object.
        """
        if handles() != self._handles_before:
            raise StrangeError("a hook was registered during the step")
        return _nodes_made() - self._nodes_before

    def skip_nodes(self, count: int) -> None:
        """Ignore this many nodes that do not belong to the step."""
        self._nodes_before += count

    def add_batch(self, tensors: Mapping[str, Tensor]) -> Any:
        """Note the tensors of the batch; return what the operations depend on of them.

        Raises:
            StrangeError: as for the state.
        """
        found: list[Any] = []
        first: dict[int, int] = {}
        is_late = self.count > self._count_before
        for name, tensor in tensors.items():
            offset = self.batch_offsets[name] = int(tensor.storage_offset())
            if self._of.get(id(tensor), (_nothing,))[0]() is tensor:
                found.append((name, self.of(tensor)))
                continue
            place = tensor.untyped_storage()._cdata
            likeness = self._likeness(tensor)
            if place not in self._places:  # not of the state: it may be any part of more data
                distance = offset - first.setdefault(place, offset)
                aligned = offset * tensor.itemsize % ALIGNMENT
                likeness = (*likeness[:4], distance, aligned, list(first).index(place), likeness[5])
            else:
                likeness = (*likeness, self._places[place])
            shared = self._sharing(tensor) if is_late else None
            found.append((name, likeness, shared, self._gradient(tensor, is_new=True)))
            self._add(tensor)
        return ("batch", *found)

    def of(self, tensor: Tensor) -> Any:
        """Return the reference of an argument of a call.

        It includes how often the tensor was changed, and the properties of a tensor from elsewhere.

        Raises:
            StrangeError: as for the state.
        """
        known = self._of.get(id(tensor))
        if known is None or known[0]() is not tensor:
            if not tensor.requires_grad:
                self._note_gradients(0)
            known = self._of.get(id(tensor))
        if known is not None and known[0]() is tensor:
            changes = _version(tensor) - known[2]
            return known[1] if not changes else (known[1], changes)
        likeness, shared = self._likeness(tensor), self._sharing(tensor)
        gradient = self._gradient(tensor, is_new=True)
        reference = self._add(tensor)
        if shared is None:
            storage = tensor.untyped_storage()
            # As long as there is a reference, no other storage can have its place.
            kept = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._elsewhere[storage._cdata] = reference, kept
        return (*likeness, shared, gradient, reference)

    def lookup(self, tensor: Tensor) -> Reference | None:
        """Return the reference of a tensor, None if the step has not met it."""
        known = self._of.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def results(self, tensors: Iterable[Tensor]) -> tuple[Reference, ...]:
        """Return the references of the results of a call."""
        found = []
        for tensor in tensors:
            known = self._of.get(id(tensor))
            if known is not None and known[0]() is tensor:
                found.append(known[1])
            else:
                made = self._add(tensor)
                self._made.add(made.number)
                found.append(made)
        return tuple(found)

    def alive(self) -> Iterable[tuple[Reference, Tensor]]:
        """Yield the tensors of the step that still exist, with their references."""
        for weak, reference, _ in self._of.values():
            tensor = weak()
            if tensor is not None:
                yield reference, tensor

    def changed(self) -> dict[int, int]:
        """Return how often the existing tensors were changed since the step met them.

        By the number of the reference, for those that were.
        """
        found = {}
        for weak, reference, version in self._of.values():
            tensor = weak()
            if tensor is not None and (changes := _version(tensor) - version):
                found[reference.number] = changes
        return found

    def bound(self, tensors: Iterable[Tensor]) -> tuple[Reference | None, ...]:
        """Return the reference of each tensor, None if the step has not met it."""
        get = self._of.get
        known: list[tuple[Any, Tensor]] = [(get(id(tensor), _NOT_MET), tensor) for tensor in tensors]
        return tuple([found[1] if found[0]() is tensor else None for found, tensor in known])

    def changes(
        self, tensors: Iterable[Tensor], bound: Iterable[Reference | None]
    ) -> tuple[int | None, ...]:
        """Return how often each tensor was changed that was in the state at the beginning.

        bound: the reference of each.
        """
        before, count = self._versions, len(self._versions)
        return tuple(
            [
                None if r is None or r.number >= count or now is None else now - (before[r.number] or 0)
                for now, r in zip(versions_of(tensors), bound, strict=True)
            ]
        )

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Tell whether the step has met all parameters of an optimizer, and what it keeps of them."""
        used = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        kept = [v for p in used for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
        return all(self.lookup(tensor) is not None for tensor in (*used, *kept))

    def is_made(self, reference: Reference) -> bool:
        """Tell whether the step has made a tensor."""
        return reference.number in self._made

    def _sharing(self, tensor: Tensor) -> Reference | None:
        """Return the first tensor that shares memory with one from elsewhere.

        Raises:
            StrangeError: the step made that tensor.
        """
        place = tensor.untyped_storage()._cdata
        for reference, other in self.alive():
            if other.layout is torch.strided and other.untyped_storage()._cdata == place:
                if reference.number in self._made:
                    raise StrangeError(
                        "something other than torch functions returns tensors that the step made"
                    )
                return reference
        known = self._elsewhere.get(place)
        return None if known is None else known[0]

    def note_gradients(self) -> None:
        """Note the gradients that a backward pass just made, so that each is identified by its owner.

        How often autograd itself wrote into them does not count: it adds gradients up in place only
        where nothing else, such as a watch, holds them.
        """
        self._note_gradients(None)

    def _note_gradients(self, version: int | None) -> None:
        """Note new gradients. version: count their changes from there on; None: from the current one."""
        for _, tensor in sorted(self.alive(), key=lambda known: known[0].number):
            if tensor.requires_grad and (tensor.is_leaf or tensor.retains_grad):
                gradient = tensor.grad
                if gradient is None or gradient.layout is not torch.strided:
                    continue
                if self.lookup(gradient) is None:
                    self._made.add(self._add(gradient, version).number)

    def _gradient(self, tensor: Tensor, is_new: bool = False) -> Any:
        """Return the reference of a tensor's gradient before the step uses it.

        is_new: whether it is not in the state, and was not checked for hooks.

        Raises:
            StrangeError: as for the state.
        """
        if not tensor.requires_grad or not tensor.is_leaf:
            return None
        if is_new:
            before, hung_up = _nodes_made(), handles()
            if has_hooks_on_node(tensor):
                raise StrangeError("the step uses hooks on graph nodes")
            self.skip_nodes(_nodes_made() - before)
            self._handles_before += handles() - hung_up
        gradient = tensor.grad
        return None if gradient is None else self.of(gradient)

    def _add(self, tensor: Tensor, version: int | None = None) -> Reference:
        """Add a tensor. version: count its changes from there on; None: from its current version."""
        if self.count == len(_references):
            _references.append(Reference(self.count))
        reference = _references[self.count]
        self.count += 1
        self._of[id(tensor)] = (
            weakref.ref(tensor),
            reference,
            (_version(tensor) if version is None else version),
        )
        return reference

    def _likeness(self, tensor: Tensor) -> tuple[Any, ...]:
        """Return what the operations on a tensor depend on, except shared memory.

        Raises:
            StrangeError: it is a subclass, has hooks, or a graph from before the step.
        """
        kind = type(tensor)
        if kind not in PLAIN_TENSORS or tensor.layout is not torch.strided or tensor.is_nested:
            raise StrangeError("the step uses tensor subclasses or sparse tensors")
        needs = tensor.requires_grad
        if needs and not tensor.is_leaf:
            raise StrangeError("the step uses a tensor with a graph from before the step")
        if needs and (tensor._backward_hooks or tensor._post_accumulate_grad_hooks):
            raise StrangeError("the step uses hooks on tensors")
        if tensor.dtype.is_complex and (tensor.is_conj() or tensor.is_neg()):
            raise StrangeError("the step uses conjugated tensors")
        shape, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        return kind, tensor.dtype, shape, stride, offset, needs, tensor.device


def _nothing(*_: Any) -> None:
    return None


_NOT_MET: tuple[Any, None] = (_nothing, None)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # torch does not count
        return version_of(tensor) or 0
