"""The program of a step that Python took: its operations and nothing else."""

import torch
from tests.conftest import Unwritten
from torch import nn

from everystep.training.stepper import Stepper

PARAMETERS = ("0.weight", "0.bias", "2.weight", "2.bias")


def names(program):
    return [each.name for each in program.operations]


def test_the_chapters_step_is_twelve_operations_and_the_optimizers_step(
    chapter, make_trainee, program_of
):
    forward_and_loss = ["addmm", "relu", "addmm", "mse_loss", "ones_like"]
    backward = ["mse_loss_backward", "mm", "mm", "sum", "threshold_backward", "mm", "sum"]
    program = program_of(make_trainee(*chapter))
    assert names(program) == [*forward_and_loss, *backward, "GradientDescent"]


def test_every_operation_knows_its_phase_and_module_also_backwards(chapter, make_trainee, program_of):
    program = program_of(make_trainee(*chapter))
    places = [(each.phase, each.module) for each in program.operations]
    assert places[:4] == [("forward", "0"), ("forward", "1"), ("forward", "2"), ("loss", None)]
    assert [module for phase, module in places if phase == "backward"] == [
        *(None, None, "2", "2", "2", "1", "0", "0")
    ]
    assert places[12:] == [("update", None)]


def test_a_module_inside_a_module_has_a_path_in_both_directions(make_trainee, program_of):
    inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model = nn.Sequential(inner, nn.Linear(3, 2))
    program = program_of(make_trainee(model, torch.randn(5, 4), torch.randn(5, 2)))
    modules = {each.name: each.module for each in program.operations}
    assert modules["tanh"] == modules["tanh_backward"] == "0.1"
    assert set(program.activations) == {"0", "0.0", "0.1", "1"}
    assert program.activations["0"] == program.activations["0.1"]


def test_loss_gradients_activations_and_state_have_names(chapter, make_trainee, program_of):
    program = program_of(make_trainee(*chapter))
    assert program.tensors[program.loss].shape == ()
    assert program.gradients == {name: f"gradient/{name}" for name in PARAMETERS}
    assert program.tensors["gradient/0.weight"].shape == (100, 1000)
    assert program.activations == {"0": ("addmm",), "1": ("relu",), "2": ("addmm_2",)}
    assert program.of_kind("input") == ["x", "y"]
    assert program.of_kind("state") == [f"parameter/{name}" for name in PARAMETERS]


def test_two_steps_have_the_same_program(small, make_trainee, program_of):
    training = make_trainee(*small)
    assert program_of(training, 1) == program_of(training, 2)


def test_an_optimizer_creates_its_state_in_the_first_step_only(small, make_trainee, program_of):
    training = make_trainee(*small, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    first, second, third = (program_of(training, step) for step in (1, 2, 3))
    assert second == third
    state = {f"optimizer/{name}/momentum_buffer" for name in PARAMETERS}
    assert set(first.operations[-1].results) == state and not second.operations[-1].results
    assert state <= first.ends.keys() and state <= set(second.of_kind("state"))


def test_settings_of_an_optimizer_are_numbers_of_the_step(small, make_trainee):
    training = make_trainee(*small)
    stepper = Stepper(training, Unwritten(), 3, "eager")
    found = []
    for step, rate in ((1, 0.5), (2, 1e-3), (3, 0.25)):
        training.optimizer.param_groups[0]["lr"] = rate
        stepper.watch(step, *training.batch(step))
        found.append(stepper.watched.program_of_last())
    stepper.watched.finish()
    _, first, second = found  # gradients of the step before are there only from step 2 on
    assert first.built.program is second.built.program
    assert (first.numbers[-1], second.numbers[-1]) == (1e-3, 0.25)


def test_tensors_from_outside_are_inputs_with_their_content(small, make_trainee, step_of):
    model, x, y = small
    weight = torch.tensor([1.0, 3.0])
    last = step_of(make_trainee(model, x, y, loss=lambda p, t: ((p - t) ** 2 * weight).sum()))
    [(name, content)] = last.inputs.items()
    assert name.removeprefix("input/") in last.built.program.of_kind("input")
    assert content.view(torch.float32).tolist() == [1.0, 3.0]


def test_tied_weights_are_one_storage_with_two_names(make_trainee, program_of):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    training = make_trainee(nn.Sequential(first, second), torch.randn(3, 4), torch.randn(3, 4))
    tensors = program_of(training).tensors
    assert tensors["parameter/1.weight"].storage == tensors["parameter/0.weight"].storage


def test_a_branch_of_python_shows_in_the_operations(small, make_trainee, program_of):
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.sign = 1

        def forward(self, x):
            prediction = self.inner(x)
            return prediction if (prediction**2).sum() * self.sign > 0 else -prediction

    model, x, y = small
    training = make_trainee(Branching(model), x, y)
    assert "neg" not in names(program_of(training, 1))
    training.model.sign = -1
    assert "neg" in names(program_of(training, 2))


def test_a_selection_by_a_mask_has_the_shape_of_its_step(small, make_trainee, program_of):
    model, x, y = small
    program = program_of(make_trainee(model, x, y, loss=lambda p, t: (p[t > 0] ** 2).sum()))
    (index,) = [each for each in program.operations if each.name == "index"]
    assert program.tensors[index.results[0]].shape == (int((y > 0).sum()),)
