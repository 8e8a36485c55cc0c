"""A torch other than those that were tried: what is known of it is asked of it, or it is refused."""

import pytest
import torch
from tests.descent import trained
from torch import nn

from everystep import ops
from everystep.errors import ProgramError, TrainingError
from everystep.ops.operators import NotAllowedError
from everystep.program import allowed
from everystep.program.allowed import resolve
from everystep.program.step_program import Program
from everystep.recording.files import program_file
from everystep.step.known_operators import known_operator

CACHES = (allowed.resolve, allowed.known_names, known_operator)


@pytest.fixture
def without_caches():
    for each in CACHES:
        each.cache_clear()
    yield
    for each in CACHES:
        each.cache_clear()


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))

    def forward(self, x):
        return torch.cdist(x, self.points)


def train(model, x, y, engine="auto"):
    return trained(model, (x, y), steps=4, engine=engine)


TRUSTING = [n for n, r in ops.PERMITTED.items() if r.arguments or r.kept is not None]


@pytest.mark.parametrize("name", TRUSTING)
def test_the_arguments_of_kernels_that_trust_are_those_of_this_torch(name):
    packet = getattr(torch.ops.aten, name)
    found = [allowed._what_is_unknown(getattr(packet, each)) for each in packet.overloads()]
    assert not any(found)


def test_the_arguments_are_known_by_position_under_any_name():
    names = allowed.known_names(torch.ops.aten._cdist_backward.default)
    assert list(names.values()) == ["grad", "x1", "x2", "p", "cdist"]


def test_an_operator_that_a_later_torch_brings_is_not_allowed():
    library = torch.library.Library("aten", "FRAGMENT")
    library.define("brought_later_(Tensor(a!) self, Tensor source) -> Tensor(a!)")
    with pytest.raises(NotAllowedError, match="not on the list"):
        resolve("aten.brought_later_.default")


def test_a_tensor_never_gets_the_memory_of_another():
    with pytest.raises(NotAllowedError):
        resolve("aten.shallow_copy_data_.default")  # torch 2.15


@pytest.mark.usefixtures("without_caches")
def test_a_kernel_with_other_arguments_is_not_used_and_the_step_says_so(small, monkeypatch, capsys):
    _, x, _ = small
    run = train(Distances(), x, torch.zeros(20, 3), "program")
    text = (run.directory / program_file(run.facts.training.engine.programs[0])).read_text()
    assert "_cdist_backward" in text

    changed = "Tensor grad, Tensor x1, Tensor x2, Tensor cdist, float p"
    record = ops.PERMITTED["_cdist_backward"]._replace(arguments=changed)
    monkeypatch.setitem(ops.PERMITTED, "_cdist_backward", record)
    for each in CACHES:
        each.cache_clear()
    with pytest.raises(ProgramError, match=r"_cdist_backward\.default has another signature in torch"):
        Program.from_json(text)
    with pytest.raises(TrainingError, match="has another signature in torch"):
        train(Distances(), x, torch.zeros(20, 3), "program")
    assert len(train(Distances(), x, torch.zeros(20, 3)).losses) == 4
    assert "_cdist_backward.default has another signature in torch" in capsys.readouterr().err


@pytest.mark.usefixtures("without_caches")
def test_an_argument_of_the_backward_pass_of_which_nothing_is_known_is_refused(monkeypatch):
    monkeypatch.setattr(allowed, "OF_BACKWARD_ALONE", {"output_mask"})
    with pytest.raises(NotAllowedError, match=r"takes bias_sizes in torch .* convolution has no such"):
        resolve("aten.convolution_backward.default")


@pytest.mark.usefixtures("without_caches")
def test_a_torch_without_what_programs_need_takes_steps_in_python(small, monkeypatch, capsys):
    needed = (*allowed._NEEDED, "_C._gone")
    monkeypatch.setattr(allowed, "_NEEDED", needed)
    run = train(*small)
    assert run.facts.training.engine.eager_from == 1
    assert "has no torch._C._gone, which everystep needs" in run.facts.training.engine.reason
    assert len(run.losses) == 4
    assert "has no torch._C._gone, which everystep needs" in capsys.readouterr().err
