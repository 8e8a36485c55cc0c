"""The state of parts in addition to named tensors: its snapshot, and how it is restored.

Schedulers, scalers, dicts and other objects are written attribute by attribute, optimizers in torch's
format, and modules by their attributes that changed since the recording began. A state that was restored
is read again, and must be the same: what only the user's code could make again is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from everystep.errors import Fault, RunError, named
from everystep.program.memory import copy_into
from everystep.program.operation import extent_of
from everystep.step.generators import Generators
from everystep.step.gradient_layouts import GradientLayouts, is_of_reducer
from everystep.step.kept_values import (
    Encoded,
    decoded,
    encoded,
    has_graph,
    is_plain_value,
    is_written_alike,
)
from everystep.step.own_state import (
    entries_of,
    keeps_own_state,
    optimizer_settings,
    restore_optimizer,
    state_dict_of,
)
from everystep.step.parts import Parts
from everystep.step.state import OWN, State, copy_of, same_bits

__all__ = ["AtFirst", "PartsState", "Rest"]

#: Names in a message about what cannot be restored.
MOST_NAMED = 5
#: Attributes of every module, which are written in another way, or are hooks.
_OF_MODULES = frozenset(vars(nn.Module()))


#: A module, and its attributes as a training began, by path and name.
AtFirst = tuple[weakref.ref[nn.Module], dict[tuple[str, str], Encoded]]


class Rest(NamedTuple):
    """What parts hold besides their named tensors, and the random generators: copies.

    tensors: in objects, by name; held: the rest, as JSON can hold it.
    """

    tensors: dict[str, Tensor]
    held: dict[str, Any]


class PartsState:
    """Takes snapshots of parts, and restores them.

    parts: as they are when the training begins; before: `at_first` of a recording in this process, which
    these parts continue; layouts: of their gradients, if several processes train; at_first: the modules,
    and copies of their attributes: what differs from these is in a snapshot.
    """

    def __init__(self, parts: Parts, before: Mapping[str, AtFirst] = MappingProxyType({})) -> None:
        self.parts = parts
        self.layouts = GradientLayouts(parts)
        #: The classes of what no state holds, by part; and of the objects that there were at first.
        self.lost: dict[str, set[str]] = {name: set() for name in parts.named}
        self._objects_at_first: dict[str, Mapping[str, str]] = {}
        live = parts.state()
        self.at_first: dict[str, AtFirst] = {}
        for name, module in parts.modules.items():
            known = before.get(name)
            if known is None or known[0]() is not module:
                found = {place: each.copy() for place, each in self._attributes(name, live).items()}
                known = weakref.ref(module), found
            self.at_first[name] = known
        # The same of the shapes of buffers.
        self._buffers_at_first = _buffers(live)

    def rest(self, live: Mapping[str, Tensor] | None = None) -> Rest:
        """Return what the parts hold besides the tensors of a state, and the random generators.

        live: their tensors in a state; None: all.
        """
        parts, live = self.parts, self.parts.state() if live is None else live
        names = parts.parameter_names()
        tensors: dict[str, Tensor] = {}
        held: dict[str, Any] = {}
        others = {id(part) for part in parts.named.values()}
        for name, part in parts.named.items():
            if isinstance(part, nn.Module):
                first, attributes = self.at_first[name][1], dict[str, dict[str, Any]]()
                for (path, attribute), now in self._attributes(name, live).items():
                    known = first.get((path, attribute))
                    if now.objects != (known.objects if known is not None else {}):
                        continue  # only the user's code can make these objects
                    if known is None or not now.is_same(known):
                        attributes.setdefault(path, {})[attribute] = now.data
                        tensors |= now.tensors
                held[name] = {"attributes": attributes}
            elif isinstance(part, torch.optim.Optimizer):
                # In torch's format, too, in which a run shows settings, and a fork changes them.
                found = self._noted(name, encoded(part, name, live, names))
                tensors |= found.tensors
                held[name] = {
                    "optimizer": optimizer_settings(part, names),
                    "own": found.data["object"],
                }
            else:
                # Parts that lie within this one are written under their own names.
                alone = others - {id(part)}
                found = self._noted(name, encoded(part, name, live, names, alone))
                tensors |= found.tensors
                held[name] = {"object": found.data}
        tensors |= _other_gradients(live, parts.leaves().values())
        generators = Generators.capture(parts.device).tensors()
        tensors |= {f"generator/{name}": value for name, value in generators.items()}
        return Rest({name: copy_of(tensor) for name, tensor in tensors.items()}, held)

    def snapshot(
        self, step: int, live: Mapping[str, Tensor] | None = None, rest: Rest | None = None
    ) -> State:
        """Return a copy of everything that the parts hold after `step`, on the CPU.

        `parameters` is exactly the state_dict of the part called `model`, or of the only module; of
        others, each name begins with that of the part.

        Args:
            step: the last one.
            live: their tensors as far as a state has them; None: all.
            rest: what else they held after the step; None: what they hold now.
        """
        parts, live = self.parts, self.parts.state() if live is None else live
        tensors, held = self.rest(live) if rest is None else rest
        parameters = {
            f"{parts.prefix(name)}{path}": copy_of(tensor)
            for name, module in parts.modules.items()
            if name not in parts.apart
            for path, tensor in state_dict_of(module).items()
        }
        # What a state_dict has is kept once; a gradient has the same path as its parameter.
        others = {
            name: copy_of(tensor)
            for name, tensor in live.items()
            if name.partition("/")[2] not in parameters or not name.startswith(("parameter/", "buffer/"))
        }
        # A loop may freeze and unfreeze layers on its way, and a resumed one must train the same.
        frozen = [n for p, n in parts.parameter_names().items() if not p.requires_grad]
        settings = {"step": step, "names": [*live], "held": held, "frozen": frozen}
        settings["shared"] = _shared(live)
        if layouts := self.layouts.now():
            settings["layouts"] = layouts
        first = self._buffers_at_first
        settings["buffers"] = {n: first.get(n) for n, g in _buffers(live).items() if first.get(n) != g}
        return State(step, parameters, others | tensors, settings)

    def check_begins_as(self, state: State, cure: str) -> None:
        """Check that the parts are equal to those of a state, except for numbers.

        cure: how to change it instead.

        Raises:
            RunError: they differ; names where.
        """
        now, then = (each.settings for each in (self.snapshot(state.step), state))
        held = then.get("held", {})
        pairs = {name: (each, held.get(name)) for name, each in now["held"].items()}
        other: list[str] = []
        for name, pair in pairs.items():
            here, there = map(_without_draws, pair)
            if not is_written_alike(here, there):
                # What only one of them has is not named.
                other += dict.fromkeys(_differing(*_compared(here, there), name)) or [name]
        if now["frozen"] != then.get("frozen"):
            other.append("which parameters are trained")
        if other:
            raise RunError(
                f"{named(other, MOST_NAMED)}: other settings than those that the recording began with; "
                f"{cure}"
            )

    def _noted(self, part: str, found: Encoded) -> Encoded:
        """Note what could not be restored: what cannot be written, and objects that came later."""
        first = self._objects_at_first.setdefault(part, found.objects)
        # A resumed loop makes the objects that there were at first, and only its code makes the others.
        later = {path for place, path in found.objects.items() if first.get(place) != path}
        # e.g. "script:Trainer.Meter" -> "Trainer.Meter"
        self.lost[part] |= found.unkept | {path.rpartition(":")[2] for path in later}
        return found

    def restore(self, state: State, only: Collection[str] | None = None) -> None:
        """Bring the parts to a state that was written in this or another process.

        only: some parts, if the state has them, without restoring which parameters are trained, and by
        which group of an optimizer. None: all parts, completely.

        Raises:
            RunError: the state has different parts; lists the differences.
        """
        parts, held = self.parts, state.settings.get("held", {})
        if only is not None and isinstance(held, dict):
            parts = parts.only([name for name in only if name in held])
        elif not isinstance(held, dict) or held.keys() != parts.named.keys():
            known = ", ".join(held) if isinstance(held, dict) else "none"
            raise RunError(
                f"the run was recorded with the parts {known}, not {', '.join(parts.named)}; pass the "
                "same parts under the same names"
            )
        saved = dict(state.rest) | state.named()
        # Files have no fixed order of tensors; an optimizer gets its entries in their original order.
        saved = {name: saved[name] for name in state.settings["names"] if name in saved} | saved
        self._make_buffers(parts, state, saved)
        try:
            # An object may hold a parameter or a buffer, too, and must get the same tensor again.
            of_modules = ("parameter/", "buffer/")
            shared = {n: each for n, each in parts.state().items() if n.startswith(of_modules)}
            for name in parts.named:
                self._restore_part(parts, name, held[name], saved, shared, is_whole=only is None)
        except KeyError as error:
            raise RunError(
                f"the part {name!r} does not fit the snapshot: it lacks {error}; build the parts as "
                f"they were after step {state.step}, with what the training added to them by then"
            ) from None
        except (ValueError, TypeError, AttributeError, StopIteration, ArithmeticError) as error:
            raise RunError(f"the part {name!r} does not fit the snapshot: {error}") from None
        try:
            # Before `_fill`, which would write a tensor into memory that another one no longer shares.
            with torch.no_grad():
                _share(parts.state(), state.settings["shared"])
        except RunError:
            raise
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise RunError(f"the parts do not fit the snapshot: {error}") from None
        _fill(parts, state, saved, is_whole=only is None)
        if only is None:
            frozen = set(state.settings.get("frozen", ()))
            for parameter, name in parts.parameter_names().items():
                if not has_graph(parameter):
                    parameter.requires_grad_(name not in frozen)
        # After all that may run code of the user's, which may draw: the factory of a defaultdict.
        state.generators.restore(parts.device)
        if only is None:
            self._check_restored(state)

    def _make_buffers(self, parts: Parts, state: State, saved: Mapping[str, Tensor]) -> None:
        """Make the buffers that the loop has made or given another shape, if it began as here."""
        live, made = parts.state(), state.settings.get("buffers")
        modules = {
            f"{parts.prefix(part)}{path}".rstrip("."): inner
            for part, module in parts.modules.items()
            for path, inner in module.named_modules()
        }
        for name, first in made.items() if isinstance(made, dict) else ():
            path = name.partition("/")[2]
            place, _, own = path.rpartition(".")
            if first != self._buffers_at_first.get(name) or name not in saved:
                continue  # `_fill` names it
            if name in live:  # the same tensor with another shape, since other code may hold it
                live[name].data = saved[name].to(live[name].device, copy=True)
            elif place in modules:
                value, is_in = saved[name].to(parts.device, copy=True), path in state.parameters
                # Such as a number that the first step makes a buffer of.
                vars(modules[place]).pop(own, None)
                with suppress(KeyError):  # its class has an attribute of that name
                    nn.Module.register_buffer(modules[place], own, value, persistent=is_in)

    def _restore_part(
        self,
        parts: Parts,
        name: str,
        held: Mapping[str, Any],
        saved: Mapping[str, Tensor],
        shared: dict[str, Tensor],
        *,
        is_whole: bool,
    ) -> None:
        part, names = parts.named[name], parts.parameter_names()
        if isinstance(part, nn.Module):
            self._restore_attributes(name, held["attributes"], saved, shared)
        elif isinstance(part, torch.optim.Optimizer):
            own_class, known = type(part).__qualname__, held["optimizer"]["class"]
            if own_class != known:
                raise ValueError(f"it is {own_class}, but the snapshot has {known}")
            # A state that programs have made has none of them.
            if "own" in held and (is_whole or _keeps_more(part)):
                # All its attributes, its param groups and its state among them.
                decoded(part, name, saved, {"object": held["own"]}, names)
                return
            own = "" if len(parts.optimizers) == 1 else f"{name}."
            in_it = {p: names[p] for group in part.param_groups for p in group["params"]}
            restore_optimizer(part, in_it, held["optimizer"], saved, f"optimizer/{own}")
        elif isinstance(part, Tensor):
            pass  # `_fill` does
        else:
            decoded(part, name, saved, held["object"], names, shared)

    def _restore_attributes(
        self,
        part: str,
        later: Mapping[str, Mapping[str, Any]],
        saved: Mapping[str, Tensor],
        shared: dict[str, Tensor],
    ) -> None:
        """Set the attributes of a module; those that are not in a snapshot are as at first."""
        modules, names = dict(self.parts.modules[part].named_modules()), self.parts.parameter_names()
        now, first = self._attributes(part, shared), self.at_first[part][1]
        wanted = {(path, n): Encoded(data) for path in later for n, data in later[path].items()}
        for (path, attribute), each in (first | wanted).items():
            known = now.get((path, attribute))
            # What was an attribute at first may be a buffer by now, which hides behind one.
            if (path, attribute) not in wanted and attribute in modules[path]._buffers:
                continue
            if each.objects and (known is None or known.objects != each.objects):
                continue
            if (path, attribute) in wanted or known is None or not known.is_same(each):
                there, place = vars(modules[path]).get(attribute), _place(part, path, attribute)
                value = decoded(there, place, {**saved, **each.tensors}, each.data, names, shared)
                # Not by `setattr`: that of a module registers tensors, and a user's may do anything.
                object.__setattr__(modules[path], attribute, value)

    def _attributes(self, part: str, live: Mapping[str, Tensor]) -> dict[tuple[str, str], Encoded]:
        """Return the attributes of a module and of all within it, by path and name."""
        found, names, seen = {}, self.parts.parameter_names(), set[int]()
        parts = {id(each) for each in self.parts.named.values()}
        for path, inner in self.parts.modules[part].named_modules():
            for name, value in vars(inner).items():
                if is_of_reducer(inner, name):
                    continue
                if is_plain_value(value):
                    found[path, name] = Encoded(value)
                # An object that several modules have, such as a configuration, is found once.
                elif name not in _OF_MODULES and id(value) not in seen:
                    place = _place(part, path, name)
                    each = encoded(value, place, live, names, parts, "attribute")
                    # What is large may be a trainer, or the data; the rest is kept as a whole, or named.
                    if not each.is_large:
                        self.lost[part] |= each.unkept
                    is_left = "left" in each.data and "text" not in each.data
                    if not (each.is_large or each.unkept or is_left):
                        found[path, name] = each
                        seen |= {id(value)} if each.objects else set()
        return found

    def _check_restored(self, state: State) -> None:
        """Check that the parts hold what a state has, as it is read from them.

        Raises:
            RunError: they do not; names what differs.
        """
        now, held = self.rest(), state.settings["held"]
        other = {
            name
            for name, tensor in now.tensors.items()
            if name.startswith(OWN) and name in state.rest and not same_bits(tensor, state.rest[name])
        }
        faults = {name.removeprefix(OWN) for name in other}
        for name in self.parts.named:
            if name not in self.parts.modules:
                faults |= {*_differing(*_compared(now.held[name], held[name]), name)}
                continue
            attributes = self._attributes(name, self.parts.state())
            for path, each in held[name]["attributes"].items():
                for attribute, data in each.items():
                    known = attributes.get((path, attribute))
                    if known is not None:
                        faults |= {*_differing(known.data, data, _place(name, path, attribute))}
        if faults:
            raise RunError(
                f"{', '.join(sorted(faults)[:MOST_NAMED])}: cannot be made again as after step "
                f"{state.step:,}; keep numbers, texts, tensors and arrays, in dicts and lists that "
                "share nothing, and pass modules and optimizers as parts of their own; or let your code "
                "make it before everystep.record, such as by a forward pass"
            )


def _keeps_more(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether steps may use more of it than settings, and tensors and numbers by parameter."""
    # Such as LBFGS, which keeps lists of tensors.
    entries = (value for _, each in entries_of(optimizer) for value in each.values())
    is_usual = all(isinstance(value, Tensor | bool | int | float | str | None) for value in entries)
    return not is_usual or keeps_own_state(optimizer)


def _place(part: str, path: str, attribute: str) -> str:
    return ".".join(each for each in (part, path, attribute) if each)


def _compared(now: Any, saved: Any) -> tuple[Any, Any]:
    """Return what shows by name where a part differs from a saved one. Each: as it is held."""
    if not (now and saved):
        return now, saved
    if "object" in saved:
        return now.get("object"), saved["object"]
    # All attributes of an optimizer have what it has in torch's format, too.
    return now, {kind: each for kind, each in saved.items() if kind != "optimizer" or "own" not in saved}


def _differing(now: Any, saved: Any, place: str) -> Iterator[str]:
    """Yield where values differ, as JSON can hold them."""
    if isinstance(now, dict) and isinstance(saved, dict):
        # A run may be resumed on another device.
        for key, value in ((key, each) for key, each in saved.items() if key != "on_device"):
            here, there = (_by_name(key, each) for each in (now.get(key), value))
            if here is None or there is None or (key == "dict" and [*here] != [*there]):
                yield from _differing(now.get(key), value, place)
            else:
                for name, each in there.items():
                    yield from _differing(here.get(name), each, f"{place}.{name}")
    elif isinstance(now, list) and isinstance(saved, list) and len(now) == len(saved):
        for one, two in zip(now, saved, strict=True):
            yield from _differing(one, two, place)
    elif not is_written_alike(now, saved):
        yield place


def _by_name(key: str, content: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, or the values of a dict, by name; None of all else."""
    # e.g. [["lr", 0.1], [{"tuple": [1, 2]}, 5]] -> {"lr": 0.1, "[1, 2]": 5}
    if key == "dict" and isinstance(content, list):
        return {str(*k.values() if isinstance(k, dict) else [k]): each for k, each in content}
    return content if key in ("object", "attributes", "own") and isinstance(content, dict) else None


def _fill(parts: Parts, state: State, saved: Mapping[str, Tensor], *, is_whole: bool) -> None:
    """Write the saved values into the tensors of parts, and set pending gradients.

    is_whole: whether the state is of these parts alone.

    Raises:
        RunError: tensors are missing, or have another shape.
    """
    for parameter, name in parts.parameter_names().items():
        other = _other_gradient(f"parameter/{name}", parameter, saved)
        _set_gradient(parameter, saved.get(f"gradient/{name}", other))
    live, leaves, faults = parts.state(), parts.leaves(), []
    known = [name for name in state.settings["names"] if is_whole or name in live]
    for name in known:
        if name.startswith("gradient/"):
            continue
        tensor, value = live.get(name), saved.get(name)
        path = name.partition("/")[2]
        if value is None or tensor is None:
            faults.append(Fault(path, "is in the snapshot, but not in the parts"))
        elif tensor.shape != value.shape or tensor.dtype != value.dtype:
            faults.append(Fault(path, f"is {_geometry(tensor)}, but {_geometry(value)} was recorded"))
        else:
            with torch.no_grad():
                copy_into(tensor, value)
            if not name.startswith("parameter/") and not has_graph(tensor):
                own = saved.get(f"gradient/{path}") if leaves.get(path) is tensor else None
                _set_gradient(tensor, _other_gradient(name, tensor, saved) if own is None else own)
    faults += [
        Fault(name.partition("/")[2], "is in the parts, but not in the snapshot")
        for name in live.keys() - set(known)
        if not name.startswith("gradient/")
    ]
    if faults:
        raise RunError(faults, f"the parts, which must be as they were after step {state.step}")


def _buffers(live: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: _geometry(each) for name, each in live.items() if name.startswith("buffer/")}


def _shared(live: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return which tensors of a state lie on the memory of another one: its name, and where.

    That is the one that reaches over most of this memory. The place is in bytes, from where it begins.
    """
    # e.g. {"part/state.row": ("buffer/table", 24, (1,))}
    on: dict[int, list[str]] = {}
    for name, tensor in live.items():
        if tensor.numel() and not name.startswith("gradient/"):
            on.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    found = {}
    for names in chain.from_iterable(_overlapping(live, each) for each in on.values()):
        # An expanded tensor has more numbers than its memory, and one that is made again must have all.
        largest = max(names, key=lambda name: (_reach(live[name]), -live[name].numel()))
        for name in names:
            if live[name] is not live[largest]:
                place = live[name].data_ptr() - live[largest].data_ptr()
                found[name] = [largest, place, [*live[name].stride()]]
    return found


def _overlapping(live: Mapping[str, Tensor], names: list[str]) -> list[list[str]]:
    """Return tensors of the same memory, apart where no other one reaches."""
    # Rows of a batch are tensors of their own, and so are numbers of all parameters that an optimizer
    # has computed together, and parameters that were set from one vector.
    found, end = list[list[str]](), 0
    for name in sorted(names, key=lambda name: live[name].data_ptr()):
        tensor, begin = live[name], live[name].data_ptr()
        if begin >= end:
            found.append([])
        found[-1].append(name)
        end = max(end, begin + _reach(tensor))
    return found


def _reach(tensor: Tensor) -> int:
    """Return the bytes from the first number of a tensor to the end of its last."""
    return extent_of((tensor.dtype, tensor.shape, tensor.stride(), 0))[1]


def _share(live: Mapping[str, Tensor], shared: Mapping[str, Any]) -> None:
    """Let tensors share memory as `_shared` has found it; the loop may have made them on its way.

    Raises:
        RunError: the tensor that held the memory of another one is too small for it.
    """
    # First apart, then together: a tensor may have moved from one memory to another.
    for name, place in _shared(live).items():
        if shared.get(name) != place:
            live[name].set_(live[name].clone())  # type: ignore[call-overload]
    for name, (largest, place, stride) in shared.items():
        tensor, whole = live.get(name), live.get(largest)
        # The user's code has made most of them where they were, and other code may hold them.
        if tensor is None or whole is None or tensor.data_ptr() - whole.data_ptr() == place:
            continue
        begin = place + whole.storage_offset() * whole.itemsize
        geometry = tensor.dtype, (*tensor.shape,), (*stride,), begin // tensor.itemsize
        is_whole = begin >= 0 and begin % tensor.itemsize == 0
        if not is_whole or extent_of(geometry)[1] > whole.untyped_storage().nbytes():
            names = [each.partition("/")[2] for each in (name, largest)]
            raise RunError(
                f"{' and '.join(names)} are views of the same memory, which cannot be made again; keep "
                "the tensor that has all of it in a part"
            )
        tensor.set_(whole.untyped_storage(), geometry[3], *geometry[1:3])


def _other_gradients(live: Mapping[str, Tensor], leaves: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the pending gradients for which the tensors of a state have no names, by name.

    They are sparse, or those of tensors that are not `leaves`, as `Parts` has them.
    """
    held = {id(t) for name, t in live.items() if name.startswith("gradient/")}
    # The state has their dense gradients, or the next step drops them.
    named = {id(leaf) for leaf in leaves}
    found: dict[str, Tensor] = {}
    for name, tensor in live.items():
        gradient = None if has_graph(tensor) or id(tensor) in held else tensor.grad
        place = f"{OWN}gradient/{name}"
        if gradient is None or id(gradient) in held:
            continue
        if gradient.layout is torch.sparse_coo:
            is_coalesced = torch.tensor(gradient.is_coalesced())
            found |= {place: gradient._values(), f"{place} at": gradient._indices()}
            found[f"{place} is coalesced"] = is_coalesced
        elif gradient.layout is torch.strided and id(tensor) not in named:
            found[place] = gradient
    return found


def _other_gradient(name: str, tensor: Tensor, saved: Mapping[str, Tensor]) -> Tensor | None:
    """Return the gradient that `_other_gradients` has found of a tensor, None if there was none."""
    place = f"{OWN}gradient/{name}"
    indices, values = saved.get(f"{place} at"), saved.get(place)
    if indices is None or values is None:
        return values
    is_coalesced = bool(saved[f"{place} is coalesced"])
    with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
        return torch.sparse_coo_tensor(indices, values, tensor.shape, is_coalesced=is_coalesced)


def _set_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
    there = tensor.grad
    if there is gradient is None:
        return
    is_dense = there is not None and there.layout is torch.strided
    if there is None or gradient is None or not is_dense or there.dtype is not gradient.dtype:
        tensor.grad = None if gradient is None else gradient.to(tensor.device, copy=True)
    else:  # in its memory, which may be a part of one buffer for all gradients
        with torch.no_grad():
            copy_into(there, gradient)


def _without_draws(node: Any) -> Any:
    """Return a written value without the states of generators, which are numbers of a snapshot."""
    if isinstance(node, dict):
        is_generator = node.keys() == {"random"}
        return {key: None if is_generator else _without_draws(each) for key, each in node.items()}
    return [_without_draws(each) for each in node] if isinstance(node, list) else node


def _geometry(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
