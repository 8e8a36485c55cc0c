"""Where the forward of a model counts its calls.

Each place is made from the module that owns it, and returns a function that increments a count of
calls and returns it.
"""

import array
import contextvars
import ctypes
import decimal
import enum
import functools
import gc
import heapq
import io
import itertools
import linecache
import logging
import os
import queue
import random
import sqlite3
import sys
import threading
import types
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tests.training.by_hand import new_training
from tests.training.python_cases.case import WHEN, Case, Network, Table, moments
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["PLACES", "PLACE_CASES", "Owner", "factor_of"]

PLACES = place = Table()


class Owner(nn.Module):
    """A module that a place belongs to."""

    calls_of_class = 0


# Attributes.


@place
def an_attribute_of_the_module(owner):
    owner.calls = 0

    def count():
        owner.calls += 1
        return owner.calls

    return count


@place
def an_attribute_of_a_submodule(owner):
    owner.child = nn.Identity()
    owner.child.calls = 0

    def count():
        owner.child.calls += 1
        return owner.child.calls

    return count


@place
def an_attribute_of_a_module_in_a_list(owner):
    owner.children_of_mine = [nn.Identity()]
    owner.children_of_mine[0].calls = 0

    def count():
        owner.children_of_mine[0].calls += 1
        return owner.children_of_mine[0].calls

    return count


class Helper:
    def __init__(self):
        self.calls = 0

    def count(self):
        self.calls += 1
        return self.calls


@place
def a_helper_object(owner):
    owner.helper = Helper()
    return owner.helper.count


@dataclass
class Statistics:
    calls: int = 0
    seen: list[int] = field(default_factory=list)


@place
def a_dataclass(owner):
    owner.statistics = Statistics()

    def count():
        owner.statistics.calls += 1
        owner.statistics.seen.append(1)
        return len(owner.statistics.seen)

    return count


class Slots:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


@place
def a_slot(owner):
    return Slots()


Pair = namedtuple("Pair", ["name", "calls"])


@place
def a_named_tuple_that_holds_a_list(owner):
    owner.pair = Pair("calls", [0])

    def count():
        owner.pair.calls[0] += 1
        return owner.pair.calls[0]

    return count


@place
def a_simple_namespace(owner):
    owner.options = types.SimpleNamespace(calls=0)

    def count():
        owner.options.calls += 1
        return owner.options.calls

    return count


class CountsInItsClass:
    calls = 0

    def __call__(self):
        type(self).calls += 1
        return self.calls


@place
def a_class_attribute(owner):
    CountsInItsClass.calls = 0
    return CountsInItsClass()


@place
def a_class_attribute_of_the_module(owner):
    type(owner).calls_of_class = 0

    def count():
        type(owner).calls_of_class += 1
        return owner.calls_of_class

    return count


class CountsInABase(CountsInItsClass):
    def __call__(self):
        CountsInItsClass.calls += 1
        return self.calls


@place
def an_attribute_of_a_base_class(owner):
    CountsInItsClass.calls = 0
    return CountsInABase()


class Metaclass(type):
    calls = 0


class OfAMetaclass(metaclass=Metaclass):
    def __call__(self):
        Metaclass.calls += 1
        return type(self).calls


@place
def an_attribute_of_a_metaclass(owner):
    Metaclass.calls = 0
    return OfAMetaclass()


class State(enum.Enum):
    COUNTED = "counted"


@place
def an_enum_member(owner):
    State.COUNTED.calls = 0

    def count():
        State.COUNTED.calls += 1
        return State.COUNTED.calls

    return count


@place
def an_attribute_of_a_parameter(owner):
    owner.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
    owner.weight.calls = 0

    def count():
        owner.weight.calls += 1
        return owner.weight.calls

    return count


@place
def an_attribute_of_a_function(owner):
    def count():
        count.calls += 1
        return count.calls

    count.calls = 0
    return count


@place
def an_attribute_of_another_module(owner):
    module = types.ModuleType("settings_of_a_user")
    module.calls = 0
    sys.modules["settings_of_a_user"] = module

    def count():
        import settings_of_a_user

        settings_of_a_user.calls += 1
        return settings_of_a_user.calls

    return count


@place
def an_attribute_of_sys(owner):
    sys.calls_of_a_user = 0

    def count():
        sys.calls_of_a_user += 1
        return sys.calls_of_a_user

    return count


@place
def an_extra_state_of_the_module(owner):
    owner.__dict__["_extra"] = {"calls": 0}

    def count():
        vars(owner)["_extra"]["calls"] += 1
        return vars(owner)["_extra"]["calls"]

    return count


# Variables and functions.

CALLS = 0


@place
def a_global(owner):
    global CALLS
    CALLS = 0

    def count():
        global CALLS
        CALLS += 1
        return CALLS

    return count


@place
def a_closure(owner):
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return calls

    return count


@place
def a_default_argument(owner):
    def count(calls=[0]):  # noqa: B006
        calls[0] += 1
        return calls[0]

    count.__defaults__ = ([0],)
    return count


@place
def a_default_keyword(owner):
    def count(*, calls={"all": 0}):  # noqa: B006
        calls["all"] += 1
        return calls["all"]

    count.__kwdefaults__ = {"calls": {"all": 0}}
    return count


@place
def a_tuple_of_defaults(owner):
    def count(calls=0):
        count.__defaults__ = (calls + 1,)
        return calls + 1

    return count


@place
def an_lru_cache(owner):
    @functools.lru_cache(maxsize=1000)
    def cached(key):
        return key

    def count():
        cached(cached.cache_info().currsize)
        return cached.cache_info().currsize

    return count


@place
def the_hits_of_a_cache(owner):
    @functools.cache
    def cached():
        return 1.0

    def count():
        cached()
        return cached.cache_info().hits + 1

    return count


@place
def the_one_call_of_a_cache(owner):
    """The first call makes what all later ones fill."""

    @functools.cache
    def made_once():
        return []

    def count():
        made_once().append(1)
        return len(made_once())

    return count


class WithACachedProperty:
    @functools.cached_property
    def calls(self):
        return [0]

    def __call__(self):
        self.calls[0] += 1
        return self.calls[0]


@place
def a_cached_property(owner):
    return WithACachedProperty()


@place
def a_single_dispatch(owner):
    @functools.singledispatch
    def function(value):
        return value

    def count():
        function.register(type("Other", (), {}), lambda value: value)
        return len(function.registry) - 1

    return count


@place
def a_partial(owner):
    def adding(calls):
        calls.append(1)
        return len(calls)

    return functools.partial(adding, [])


@place
def the_keywords_of_a_partial(owner):
    counting = functools.partial(dict, calls=0)

    def count():
        counting.keywords["calls"] += 1
        return counting()["calls"]

    return count


# Iterators.


@place
def an_itertools_count(owner):
    return functools.partial(next, itertools.count(1))


@place
def an_itertools_cycle(owner):
    owner.numbers = itertools.cycle(range(1, 5001))

    def count():
        return next(owner.numbers)

    return count


@place
def a_generator(owner):
    def numbers():
        calls = 0
        while True:
            calls += 1
            yield calls

    owner.numbers = numbers()
    return lambda: next(owner.numbers)


@place
def a_generator_that_is_sent_to(owner):
    def sums():
        total = 0
        while True:
            total += yield total

    running = sums()
    running.send(None)
    return lambda: running.send(1)


@place
def an_iterator_of_a_list(owner):
    owner.numbers = iter([*range(1, 5001)])
    return lambda: next(owner.numbers)


@place
def a_map(owner):
    owner.numbers = map(abs, range(-1, -5001, -1))
    return lambda: next(owner.numbers)


@place
def a_file_that_is_read(owner):
    lines = io.StringIO("\n".join(map(str, range(1, 5001))))
    return lambda: int(lines.readline())


# Containers.


@place
def a_list(owner):
    owner.calls = []

    def count():
        owner.calls.append(1)
        return len(owner.calls)

    return count


@place
def a_list_that_becomes_shorter(owner):
    owner.left = [*range(5000, 0, -1)]

    def count():
        return owner.left.pop()

    return count


@place
def a_dict(owner):
    owner.calls = {}

    def count():
        owner.calls["all"] = owner.calls.get("all", 0) + 1
        return owner.calls["all"]

    return count


@place
def the_order_of_a_dict(owner):
    owner.order = OrderedDict.fromkeys(range(5000))

    def count():
        first = next(iter(owner.order))
        owner.order.move_to_end(first)
        return first + 1

    return count


@place
def a_set(owner):
    owner.seen = set()

    def count():
        owner.seen.add(len(owner.seen))
        return len(owner.seen)

    return count


@place
def a_default_dict(owner):
    owner.calls = defaultdict(int)

    def count():
        owner.calls["forward"] += 1
        return owner.calls["forward"]

    return count


@place
def what_a_default_dict_makes(owner):
    owner.calls = defaultdict(itertools.count(1).__next__)
    return lambda: owner.calls[object()]


@place
def a_counter(owner):
    owner.calls = Counter()

    def count():
        owner.calls.update(["forward"])
        return owner.calls["forward"]

    return count


@place
def a_chain_of_maps(owner):
    owner.calls = ChainMap({}, {"all": 0})

    def count():
        owner.calls["all"] = owner.calls["all"] + 1
        return owner.calls["all"]

    return count


@place
def a_user_dict(owner):
    owner.calls = UserDict(all=0)

    def count():
        owner.calls["all"] += 1
        return owner.calls["all"]

    return count


@place
def a_queue_of_fixed_length(owner):
    owner.numbers = deque(range(1, 5001), maxlen=5000)

    def count():
        owner.numbers.rotate(-1)
        return owner.numbers[-1]

    return count


@place
def a_heap(owner):
    owner.heap = [*range(1, 5001)]
    return lambda: heapq.heappop(owner.heap)


@place
def a_simple_queue(owner):
    owner.numbers = queue.SimpleQueue()
    for number in range(1, 5001):
        owner.numbers.put(number)
    return lambda: owner.numbers.get_nowait()


@place
def an_array(owner):
    owner.calls = array.array("l", [0])

    def count():
        owner.calls[0] += 1
        return owner.calls[0]

    return count


@place
def bytes_that_change(owner):
    owner.calls = bytearray(1)

    def count():
        owner.calls[0] += 1
        return owner.calls[0]

    return count


@place
def a_memory_view(owner):
    owner.view = memoryview(bytearray(2))[1:]

    def count():
        owner.view[0] += 1
        return owner.view[0]

    return count


@place
def a_text(owner):
    owner.text = ""

    def count():
        owner.text += "."
        return len(owner.text)

    return count


@place
def a_number_of_c(owner):
    owner.calls = ctypes.c_int(0)

    def count():
        owner.calls.value += 1
        return owner.calls.value

    return count


@place
def a_dict_behind_a_proxy(owner):
    calls = {"all": 0}
    owner.calls = types.MappingProxyType(calls)

    def count():
        calls["all"] += 1
        return owner.calls["all"]

    return count


# The process.


@place
def a_buffer_of_text(owner):
    owner.log = io.StringIO()

    def count():
        owner.log.write(".")
        return owner.log.tell()

    return count


@place
def a_file(owner):
    path = Path("calls")
    path.write_text("")

    def count():
        with path.open("a") as file:
            file.write(".")
        return path.stat().st_size

    return count


@place
def the_environment(owner):
    os.environ["CALLS_OF_A_USER"] = "0"

    def count():
        os.environ["CALLS_OF_A_USER"] = str(int(os.environ["CALLS_OF_A_USER"]) + 1)
        return int(os.environ["CALLS_OF_A_USER"])

    return count


@place
def a_context_variable(owner):
    calls = contextvars.ContextVar("calls", default=0)

    def count():
        calls.set(calls.get() + 1)
        return calls.get()

    return count


@place
def a_thread_local(owner):
    local = threading.local()
    local.calls = 0

    def count():
        local.calls += 1
        return local.calls

    return count


@place
def a_weak_dictionary(owner):
    calls = weakref.WeakKeyDictionary({owner: 0})

    def count():
        calls[owner] += 1
        return calls[owner]

    return count


@place
def a_log(owner):
    class Counting(logging.Handler):
        calls = 0

        def emit(self, record):
            self.calls += 1

    logger = logging.getLogger("a user")
    logger.handlers, logger.propagate = [Counting()], False

    def count():
        logger.warning("forward")
        return logger.handlers[0].calls

    return count


@place
def a_decimal_context(owner):
    decimal.getcontext().prec = 28

    def count():
        decimal.getcontext().prec += 1
        return decimal.getcontext().prec - 28

    return count


@place
def the_limit_of_recursion(owner):
    first = 3000
    sys.setrecursionlimit(first)

    def count():
        sys.setrecursionlimit(sys.getrecursionlimit() + 1)
        return sys.getrecursionlimit() - first

    return count


@place
def a_threshold_of_the_garbage_collector(owner):
    gc.set_threshold(700, 10, 1000)

    def count():
        *first, last = gc.get_threshold()
        gc.set_threshold(*first, last + 1)
        return last - 999

    return count


@place
def a_cache_of_lines(owner):
    linecache.cache["a user's file"] = (0, None, [], "")

    def count():
        lines = linecache.cache["a user's file"][2]
        lines.append("forward")
        return len(linecache.getlines("a user's file"))

    return count


@place
def a_database(owner):
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE calls(number INTEGER PRIMARY KEY)")

    def count():
        connection.execute("INSERT INTO calls DEFAULT VALUES")
        return connection.execute("SELECT count(*) FROM calls").fetchone()[0]

    weakref.finalize(count, connection.close)
    return count


@place
def a_lock(owner):
    """A semaphore counts what is left."""
    owner.semaphore = threading.Semaphore(5000)

    def count():
        owner.semaphore.acquire()
        return 5000 - owner.semaphore._value

    return count


class Clock:
    """Time that goes on by a nanosecond at each look."""

    now = 0

    @classmethod
    def perf_counter_ns(cls):
        cls.now += 1
        return cls.now


@place
def a_clock(owner):
    Clock.now = 0
    return Clock.perf_counter_ns


@place
def objects_that_are_freed(owner):
    """Each call makes an object; that it is freed is counted."""
    freed = []

    class Freed:
        def __del__(self):
            freed.append(1)

    def count():
        Freed()
        return len(freed)

    return count


@place
def a_finalizer(owner):
    freed = []

    def count():
        weakref.finalize(Helper(), freed.append, 1)
        return len(freed)

    return count


@place
def subclasses_that_are_made(owner):
    made = []

    class Base:
        def __init_subclass__(cls):
            made.append(cls)

    def count():
        type("Derived", (Base,), {})
        return len(made)

    return count


# Random numbers: not a count of calls, but what changes from call to call.


@place
def a_random_generator(owner):
    owner.random = random.Random(1)
    return lambda: owner.random.randint(1, 90)


@place
def the_random_generator(owner):
    return lambda: random.randint(1, 90)


@place
def a_generator_of_numpy(owner):
    owner.random = np.random.default_rng(2)
    return lambda: int(owner.random.integers(1, 90))


@place
def the_generator_of_numpy(owner):
    return lambda: int(np.random.randint(1, 90))


@place
def a_generator_of_torch(owner):
    owner.random = torch.Generator().manual_seed(1)
    return lambda: int(torch.randint(1, 90, (), generator=owner.random))


@place
def the_generator_of_torch(owner):
    return lambda: int(torch.randint(1, 90, ()))


@place
def the_seed_of_a_generator_of_torch(owner):
    owner.random = torch.Generator().manual_seed(0)

    def count():
        owner.random.manual_seed(owner.random.initial_seed() + 1)
        return owner.random.initial_seed()

    return count


# Tensors that are not parameters or buffers, arrays, and torch's own settings.


@place
def a_tensor(owner):
    owner.calls = torch.zeros(())

    def count():
        owner.calls += 1
        return int(owner.calls)

    return count


@place
def a_tensor_that_is_replaced(owner):
    owner.calls = torch.zeros(())

    def count():
        owner.calls = owner.calls + 1
        return int(owner.calls)

    return count


@place
def a_tensor_in_a_list(owner):
    owner.calls = [torch.zeros((), dtype=torch.int64)]

    def count():
        owner.calls[0].add_(1)
        return owner.calls[0].item()

    return count


TENSOR = torch.zeros(3)


@place
def a_global_tensor(owner):
    TENSOR.zero_()

    def count():
        TENSOR[1] += 1
        return int(TENSOR[1])

    return count


@place
def the_data_of_a_tensor(owner):
    owner.calls = torch.zeros(1)

    def count():
        owner.calls.data = owner.calls.data + 1
        return int(owner.calls)

    return count


@place
def the_size_of_a_tensor(owner):
    owner.calls = torch.zeros(0)

    def count():
        owner.calls.resize_(len(owner.calls) + 1)
        return len(owner.calls)

    return count


@place
def the_version_of_a_tensor(owner):
    owner.calls = torch.zeros(1)

    def count():
        owner.calls.zero_()
        return owner.calls._version

    return count


@place
def a_buffer(owner):
    owner.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def count():
        owner.calls += 1
        return int(owner.calls)

    return count


@place
def an_array_of_numpy(owner):
    owner.calls = np.zeros(1)

    def count():
        owner.calls[0] += 1
        return owner.calls[0]

    return count


@place
def a_tensor_seen_by_numpy(owner):
    owner.tensor = torch.zeros(2)
    owner.array = owner.tensor.numpy()

    def count():
        owner.array[1] += 1
        return float(owner.tensor[1])

    return count


@place
def how_torch_prints(owner):
    torch.set_printoptions(precision=4)

    def count():
        options = torch._tensor_str.PRINT_OPTS
        torch.set_printoptions(precision=options.precision + 1)
        return options.precision - 3

    return count


@place
def the_parametrizations_of_a_module(owner):
    owner.linear = nn.Linear(1, 1)
    parametrize.register_parametrization(owner.linear, "weight", nn.Identity())

    def count():
        owner.linear.parametrizations.weight.append(nn.Identity())
        return len(owner.linear.parametrizations.weight) - 1

    return count


@place
def the_buffers_of_a_module(owner):
    owner.helpers = [nn.Module()]

    def count():
        calls = len(owner.helpers[0]._buffers) + 1
        owner.helpers[0].register_buffer(f"buffer_{calls}", torch.zeros(1))
        return calls

    return count


class Counting(Network):
    """Doubles what it gives where its count says so."""

    calls_of_class = 0

    def forward(self, x):
        h = self.inner(x)
        return 2 * h if self.when(self.count(), self.at) else h


def counting(place, when, at):
    """Return a model that counts its calls at a place."""
    model = Counting()
    model.count, model.when, model.at = place(model), when, at
    return model


def factor_of(place, when, at):
    """Return a function that counts its calls at a place, and gives 2 where the count says so, or 1."""
    count = place(Owner())
    return lambda: 2.0 if when(count(), at) else 1.0


def _cases():
    for (name, place), (when, step) in zip(PLACES.items(), moments(), strict=False):

        def make(at, place=place, when=WHEN[when]):
            return new_training(lambda: counting(place, when, at))

        yield Case(f"counts in {name}, {when} {step}", make, step, program=False)


PLACE_CASES = [*_cases()]
