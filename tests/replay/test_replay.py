"""Every step of a training opens to what was in it."""

import pytest
import torch
from tests.training.by_hand import Made, bits, by_hand, by_train
from tests.training.engine_cases import CASES
from torch import Tensor, nn

import everystep


@pytest.mark.sweep(every=5)
@pytest.mark.parametrize("number", [1, 2, 11, 20])
@pytest.mark.parametrize(
    "name",
    [
        "SGD momentum",
        "Adam",
        "short last batch",
        "clip_norm of batches",
        "convolutional in batches",
        "dropout",
    ],
)
def test_a_step_opens_to_what_was_in_it(name, number):
    case = next(case for case in CASES if case.name == name)
    seen = Seen(case.make(), number)
    by_hand(seen.made, **case.options, before_step=seen.before, after_step=seen.after)
    run = everystep.open(by_train(case.make(), **case.options).directory)
    step = run[number]
    assert step.is_exact
    assert same(step.parameters, seen.parameters)
    assert same(step.activations, seen.activations)
    assert same({n: u.before for n, u in step.updates.items()}, seen.parameters)
    assert same({n: u.after for n, u in step.updates.items()}, seen.updated)
    if case.clip_norm is None:
        assert same(step.gradients, seen.gradients)
    else:
        norms = [torch.linalg.vector_norm(g) for g in step.gradients.values()]
        assert torch.linalg.vector_norm(torch.stack(norms)) > case.clip_norm
    assert same(step.dropped, seen.dropped)
    assert bits(step.batch.x) == bits(seen.inputs[0])
    state = run.parameters(number - 1)
    assert {n: bits(state[n]) for n in seen.parameters} == {
        n: bits(t) for n, t in seen.parameters.items()
    }


class Seen:
    """What hooks on the user's own modules see of one step of a loop by hand."""

    def __init__(self, made: Made, number: int) -> None:
        self.made, self.number = made, number
        self.activations: dict[str, Tensor] = {}

    def before(self, step: int) -> None:
        if step != self.number:
            return
        model = self.made.model
        self.dropped = self._gradients()
        self.parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.hooks = [
            module.register_forward_hook(self._hook(name)) for name, module in model.named_modules()
        ]

    def after(self, step: int) -> None:
        if step == self.number:
            self.updated = {n: p.detach().clone() for n, p in self.made.model.named_parameters()}
            self.gradients = self._gradients()
            for hook in self.hooks:
                hook.remove()

    def _gradients(self) -> dict[str, Tensor]:
        named = self.made.model.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}

    def _hook(self, name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name:
                self.activations[name] = output.detach().clone()
            else:
                self.inputs = inputs

        return hook


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return {n: bits(t) for n, t in one.items()} == {n: bits(t) for n, t in two.items()}
