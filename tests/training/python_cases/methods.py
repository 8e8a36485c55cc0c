"""Special methods of a helper object that a forward calls without saying so.

Each is a function of the helper and of what a network gives; what the method returns follows from a
factor that is 1 or 2, and counts its calls.
"""

import copy
import math
import operator
import pickle
import sys

import numpy as np
import torch
from tests.training.by_hand import new_training
from tests.training.python_cases.case import WHEN, Case, Network, moments
from tests.training.python_cases.places import PLACES, factor_of
from torch import nn

__all__ = ["METHODS", "METHOD_CASES"]

#: Name to: name of the method, what it returns of (factor, its arguments), and who calls it.
METHODS = {}


def method(name, returned):
    """Add a function that makes Python call a method of a helper."""

    def add(use):
        title = use.__name__.replace("_", " ").strip()
        assert title not in METHODS
        METHODS[title] = name, returned, use
        return use

    return add


@method("__call__", lambda f: f())
def a_call(o, h):
    return o() * h


@method("__bool__", lambda f: f() > 1)
def truth(o, h):
    return 2 * h if o else h


@method("__bool__", lambda f: f() > 1)
def truth_of_and(o, h):
    return 2 * h if o and h.ndim == 2 else h


@method("__len__", lambda f: int(f()))
def a_length(o, h):
    return h * len(o)


@method("__len__", lambda f: int(f()) - 1)
def a_length_as_truth(o, h):
    return h if not o else 2 * h


@method("__eq__", lambda f, other: f() > 1)
def equality(o, h):
    return 2 * h if o == "training" else h


@method("__eq__", lambda f, other: f() > 1)
def equality_from_the_right(o, h):
    return 2 * h if "training" == o else h  # noqa: SIM300


@method("__eq__", lambda f, other: f() > 1)
def a_place_in_a_list(o, h):
    return 2 * h if "training" in [o] else h


@method("__eq__", lambda f, other: f() > 1)
def a_count_in_a_tuple(o, h):
    return h * (1 + (o, o).count("training"))


@method("__ne__", lambda f, other: f() > 1)
def inequality(o, h):
    return 2 * h if o != "training" else h


@method("__lt__", lambda f, other: f() > 1)
def an_order(o, h):
    return 2 * h if o < 3 else h


@method("__lt__", lambda f, other: f() > 1)
def the_least(o, h):
    return h if min(3, o) == 3 else 2 * h


@method("__lt__", lambda f, other: f() > 1)
def a_sorted_list(o, h):
    return h if sorted([3, o])[0] == 3 else 2 * h


@method("__hash__", lambda f: int(f()))
def a_hash(o, h):
    return h * hash(o)


@method("__hash__", lambda f: int(f()))
def a_key_of_a_dict(o, h):
    return h * len({1: "one", o: "equal to all"})


@method("__index__", lambda f: int(f()))
def an_index(o, h):
    return h * (0.0, 1.0, 2.0)[o]


@method("__index__", lambda f: int(f()))
def a_range(o, h):
    for _ in range(o):
        h = h * 1.5
    return h


@method("__index__", lambda f: int(f()))
def a_slice(o, h):
    return h * h[:o].shape[0]


@method("__index__", lambda f: int(f()))
def a_row_of_a_tensor(o, h):
    return h + h[o].detach()


@method("__index__", lambda f: int(f()))
def a_size(o, h):
    return h * torch.ones(o).sum()


@method("__index__", lambda f: int(f()))
def operators_index(o, h):
    return h * operator.index(o)


@method("__float__", lambda f: f())
def a_float(o, h):
    return h * float(o)


@method("__float__", lambda f: f())
def a_root(o, h):
    return h * math.sqrt(o)


@method("__int__", lambda f: int(f()))
def an_int(o, h):
    return h * int(o)


@method("__floor__", lambda f: int(f()))
def a_floor(o, h):
    return h * math.floor(o)


@method("__round__", lambda f, digits=None: f())
def a_rounded_number(o, h):
    return h * round(o)


@method("__abs__", lambda f: f())
def an_absolute_value(o, h):
    return h * abs(o)


@method("__neg__", lambda f: f())
def a_negative(o, h):
    return h * -o


@method("__format__", lambda f, spec: str(f()))
def a_format(o, h):
    return h * float(f"{o:>3}")


@method("__format__", lambda f, spec: f"times {f()}")
def a_name_that_is_put_together(o, h):
    return h * {"times 1.0": 1, "times 2.0": 2}[f"{o}"]


@method("__str__", lambda f: str(f()))
def a_text(o, h):
    return h * float(str(o))


@method("__repr__", lambda f: str(f()))
def a_representation(o, h):
    return h * float(f"{o!r}")


@method("__add__", lambda f, other: f() + other)
def a_sum(o, h):
    return o + h


@method("__radd__", lambda f, other: f() + other)
def a_sum_from_the_right(o, h):
    return h + o


@method("__rmul__", lambda f, other: f() * other)
def a_product_from_the_right(o, h):
    return h * o


@method("__mul__", lambda f, other: f() * other)
def a_product(o, h):
    return o * h


@method("__matmul__", lambda f, other: f() * other)
def a_matrix_product(o, h):
    return o @ h


@method("__rtruediv__", lambda f, other: other / f())
def a_quotient(o, h):
    return h / o


@method("__rpow__", lambda f, other: other ** f())
def a_power(o, h):
    return h**o


@method("__iadd__", lambda f, other: f() * other)
def a_sum_in_place(o, h):
    o += h
    return o


@method("__or__", lambda f, other: f() * other)
def a_pipe(o, h):
    return o | h


@method("__contains__", lambda f, key: f() > 1)
def membership(o, h):
    return 2 * h if "scale" in o else h


@method("__getitem__", lambda f, key: f() if key == "scale" else 0.0)
def an_item(o, h):
    return h * o["scale"]


@method("__getitem__", lambda f, key: [f(), 1.0][key])
def an_iteration_by_items(o, h):
    for factor in o:
        h = h * factor
    return h


@method("__iter__", lambda f: iter([f(), 1.0]))
def an_iteration(o, h):
    for factor in o:
        h = h * factor
    return h


@method("__iter__", lambda f: iter([f(), 1.0]))
def an_unpacked_pair(o, h):
    scale, shift = o
    return h * scale + shift


@method("__iter__", lambda f: iter([f(), 1.0]))
def star_arguments(o, h):
    return h * max(*o)


@method("__next__", lambda f: f())
def a_next_one(o, h):
    return h * next(o)


@method("__reversed__", lambda f: [f(), 1.0])
def a_reversed_list(o, h):
    return h * next(iter(reversed(o)))


@method("__getattr__", lambda f, name: f() if name == "scale" else object.__getattribute__(f, name))
def an_absent_attribute(o, h):
    return h * o.scale


@method("__getattribute__", lambda f, name: f() if name == "scale" else None)
def any_attribute(o, h):
    return h * o.scale


@method("__getattribute__", lambda f, name: f() if name == "scale" else None)
def a_computed_attribute(o, h):
    return h * getattr(o, "sc" + "ale", 1.0)


@method("__setattr__", lambda f, name, value: value.append(f()))
def an_attribute_that_is_set(o, h):
    o.scale = factors = []
    return h * factors[0]


@method("__setitem__", lambda f, key, value: value.append(f()))
def an_item_that_is_set(o, h):
    factors = []
    o["scale"] = factors
    return h * factors[0]


@method("__delitem__", lambda f, key: key.append(f()))
def an_item_that_is_deleted(o, h):
    factors = []
    del o[factors]
    return h * factors[0]


@method("__enter__", lambda f: f())
def a_context(o, h):
    type(o).__exit__ = lambda *_: None
    with o as factor:
        return h * factor


@method("__sizeof__", lambda f: int(f()) * 1000)
def the_size_of_an_object(o, h):
    return h * 2 if sys.getsizeof(o) >= 2000 else h


@method("__dir__", lambda f: ["scale"] * int(f()))
def the_names_of_an_object(o, h):
    return h * len(dir(o))


@method("__deepcopy__", lambda f, memo: f())
def a_copy(o, h):
    return h * copy.deepcopy(o)


@method("__reduce_ex__", lambda f, protocol: (float, (f(),)))
def a_pickle(o, h):
    return h * pickle.loads(pickle.dumps(o))


@method("__array__", lambda f, *_, **__: torch.tensor([f()]).numpy())
def an_array(o, h):
    return h * torch.from_numpy(np.asarray(o))


@method("__missing__", lambda f, key: f())
def a_missing_key(o, h):
    kind = type("Defaults", (dict,), {"__missing__": type(o).__missing__})
    return h * kind()["scale"]


@method("__instancecheck__", lambda f, instance: f() > 1)
def a_kind_of_a_class_of_its_own(o, h):
    return 2 * h if isinstance(h, o) else h


@method("__torch_function__", lambda f, function, types, args=(), kwargs=None: f() * args[0])
def an_operand_of_torch(o, h):
    return torch.add(h, o)


@method("__torch_function__", lambda f, function, types, args=(), kwargs=None: f() * args[1])
def an_argument_of_a_functional(o, h):
    return nn.functional.mse_loss(o, h)


class UsingAHelper(Network):
    def forward(self, x):
        return self.use(self.helper, self.inner(x))


def using(method, factor):
    """Return a model of which the forward makes Python call a method of a helper."""
    name, returned, use = method
    model = UsingAHelper()
    of_class = {name: lambda self, *args, **kwargs: returned(factor, *args, **kwargs)}
    if name == "__eq__":
        of_class["__hash__"] = object.__hash__
    if name == "__getitem__":
        of_class["__len__"] = lambda self: 2
    if name == "__torch_function__":
        of_class[name] = classmethod(of_class[name])
    if name == "__hash__":
        of_class["__eq__"] = lambda self, other: True
    model.helper, model.use = type("Helper", (), of_class)(), use
    return model


def _cases():
    place = PLACES["a helper object"]
    for (name, method), (when, step) in zip(METHODS.items(), moments(), strict=False):

        def make(at, method=method, when=WHEN[when]):
            return new_training(lambda: using(method, factor_of(place, when, at)))

        yield Case(f"counts in {method[0]} by {name}, {when} {step}", make, step, program=False)


METHOD_CASES = [*_cases()]
