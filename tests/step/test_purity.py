"""The reader: what it proves, what it refuses and why, and that it runs nothing of the user's."""

import dataclasses
import functools
import math
from collections import namedtuple

import pytest
import torch
from torch import nn

from everystep.step.purity.attributes import NotProvenError
from everystep.step.purity.guards import Guards
from everystep.step.purity.reader import Reader

RAN = []


def ran(*_):
    RAN.append(1)
    raise AssertionError("the reader ran code of the user's")


def read(function, *args):
    """Read a call; return its value and the guards."""
    guards = Guards()
    return Reader(guards, lambda tensor: False).call(function, *args), guards


def refused(function, *args):
    with pytest.raises(NotProvenError) as refusal:
        read(function, *args)
    return str(refusal.value)


# Traps: each runs code of the user's where Python would. The reader must refuse, and not run it.


class Meta(type):
    __instancecheck__ = __getattribute__ = __call__ = __len__ = ran


class Descriptor:
    __get__ = ran


class Settable:
    __get__ = __set__ = ran


class Trap:
    __getattribute__ = __eq__ = __hash__ = __bool__ = __len__ = __iter__ = __repr__ = __str__ = ran
    __add__ = __radd__ = __matmul__ = __getitem__ = __contains__ = __index__ = __float__ = ran
    __format__ = __lt__ = __neg__ = __call__ = __enter__ = __del__ = ran
    __torch_function__ = classmethod(ran)


class Fallback:
    __getattr__ = ran


class LiesAboutItsClass:
    __class__ = property(ran)


class WithDescriptors:
    plain, settable = Descriptor(), Settable()
    __dict__ = property(ran)


class Lookup(dict):
    __getitem__ = __missing__ = __iter__ = __len__ = keys = items = ran


class OfItsOwnKind(torch.Tensor):
    __torch_function__ = classmethod(ran)


class Named(metaclass=Meta):
    value = 1


TRAP, DESCRIPTORS = object.__new__(Trap), object.__new__(WithDescriptors)
FALLBACK, LIES, LOOKUP = Fallback(), LiesAboutItsClass(), Lookup(a=1)
OWN_KIND = torch.ones(2).as_subclass(OfItsOwnKind)

TRAPS = {
    "getattribute": lambda x, t=TRAP: t.value,
    "eq": lambda x, t=TRAP: t == 1,
    "in": lambda x, t=TRAP: t in [1, 2],
    "in itself": lambda x, t=TRAP: 1 in t,
    "key": lambda x, t=TRAP: {1: 2}[t],
    "dict key": lambda x, t=TRAP: {t: 2},
    "bool": lambda x, t=TRAP: x if t else 2 * x,
    "not": lambda x, t=TRAP: not t,
    "len": lambda x, t=TRAP: len(t),
    "iter": lambda x, t=TRAP: [i + 1 for i in t],
    "unpack": lambda x, t=TRAP: [*t],
    "add": lambda x, t=TRAP: x + t,
    "add to": lambda x, t=TRAP: t + x,
    "matmul": lambda x, t=TRAP: t @ x,
    "negate": lambda x, t=TRAP: -t,
    "less": lambda x, t=TRAP: t < 1,
    "item": lambda x, t=TRAP: t[0],
    "index": lambda x, t=TRAP: [1, 2][t],
    "float": lambda x, t=TRAP: float(t),
    "text": lambda x, t=TRAP: f"{t}",
    "str": lambda x, t=TRAP: str(t),
    "call": lambda x, t=TRAP: t(x),
    "argument": lambda x, t=TRAP: torch.relu(t),
    "nested argument": lambda x, t=TRAP: torch.stack([x, t]),
    "keyword": lambda x, t=TRAP: torch.sum(x, dim=t),
    "isinstance": lambda x, t=TRAP: isinstance(t, int),
    "isinstance of": lambda x: isinstance(x, Named),
    "metaclass": lambda x: Named.value,
    "make": lambda x: Named(),
    "getattr": lambda x, t=FALLBACK: t.value,
    "hasattr": lambda x, t=FALLBACK: hasattr(t, "value"),
    "class": lambda x, t=LIES: t.__class__,
    "is of": lambda x, t=LIES: isinstance(t, int),
    "descriptor": lambda x, t=DESCRIPTORS: t.plain,
    "data descriptor": lambda x, t=DESCRIPTORS: t.settable,
    "dict": lambda x, t=DESCRIPTORS: t.other,
    "mapping": lambda x, t=LOOKUP: t["a"],
    "mapping keys": lambda x, t=LOOKUP: dict(**t),
    "tensor of its own kind": lambda x, t=OWN_KIND: t + x,
    "with": lambda x, t=TRAP: with_(t, x),
    "max": lambda x, t=TRAP: max(1, t),
    "sorted": lambda x: sorted([2, 1], key=ran),
    "map": lambda x, t=TRAP: list(map(t, [x])),
    "sum": lambda x, t=TRAP: sum([t]),
    "range": lambda x, t=TRAP: range(t),
}


def with_(context, x):
    with context:
        return x


@pytest.mark.parametrize("kind", TRAPS)
def test_it_runs_nothing_of_the_users(kind):
    RAN.clear()
    refused(TRAPS[kind], torch.ones(2))
    assert not RAN


# What is read like Python.


@dataclasses.dataclass
class Config:
    width: int = 3
    scale: float = 0.5

    @property
    def area(self):
        return self.width * self.width

    @staticmethod
    def twice(x):
        return 2 * x

    @classmethod
    def named(cls):
        return cls.__name__


Pair = namedtuple("Pair", ["one", "two"])
CONFIG = Config()


def ordinary(x, *rest, factor=2.0, **named):
    """Many things that people write."""
    h, (a, *b) = x, [1, 2, 3]
    for index, (one, two) in enumerate(zip([1, 2], (3, 4), strict=True)):
        h = h + index * one - two
    while a < 5:
        a += 1
        if a == 4:
            continue
    total = sum(i * i for i in range(4) if i % 2)
    layers = {f"layer{i}": i for i in reversed(range(2))}
    h = h * factor if named.get("missing") is None else h
    h += len(layers) + layers["layer1"] + max(b) + math.sqrt(16) + total

    def inner(value, power=2):
        return value**power + a

    pair = Pair(inner(h), two=(lambda v, *, by=3: v / by)(h))
    parts = torch.cat([pair.one, pair[1]]).chunk(2)
    first, second = parts
    result = [first[:1], second[..., -1:]][::-1]
    return torch.stack(result).sum() * CONFIG.scale + CONFIG.area + Config.twice(x).mean()


def test_it_computes_what_python_computes():
    x = torch.tensor([1.5, -2.0])
    assert torch.equal(read(ordinary, x)[0], ordinary(x))
    partial = functools.partial(ordinary, factor=-1.0)
    assert torch.equal(read(partial, x)[0], partial(x))


class Block(nn.Module):
    width = 4

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.sizes, self.act = [1, 2], torch.tanh
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x):
        for layer in self.layers[:2]:
            x = self.act(layer(x)) + self.sizes[1]
        penalty = sum(p.square().sum() for p in self.parameters())
        return self.norm(self.layers[-1](x) * self.mask) * self.width + penalty


class Wider(Block):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


#: What may be changed of the module, and a part of what is then said.
CHANGES = {
    "a list": (lambda m: m.sizes.append(3), "a list changes"),
    "an item": (lambda m: m.sizes.__setitem__(1, 5), "a list changes"),
    "a function": (lambda m: setattr(m, "act", torch.sigmoid), "act of a Wider"),
    "the mode": (lambda m: m.eval(), "training of a Wider"),
    "a class attribute": (lambda m: setattr(Wider, "width", 5), "width of the class Wider"),
    "a base's attribute": (lambda m: setattr(Block, "width", 5), "width of the class Block"),
    "a method": (lambda m: setattr(m, "forward", ran), "forward of a Wider"),
    "a layer": (lambda m: m.layers.__setitem__(0, nn.Linear(4, 4)), "_modules of"),
    "a setting": (lambda m: setattr(m.norm, "eps", 0.1), "eps of"),
    "a buffer": (lambda m: setattr(m, "mask", torch.zeros(4)), "mask of _buffers"),
    "a dtype": (lambda m: m.double(), "change"),
    "what is learned": (lambda m: m.layers[0].weight.requires_grad_(False), "requires_grad"),
    "a hook": (lambda m: m.layers[0].register_forward_hook(ran), "module 0"),
    "a class": (lambda m: setattr(m, "__class__", Block), "the class of a"),
}


@pytest.fixture
def classes_as_they_were():
    yield
    Block.width = 4
    if "width" in vars(Wider):
        del Wider.width


@pytest.mark.usefixtures("classes_as_they_were")
@pytest.mark.parametrize("change", CHANGES)
def test_a_guard_fails_where_what_was_read_changes(change):
    torch.manual_seed(0)
    module, x = Wider(), torch.randn(2, 4)
    value, guards = read(module, x)
    assert torch.equal(value, module(x))
    assert guards.difference() is None
    module.unread = 1
    module.layers[0].weight.data.mul_(2.0)
    CHANGES[change][0](module)
    assert guards.difference() is not None


@pytest.mark.parametrize(
    ("one", "two"),
    [(1, True), (1, 1.0), (0.0, -0.0), ("a", "b"), (torch.float32, torch.float64), ((1, 2), (1, 3))],
)
def test_a_setting_that_only_looks_the_same_is_another(one, two):
    config = Config(width=one)
    _, guards = read(lambda x: x * 1 if config.width else x, torch.ones(2))
    config.width = two
    assert guards.difference() is not None
    config.width = one
    assert guards.difference() is None
