"""An optimizer's step as direct calls has the bits of torch's own class, also when settings change."""

import copy

import pytest
import torch
from tests.training.test_torch_optimizers import OPTIMIZERS
from torch import nn

from everystep.program.calls import without_autograd
from everystep.program.optimizer_operator import OPTIMIZERS as OPERATORS
from everystep.program.optimizer_operator import BoundOptimizer
from everystep.program.steady import SteadyOptimizer
from everystep.step.state import same_bits

#: The others read a number from a tensor: how many steps they have taken.
CALLED_DIRECTLY = {
    *("gradient_descent", "sgd", "sgd_momentum", "sgd_fused", "adamw_fused", "adadelta", "rmsprop"),
    "rprop",
}
STEPS = 9


def stepped(make):
    """Return an optimizer with two param groups after its first step, and a step's gradients."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size)) for size in ((5, 6), (5,), (1, 5), (1,))]
    optimizer = make([{"params": parameters[:2]}, {"params": parameters[2:]}])
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def arguments_of(optimizer):
    """Return the arguments of the operation, on the tensors of the optimizer."""
    groups = [group["params"] for group in optimizer.param_groups]
    kept = [[[x for kv in optimizer.state[p].items() for x in kv] for p in group] for group in groups]
    return groups, [[p.grad for p in group] for group in groups], kept, []


def settings_of(optimizer, operator):
    return {key: [group.get(key) for group in optimizer.param_groups] for key in operator.settings}


def tensors_of(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter.detach()
            yield from (v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor))


def change(optimizer, settings):
    rate = optimizer.param_groups[1]["lr"]
    if isinstance(rate, torch.Tensor):
        rate.fill_(0.005)
    else:
        optimizer.param_groups[1]["lr"] = settings["lr"][1] = 0.005


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_direct_calls_have_the_bits_of_torchs_class(name, monkeypatch):
    optimizer = stepped(OPTIMIZERS[name])
    operator = OPERATORS[f"optim.{type(optimizer).__name__}.step"]
    by_hand = copy.deepcopy(optimizer)
    for parameter, other in zip(*map(parameters_of, (optimizer, by_hand)), strict=True):
        other.grad = parameter.grad.clone()
    arguments, settings = arguments_of(optimizer), settings_of(optimizer, operator)
    steady = SteadyOptimizer(operator, arguments, settings)
    gradients = [gradient for group in arguments[1] for gradient in group]
    by_class = []
    step = BoundOptimizer.step
    monkeypatch.setattr(BoundOptimizer, "step", lambda *given: by_class.append(number) or step(*given))
    for number in range(2 * STEPS):
        if number == STEPS:
            change(optimizer, settings)
            change(by_hand, {"lr": [None, None]})
        for parameter, gradient in zip(parameters_of(by_hand), gradients, strict=True):
            with torch.no_grad():
                gradient.normal_()
            parameter.grad.copy_(gradient)
        steady.settle()
        with without_autograd():
            steady()
        by_hand.step()
        assert all(map(same_bits, tensors_of(optimizer), tensors_of(by_hand))), number
    assert (len(by_class) < STEPS) == (name in CALLED_DIRECTLY), by_class


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
