"""A program that is bound and run: the eager step's bits, and nothing made on the way."""

import gc
import tracemalloc

import pytest
import torch
from torch import nn

from everystep.errors import ProgramError
from everystep.program.bound import BoundProgram
from everystep.program.calls import without_autograd
from everystep.program.program import Program
from everystep.step.check import same_bits
from everystep.step.eager import EagerStep


def bound(built, memory):
    return BoundProgram(built.program, memory, torch.device("cpu"))


def run(program, steps):
    losses = []
    with without_autograd():
        for _ in range(steps):
            program.run()
            losses.append(program.loss.item())
    return losses


@pytest.fixture
def training(small, make_trainee):
    return make_trainee(*small)


def test_it_goes_on_with_the_eager_bits(training, program_of, memory_of):
    built = program_of(training)
    losses = run(bound(built, memory_of(built, training)), 20)
    eager = EagerStep(training)
    assert losses == [eager.take(*training.batch(1)).item() for _ in range(20)]


def test_read_from_json_it_is_the_same(training, program_of, memory_of):
    built = program_of(training)
    memory = memory_of(built, training), memory_of(built, training)
    again = built._replace(program=Program.from_json(built.program.to_json()))
    assert run(bound(built, memory[0]), 5) == run(bound(again, memory[1]), 5)
    assert all(same_bits(memory[0][name], memory[1][name]) for name in memory[0])


def test_looked_at_it_is_the_same_step(training, program_of, memory_of):
    built = program_of(training)
    memory = memory_of(built, training), memory_of(built, training)
    plain, watched = (bound(built, each) for each in memory)
    for _ in range(5):
        run(plain, 1)
        with without_autograd():
            for _ in watched.observe():
                pass
        assert same_bits(plain.loss, watched.loss)
    assert all(same_bits(memory[0][name], memory[1][name]) for name in memory[0])


def test_every_operation_shows_its_inputs_before_and_its_results_after(training, program_of, memory_of):
    built = program_of(training)
    with without_autograd():
        seen = {
            each.operation.operator: (
                {name: tensor.clone() for name, tensor in each.inputs.items()},
                each.results,
            )
            for each in bound(built, memory_of(built, training)).observe()
        }
    inputs, results = seen["aten.sub_.Tensor"]
    (name,) = results
    (product,) = set(inputs) - {name}
    assert same_bits(results[name], inputs[name] - inputs[product])
    inputs, results = seen["aten.tanh.default"]
    assert same_bits(*map(torch.as_tensor, (results["tanh"], torch.tanh(inputs["addmm"]))))


def test_a_program_with_an_optimizer_step_shows_it_as_one(small, make_trainee, program_of, memory_of):
    training = make_trainee(*small, optimizer=lambda p: torch.optim.Adam(p, 0.1))
    built = program_of(training)
    memory = memory_of(built, training)
    weight = memory["parameter/0.weight"].view(torch.float32)

    def step():
        weight.sub_(1.0)

    program = BoundProgram(built.program, memory, torch.device("cpu"), step)
    with without_autograd():
        *_, last = program.observe()
    assert last.operation.operator == "torch.optim.Adam"
    before, after = last.inputs["parameter/0.weight"], last.results["parameter/0.weight"]
    assert torch.equal(before - 1.0, after)


def test_memory_is_named_when_it_is_missing_or_too_small(training, program_of, memory_of):
    built = program_of(training)
    memory = memory_of(built, training)
    with pytest.raises(ProgramError, match=r"parameter/0\.bias"):
        bound(built, {name: m for name, m in memory.items() if name != "parameter/0.bias"})
    with pytest.raises(ProgramError, match=r"bytes of x, which has only 4"):
        bound(built, memory | {"x": torch.zeros(1)})


def test_a_state_of_other_strides_is_put_where_the_program_has_it(make_trainee, program_of, memory_of):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    training = make_trainee(model, x, torch.randn(2, 2))
    built = program_of(training)
    losses = run(bound(built, memory_of(built, training)), 3)
    eager = EagerStep(training)
    assert losses == [eager.take(*training.batch(1)).item() for _ in range(3)]


def test_temporary_memory_is_shared_by_those_that_follow_each_other(make_trainee, program_of, memory_of):
    layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.Tanh())]
    training = make_trainee(nn.Sequential(*layers), torch.randn(256, 64), torch.randn(256, 64))
    built = program_of(training)
    program = bound(built, memory_of(built, training))
    sizes = [s.bytes for s in built.program.storages.values() if s.kind == "temporary"]
    assert program.temporary_bytes < 0.7 * sum(sizes)


def test_a_step_makes_no_tensor_and_no_object(training, program_of, memory_of):
    built = program_of(training)
    program = bound(built, memory_of(built, training))
    run(program, 10)
    with without_autograd():
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(10):
                program.run()
            before = tracemalloc.take_snapshot()
            for _ in range(1000):
                program.run()
            after = tracemalloc.take_snapshot()
        finally:
            tracemalloc.stop()
            gc.enable()
    grown = [each for each in after.compare_to(before, "lineno") if each.count_diff > 0]
    ours = [each for each in grown if "everystep/program" in str(each.traceback)]
    assert not ours


def test_a_small_network_asks_for_no_memory_while_it_runs(chapter, make_trainee, program_of, memory_of):
    training = make_trainee(*chapter)
    built = program_of(training)
    program = bound(built, memory_of(built, training))
    run(program, 3)
    with without_autograd(), torch.profiler.profile(profile_memory=True) as profile:
        program.run()
    asked = {event.key: event.self_cpu_memory_usage for event in profile.key_averages()}
    assert sum(abs(size) for size in asked.values()) == 0, asked


def test_the_same_constants_serve_a_new_process(small, make_trainee, program_of):
    model, x, y = small
    weight = torch.tensor([1.0, 3.0])
    training = make_trainee(model, x, y, loss=lambda p, t: ((p - t) ** 2 * weight).sum())
    built = program_of(training)
    memory = allocate(built.program, built.constants, torch.device("cpu"))
    (name,) = built.program.of_kind("constant")
    assert memory[name].view(torch.float32).tolist() == [1.0, 3.0]
