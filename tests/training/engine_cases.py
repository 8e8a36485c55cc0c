"""Trainings as rows of one table (`CASES`): what `train` gets, new objects each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tests.training.by_hand import Made
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from everystep import GradientDescent

__all__ = ["CASES", "OPTIMIZERS", "Case", "made_case"]


@dataclass(frozen=True)
class Case:
    """A training, and what is expected of its engine.

    eager: from which step on Python runs, and a part of the reason; None: programs take all steps.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[], Any]
    optimizer: Callable[[nn.Module, Any], optim.Optimizer]
    scheduler: Callable[[Any], Any] | None = None
    steps: int = 20
    batch_size: int | None = None
    drop_last: bool = False
    max_grad_norm: float | None = None
    scheduler_every: str = "step"
    eager: tuple[int, str] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What is said to `train` besides objects, and to `by_hand`."""
        names = ("steps", "batch_size", "drop_last", "max_grad_norm", "scheduler_every")
        return {name: getattr(self, name) for name in names}

    def make(self) -> Made:
        """Return new objects; the same numbers at every call."""
        torch.manual_seed(0)
        x, y = self.data()
        model, loss = self.model(), self.loss()
        optimizer = self.optimizer(model, loss)
        return Made(model, x, y, loss, optimizer, self.scheduler and self.scheduler(optimizer))


# Data: random numbers.


def floats(*shape: int, targets: int = 2, rows: int = 20) -> tuple[Tensor, Tensor]:
    """Return x (rows, *shape) and y (rows, targets)."""
    return torch.randn(rows, *shape), torch.randn(rows, targets)


def classes(*shape: int, count: int = 3) -> tuple[Tensor, Tensor]:
    """Return x (20, *shape) and the class of each row."""
    return torch.randn(20, *shape), torch.randint(count, (20,))


def words(length: int = 5) -> tuple[Tensor, Tensor]:
    """Return x (20, length) of numbers below 11, and y (20, 2)."""
    return torch.randint(11, (20, length)), torch.randn(20, 2)


def transposed() -> tuple[Tensor, Tensor]:
    """Return x (20, 4) stored column by column, and a y with gaps."""
    return torch.randn(4, 20).t(), torch.randn(20, 4)[:, ::2]


def itself() -> tuple[Tensor, Tensor]:
    """Return one tensor as both x and y."""
    x = torch.randn(20, 4)
    return x, x


# Models.


def mlp(out: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, out))


def mlp_double() -> nn.Module:
    return mlp().double()


class Last(nn.Module):
    """What a recurrent layer gives at the last place, through a linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.out(self.layer(x, src_mask=mask, is_causal=True)[:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def normalized(kind: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(kind(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 2))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


def channels_last() -> nn.Module:
    return convolutional().to(memory_format=torch.channels_last)


def images_channels_last() -> tuple[Tensor, Tensor]:
    x, y = floats(3, 4, 4)
    return x.to(memory_format=torch.channels_last), y


def averaged() -> nn.Module:
    """Batch norm that counts: its factor is a number made from a tensor."""
    norm = nn.BatchNorm1d(8, momentum=None)
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 2))


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(11, 6, **options), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding(x).sum(1))


class OnlyEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 2, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x).sum(1)


class Rows(nn.Module):
    """Row by row (vmap), with the slope of a function (func.grad) and parameters put in from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale, self.nothing = (
            mlp(),
            nn.Parameter(torch.tensor(1.5)),
            nn.Parameter(torch.empty(0)),
        )

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.vmap(torch.func.grad(lambda row: (row @ self.inner[0].weight.t()).square().sum()))
        scaled = {name: p * self.scale for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, scaled, (x + slope(x),)) + self.nothing.sum()


class Graph(nn.Module):
    """A product with a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.edges = mlp(), (torch.rand(20, 20) > 0.8).float().to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.edges, self.inner(x))


# Losses.


def relative_error(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction - target).abs() / (target.abs() + 1)).mean().sqrt()


class Uncertain(nn.Module):
    """A loss with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.seen += 1
        squares = (prediction - target).square()
        return (squares / self.log_variance.exp() + self.log_variance).mean()


# Optimizers.

Make = Callable[[nn.Module, Any], optim.Optimizer]


def of(kind: Any, **options: Any) -> Make:
    """Return what makes an optimizer over the model's parameters that need gradients."""
    return lambda model, loss: kind([p for p in model.parameters() if p.requires_grad], **options)


def of_lr_tensor(kind: Any, **options: Any) -> Make:
    return lambda model, loss: kind(model.parameters(), lr=torch.tensor(0.01), **options)


def in_groups(kind: Any, **options: Any) -> Make:
    """Return what makes an optimizer of two groups, the biases ten times as slow."""

    def make(model: nn.Module, loss: Any) -> optim.Optimizer:
        named = list(model.named_parameters())
        weights = [p for name, p in named if name.endswith("weight")]
        biases = [p for name, p in named if not name.endswith("weight")]
        groups = [{"params": weights, "lr": 0.02}, {"params": biases, "lr": 0.002}]
        return kind(groups, **options)

    return make


def of_matrices(kind: Any, **options: Any) -> Make:
    return lambda model, loss: kind([p for p in model.parameters() if p.ndim == 2], **options)


def with_loss(kind: Any, **options: Any) -> Make:
    return lambda model, loss: kind([*model.parameters(), *loss.parameters()], **options)


class Signs(optim.Optimizer):
    """An optimizer of the user: operations on tensors alone."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    average.lerp_(parameter.grad, 0.1)
                    parameter.add_(average.sign(), alpha=-group["lr"])


momentum = of(SGD, lr=0.02, momentum=0.9)
adamw = of(AdamW, lr=0.01, fused=True)
descent = of(GradientDescent, lr=0.05)


rows_of_four = partial(floats, 4)


def row(
    name: str,
    model: Callable[[], nn.Module] = mlp,
    data: Callable[[], tuple[Tensor, Tensor]] = rows_of_four,
    loss: Callable[[], Any] = nn.MSELoss,
    optimizer: Make = momentum,
    scheduler: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Case:
    """Return a case that is named after what is unusual about it."""
    return Case(name, model, data, loss, optimizer, scheduler, **options)


OPTIMIZERS = [
    row("GradientDescent", optimizer=descent),
    row("GradientDescent of two groups", optimizer=in_groups(GradientDescent)),
    row("SGD", optimizer=of(SGD, lr=0.05, foreach=False)),
    row("SGD momentum", optimizer=of(SGD, lr=0.02, momentum=0.9, foreach=False)),
    row("SGD foreach nesterov", optimizer=of(SGD, lr=0.02, momentum=0.9, nesterov=True, foreach=True)),
    row("Adam", optimizer=of(Adam, lr=0.01, foreach=False)),
    row("Adam foreach amsgrad", optimizer=of(Adam, lr=0.01, foreach=True, amsgrad=True)),
    row("Adam fused lr tensor", optimizer=of_lr_tensor(Adam, fused=True)),
    row("AdamW fused", optimizer=adamw),
    row("Adagrad", optimizer=of(optim.Adagrad, lr=0.02)),
    row("RMSprop", optimizer=of(optim.RMSprop, lr=0.005)),
    row("Adadelta", optimizer=of(optim.Adadelta, lr=0.5)),
    row("Adamax", optimizer=of(optim.Adamax, lr=0.01)),
    row("NAdam", optimizer=of(optim.NAdam, lr=0.01, decoupled_weight_decay=True, weight_decay=0.01)),
    row("RAdam", optimizer=of(optim.RAdam, lr=0.01)),
    row("ASGD", optimizer=of(optim.ASGD, lr=0.02)),
    row("Rprop", optimizer=of(optim.Rprop, lr=0.01)),
    row("Adafactor", optimizer=of(optim.Adafactor, lr=0.02)),
    row("Muon", optimizer=of_matrices(optim.Muon, lr=0.01)),
    row(
        "SparseAdam", OnlyEmbedding, words, optimizer=of(optim.SparseAdam, lr=0.01), eager=(1, "sparse")
    ),
    row("an optimizer of the user", optimizer=of(Signs, lr=0.01)),
]

halving = partial(lr_scheduler.StepLR, step_size=7, gamma=0.5)
one_cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=30)
plateau = partial(lr_scheduler.ReduceLROnPlateau, patience=0)
slowing = partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))


def sequential(optimizer: optim.Optimizer) -> lr_scheduler.LRScheduler:
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    return lr_scheduler.SequentialLR(
        optimizer, [warm_up, lr_scheduler.ExponentialLR(optimizer, 0.95)], milestones=[10]
    )


class Warm(lr_scheduler.LRScheduler):
    """A scheduler of the user, which changes the momentum too."""

    def get_lr(self) -> list[float]:
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9 - 0.5 / (1 + self.last_epoch)
        return [rate * min(1.0, (1 + self.last_epoch) / 10) for rate in self.base_lrs]


SCHEDULERS = [
    row("StepLR", optimizer=descent, scheduler=halving),
    row("StepLR every epoch", optimizer=adamw, scheduler=halving, scheduler_every="epoch", batch_size=6),
    row("StepLR of Adam with an lr tensor", optimizer=of_lr_tensor(Adam, fused=True),
        scheduler=halving, eager=(1, "a learning rate that is a tensor")),
    row("OneCycleLR", scheduler=one_cycle),
    row("ReduceLROnPlateau of SGD", optimizer=of(SGD, lr=0.5), scheduler=plateau),
    row("LambdaLR", optimizer=descent, scheduler=slowing, eager=(1, "calls a function of yours")),
    row("SequentialLR", optimizer=adamw, scheduler=sequential),
    row("a scheduler of the user", scheduler=Warm, eager=(1, "is not one of torch's schedulers")),
]  # fmt: skip

BATCHES = [
    row("short last batch", batch_size=8),
    row("drop_last", batch_size=8, drop_last=True),
    row("batches of one row", batch_size=1),
    row("max_grad_norm", optimizer=descent, max_grad_norm=0.1),
    row("max_grad_norm of batches", optimizer=adamw, max_grad_norm=0.1, batch_size=8),
    row("max_grad_norm one of two groups", Unused,
        optimizer=lambda m, _: SGD(m.used[0].parameters(), lr=0.1), max_grad_norm=0.1),
    row("x transposed", data=transposed),
    row("x is y", partial(mlp, 4), itself),
]  # fmt: skip

images = partial(floats, 3, 4, 4)
sequences = partial(floats, 5, 8)

MODELS = [
    row("convolutional in batches", convolutional, images, optimizer=momentum, batch_size=8),
    row("dropout in batches", lambda: nn.Sequential(mlp(8), nn.Dropout(0.3), nn.Linear(8, 2)),
        batch_size=8),
    row("lstm", lambda: Last(nn.LSTM(8, 6, batch_first=True)), sequences, optimizer=adamw),
    row("transformer", Transformer, sequences, optimizer=adamw),
    row("embedding", Embedded, words, optimizer=adamw),
    row("embedding max_norm", partial(Embedded, max_norm=1.0), words),
    row("layer norm", lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))),
    row("batch norm averaged", averaged, eager=(1, "reads a number from a tensor")),
    row("outside the optimizer", mlp, optimizer=lambda m, _: SGD(m[2].parameters(), lr=0.05)),
    row("spectral_norm", partial(normalized, parametrizations.spectral_norm)),
    row("old weight_norm", partial(normalized, nn.utils.weight_norm), eager=(1, "a forward hook")),
    row("channels_last in batches", channels_last, images_channels_last, batch_size=8, optimizer=adamw),
    row("float64", mlp_double, lambda: tuple(t.double() for t in floats(4)), optimizer=adamw),
    row("bfloat16", lambda: mlp().bfloat16(), lambda: tuple(t.bfloat16() for t in floats(4)),
        optimizer=descent),
    row("complex", Complex),
    row("rows", Rows, optimizer=adamw),
    row("graph", Graph),
]  # fmt: skip

LOSSES = [
    row("sum", loss=partial(nn.MSELoss, reduction="sum"), optimizer=of(GradientDescent, lr=0.001)),
    row("cross entropy", partial(mlp, 3), partial(classes, 4),
        lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1), adamw),
    row("a loss of the user", loss=lambda: relative_error),
    row("loss with parameters", loss=Uncertain, optimizer=with_loss(AdamW, lr=0.01, fused=True)),
]  # fmt: skip

CASES = [*OPTIMIZERS, *SCHEDULERS, *BATCHES, *MODELS, *LOSSES]


def made_case(name: str, steps: int) -> tuple[Made, dict[str, Any]]:
    """Return new objects of a case, and its options for so many steps."""
    case = next(case for case in CASES if case.name == name)
    return case.make(), case.options | {"steps": steps}
