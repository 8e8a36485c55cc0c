"""Known paths: those of the steps of a recording, which later steps can follow."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from everystep.program.memory import geometry
from everystep.step.collective_calls import has_ranks
from everystep.step.met_tensors import MetTensors
from everystep.step.optimizer_call import OptimizerCalls
from everystep.step.path import Ending, Entry, Mark, MetTensor
from everystep.step.torchs_own import handles, has_hooks_on_node

__all__ = ["KnownPaths"]

#: Entries that are remembered, about 2.5 kB each: a loop of steps that all differ would fill the memory.
_MOST_ENTRIES = 100_000
#: Graphs and random trees give steps that all differ, and a third of writing one down goes into
#: remembering it: after as many in a row that followed none before, one of a few is remembered, which
#: later steps can show to be worth it.
_PATIENCE, _ONE_OF = 64, 8
#: New objects between two collections. It is not disabled: a long step of the user's may leave much to
#: collect, the user may disable it in the step, and a process that is forked there lives longer.
_OBJECTS = 100_000


class KnownPaths:
    """The paths of a recording, as a tree.

    tensors: of the step in progress; moved_views: as `loose_tokens` has them; calls: of optimizers;
    size: how many entries there are; pause: of the collector while a step is written down; has_ranks:
    whether several processes train; partly_read: memory from outside, by its bytes and dtype, that steps
    overwrite in part before they read all of it.
    """

    def __init__(self) -> None:
        self.tensors = MetTensors()
        self.pause = CollectorPause()
        self.moved_views: set[tuple[Any, ...]] = set()
        self.calls = OptimizerCalls()
        self.step: Any = None
        self._roots: dict[Any, Entry] = {}
        self.size = 0
        #: By the id of a known ending: where the step after it begins if nothing changes the state, and
        #: how many of its tensors are as when the step before began.
        self._after: dict[int, tuple[Ending, Entry, int]] = {}
        self.has_ranks = has_ranks()
        self.partly_read: set[tuple[int, torch.dtype]] = set()
        #: Steps in a row, up to the last, that have followed none.
        self._unlike = 0
        self._handles = -1
        self._without_hooks: dict[int, Any] = {}

    def root(self, state: Mapping[str, Tensor], same: int, *, is_remembered: bool) -> Entry:
        """Return the point at which steps with such a state begin.

        Args:
            state: the tensors.
            same: how many of them, from the first, are unchanged since the last call.
            is_remembered: whether later steps may follow this one.
        """
        lies = self.tensors.looks
        del lies[same:]
        for tensor in [*state.values()][same:]:
            storage = tensor.untyped_storage()
            lies.append((geometry(tensor), storage.nbytes(), tensor.is_cpu, storage._cdata))
        places: dict[int, int] = {}
        shared = [places.setdefault(each[3], number) for number, each in enumerate(lies)]
        key = (*state, *shared, *[each[:3] for each in lies])
        root = self._roots.get(key) if is_remembered else None
        if root is None:
            met = tuple(
                MetTensor(origin, "state", size, on_cpu, True, own)
                for origin, (own, size, on_cpu, _) in zip(shared, lies, strict=True)
            )
            marks = tuple(Mark("state", name, (number,)) for number, name in enumerate(state))
            root = Entry("root", None, met, marks=marks)
        if is_remembered:
            self._roots[key] = root
        return root

    def begins_after(self, ending: Ending, root: Entry, same: int) -> None:
        """Note how the step after an ending began. root, same: as `root` has them."""
        # Those that stay have their numbers again: the state is met in order, so these are 0, 1, 2, ...
        is_still = all(number == place for place, number in enumerate(ending.bound[:same]))
        # The geometry of a view that moves does not follow from the ending.
        moves = any(ending.path.tensors[number].moves is not None for _, number in ending.path.ends)
        if is_still and not moves:
            # The ending is held, so that no other one gets its id.
            self._after[id(ending)] = ending, root, same

    def beginning_after(self, ending: Ending | None) -> tuple[Entry, int] | None:
        """Return how the step after such an ending begins, if one has begun before, and as it was left.

        The ending has where each tensor comes from, and so how it lies.
        """
        if id(ending) not in self._after:
            return None
        _, root, same = self._after[id(ending)]
        del self.tensors.looks[same:]  # of the tensors of the step before
        return root, same

    def have_hooks(self, leaves: Iterable[Tensor]) -> bool:
        """Return whether Python runs where autograd adds to the gradients of some tensors."""
        if self._handles != handles():
            self._without_hooks.clear()
        # A look makes a node, so it is taken once of each leaf, and again after any hook was registered.
        known = self._without_hooks
        unknown = [leaf for leaf in leaves if (of := known.get(id(leaf))) is None or of() is not leaf]
        if unknown:
            with torch._C._DisableTorchDispatch():
                if any(map(has_hooks_on_node, unknown)):
                    return True
            known.update((id(leaf), ref(leaf)) for leaf in unknown)
        # Only now, since the look itself has registered hooks.
        self._handles = handles()
        return False

    def remembers_next(self) -> bool:
        """Return whether later steps may follow what the step that begins is the first to do."""
        self._unlike += 1
        return self._unlike <= _PATIENCE or self._unlike % _ONE_OF == 0

    def was_followed(self) -> None:
        """Note that a step has followed most of another one."""
        self._unlike = 0

    def let_go(self) -> None:
        """Refer to no object of the user's: entries refer to this one until garbage is collected."""
        self.step, self.calls = None, OptimizerCalls()

    def make_room(self) -> None:
        """Forget all paths once they take too much memory; the next steps are new ones."""
        if self.size > _MOST_ENTRIES:
            self.size, self._roots, self._after = 0, {}, {}


class CollectorPause:
    """A pause of Python's garbage collector, which changes its threshold alone.

    While a step is written down, each call makes some twenty objects that stay until the step ends, so
    the collector would go through all objects of the process again and again: with packed sequences, a
    fifth of the time.
    """

    _usual: tuple[int, int, int] | None = None

    def begin(self) -> None:
        """Pause, unless that is so already."""
        usual = gc.get_threshold()
        if 0 < usual[0] < _OBJECTS:  # 0: it does not run by itself
            self._usual = usual
            gc.set_threshold(_OBJECTS, *usual[1:])

    def end(self) -> None:
        """Run as before, if this has paused; the user may have set other thresholds since."""
        usual, self._usual = self._usual, None
        if usual is not None and gc.get_threshold() == (_OBJECTS, *usual[1:]):
            gc.set_threshold(*usual)
