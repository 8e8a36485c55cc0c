"""Losses as people write them, with a change on the way or without."""

import functools

import torch
from tests.training.by_hand import mlp, new_training
from tests.training.python_cases.case import Case, Network, Table, moments
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

__all__ = ["LOSS_CASES"]

COUNTING = counting = Table()
PURE = pure = Table()
CLASSES = for_classes = Table()
NUMBERS = number = Table()


# These count, and change at the step `at`.


@counting
def a_function(at):
    calls = []

    def loss(prediction, target):
        calls.append(1)
        error = (prediction - target).square().mean()
        return 2 * error if len(calls) >= at else error

    return loss


@counting
def a_lambda(at):
    calls = []
    return lambda p, t: functional.mse_loss(p, t) * (2 if calls.append(1) or len(calls) == at else 1)


@counting
def a_partial(at):
    def loss(prediction, target, calls):
        calls["all"] += 1
        return functional.mse_loss(prediction, target) * (2 if calls["all"] % at == 0 else 1)

    return functools.partial(loss, calls={"all": 0})


class Annealed:
    """A weight that goes down with every call."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, prediction, target):
        self.calls += 1
        weight = max(0.0, 1 - self.calls / self.at) if self.at < 1000 else 1.0
        return functional.mse_loss(prediction, target) + weight * prediction.square().mean()


counting(Annealed)


class Method(Annealed):
    def of(self, prediction, target):
        return self(prediction, target)


@counting
def a_bound_method(at):
    return Method(at).of


@counting
class AModuleThatCounts(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, prediction, target):
        self.calls += 1
        error = functional.mse_loss(prediction, target)
        return 2 * error if self.calls >= self.at else error


@counting
class AModuleWithABuffer(nn.Module):
    """Counts in a buffer, and never reads a number from it."""

    def __init__(self, at):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.at = at

    def forward(self, prediction, target):
        self.calls += 1
        weight = torch.where(self.calls >= self.at, 2.0, 1.0)
        return weight * functional.mse_loss(prediction, target)


@counting
class AModuleThatReplacesItsBuffer(AModuleWithABuffer):
    def forward(self, prediction, target):
        self.calls = self.calls + 1
        weight = (self.calls >= self.at).float() + 1
        return weight * functional.mse_loss(prediction, target)


@counting
class AModuleWithParameters(nn.Module):
    """Uncertainty that would be learned, if an optimizer had it; it counts as well."""

    def __init__(self, at):
        super().__init__()
        self.uncertainty, self.at, self.calls = nn.Parameter(torch.zeros(())), at, [0]

    def forward(self, prediction, target):
        self.calls[0] += 1
        error = functional.mse_loss(prediction, target)
        return (error * torch.exp(-self.uncertainty) + self.uncertainty) * (
            2 if self.calls[0] == self.at else 1
        )


@counting
class DerivedFromTorchs(nn.MSELoss):
    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, input, target):
        self.calls += 1
        return super().forward(input, target) * (2 if self.calls >= self.at else 1)


@counting
class WithAReductionThatIsAProperty(nn.MSELoss):
    def __init__(self, at):
        self.at, self.calls = at, 0
        super().__init__()

    @property
    def reduction(self):
        self.calls += 1
        return "sum" if self.calls == self.at else "mean"

    @reduction.setter
    def reduction(self, value):
        pass

    def __setattr__(self, name, value):
        if name in ("at", "calls"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


@counting
class KeepsAMovingAverage(nn.Module):
    """A plain tensor that is not a buffer."""

    def __init__(self, at):
        super().__init__()
        self.average, self.at, self.calls = torch.ones(()), at, 0

    def forward(self, prediction, target):
        self.calls += 1
        error = functional.mse_loss(prediction, target)
        self.average = 0.9 * self.average + 0.1 * error.detach()
        return error / self.average if self.calls >= self.at else error


@counting
class KeepsTheLastPrediction:
    def __init__(self, at):
        self.last, self.at, self.calls = None, at, 0

    def __call__(self, prediction, target):
        self.calls += 1
        error = functional.mse_loss(prediction, target)
        if self.last is not None and self.calls >= self.at:
            error = error + 0.1 * functional.mse_loss(prediction, self.last)
        self.last = prediction.detach()
        return error


@counting
class UsesAMetric:
    """A metric of torchmetrics counts batches."""

    def __init__(self, at):
        from torchmetrics import MeanSquaredError  # the import takes seconds

        self.metric, self.at = MeanSquaredError(), at

    def __call__(self, prediction, target):
        self.metric.update(prediction.detach(), target)
        error = functional.mse_loss(prediction, target)
        return 2 * error if self.metric.update_count >= self.at else error / self.metric.compute()


@counting
def with_an_average_of_a_model(at):
    other = mlp()
    average = AveragedModel(other)
    x = torch.randn(20, 4)

    def loss(prediction, target):
        average.update_parameters(other)
        with torch.no_grad():
            weight = float(average(x).mean()) if average.n_averaged >= at else 1.0
        return functional.mse_loss(prediction, target) * (1 + weight)

    return loss


@counting
def with_a_spectral_norm(at):
    """Its power iteration goes on with each call in training mode."""
    judge = parametrizations.spectral_norm(nn.Linear(2, 3))
    calls = []

    def loss(prediction, target):
        calls.append(1)
        weight = 2 if len(calls) >= at else 1
        return functional.mse_loss(prediction, target) * weight + judge(prediction).square().mean()

    return loss


@counting
def of_shape_one(at):
    calls = []

    def loss(prediction, target):
        calls.append(1)
        factor = 2 if len(calls) >= at else 1
        return (prediction - target).square().mean().reshape(1) * factor

    return loss


@counting
def a_cached_function(at):
    @functools.cache
    def weight(calls):
        return 2.0 if calls >= at else 1.0

    def loss(prediction, target):
        return functional.mse_loss(prediction, target) * weight(weight.cache_info().currsize)

    return loss


@counting
def draws_noise(at):
    calls = []

    def loss(prediction, target):
        calls.append(1)
        noise = torch.randn_like(target) if len(calls) >= at else 0.0
        return functional.mse_loss(prediction, target + noise)

    return loss


@counting
def changes_the_prediction(at):
    """In place, and from there on the target too."""
    calls = []

    def loss(prediction, target):
        calls.append(1)
        if len(calls) >= at:
            target.mul_(0.99)
        return functional.mse_loss(prediction.mul_(1.1), target)

    return loss


@counting
def looks_into_the_graph(at):
    """Hooks on the nodes that the model has made."""
    calls = []

    def loss(prediction, target):
        calls.append(1)
        if len(calls) >= at:
            prediction.grad_fn.register_prehook(lambda gradients: (2 * gradients[0],))
        return functional.mse_loss(prediction, target)

    return loss


@counting
def raises_on_the_way(at):
    calls = []

    def loss(prediction, target):
        calls.append(1)
        if len(calls) == at:
            raise ZeroDivisionError("in a loss")
        return functional.mse_loss(prediction, target)

    return loss


# These read a number from a tensor: what it decides changes when it will.


@number
def clips_by_a_number(prediction, target):
    error = (prediction - target).square().mean()
    return error if error.item() > 0.85 else 2 * error


@number
def branches_on_a_tensor(prediction, target):
    error = prediction - target
    if error.abs().max() > 2.4:
        return error.abs().mean()
    return error.square().mean()


@number
def counts_rows_that_are_wrong(prediction, target):
    wrong = (prediction - target).abs().sum(1) > 1.5
    return (prediction - target)[wrong].square().mean()


@number
def asks_whether_tensors_are_equal(prediction, target):
    error = functional.mse_loss(prediction, target)
    return 2 * error if torch.allclose(prediction, target, atol=2.4) else error


@number
def weighs_by_a_list(prediction, target):
    weights = prediction.detach().mean(0).tolist()
    errors = (prediction - target).square().mean(0)
    return sum((1 + weight) * error for weight, error in zip(weights, errors, strict=True))


# These are pure.


@pure
def mean_square(prediction, target):
    return ((prediction - target) ** 2).mean()


@pure
def mean_and_absolute(prediction, target):
    """Return the sum of two losses."""
    square = functional.mse_loss(prediction, target)
    absolute = functional.l1_loss(prediction, target)
    return square + 0.1 * absolute


@pure
def huber_by_where(prediction, target, delta: float = 0.5):
    error = prediction - target
    small = error.abs() <= delta
    return torch.where(small, 0.5 * error**2, delta * (error.abs() - 0.5 * delta)).mean()


@pure
def logarithm_of_cosh(prediction, target):
    return torch.log(torch.cosh(prediction - target)).mean()


@pure
def weighted_columns(prediction, target):
    weights = torch.tensor([1.0, 0.5])
    return (weights * (prediction - target).square()).sum(dim=1).mean()


@pure
def contrastive(prediction, target):
    """Pairs of rows: near where their targets are."""
    first, second = prediction.chunk(2)
    distance = (first - second).norm(dim=1)
    same = (target[:10, 0] * target[10:, 0] > 0).float()
    return (same * distance**2 + (1 - same) * torch.relu(1.0 - distance) ** 2).mean()


@pure
def cosine(prediction, target):
    return 1 - functional.cosine_similarity(prediction, target, dim=-1).mean()


@for_classes
def focal(prediction, target, gamma=2.0):
    logs = functional.log_softmax(prediction, dim=-1)
    logs = logs.gather(1, target.unsqueeze(1)).squeeze(1)
    return (-((1 - logs.exp()) ** gamma) * logs).mean()


@for_classes
def smoothed_labels(prediction, target):
    logs = prediction.log_softmax(dim=1)
    count = prediction.shape[1]
    smooth = torch.full_like(logs, 0.1 / (count - 1))
    smooth.scatter_(1, target[:, None], 0.9)
    return -(smooth * logs).sum(1).mean()


def likelihood_by_one_hot(prediction, target):
    """`one_hot` looks at the least and the greatest class."""
    probabilities = prediction.softmax(-1)
    one_hot = functional.one_hot(target, num_classes=2).to(probabilities.dtype)
    return -(one_hot * torch.log(probabilities + 1e-8)).sum(-1).mean()


class SmoothedAndWeighted(nn.Module):
    def __init__(self, smoothing: float = 0.1):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weight", torch.tensor([1.0, 2.0]))

    def forward(self, prediction, target):
        return functional.cross_entropy(
            prediction, target, weight=self.weight, label_smoothing=self.smoothing
        )


class Penalised(Network):
    def forward(self, x):
        h = self.inner(x)
        return h, h.square().mean()


def of_a_pair(prediction, target):
    prediction, penalty = prediction
    return functional.mse_loss(prediction, target) + 0.1 * penalty


def with_classes(loss):
    trained = new_training(loss=loss)
    trained.y = (trained.x[:, 0] > 0).long()
    return trained


def _cases():
    steps = moments()
    for name, kind in COUNTING.items():
        _, step = next(steps)

        def make(at, kind=kind):
            return new_training(loss=lambda: kind(at))

        raises = kind is raises_on_the_way
        yield Case(f"a loss that counts, {name} at {step}", make, step, raises=raises)
    for name, kind in NUMBERS.items():
        yield Case(
            f"a loss that reads a number, {name}",
            lambda at, kind=kind: new_training(loss=lambda: kind),
            program=False,
        )
    for name, kind in PURE.items():
        yield Case(
            f"a loss that is pure, {name}",
            lambda at, kind=kind: new_training(loss=lambda: kind),
            program=True,
        )
    for name, kind in CLASSES.items():
        yield Case(
            f"a loss that is pure, {name}",
            lambda at, kind=kind: with_classes(lambda: kind),
            program=True,
        )
    yield Case(
        "a loss that is pure, a module with a buffer",
        lambda at: with_classes(SmoothedAndWeighted),
        program=True,
    )
    yield Case(
        "a loss that is pure, of a pair",
        lambda at: new_training(Penalised, loss=lambda: of_a_pair),
        program=True,
    )
    yield Case(
        "a loss that is pure, likelihood by one hot",
        lambda at: with_classes(lambda: likelihood_by_one_hot),
    )
    yield Case(
        "a loss that is pure, a partial",
        lambda at: new_training(loss=lambda: functools.partial(huber_by_where, delta=0.3)),
    )
    yield Case(
        "a loss that is pure, a functional of torch",
        lambda at: new_training(loss=lambda: functional.mse_loss),
        program=True,
    )


LOSS_CASES = [*_cases()]
