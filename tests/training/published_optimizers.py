"""Optimizers that others have published, as their packages list them, and how each is made.

An optimizer that a package lists is tried, whether it is named here or not, and once where two packages
list it. Most are made from the parameters alone. `SETTINGS` says how the others are made, `NEEDS` what
those need that a plain loop does not do, and `NOT_TRIED` which are left out, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.training.by_hand import Made, mlp, new_training
from torch import nn, optim

__all__ = ["NEEDS", "NOT_TRIED", "TRIED", "new_published_training"]

# Light imports all, without compilers.
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
torch_optimizer = pytest.importorskip("torch_optimizer")
schedulefree = pytest.importorskip("schedulefree")

Kind = Callable[..., optim.Optimizer]
Make = Callable[[Kind, nn.Module], optim.Optimizer]


def new_published_training(name: str) -> Made:
    """Return a training with the optimizer of this name; the same numbers at every call."""
    made = new_training(matrices if name in MATRICES_ONLY else mlp)
    make = SETTINGS.get(name) or of_the_parameters()
    made.optimizer = make(LISTED[name], made.model)
    return made


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))


#: They refuse other parameters than matrices.
MATRICES_ONLY = {"pytorch_optimizer.SpectralSphere"}


def _listed() -> dict[str, type[optim.Optimizer]]:
    """Return every optimizer that the packages list and do not take from torch, by its name."""
    found, names = {}, set()
    for package in (schedulefree, pytorch_optimizer, torch_optimizer):
        for name, kind in sorted(vars(package).items()):
            is_optimizer = isinstance(kind, type) and issubclass(kind, optim.Optimizer)
            is_torchs = is_optimizer and kind.__module__.startswith("torch.optim")
            if is_optimizer and not is_torchs and name.lower() not in names:
                names.add(name.lower())
                found[f"{package.__name__}.{name}"] = kind
    return found


LISTED = _listed()


# How they are made.


def of_the_parameters(**settings: Any) -> Make:
    return lambda kind, model: kind(model.parameters(), **settings)


def of_the_model(**settings: Any) -> Make:
    return lambda kind, model: kind(model, **settings)


def around(inner: Kind) -> Make:
    """Return how an optimizer is made that changes what another one does."""
    return lambda kind, model: kind(inner(model.parameters(), lr=0.02))


def with_matrices_apart(kind: Kind, model: nn.Module) -> optim.Optimizer:
    """Return an optimizer that trains matrices in one way, and all else in another."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return kind([{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}])


def in_training_mode(make: Make) -> Make:
    """Return how an optimizer is made that has a mode, as a module has."""

    def make_and_switch(kind: Kind, model: nn.Module) -> optim.Optimizer:
        optimizer: Any = make(kind, model)
        optimizer.train()
        return optimizer

    return make_and_switch


def gsam(kind: Kind, model: nn.Module) -> optim.Optimizer:
    inner = optim.SGD(model.parameters(), lr=0.02)
    schedule = optim.lr_scheduler.StepLR(inner, step_size=10)
    radius = pytorch_optimizer.ProportionScheduler(schedule, max_lr=0.02, min_lr=0.0)
    return kind(model.parameters(), inner, model, radius)


def wsam(kind: Kind, model: nn.Module) -> optim.Optimizer:
    return kind(model, model.parameters(), optim.SGD, lr=0.02)


#: Of those that are not made from the parameters alone.
SETTINGS: dict[str, Make] = {
    "pytorch_optimizer.AdaGO": with_matrices_apart,
    "pytorch_optimizer.AdaLOMO": of_the_model(),
    "pytorch_optimizer.AdaMuon": with_matrices_apart,
    "pytorch_optimizer.AdamMini": of_the_model(lr=0.01),
    "pytorch_optimizer.BSAM": of_the_parameters(num_data=20),
    "pytorch_optimizer.FriendlySAM": of_the_parameters(base_optimizer=optim.SGD, lr=0.02),
    "pytorch_optimizer.GSAM": gsam,
    "pytorch_optimizer.LOMO": of_the_model(),
    "pytorch_optimizer.LookSAM": of_the_parameters(base_optimizer=optim.SGD, lr=0.02),
    "pytorch_optimizer.Lookahead": around(optim.Adam),
    "pytorch_optimizer.Magma": around(optim.Adam),
    "pytorch_optimizer.Muon": with_matrices_apart,
    "pytorch_optimizer.MuonClip": with_matrices_apart,
    "pytorch_optimizer.NorMuon": with_matrices_apart,
    "pytorch_optimizer.OrthoGrad": around(optim.SGD),
    "pytorch_optimizer.PCGrad": around(optim.Adam),
    "pytorch_optimizer.Ranger21": of_the_parameters(num_iterations=40),
    "pytorch_optimizer.SAM": of_the_parameters(base_optimizer=optim.SGD, lr=0.02),
    # Trains only weights that begin close to 0: by default, none of these.
    "pytorch_optimizer.SaRA": of_the_parameters(threshold=0.3, lr=0.01),
    "pytorch_optimizer.ScheduleFreeWrapper": in_training_mode(around(optim.SGD)),
    "pytorch_optimizer.SpectralSphere": of_the_parameters(solver_max_iterations=10),
    "pytorch_optimizer.TRAC": around(optim.Adam),
    "pytorch_optimizer.WSAM": wsam,
} | {
    name: in_training_mode(of_the_parameters())
    for name, kind in LISTED.items()
    if kind.__module__.startswith("schedulefree.") and hasattr(kind, "train")
}

#: What the loop by hand cannot train with, and the word for what is missing that both errors must have,
#: that of the loop and everystep's. The first: a function that takes loss and gradients again.
NEEDS = {
    "pytorch_optimizer.AliG": "closure",
    "pytorch_optimizer.BSAM": "closure",
    "pytorch_optimizer.FriendlySAM": "closure",
    "pytorch_optimizer.LookSAM": "closure",
    "pytorch_optimizer.SAM": "closure",
    "pytorch_optimizer.WSAM": "closure",
    "schedulefree.AdamWScheduleFreeClosure": "closure",
    "schedulefree.RAdamScheduleFreeClosure": "closure",
    "schedulefree.SGDScheduleFreeClosure": "closure",
    # A closure that is set by a method.
    "pytorch_optimizer.GSAM": "'NoneType' object is not callable",
    # Gradients that have gradients.
    "pytorch_optimizer.AdaHessian": "does not have a grad_fn",
    "pytorch_optimizer.SophiaH": "does not have a grad_fn",
    # They update parameters in the backward pass, and have no step.
    "pytorch_optimizer.AdaLOMO": "NotImplementedError",
    "pytorch_optimizer.LOMO": "NotImplementedError",
}

#: Those that are left out, and why.
NOT_TRIED = {
    "pytorch_optimizer.DeMo": "needs einops, and a group of processes",
    "pytorch_optimizer.DistributedMuon": "needs a group of processes",
    "pytorch_optimizer.SafeFP16Optimizer": "scales the loss in a backward pass of its own",
}

TRIED = [name for name in LISTED if name not in NOT_TRIED]
