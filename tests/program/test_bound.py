"""A program that is bound to memory: the bits of Python's step, and nothing made on the way."""

import gc
import tracemalloc

import pytest
import torch
from torch import nn

from everystep.program.bound import BoundProgram
from everystep.program.calls import without_autograd
from everystep.program.interpreter import Interpreter

CPU = torch.device("cpu")


class Bound:
    """A program on a copy of the state of a training, with the numbers and the batch of its step."""

    def __init__(self, training, last, program=None):
        self.program = program or last.built.program
        self.numbers = last.numbers
        named = training.named_state()
        self.state = {name: named[name].detach().clone() for name in self.program.state_names}
        Interpreter(self.program, CPU).lay_state(self.state)
        self.batch = dict(zip("xy", training.batch(1), strict=True))
        inputs = {name.removeprefix("input/"): each for name, each in last.inputs.items()}
        self.live = BoundProgram(self.program, self.state, inputs, self.batch, CPU)
        self.live.load(self.batch)

    def losses(self, steps):
        with without_autograd():
            return [self.live.take(self.numbers)["loss"].item() for _ in range(steps)]


@pytest.fixture
def training(small, make_trainee):
    return make_trainee(*small)


@pytest.fixture
def bind(step_of):
    return lambda training: Bound(training, step_of(training))


def test_temporary_memory_is_shared_by_those_that_follow_each_other(make_trainee, bind):
    layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.Tanh())]
    training = make_trainee(nn.Sequential(*layers), torch.randn(256, 64), torch.randn(256, 64))
    bound = bind(training)
    sizes = [each.bytes for each in bound.program.storages.values() if each.kind == "temporary"]
    assert bound.live.temporary_bytes < 0.7 * sum(sizes)


def test_a_step_makes_no_object(training, bind):
    bound = bind(training)
    bound.losses(10)
    with without_autograd():
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(10):
                bound.live.run()
            before = tracemalloc.take_snapshot()
            for _ in range(1000):
                bound.live.run()
            after = tracemalloc.take_snapshot()
        finally:
            tracemalloc.stop()
            gc.enable()
    grown = [each for each in after.compare_to(before, "lineno") if each.count_diff > 0]
    assert not [each for each in grown if "everystep/program" in str(each.traceback)]


def test_a_small_network_asks_for_memory_of_its_numbers_alone(chapter, make_trainee, bind):
    bound = bind(make_trainee(*chapter))
    bound.losses(10)
    with without_autograd(), torch.profiler.profile(profile_memory=True) as profile:
        bound.live.run()
    asked = {event.key: event.self_cpu_memory_usage for event in profile.key_averages()}
    # For each parameter, torch makes a tensor of the learning rate.
    assert sum(abs(size) for size in asked.values()) <= 2 * 4 * 4, asked
