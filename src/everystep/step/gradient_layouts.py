"""How DistributedDataParallel lays out the gradients that processes add, which is a part of the state.

After its first steps, it lays them out again, in the order in which they were ready. Of three numbers or
more, gloo adds other ones first where they lie in another place.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from everystep.step.parts import Parts
from everystep.step.state import State

__all__ = ["GradientLayouts", "is_of_reducer"]

#: The names of the parameters in each bucket: [] before any was used, None before they are final.
Layout: TypeAlias = list[list[str]] | None


class GradientLayouts:
    """The layouts of the gradients of parts. parts: as they are when the training begins."""

    def __init__(self, parts: Parts) -> None:
        names, found = parts.parameter_names(), []
        is_alone = not (distributed.is_available() and distributed.is_initialized())
        for each in () if is_alone else _all_modules():
            found += [(names[p], each) for p in each.parameters() if p in names][:1]
        self._modules = [module for _, module in sorted(found, key=lambda pair: pair[0])]
        self._known: WeakKeyDictionary[Any, Layout] = WeakKeyDictionary()

    def now(self) -> list[Layout]:
        """Return the layout of each module, in the order of the names of their first parameters."""
        return [self._of(module) for module in self._modules]

    def _of(self, module: DistributedDataParallel) -> Layout:
        reducer = getattr(module, "reducer", None)
        if reducer is None or not (module._has_rebuilt_buckets or _keeps_first(module)):
            return None if reducer is not None and module._lazy_init_ran else []
        if reducer not in self._known:
            names = {parameter: name for name, parameter in module.named_parameters()}
            buckets = reducer._get_zeros_like_grad_buckets()
            self._known[reducer] = [[names.get(p, "") for p in each.parameters()] for each in buckets]
        return self._known[reducer]

    def restore(self, state: State, is_same: Callable[[bool], bool]) -> bool:
        """Lay out the gradients as in a state; return whether all ranks then add them as before.

        is_same: returns whether all ranks have the same value.
        """
        now = self.now()
        # A training begins with those that its code makes.
        wanted = state.settings.get("layouts", [] if state.step else now)
        is_known = isinstance(wanted, list) and len(wanted) == len(now)
        each = zip(self._modules, wanted, now, strict=True) if is_known else ()
        orders = [(module, _order(module, layout)) for module, layout, own in each if layout != own]
        fits = is_known and all(order for _, order in orders)
        # A broadcast tells the layout to all ranks, so none of them may lack it.
        if not (is_same(fits) and fits):
            return False
        for module, order in orders:
            _lay_out(module, order)
        # Where it is not final, a new module is at another place on the way to it.
        is_exact = self.now() == wanted and not (state.step and None in wanted)
        return is_same(is_exact) and is_exact


def is_of_reducer(module: object, attribute: str) -> bool:
    """Return whether an attribute tells what the reducer of this process has done, which is new."""
    return isinstance(module, DistributedDataParallel) and attribute.startswith("_")


def _all_modules() -> list[DistributedDataParallel]:
    """Return all that are in the process."""
    # torch does not tell which module adds the gradients of a parameter, and Lightning and Trainer do
    # not make it a part. A list of all objects would stop other threads from making tuples.
    kinds: list[type] = [DistributedDataParallel]
    for kind in kinds:
        kinds += type.__subclasses__(kind)
    return [each for each in gc.get_referrers(*kinds) if type(each) in kinds]


def _keeps_first(module: DistributedDataParallel) -> bool:
    """Return whether a module keeps the layout that it was made with."""
    return module.find_unused_parameters and not module.static_graph


def _order(module: Any, layout: Layout) -> list[tuple[Tensor, bool]]:
    """Return parameters in the order of a layout, and whether their gradients are sparse.

    [] if the module cannot have that layout.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = {
        names[p]: (p, is_sparse)
        for p, is_sparse in zip(*module._build_params_for_reducer(), strict=True)
    }
    wanted = [*chain(*layout or ())]
    fits = sorted(wanted) == sorted(own) and not (_keeps_first(module) or module._use_python_reducer)
    return [own[name] for name in wanted] if fits else []


def _lay_out(module: Any, order: list[tuple[Tensor, bool]]) -> None:
    """Make the reducer of a module again, as torch does for a pickled one, with its final layout."""
    # It lays out gradients in the order in which they were ready, or in that of its parameters.
    parameters, are_sparse = zip(*order, strict=True)
    names = module._build_debug_param_to_name_mapping(parameters)
    module.reducer._remove_autograd_hooks()
    module._ddp_init_helper(parameters, are_sparse, names, module.static_graph)
    if module.static_graph:
        module.reducer._set_static_graph()
        module.logger._set_static_graph()
    module.reducer._push_all_rebuilt_params()
    module._has_rebuilt_buckets = module.reducer._rebuild_buckets()
