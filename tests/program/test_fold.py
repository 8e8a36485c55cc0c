"""Folding: fewer operations, the same numbers but for rounding, and gradients still to be seen."""

import pytest
import torch
from torch import nn

from everystep.program.execute import BoundProgram, without_autograd
from everystep.program.fold import fold_updates
from everystep.step.eager import EagerStep


def taken(program):
    return [each.operator.split(".")[1] for each in program.operations if not each.derived]


@pytest.fixture
def chapter_trainee(chapter, make_trainee):
    model, x, y = chapter
    from everystep import GradientDescent

    return make_trainee(model, x, y, optimizer=lambda p: GradientDescent(p, lr=1e-4))


def test_the_chapters_update_is_folded_into_four_products(chapter_trainee, program_of):
    program = fold_updates(program_of(chapter_trainee).program, chapter_trainee.rates())
    forward_and_loss = ["addmm", "relu", "addmm", "mse_loss"]
    backward = ["mse_loss_backward", "mm", "threshold_backward"]
    assert taken(program) == [*forward_and_loss, *backward, *["addmm_", "addmv_"] * 2]
    assert program.derived_gradients == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_sgd_is_folded_too(chapter, make_trainee, program_of):
    training = make_trainee(*chapter, optimizer=lambda p: torch.optim.SGD(p, 1e-4, foreach=False))
    program = fold_updates(program_of(training).program, training.rates())
    assert taken(program)[-4:] == ["addmm_", "addmv_"] * 2


def test_folded_it_gives_the_same_numbers_but_for_rounding(chapter_trainee, program_of, memory_of):
    training = chapter_trainee
    built = program_of(training)
    folded = built._replace(program=fold_updates(built.program, training.rates()))
    memory = memory_of(folded, training)
    program = BoundProgram(folded.program, memory, torch.device("cpu"))
    eager = EagerStep(training)
    for _ in range(10):
        with without_autograd():
            program.run()
        assert program.loss.item() == pytest.approx(eager.take(1, *training.batch(1)).item(), rel=1e-5)


def test_looked_at_it_shows_the_gradients_that_it_does_not_compute(
    chapter_trainee, program_of, memory_of
):
    training = chapter_trainee
    built = program_of(training)
    folded = built._replace(program=fold_updates(built.program, training.rates()))
    memory = memory_of(folded, training)
    watched = BoundProgram(folded.program, memory, torch.device("cpu"))
    plain = BoundProgram(folded.program, memory_of(folded, training), torch.device("cpu"))
    with without_autograd():
        seen = {n: t for each in watched.observe() for n, t in each.results.items()}
        plain.run()
    assert torch.equal(seen["loss"], plain.loss)
    loss = training.loss(training.model(training.batch(1)[0]), training.batch(1)[1])
    gradient = torch.autograd.grad(loss, training.model[0].weight)[0]
    assert torch.equal(seen["gradient/0.weight"], gradient)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_gradient_that_is_needed_otherwise_is_computed(small, make_trainee, program_of, clip_norm):
    training = make_trainee(*small, clip_norm=clip_norm)
    program = fold_updates(program_of(training).program, training.rates())
    assert ("addmm_" in taken(program)) == (clip_norm is None)
    if clip_norm is not None:
        assert taken(program)[-4:] == ["add_"] * 4


def test_a_tied_weight_is_not_folded(make_trainee, program_of):
    layer = nn.Linear(4, 4)
    training = make_trainee(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 4), torch.randn(3, 4))
    program = fold_updates(program_of(training).program, training.rates())
    assert "addmm_" not in taken(program)
