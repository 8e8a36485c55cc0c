"""Optimizers that others have published, as their packages list them, train as in the loop by hand.

An optimizer that a package lists is tried, whether it is named here or not, and once where two packages
list it. Most are made from the parameters alone; `SETTINGS` has how the others are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.training.by_hand import Made, by_hand, by_train, contents, mlp, new_training
from torch import nn, optim

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
    "pytorch_optimizer.AdaGO": with_matrices_apart,
    "pytorch_optimizer.AdaMuon": with_matrices_apart,
    "pytorch_optimizer.AdamMini": lambda kind, model: kind(model, lr=0.01),
    "pytorch_optimizer.Lookahead": around(optim.Adam),
    "pytorch_optimizer.Magma": around(optim.Adam),
    "pytorch_optimizer.Muon": with_matrices_apart,
    "pytorch_optimizer.MuonClip": with_matrices_apart,
    "pytorch_optimizer.NorMuon": with_matrices_apart,
    "pytorch_optimizer.OrthoGrad": around(optim.SGD),
    "pytorch_optimizer.PCGrad": around(optim.Adam),
    "pytorch_optimizer.Ranger21": of_the_parameters(num_iterations=40),
    # Trains only weights that begin close to 0: by default, none of these.
    "pytorch_optimizer.SaRA": of_the_parameters(threshold=0.3, lr=0.01),
    "pytorch_optimizer.ScheduleFreeWrapper": in_training_mode(around(optim.SGD)),
    "pytorch_optimizer.SpectralSphere": of_the_parameters(solver_max_iterations=10),
    "pytorch_optimizer.TRAC": around(optim.Adam),
} | {
    name: in_training_mode(of_the_parameters())
    for name, kind in LISTED.items()
    if kind.__module__.startswith("schedulefree.") and hasattr(kind, "train")
}

#: Those that are left out, by what they need that a plain loop does not do.
NOT_TRIED = {
    "a closure": "pytorch_optimizer.AliG pytorch_optimizer.BSAM pytorch_optimizer.FriendlySAM "
    "pytorch_optimizer.GSAM pytorch_optimizer.LookSAM pytorch_optimizer.SAM pytorch_optimizer.WSAM "
    "schedulefree.AdamWScheduleFreeClosure schedulefree.RAdamScheduleFreeClosure "
    "schedulefree.SGDScheduleFreeClosure",
    "gradients that have gradients": "pytorch_optimizer.AdaHessian pytorch_optimizer.SophiaH",
    "updates in the backward pass": "pytorch_optimizer.AdaLOMO pytorch_optimizer.LOMO",
    "a group of processes": "pytorch_optimizer.DeMo pytorch_optimizer.DistributedMuon",
    "a backward pass of its own": "pytorch_optimizer.SafeFP16Optimizer",
}

TRIED = [name for name in LISTED if name not in " ".join(NOT_TRIED.values()).split()]

STEPS = 12

pytestmark = [
    # Of torch, about the oldest ones of torch_optimizer.
    pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning"),
    # Of pytorch_optimizer, where transformers is not installed.
    pytest.mark.filterwarnings("ignore:you need to install `transformers`:ImportWarning"),
]


def test_at_least_seventy_are_trained():
    assert len(set(TRIED)) >= 70


@pytest.mark.sweep(every=10)
@pytest.mark.parametrize("name", TRIED)
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
