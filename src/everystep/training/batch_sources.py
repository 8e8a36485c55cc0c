"""The objects that batches are drawn from: what they carry from batch to batch, and from epoch to epoch.

A sampler may shuffle a list of its own in each epoch, and a data set may draw from a generator of its
own. A resumed loop has these objects as its script makes them, so what has changed in them is recorded.
"""

from __future__ import annotations

import json
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from operator import is_
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from everystep.errors import RunError
from everystep.recording.contents import given_of
from everystep.step.kept_values import (
    GENERATORS,
    Encoded,
    decoded,
    encoded,
    is_aside,
    is_plain_value,
)
from everystep.step.state import OWN

__all__ = ["BatchSources", "Changed", "sources_of"]


# e.g. of a sampler that shuffles a list of its own:
#   {"sampler": {"order": {"value": {"list": [3, 1, 2]}, "digest": "9f86...", "first": "51aa..."}}}


class Changed(NamedTuple):
    """The attributes that have changed: their tensors, and the rest, by the names of their objects.

    held: each with its `value`, a `digest` of both, and that of what it was at `first`.
    """

    tensors: Mapping[str, Tensor] = {}
    held: Mapping[str, Mapping[str, Any]] = {}


class _AttributeThen(NamedTuple):
    """An attribute at one time: a digest, the classes of what only the user's code makes, and a copy."""

    digest: str
    fixed: Mapping[str, str]
    copy: Encoded = Encoded(None)


_Found = tuple[Encoded, _AttributeThen]
#: An attribute: the name of its object, its own, and the digest of what it was at first.
_Attribute = tuple[str, str, str]
#: Generators that are known as objects; NumPy's are attributes of an object that has them.
_WITH_REFERENCES = (torch.Generator, random.Random)


def _reference(each: Any) -> Callable[[], Any]:
    """Return a weak reference, or what holds the object where that is impossible."""
    try:
        return weakref.ref(each)
    except TypeError:  # a generator of torch 2.9
        return lambda: each


class _Aside(NamedTuple):
    """What an attribute had as its batches were left: `node` as in `held`, and its tensors.

    owner: its generator or object, which may be gone; None if it is from a recorded state.
    """

    node: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    owner: Callable[[], Any] | None = None


class BatchSources:
    """Notes how the objects are at first, and finds what has changed in them since.

    Left are tensors and collections that are large (the data), modules, functions and files.
    """

    def __init__(self) -> None:
        self._first: dict[int, tuple[weakref.ref[Any], str, dict[str, _AttributeThen]]] = {}
        #: A loop may make new loaders in each epoch, with the same generators.
        self._generators: dict[tuple[int, str, str], tuple[Callable[[], Any], _AttributeThen]] = {}
        #: Of batches that a loop has left, and may come back to in a later epoch: each with the id of
        #: its owner, or with 0, -1, ... if it is from a recorded state.
        self._aside: dict[tuple[_Attribute, int], _Aside] = {}
        #: Long lists of targets or paths as they were found last, and what that gave, by place.
        self._lists: dict[str, tuple[list[Any], _Found]] = {}

    def note(self, batches: Any) -> None:
        """Note how the objects of some batches are, unless they are known."""
        for name, source in _with_state(batches).items():
            known = self._first.get(id(source))
            if known is None or known[0]() is not source:
                noted = {
                    key: self._at_first(name, key, vars(source)[key], now._replace(copy=each.copy()))
                    for key, each, now in self._attributes(name, source, batches)
                }
                with suppress(TypeError):  # a class without weak references
                    self._first[id(source)] = weakref.ref(source), name, noted

    def _at_first(self, name: str, key: str, value: Any, now: _AttributeThen) -> _AttributeThen:
        """Return what an attribute was at first: of a generator, in whichever object it was then."""
        if not isinstance(value, _WITH_REFERENCES):
            return now
        place = id(value), name, key
        if place not in self._generators or self._generators[place][0]() is not value:
            self._generators[place] = _reference(value), now
        return self._generators[place][1]

    def set_aside(self, batches: Any, *, generators_only: bool) -> None:
        """Keep what has changed in some batches, which the loop leaves for others."""
        sources = _with_state(batches)
        changed = self.changed(batches, "", generators_only=generators_only)
        for name, nodes in changed.held.items():
            for key, node in nodes.items():
                value = vars(sources[name])[key]
                place, own = (name, key, node["first"]), f"{OWN}{_place(name, key)}"
                owner = _reference(value if isinstance(value, _WITH_REFERENCES) else sources[name])
                # Of the attribute itself, and of what is in it: `.state.0`.
                tensors = {
                    n: t for n, t in changed.tensors.items() if n == own or n.startswith(f"{own}.")
                }
                self._aside[place, id(owner())] = _Aside(node, tensors, owner)

    def take_back(self, batches: Any, *, is_current: bool) -> None:
        """Restore what the recorded training had in some batches as it left them, if it did.

        is_current: whether it was drawing from these when its state was recorded.

        Not in attributes that the loop has set since, by `set_epoch`: they are not as at first.

        Raises:
            RunError: it left several that were alike at first.
        """
        for name, source in _with_state(batches).items():
            _, _, first = self._first.get(id(source), (None, name, {}))
            for key, then in first.items():
                place, own = (name, key, then.digest), vars(source)
                # What this process has left is in the objects themselves.
                for each in (source, own.get(key)):
                    self._aside.pop((place, id(each)), None)
                recorded = [k for k, each in self._aside.items() if k[0] == place and each.owner is None]
                if is_current or not recorded:
                    continue
                if len({self._aside[k].node.get("digest") for k in recorded}) > 1:
                    raise RunError(
                        "the loop draws from several loaders that were alike at first, so which of them "
                        "has drawn how much is not known; give their generators different seeds"
                    )
                aside = self._aside.pop(recorded[0])
                with suppress(LookupError, TypeError, ValueError, AttributeError):
                    value = aside.node["value"]
                    own[key] = decoded(own.get(key), _place(name, key), aside.tensors, value)

    def aside(self, prefix: str) -> tuple[dict[str, Tensor], list[list[Any]]]:
        """Return what is set aside, as a state has it. prefix: of the names of its tensors."""
        # What is gone does not come again: a loop that makes a new one has it as at first.
        found = [
            (f"{prefix}{'/'.join(place)}/{each.node.get('digest')}/", place, each)
            for (place, _), each in self._aside.items()
            if each.owner is None or each.owner() is not None
        ]
        tensors = {f"{own}{n}": t for own, _, each in found for n, t in each.tensors.items()}
        return tensors, [[*place, each.node] for _, place, each in found]

    def expect(
        self, prefix: str, tensors: Mapping[str, Tensor], aside: Iterable[tuple[Any, ...]]
    ) -> None:
        """Set aside what `aside` returned in the process that recorded."""
        for number, (*place, node) in enumerate(aside):
            own = f"{prefix}{'/'.join(place)}/{node.get('digest')}/"
            named = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
            self._aside[(place[0], place[1], place[2]), -number] = _Aside(node, named)

    def reset(self) -> None:
        """Bring the objects to what they were as they were noted: as in a new process."""
        for reference, name, first in self._first.values():
            source = reference()
            for key, (_, _, copy) in first.items() if source is not None else ():
                with suppress(LookupError, TypeError, ValueError, AttributeError):
                    own = vars(source)
                    own[key] = decoded(own.get(key), _place(name, key), copy.tensors, copy.data)

    def changed(self, batches: Any, prefix: str, *, generators_only: bool = False) -> Changed:
        """Return copies of what has changed since the objects were noted. prefix: of their names."""
        tensors, held = dict[str, Tensor](), dict[str, dict[str, Any]]()
        for name, source in _with_state(batches).items():
            reference, _, first = self._first.get(id(source), (None, name, {}))
            if reference is None or reference() is not source:
                continue
            for key, found, now in self._attributes(name, source, batches):
                if generators_only and not isinstance(vars(source)[key], GENERATORS):
                    continue
                then = first.get(key, _AttributeThen("", {}))
                # With other objects in it, only the user's code can make it again.
                if now.digest != then.digest and now.fixed == then.fixed:
                    tensors |= {
                        f"{prefix}{n}": each.detach().clone() for n, each in found.tensors.items()
                    }
                    node = {"value": found.data, "digest": now.digest, "first": then.digest}
                    held.setdefault(name, {})[key] = node
        return Changed(tensors, held)

    def restore(self, batches: Any, prefix: str, changed: Changed) -> None:
        """Bring the objects to what `changed` returned; where it does not fit, the batches differ."""
        named = changed.tensors.items()
        tensors = {n.removeprefix(prefix): each for n, each in named if n.startswith(prefix)}
        for name, source in _with_state(batches).items():
            own, known = vars(source), changed.held.get(name, {})
            current = {key: now.digest for key, _, now in self._attributes(name, source, batches)}
            for key, node in known.items():
                with suppress(LookupError, TypeError, ValueError, AttributeError):
                    if node["digest"] != current.get(key):  # an iterator may be in the middle of it
                        own[key] = decoded(own.get(key), _place(name, key), tensors, node["value"])

    def _attributes(
        self, name: str, source: Any, batches: Any
    ) -> Iterator[tuple[str, Encoded, _AttributeThen]]:
        """Yield the attributes of an object: live tensors, the rest, and how they are now."""
        others = {id(each) for each in sources_of(batches).values()}
        for key, value in list(vars(source).items()):
            if isinstance(source, DataLoader) and key.startswith("_"):
                continue  # its iterator
            if _is_torchs(source) and key != "generator":
                continue
            with suppress(Exception):  # a class of the user's may raise anywhere
                yield key, *self._found(_place(name, key), value, others)

    def _found(self, place: str, value: Any, others: set[int]) -> _Found:
        items, found = self._lists.get(place, ((), None))
        # The same objects, which never change, are the same list; to write it down takes much longer.
        if (
            found is not None
            and type(value) is list
            and len(value) == len(items)
            and all(map(is_, value, items))
        ):
            return found
        # What leads to another of the objects, such as a loader to its sampler, ends there.
        now = encoded(value, place, left_alone=others, limit="source")
        digest = xxhash.xxh3_128(json.dumps(now.data, sort_keys=True).encode())
        for tensor in now.tensors.values():
            digest.update(repr(given_of(tensor.detach().cpu())).encode())
        found = now, _AttributeThen(digest.hexdigest(), now.objects)
        if type(value) is list and not now.objects and all(map(is_plain_value, value)):
            self._lists[place] = [*value], found
        return found


def sources_of(batches: Any) -> dict[str, Any]:
    """Return a loader, its samplers and its data sets, by name, as far as it has them."""
    names = "sampler", "batch_sampler", "collate_fn"
    found = {"loader": batches} | {name: getattr(batches, name, None) for name in names}
    inner = getattr(found["batch_sampler"], "sampler", None)
    found["inner_sampler"] = None if inner is found["sampler"] else inner
    found |= _data_sets("dataset", getattr(batches, "dataset", None))
    return {name: source for name, source in found.items() if source is not None}


def _data_sets(name: str, data: Any) -> dict[str, Any]:
    """Return a data set, and those that it consists of."""
    found, within = {name: data}, vars(data) if isinstance(data, Dataset) else {}
    inner = [within.get("dataset"), *(each if isinstance(each := within.get("datasets"), list) else [])]
    for number, each in enumerate(inner):
        if isinstance(each, Dataset) and len(name) < _DEEPEST:
            found |= _data_sets(f"{name}_{number}", each)
    return found


#: Of a name of a data set within data sets.
_DEEPEST = 32


def _with_state(batches: Any) -> dict[str, Any]:
    """Return the objects that may carry something."""
    return {
        name: source
        for name, source in sources_of(batches).items()
        # A loader may carry something, too, and has a sampler.
        if hasattr(source, "__dict__") and (hasattr(source, "sampler") or not is_aside(source))
    }


def _is_torchs(source: Any) -> bool:
    """Return whether the class is torch's own: such an object carries a generator alone."""
    return type(source).__module__.startswith("torch.utils.data")


def _place(name: str, key: str) -> str:
    return f"source/{name}/{key}"
