"""Optimizers and schedules of the user's, which count, keep, exchange and draw."""

import random
from collections import defaultdict

import torch
from tests.training.by_hand import new_training
from tests.training.python_cases.case import Case, Table, moments
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

__all__ = ["OPTIMIZER_CASES"]

OPTIMIZERS = optimizer = Table()
SCHEDULES = schedule = Table()


class Plain(Optimizer):
    """Gradient descent, as in torch's documentation; `rate` says by which lr."""

    def __init__(self, parameters, at, lr=0.05):
        super().__init__(parameters, {"lr": lr, "at": at, "calls": 0})
        self.at = at

    def rate(self, group):
        return group["lr"]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rate = self.rate(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-rate)


# Where it counts.


@optimizer
class CountsInItsGroups(Plain):
    def rate(self, group):
        group["calls"] += 1
        return group["lr"] * (2 if group["calls"] >= group["at"] else 1)


@optimizer
class CountsInAnAttribute(Plain):
    calls = 0

    def rate(self, group):
        self.calls += 1
        return group["lr"] * (2 if self.calls >= self.at else 1)


@optimizer
class CountsInAStateOfNoParameter(Plain):
    def rate(self, group):
        state = self.state["all"]
        state["calls"] = state.get("calls", 0) + 1
        return group["lr"] * (2 if state["calls"] >= self.at else 1)


@optimizer
class CountsInATensorOfItsState(Plain):
    def rate(self, group):
        state = self.state[group["params"][0]]
        state["calls"] = state.get("calls", torch.zeros(())) + 1
        return group["lr"] * (2 if state["calls"] >= self.at else 1)


@optimizer
class DerivedFromSgd(SGD):
    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.02, momentum=0.9)
        self.at, self.calls = at, 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls >= self.at:
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(2)
        return super().step(closure)


@optimizer
class SetsItsBetas(AdamW):
    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.02)
        self.at, self.calls = at, 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == self.at:
            self.param_groups[0]["betas"] = (0.5, 0.9)
            self.param_groups[0]["weight_decay"] = 0.5
        return super().step(closure)


# How it zeroes gradients.


@optimizer
class ZeroesEverySecondStep(SGD):
    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.01)
        self.at, self.calls = at, 0

    def zero_grad(self, set_to_none=True):
        self.calls += 1
        if self.calls < self.at or self.calls % 2:
            super().zero_grad(set_to_none)


@optimizer
class ZeroesInPlace(SGD):
    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.02, momentum=0.9)
        self.at, self.calls = at, 0

    def zero_grad(self, set_to_none=True):
        self.calls += 1
        super().zero_grad(set_to_none=False)
        if self.calls >= self.at:
            for parameter in self.param_groups[0]["params"]:
                parameter.grad.add_(0.01)


@optimizer
class NeverZeroes(SGD):
    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.001)
        self.at, self.calls = at, 0

    def zero_grad(self, set_to_none=True):
        self.calls += 1
        if self.calls == self.at:
            super().zero_grad()


@optimizer
class ShrinksGradients(SGD):
    """Momentum by gradients that are not zeroed, but made smaller."""

    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.01)
        self.at, self.calls = at, 0

    @torch.no_grad()
    def zero_grad(self, set_to_none=True):
        self.calls += 1
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5 if self.calls >= self.at else 0.9)


# What it does with gradients and parameters.


@optimizer
class Accumulates(SGD):
    """Updates at every fourth step, by the sum of the gradients."""

    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.02)
        self.at, self.calls = at, 0
        self.sums = defaultdict(float)

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for parameter in self.param_groups[0]["params"]:
            self.sums[parameter] = self.sums[parameter] + parameter.grad
        if self.calls % (4 if self.calls < self.at else 3) == 0:
            for parameter in self.param_groups[0]["params"]:
                parameter.grad = self.sums.pop(parameter)
            super().step(closure)


@optimizer
class KeepsTheGradient(Plain):
    """Uses the gradient of the step before, the very tensor."""

    def __init__(self, parameters, at):
        super().__init__(parameters, at)
        self.kept, self.calls = {}, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for parameter in self.param_groups[0]["params"]:
            before = self.kept.get(parameter, parameter.grad)
            factor = 0.5 if self.calls >= self.at else 0.1
            parameter.sub_(0.05 * (parameter.grad + factor * before))
            self.kept[parameter] = parameter.grad


@optimizer
class KeepsAViewOfTheGradient(Plain):
    def __init__(self, parameters, at):
        super().__init__(parameters, at)
        self.views, self.calls = {}, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            before = self.views.get(number, parameter.grad[:1])
            parameter.sub_(0.05 * parameter.grad)
            parameter[:1] -= 0.05 * before
            if self.calls < self.at or self.calls % 3 == 0:
                self.views[number] = parameter.grad[:1]


@optimizer
class ExchangesData(Plain):
    def __init__(self, parameters, at):
        super().__init__(parameters, at)
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        factor = 2 if self.calls >= self.at else 1
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.05 * factor * parameter.grad


@optimizer
class ExchangesGradients(DerivedFromSgd):
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = parameter.grad.sign() * (0.1 if self.calls >= self.at else 0.2)
        super().step(closure)


@optimizer
class SwapsParametersAndAverages(DerivedFromSgd):
    """The average becomes what is trained; the tensors change their places."""

    def __init__(self, parameters, at):
        super().__init__(parameters, at)
        self.averages = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            self.averages[number].lerp_(parameter, 0.1)
            if self.calls % self.at == 0:
                average = self.averages[number]
                self.averages[number] = parameter.data
                parameter.data = average


@optimizer
class Wraps(Optimizer):
    """Holds another optimizer, of which it shows the groups and the state."""

    def __init__(self, parameters, at):
        self.inner = SGD(parameters, lr=0.02, momentum=0.9)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.at, self.calls = at, 0

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self, closure=None):
        self.calls += 1
        if self.calls >= self.at:
            for parameter in self.param_groups[0]["params"]:
                parameter.grad *= 2
        self.inner.step()


# Random numbers, and the rest.


@optimizer
class DrawsFromTorch(DerivedFromSgd):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        if self.calls >= self.at:
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.001)


@optimizer
class DrawsFromPython(DerivedFromSgd):
    def step(self, closure=None):
        if random.random() < 0.5 or self.calls < self.at:
            super().step(closure)
        else:
            self.calls += 1


@optimizer
class SkipsLargeGradients(DerivedFromSgd):
    """A branch on a number from a tensor."""

    def step(self, closure=None):
        norm = sum(p.grad.norm() for p in self.param_groups[0]["params"])
        if self.calls < self.at or norm < 0.3:
            super().step(closure)
        self.calls += 1


@optimizer
class AddsAGroup(DerivedFromSgd):
    def __init__(self, parameters, at):
        first, *self.others = parameters
        super().__init__([first], at)

    def step(self, closure=None):
        super().step(closure)
        if self.calls == self.at:
            self.add_param_group({"params": self.others, "lr": 0.01})


@optimizer
class ReplacesItsState(DerivedFromSgd):
    def step(self, closure=None):
        super().step(closure)
        if self.calls == self.at:
            for entries in self.state.values():
                entries["momentum_buffer"] = -entries["momentum_buffer"]


@optimizer
class LoadsItsState(DerivedFromSgd):
    def step(self, closure=None):
        super().step(closure)
        if self.calls == 3:
            self.kept = {k: e["momentum_buffer"].clone() for k, e in self.state_dict()["state"].items()}
        if self.calls == self.at:
            loaded = self.state_dict()
            for number, buffer in self.kept.items():
                loaded["state"][number]["momentum_buffer"] = buffer
            self.load_state_dict(loaded)


@optimizer
class FreezesAParameter(DerivedFromSgd):
    def step(self, closure=None):
        super().step(closure)
        if self.calls == self.at:
            self.param_groups[0]["params"][0].requires_grad_(False)


@optimizer
class RaisesOnTheWay(DerivedFromSgd):
    def step(self, closure=None):
        super().step(closure)
        if self.calls == self.at:
            raise ZeroDivisionError("on the way")


# Schedules.


class OfTheUser(lr_scheduler.LRScheduler):
    def __init__(self, optimizer, at):
        self.at = at
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]


@schedule
class HalvesOnce(OfTheUser):
    def get_lr(self):
        return [rate * (0.5 if self.last_epoch == self.at else 1) for rate in super().get_lr()]


@schedule
class CountsItsCalls(OfTheUser):
    calls = 0

    def get_lr(self):
        self.calls += 1
        return [rate * (0.5 if self.calls % self.at == 0 else 1) for rate in self.base_lrs]


@schedule
class SetsTheMomentum(OfTheUser):
    def step(self, epoch=None):
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.5 if self.last_epoch >= self.at else 0.9


@schedule
class SetsMaximize(OfTheUser):
    def step(self, epoch=None):
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["maximize"] = self.last_epoch == self.at


@schedule
class AddsNoiseToTheRate(OfTheUser):
    def get_lr(self):
        noise = float(torch.rand(())) if self.last_epoch >= self.at else 1.0
        return [rate * noise for rate in self.base_lrs]


@schedule
class LooksAtGradients(OfTheUser):
    def get_lr(self):
        norm = sum(float(p.grad.norm()) for p in self.parameters() if p.grad is not None)
        return [rate / (1 + norm * (self.last_epoch >= self.at)) for rate in self.base_lrs]

    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@schedule
class ChangesParameters(LooksAtGradients):
    @torch.no_grad()
    def step(self, epoch=None):
        super().step(epoch)
        if self.last_epoch >= self.at:
            for parameter in self.parameters():
                parameter.mul_(0.99)


@schedule
class RatesInTensors(OfTheUser):
    def get_lr(self):
        factor = 0.5 if self.last_epoch >= self.at else 1.0
        return [torch.tensor(0.02 * factor) for _ in self.base_lrs]


@schedule
def of_lambdas_that_count(optimizer, at):
    calls = []

    def factor(step):
        calls.append(step)
        return 0.5 if len(calls) >= at else 1.0

    return lr_scheduler.LambdaLR(optimizer, factor)


@schedule
def chained_with_one_of_the_users(optimizer, at):
    first = lr_scheduler.StepLR(optimizer, 7, 0.9)
    return lr_scheduler.ChainedScheduler([first, HalvesOnce(optimizer, at)])


@schedule
def one_after_another(optimizer, at):
    first, second = lr_scheduler.ConstantLR(optimizer, 1.0), CountsItsCalls(optimizer, 3)
    return lr_scheduler.SequentialLR(optimizer, [first, second], [at])


def with_betas(optimizer, at):
    class SetsBetas(OfTheUser):
        def step(self, epoch=None):
            super().step(epoch)
            if self.last_epoch >= self.at:
                for group in self.optimizer.param_groups:
                    group["betas"], group["eps"] = (0.5, 0.99), 1e-3

    return SetsBetas(optimizer, at)


def _cases():
    steps = moments()
    for name, kind in OPTIMIZERS.items():
        _, step = next(steps)

        def make(at, kind=kind):
            return new_training(optimizer=lambda parameters: kind(parameters, at))

        raises = kind is RaisesOnTheWay
        yield Case(f"optimizer {name} at {step}", make, step, raises=raises)
    for name, kind in SCHEDULES.items():
        _, step = next(steps)

        def make_scheduled(at, kind=kind):
            return new_training(schedule=lambda optimizer: kind(optimizer, at))

        yield Case(f"schedule {name} at {step}", make_scheduled, step)
    for fused in (False, True):

        def make_adam(at, fused=fused):
            return new_training(
                optimizer=lambda parameters: Adam(parameters, lr=0.01, fused=fused),
                schedule=lambda optimizer: with_betas(optimizer, at),
            )

        yield Case(f"schedule sets betas of{' fused' * fused} Adam at 11", make_adam, 11)


OPTIMIZER_CASES = [*_cases()]
