"""Functions of torch that ask whether a dispatch mode is active have the bits of the plain loop."""

import warnings

import pytest
import torch
from tests.descent import looped, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import everystep


class Unchanging(TorchDispatchMode):
    """A mode of the user's, with which torch chooses other operations also without everystep."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


def numbers():
    return torch.randn(8, 3, 3), torch.randn(1, 3, 3), torch.randn(8, 5, 5)


def of_one_matrix(many, one, square):
    return many @ one, one @ many, torch.matmul(one.transpose(1, 2), many)


def of_rows(many, one, square):
    return many.requires_grad_() @ one, nn.functional.linear(many, one[0])


def singular_values(many, one, square):
    norms = torch.linalg.matrix_norm(square, 2), torch.linalg.matrix_norm(square, "nuc")
    return torch.linalg.svdvals(square), torch.linalg.cond(square), *norms


def eigenvalues(many, one, square):
    symmetric = square + square.transpose(1, 2)
    return torch.linalg.eigvalsh(symmetric), torch.linalg.eigvals(square).abs()


def with_derivatives(many, one, square):
    one.requires_grad_()
    results = many @ one, torch.linalg.svdvals(square.requires_grad_())
    sum(each.sum() for each in results).backward()
    return *results, one.grad, square.grad


FUNCTIONS = [of_one_matrix, of_rows, singular_values, eigenvalues, with_derivatives]
WITHOUT_DERIVATIVES = ["no_grad", "inference_mode"]
CASES = [
    pytest.param(compute, around, id=f"{compute.__name__}-{around}")
    for compute in FUNCTIONS
    for around in ("", "paused", "mode", "autocast", *WITHOUT_DERIVATIVES)
    if compute is not with_derivatives or around not in WITHOUT_DERIVATIVES
]


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize(("compute", "around"), CASES)
def test_results_have_the_bits_of_the_plain_loop(compute, around, tmp_path):
    def within(recording):
        if around in WITHOUT_DERIVATIVES:
            return getattr(torch, around)()
        if around == "autocast":
            return torch.autocast("cpu", torch.bfloat16)
        return Unchanging() if around == "mode" else torch.enable_grad()

    def results(recording=None):
        seeded()
        given = numbers()
        if around == "paused" and recording is not None:
            with recording.paused():
                return compute(*given)
        with within(recording):
            return compute(*given)

    plain = results()
    model = nn.Linear(1, 1)
    with everystep.record(model=model, run=tmp_path / "run") as recording:
        for _ in recording.steps(range(3)):
            found = results(recording)
            recording.log(loss=found[0].detach().sum())
            assert all(torch.equal(one, two) for one, two in zip(plain, found, strict=True))
    assert recording.run.verify(processes=1, progress=False).is_exact


def test_torch_has_its_functions_again_after_a_recording():
    many, one, _ = numbers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looped(nn.Linear(1, 1), range(2), lambda *_: (many @ one).sum(), optimizer=None)
    key = "AutogradCPU"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::matmul", key)
    with Unchanging():
        assert torch.equal(many @ one, (many.reshape(24, 3) @ one[0]).reshape(8, 3, 3))


@pytest.mark.parametrize("function", [torch.cumprod, torch.linalg.det, torch.prod])
def test_gradients_with_a_graph_have_the_bits_of_the_plain_loop(function, tmp_path):
    """As a penalty of gradients has them: torch also asks in a backward pass for a mode."""

    def penalized():
        seeded()
        x = torch.randn(5, 5, requires_grad=True)
        result = function(x, 0) if function is torch.cumprod else function(x)
        (gradient,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return gradient.detach(), x.grad

    plain = penalized()
    with everystep.record(model=nn.Linear(1, 1), run=tmp_path / "run") as recording:
        for _ in recording.steps(range(3)):
            found = penalized()
            recording.log(loss=found[0].sum())
            assert all(torch.equal(one, two) for one, two in zip(plain, found, strict=True))
    assert recording.run.verify(processes=1, progress=False).is_exact
