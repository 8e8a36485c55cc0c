"""A program that is bound to memory: the bits of Python's step, and nothing made on the way."""

import gc
import tracemalloc

import pytest
import torch
from torch import nn

from everystep.errors import ProgramError
from everystep.program.bound import BoundProgram
from everystep.program.calls import without_autograd
from everystep.program.interpreter import Interpreter
from everystep.program.program import Program
from everystep.step.check import same_bits
from everystep.step.eager import EagerStep

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


def test_it_continues_with_the_bits_of_python(training, bind):
    bound = bind(training)
    losses = bound.losses(20)
    eager = EagerStep(training)
    assert losses == [eager.take(*training.batch(1)).item() for _ in range(20)]
    state = training.named_state()
    assert all(same_bits(tensor, state[name]) for name, tensor in bound.state.items())


def test_a_state_of_other_strides_is_laid_out_as_the_program_has_it(make_trainee, bind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    training = make_trainee(model, x, torch.randn(2, 2))
    bound = bind(training)
    eager = EagerStep(training)
    assert bound.losses(3) == [eager.take(*training.batch(1)).item() for _ in range(3)]


def test_read_from_json_it_is_the_same(training, step_of):
    last = step_of(training)
    again = Program.from_json(last.built.program.to_json())
    one, other = Bound(training, last), Bound(training, last, again)
    assert one.losses(5) == other.losses(5)
    assert all(same_bits(tensor, other.state[name]) for name, tensor in one.state.items())


def test_observed_it_is_the_same_step(training, step_of):
    last = step_of(training)
    one, other = Bound(training, last), Bound(training, last)
    tanh = next(i for i, each in enumerate(other.program.operations) if each.name == "tanh")
    seen = []
    look = {-1: [lambda: seen.append("first")]}
    look[tanh] = [lambda: seen.append(other.live.tensor("tanh").clone())]
    calls = other.live.calls_with(look)
    expected = one.losses(1)
    other.live.put(other.numbers)
    with without_autograd():
        for call in calls:
            call()
    assert [other.live.loss.item()] == expected
    assert seen[0] == "first"
    model, (x, _) = training.model, training.batch(1)
    assert same_bits(seen[1], torch.tanh(model[0](x)).detach())


def test_a_step_has_its_own_numbers(make_trainee, small, bind):
    training = make_trainee(*small, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    bound = bind(training)
    assert 0.1 in bound.numbers
    bound.numbers = [0.02 if number == 0.1 else number for number in bound.numbers]
    training.optimizer.param_groups[0]["lr"] = 0.02
    eager = EagerStep(training)
    assert bound.losses(3) == [eager.take(*training.batch(1)).item() for _ in range(3)]
    with pytest.raises(ProgramError, match=r"the step has 0 numbers, but its program needs \d"):
        bound.live.put([])


def test_missing_or_too_small_memory_is_named(small, make_trainee, step_of):
    model, x, y = small
    weight = torch.tensor([1.0, 3.0])
    training = make_trainee(model, x, y, loss=lambda p, t: ((p - t) ** 2 * weight).sum())
    last = step_of(training)
    (name,) = [name.removeprefix("input/") for name in last.inputs]
    assert last.inputs[f"input/{name}"].view(torch.float32).tolist() == [1.0, 3.0]
    Bound(training, last)
    with pytest.raises(ProgramError, match=f"{name} is missing"):
        Bound(training, last._replace(inputs={}))
    with pytest.raises(ProgramError, match=f"bytes of {name}, which has only 4"):
        Bound(training, last._replace(inputs={f"input/{name}": torch.zeros(1)}))


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
