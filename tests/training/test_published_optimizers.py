"""Optimizers that others have published, as a package lists them, train as in the loop by hand.

An optimizer that it lists is tried, whether it is named here or not. Most are made from the parameters
alone; `SETTINGS` has how the others are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.training.by_hand import Made, by_hand, by_train, contents, mlp, new_training
from torch import nn, optim

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

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
MATRICES_ONLY = {"SpectralSphere"}


#: Every optimizer that the package lists and does not take from torch, by its name.
LISTED = {
    f"{name}": kind
    for name, kind in sorted(vars(pytorch_optimizer).items())
    if isinstance(kind, type)
    and issubclass(kind, optim.Optimizer)
    and not kind.__module__.startswith("torch.optim")
}


# How they are made.


def of_the_parameters(**settings: Any) -> Make:
    return lambda kind, model: kind(model.parameters(), **settings)


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


#: Of those that are not made from the parameters alone.
SETTINGS: dict[str, Make] = {
    "AdaGO": with_matrices_apart,
    "AdaMuon": with_matrices_apart,
    "AdamMini": lambda kind, model: kind(model, lr=0.01),
    "Lookahead": around(optim.Adam),
    "Magma": around(optim.Adam),
    "Muon": with_matrices_apart,
    "MuonClip": with_matrices_apart,
    "NorMuon": with_matrices_apart,
    "OrthoGrad": around(optim.SGD),
    "PCGrad": around(optim.Adam),
    "Ranger21": of_the_parameters(num_iterations=40),
    # Trains only weights that begin close to 0: by default, none of these.
    "SaRA": of_the_parameters(threshold=0.3, lr=0.01),
    "ScheduleFreeWrapper": in_training_mode(around(optim.SGD)),
    "SpectralSphere": of_the_parameters(solver_max_iterations=10),
    "TRAC": around(optim.Adam),
} | {
    name: in_training_mode(of_the_parameters())
    for name in LISTED
    if "ScheduleFree" in name and not name.endswith("Wrapper")
}

#: Those that are left out, by what they need that a plain loop does not do.
NOT_TRIED = {
    "a closure": "AliG BSAM FriendlySAM GSAM LookSAM SAM WSAM",
    "gradients that have gradients": "AdaHessian SophiaH",
    "updates in the backward pass": "AdaLOMO LOMO",
    "a group of processes": "DeMo DistributedMuon",
    "a backward pass of its own": "SafeFP16Optimizer",
}

TRIED = [name for name in LISTED if name not in " ".join(NOT_TRIED.values()).split()]

STEPS = 12

pytestmark = [
    # Of pytorch_optimizer, where transformers is not installed.
    pytest.mark.filterwarnings("ignore:you need to install `transformers`:ImportWarning")
]


def test_at_least_seventy_are_trained():
    assert len(set(TRIED)) >= 70


#: Those that keep something of their own kind: the others are tried with `--sweep` alone.
OFTEN = ["AdamMini", "DAdaptSGD", "Lookahead", "Magma", "Prodigy", "SCION", "ScheduleFreeWrapper"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] * (name not in OFTEN)) for name in TRIED]
)
def test_training_has_the_bits_of_the_loop(name):
    try:
        expected = new_published_training(name)
        losses = by_hand(expected, steps=STEPS)
    except Exception as error:  # of an optimizer that a later version of its package has added
        pytest.skip(f"to be named in NOT_TRIED: {error!r}")
    left = contents(expected)
    trained = new_published_training(name)
    run = by_train(trained, steps=STEPS)
    assert run.losses["loss"].to_list() == losses
    assert contents(trained) == left
    assert run.verify(processes=1, progress=False).is_exact
