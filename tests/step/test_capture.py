"""What is written down of a step: its operations and nothing else."""

import pytest
import torch
from torch import nn

from everystep.step.build import NotCapturableError


def operators(program):
    return [each.operator.split(".")[1] for each in program.operations]


def test_the_chapters_step_is_eleven_operations_and_two_for_each_parameter(
    chapter, make_trainee, program_of
):
    program = program_of(make_trainee(*chapter)).program
    forward_and_loss = ["addmm", "relu", "addmm", "mse_loss"]
    backward = ["mse_loss_backward", "mm", "mm", "sum", "threshold_backward", "mm", "sum"]
    assert operators(program) == forward_and_loss + backward + ["mul", "sub_"] * 4
    assert [each.operator for each in program.once] == ["aten.ones_like.default"]


def test_every_operation_knows_its_phase_and_module_also_backwards(chapter, make_trainee, program_of):
    program = program_of(make_trainee(*chapter)).program
    places = [(each.phase, each.module) for each in program.operations]
    assert places[:4] == [("forward", "0"), ("forward", "1"), ("forward", "2"), ("loss", None)]
    assert [module for phase, module in places if phase == "backward"] == [
        *(None, "2", "2", "2", "1", "0", "0")
    ]
    assert places[11:] == [("update", None)] * 8


def test_a_module_inside_a_module_has_a_path_in_both_directions(make_trainee, program_of):
    inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model = nn.Sequential(inner, nn.Linear(3, 2))
    program = program_of(make_trainee(model, torch.randn(5, 4), torch.randn(5, 2))).program
    modules = {each.operator.split(".")[1]: each.module for each in program.operations}
    assert modules["tanh"] == modules["tanh_backward"] == "0.1"
    assert set(program.activations) == {"0", "0.0", "0.1", "1"}
    assert program.activations["0"] == program.activations["0.1"]


def test_loss_gradients_activations_and_state_have_names(chapter, make_trainee, program_of):
    program = program_of(make_trainee(*chapter)).program
    assert program.tensors[program.loss].shape == ()
    assert program.gradients == {
        name: f"gradient/{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert program.tensors["gradient/0.weight"].shape == (100, 1000)
    assert program.activations == {"0": ("addmm",), "1": ("relu",), "2": ("addmm_2",)}
    assert program.of_kind("input") == ["x", "y"]
    assert program.of_kind("state") == [
        f"parameter/{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]


def test_watching_leaves_no_trace_in_the_step(small, make_trainee, program_of):
    program = program_of(make_trainee(*small)).program
    assert not {"clone", "detach", "alias", "empty_like"} & set(operators(program))


def test_captured_twice_it_is_the_same_program(small, make_trainee, program_of):
    training = make_trainee(*small)
    assert program_of(training, 1).program == program_of(training, 2).program


def test_optimizer_state_appears_in_the_first_step_only(small, make_trainee, program_of):
    training = make_trainee(*small, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    first, second, third = (program_of(training, step).program for step in (1, 2, 3))
    assert first != second
    assert second == third
    assert "optimizer/0.weight/momentum_buffer" in first.of_kind("state")


@pytest.mark.parametrize("fused", [True, False])
def test_adam_is_a_kernel_or_an_operation_of_its_own(small, make_trainee, program_of, fused):
    training = make_trainee(*small, optimizer=lambda p: torch.optim.Adam(p, 0.1, fused=fused))
    program = program_of(training).program
    if fused:
        update = program.operations[-1]
        assert update.operator == "aten._fused_adam_.tensor_lr"
        assert update.keywords["lr"] == "hyperparameter/0/lr/float64"
    else:
        assert program.optimizer_step.name == "Adam"
        assert program.optimizer_step.groups[0]["params"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert program.operations[-1].phase == "backward"


def test_the_learning_rate_is_a_tensor_not_a_number(small, make_trainee, program_of):
    program = program_of(make_trainee(*small)).program
    update = next(each for each in program.operations if each.phase == "update")
    assert update.arguments == ("gradient/0.weight", "hyperparameter/0/lr/float32")


def test_tensors_from_elsewhere_are_constants_with_their_content(small, make_trainee, program_of):
    model, x, y = small
    weight = torch.tensor([1.0, 3.0])
    built = program_of(make_trainee(model, x, y, loss=lambda p, t: ((p - t) ** 2 * weight).sum()))
    (name,) = built.program.of_kind("constant")
    assert built.constants[name].view(torch.float32).tolist() == [1.0, 3.0]


def test_tied_weights_are_one_storage_with_two_names(make_trainee, program_of):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    training = make_trainee(nn.Sequential(first, second), torch.randn(3, 4), torch.randn(3, 4))
    tensors = program_of(training).program.tensors
    assert tensors["parameter/1.weight"].storage == tensors["parameter/0.weight"].storage


def test_what_python_reads_from_data_is_no_program(small, make_trainee, program_of):
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            prediction = self.inner(x)
            return prediction if prediction.sum() > 0 else -prediction

    model, x, y = small
    with pytest.raises(NotCapturableError, match=r"in the forward phase, .*_local_scalar_dense"):
        program_of(make_trainee(Branching(model), x, y))


def test_what_python_reads_from_a_fixed_mask_is_no_hindrance(make_trainee, program_of):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

        def forward(self, x):
            return self.encoder(x, mask=self.mask)

    x = torch.randn(3, 5, 8)
    assert program_of(make_trainee(Causal(), x, torch.randn(3, 5, 8))).program.operations


def test_selecting_by_a_mask_is_no_program(small, make_trainee, program_of):
    model, x, y = small
    loss = lambda p, t: (p[t > 0] ** 2).sum()  # noqa: E731
    with pytest.raises(NotCapturableError, match="mask"):
        program_of(make_trainee(model, x, y, loss=loss))
