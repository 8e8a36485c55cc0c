"""The place of a training in its batches: recorded step by step, and found again when it is resumed.

A loader cannot be rewound. It goes to its place by its own state if it has one (`state_dict`, as
torchdata's StatefulDataLoader), by its sampler alone if torch's own DataLoader reads in this process,
and else by drawing batches again without using them. The random generators are restored before each draw
that used them, and what samplers and data sets carry before the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from everystep.errors import RunError, UsageError
from everystep.recording.contents import DRAW
from everystep.recording.keep import RECENT, Ahead
from everystep.step.generators import Generators, different, generator_states
from everystep.step.kept_values import decoded, encoded
from everystep.training.batch_sources import BatchSources, Changed, sources_of

__all__ = ["Drawn", "Epoch", "LoaderPosition", "Recorded", "is_quiet", "known_length"]

#: Prefix of the names of a loader's own state.
LOADER = "own/loader"
#: The same of what batches are drawn from, as a call of `steps` began, and since.
_BEGUN, _DRAWN = "own/begun/", "own/drawn/"
#: The same of what other batches were drawn from, which the loop has left.
_ASIDE = "own/aside/"
#: Iterating over them runs none of the user's code, and draws no random numbers.
_WITHOUT_CODE = (list, tuple, range)
_SAMPLERS = (SequentialSampler, RandomSampler, WeightedRandomSampler)


# The places of a loop of two epochs, each with one call of `steps` on three batches:
#
#   after step   1  2  3  4  5  6
#   epoch        0  0  0  1  1  1      (loop 0, number 0, 0 calls), then (loop 0, number 1, 1 call)
#   call         0  0  0  1  1  1
#   taken        1  2  3  1  2  3


class Epoch(NamedTuple):
    """An epoch of a loop over `epochs`.

    loop: which one, from 0; number: of the epoch; calls: of `steps` before it began.
    """

    loop: int
    number: int
    calls: int


class Drawn(NamedTuple):
    """A draw in the recording: the generators before it, if it used them; whether it gave a batch."""

    generators: dict[str, Tensor]
    matches: Callable[[Any], bool]


class Recorded(BaseModel):
    """Where a state is: after so many batches of a call of `steps` (from 0).

    step: after which the state is; draw_of: returns the draw of a step; loader: the loader's own state,
    None if it has none; tensors: those of the state on disk; at_first: the random generators of state 0;
    epoch: the epoch, None if the loop does not use `epochs`; has_workers: whether the call began with
    workers of an earlier one; begun, drawn: what had changed in the objects that batches are drawn
    from as the call began, and since; aside: what had changed in those that the loop had left for
    others; is_over: whether the loop takes no more of the call; size: how many batches the call had, if
    another number of processes continues, with other batches each: they continue at the same share.

    Raises:
        ValueError: a snapshot has no such place.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    step: int
    draw_of: Callable[[int], Drawn]
    call: int
    taken: int
    loader: Any = None
    tensors: Mapping[str, Tensor] = {}
    at_first: Mapping[str, Tensor] = {}
    epoch: Epoch | None = None
    has_workers: bool = False
    begun: dict[str, dict[str, Any]] = {}
    drawn: dict[str, dict[str, Any]] = {}
    aside: list[tuple[str, str, str, dict[str, Any]]] = []
    is_over: bool = False
    size: PositiveInt | None = None


class LoaderPosition:
    """Draws batches, and tracks its place.

    Args:
        device: of the parts, for its random generator.
        reached: called where a resumed training continues: a loop may have changed something before, or
            after epochs that it skipped.

    goal: the place to go to before the next batch, None if that is the next one; taken: how many batches
    of the current call of `steps` were drawn; generators: those before the last draw, by name, if it
    used them, and they had changed since the previous draw; before: those before a draw that is of no
    step so far; left: the call that the loop has left by `break` after a step; is_still: whether only
    Python and torch have run between the last two batches; has_skipped: whether batches of this call,
    or epochs, were skipped just before; noted: what batches are drawn from.
    """

    def __init__(self, device: torch.device, reached: Callable[[], None]) -> None:
        self.goal: Recorded | None = None
        self.taken = 0
        self.generators: dict[str, Tensor] = {}
        self.before: dict[str, Any] = {}
        self.left = -1
        self.is_still = False
        self.has_skipped = False
        self._device = device
        self._call = -1
        self._loop = -1
        self._epoch: Epoch | None = None
        self._epochs: int | None = None
        self._is_between = self._is_over = False
        #: Whether a loop over `epochs` is under way.
        self._is_within = False
        self._has_workers = False
        self._loader: Any = None
        self.noted = BatchSources()
        self._begun = Changed()
        self._at_first: dict[str, Any] = {}
        self._reached = reached

    def ahead(self, step: int) -> Ahead:
        """Return the steps to come after `step`, as far as batches and epochs have lengths."""
        # All later epochs are taken to have as many batches as this one.
        size = known_length(self._loader)
        if size is None:
            return Ahead(None, None)
        left = max(0, size - self.taken)
        if self._epoch is None or self._epochs is None:
            return Ahead(left, None)
        later = (self._epochs - self._epoch.number - 1) * size
        # The rows of the first epoch may come again.
        may_repeat = (self._call - 1) * size + self.taken < RECENT
        return Ahead(left if may_repeat else left + later, step + left + later)

    @property
    def sources(self) -> set[int]:
        """The ids of the objects that the current batches are drawn from."""
        return {id(each) for each in sources_of(self._loader).values()}

    @property
    def is_torn(self) -> bool:
        """Whether a batch that is of no step has changed what it was drawn from, besides generators."""
        loader = self._loader
        return bool(self.before) and (
            _has_state(loader) or bool(self.noted.changed(loader, _DRAWN).held)
        )

    def settings(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the current place, as a state has it: tensors, and plain data."""
        if self._call < 0 and self._epoch is None:
            return {}, {}
        call, taken = (self._call + 1, 0) if self._is_between else (self._call, self.taken)
        place: dict[str, Any] = {"call": call, "taken": taken}
        if self._is_between:  # as the objects are now; the next call may be of others
            self._set_aside()
        tensors, aside = self.noted.aside(_ASIDE)
        if aside:
            place["aside"] = aside
        if self._epoch is not None:
            place["epoch"] = [*self._epoch]
        if self._is_between:
            place["is_between"] = True
        elif self._has_workers:
            place["has_workers"] = True
        size = known_length(self._loader)
        # The end of batches with a length shows itself, and a resumed loop may have more of them.
        if self._is_over and not self._is_between and not (size == taken and is_quiet(self._loader)):
            place["is_over"] = True
        if not self._is_between and size:
            place["size"] = size
        if self._is_between:
            return tensors, {"place": place}
        # A state of its own leaves out what the loader itself draws from its generator.
        has_state = _has_state(self._loader)
        if has_state:
            found = encoded(self._loader.state_dict(), LOADER)
            tensors, place["loader"] = {**tensors, **found.tensors}, found.data
        begun = self._begun
        drawn = self.noted.changed(self._loader, _DRAWN, generators_only=has_state)
        if begun.held:
            tensors |= begun.tensors
            place["begun"] = begun.held
        if drawn.held and drawn.held != begun.held:
            tensors |= drawn.tensors
            place["drawn"] = drawn.held
        return tensors, {"place": place}

    def go_to(self, goal: Recorded | None) -> None:
        """Go to the place of a recorded training before the next batch."""
        self.goal = goal
        if goal is not None:
            self.noted.expect(_ASIDE, goal.tensors, goal.aside)

    def let_go(self) -> None:
        """Forget the loader: Python ends the workers of one that is in a cycle 5 seconds late."""
        self._loader = None

    def epochs(self, count: int | None) -> Iterator[int]:
        """Yield the numbers of epochs, from 0; of a resumed training, from the one of its place on.

        Raises:
            RunError: the recorded training did not use `epochs`.
            UsageError: they are within others.
        """
        if self._is_within:
            raise UsageError(
                "recording.epochs is called within another recording.epochs, and a resumed loop could "
                "not find its place; use it for the inner or for the outer loop alone"
            )
        self._loop, self._epochs = self._loop + 1, count
        goal, first, is_between = self.goal, 0, False
        if goal is not None and goal.epoch is None and (goal.call or goal.taken):
            raise RunError(
                "the loop was recorded without recording.epochs, so which epoch it was in is not "
                "known; write the loop as it was, or record it again"
            )
        if goal is not None and goal.epoch is not None:
            if self._loop < goal.epoch.loop:
                return
            # As if the calls of `steps` in the epochs before had been made.
            if self._loop == goal.epoch.loop:
                first, self._call = goal.epoch.number, goal.epoch.calls - 1
                is_between = goal.call == goal.epoch.calls and not goal.taken
        self._is_within = True
        try:
            for number in itertools.count(first) if count is None else range(first, count):
                self._enter(number, is_reached=is_between and number == first)
                self.has_skipped = goal is not None and 0 < number == first
                yield number
        finally:
            self._is_within = False
        # Code after the loop is between two epochs, too: a resume begins with it.
        last = first if count is None else max(first, count)
        self._enter(last, is_reached=is_between and last == first)

    def _enter(self, number: int, *, is_reached: bool) -> None:
        """Begin an epoch, or end the last one. is_reached: whether a resumed training continues here."""
        self._epoch = Epoch(self._loop, number, self._call + 1)
        self._is_between, self.before = True, {}
        if is_reached:
            self.goal = None
            self._reached()

    def draw(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches; of a resumed training, from its place on.

        Raises:
            RunError: the batches are not those of the recording.
        """
        self._call += 1
        if self._loader is not batches:
            self._set_aside()
        self.noted.note(batches)
        is_current = self.goal is not None and self.goal.call == self._call
        self.noted.take_back(batches, is_current=is_current)
        self.taken, self._loader = 0, batches
        self._is_between = self._is_over = False
        goal = self.goal
        if goal is not None and self._call < goal.call:  # it is past, and has no batch to yield
            self._start_workers(batches, goal)
            return
        own = None if _has_state(batches) else batches
        if goal is not None and goal.has_workers:
            self._start_workers(batches, goal)
        # Before the iterator is made, which starts workers that stay.
        self._has_workers = getattr(batches, "_iterator", None) is not None
        if goal is not None:
            self.noted.restore(own, _BEGUN, Changed(goal.tensors, goal.begun))
        self._begun = self.noted.changed(own, _BEGUN)
        iterator = self._skipped(batches, goal) if goal is not None and goal.taken else None
        self.has_skipped = iterator is not None
        # After the batches before were skipped, which may have changed the objects again.
        if goal is not None and (goal.taken or goal.is_over):
            self.noted.restore(batches, _DRAWN, Changed(goal.tensors, goal.drawn))
            self._reached()
        self.goal = None
        self._is_over = goal is not None and goal.is_over
        if self._is_over:
            return
        quiet, draws = is_quiet(batches), type(batches) not in _WITHOUT_CODE
        # The first draw is compared with state 0, from which a resumed training begins.
        after = self._at_first if self._call == 0 else {}
        while True:
            self.generators = {}
            # A quiet loader draws the seed and the order of an epoch before its first batch alone.
            is_seen = draws and (not quiet or self.taken == 0)
            self.before = before = generator_states(self._device) if is_seen else {}
            # After the generators were read: a DataLoader draws a seed as its iterator is made.
            iterator = iter(batches) if iterator is None else iterator
            try:
                batch = next(iterator)
            except StopIteration:
                self._is_over, self.before = True, {}
                return
            if is_seen:
                # A resume has them as the previous draw left them, so these are not stored again.
                is_left = bool(after) and not different(before, after)
                after = generator_states(self._device)
                used = set() if is_left else different(before, after)
                held = _tensors(before, used)
                self.generators = {f"{DRAW}{name}": tensor for name, tensor in held.items()}
            self.is_still = quiet and self.taken > 0
            self.taken += 1
            yield batch
            self.has_skipped = False

    def _set_aside(self) -> None:
        if self._loader is not None:
            self.noted.set_aside(self._loader, generators_only=_has_state(self._loader))

    def leave(self, *, is_untouched: bool) -> None:
        """Note that the loop leaves the current call by `break`.

        is_untouched: before it has done anything with the last batch, which is of no step.
        """
        if is_untouched:
            self.taken -= 1
        else:
            self.left = self._call

    def generators_before(self) -> dict[str, Tensor]:
        """Return the generators before a draw that is of no step, by the names that a state has."""
        held = _tensors(self.before, self.before.keys())
        return {f"generator/{name}": tensor for name, tensor in held.items()}

    def _start_workers(self, batches: Any, goal: Recorded) -> None:
        """Start workers that stay from epoch to epoch.

        That draws a random number, for their own seeds, which later epochs do not draw.
        """
        stays = isinstance(batches, DataLoader) and batches.num_workers and batches.persistent_workers
        if stays and batches._iterator is None:
            # With the generators as they were when the recorded loop started its workers, at step 1.
            before = Generators.capture(self._device)
            self._restore({**goal.at_first, **goal.draw_of(1).generators})
            iter(batches)
            before.restore(self._device)

    def _skipped(self, batches: Any, goal: Recorded) -> Iterator[Any]:
        """Return an iterator over the batches after those before the goal."""
        self.taken = goal.taken
        # Another number of processes has other batches: at the same share of them.
        if goal.size is not None:
            self.taken = goal.taken * (known_length(batches) or 0) // goal.size
        elif _has_state(batches) and goal.loader is not None:
            batches.load_state_dict(decoded({}, LOADER, goal.tensors, goal.loader))
            return iter(batches)
        first = goal.step - goal.taken + 1
        draw = goal.draw_of(first)
        # The first draw has no generators of its own where it used those of state 0.
        self._restore({**(goal.at_first if goal.call == 0 else {}), **draw.generators})
        iterator: Any = iter(batches)
        by_sampler, is_same_share = is_indexed(batches), goal.size is not None
        for place in range(self.taken):
            # Of torch's own classes, the last batch shows whether all came in the recorded order.
            is_compared = not is_same_share and (
                not by_sampler or (place == self.taken - 1 and is_quiet(batches))
            )
            if place and is_compared:
                # Between the batches, the loop drew from the same generators.
                draw = goal.draw_of(first + place)
                if not by_sampler:
                    self._restore(draw.generators)
            # What torch's iterator itself takes from the sampler; without the rows of the data set.
            try:
                batch = iterator._next_index() if by_sampler else next(iterator)
            except StopIteration:
                raise RunError(
                    f"the batches end after {place:,}, but the recording has {goal.taken:,} of them "
                    "here; pass the loader of the recorded training"
                ) from None
            if by_sampler and is_compared:
                batch = iterator._dataset_fetcher.fetch(batch)
            if is_compared and not draw.matches(batch):
                raise RunError(
                    f"the batch of step {first + place:,} is not the recorded one, so the place "
                    "of the training cannot be found; pass the same data in the same order, from the "
                    "first batch of the epoch on: recording.steps skips those that are past (a loader "
                    "with a state_dict, such as torchdata's StatefulDataLoader, finds it by itself)"
                )
        return cast("Iterator[Any]", iterator)

    def begin(self) -> None:
        """Note the random generators at the beginning of a training, which its state 0 has."""
        self._at_first = generator_states(self._device)

    def _restore(self, generators: Mapping[str, Tensor]) -> None:
        found = {name.removeprefix(DRAW): tensor for name, tensor in generators.items()}
        known = Generators.capture(self._device).tensors()
        Generators.from_tensors(known | found).restore(self._device)


def _tensors(states: Mapping[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    """Return the states of some generators as tensors, by the names that a state has."""
    # "python" and "numpy" have several tensors each: "python.gauss", "numpy.position", ...
    if not names:
        return {}
    states = {"device": None, **states}
    held = Generators(states["torch"], states["device"], states["python"], states["numpy"]).tensors()
    return {name: tensor for name, tensor in held.items() if name.partition(".")[0] in names}


def is_quiet(batches: Any) -> bool:
    """Return whether making a batch runs only torch's code, which draws only as an epoch begins."""
    if batches is None or type(batches) in _WITHOUT_CODE:
        return True
    return (
        is_indexed(batches)
        and type(batches.dataset) is TensorDataset
        and batches.collate_fn is default_collate
        and WeightedRandomSampler not in _kinds_of_samplers(batches)
    )


def is_indexed(batches: Any) -> bool:
    """Return whether a loader can go to a place by its sampler alone, without reading data."""
    return (
        type(batches) is DataLoader
        and batches.num_workers == 0
        and batches._dataset_kind == 0  # by index: torch's `_DatasetKind.Map`
        and _kinds_of_samplers(batches) <= {*_SAMPLERS}
        and (batches.batch_sampler is None or type(batches.batch_sampler) is BatchSampler)
    )


def _kinds_of_samplers(loader: DataLoader[Any]) -> set[type]:
    # A loader that got a batch sampler has a sampler that it does not use.
    return {type(loader.sampler), type(getattr(loader.batch_sampler, "sampler", loader.sampler))}


def known_length(batches: Any) -> int | None:
    """Return how many batches there are, None if that is unknown."""
    try:
        return len(batches)
    except Exception:  # a class of the user's may raise anything before it is iterated over
        return None


def _has_state(loader: Any) -> bool:
    has_methods = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    # Accelerate's loaders have the methods, and a state only if they are asked to keep one.
    return has_methods and bool(getattr(loader, "use_stateful_dataloader", True))
