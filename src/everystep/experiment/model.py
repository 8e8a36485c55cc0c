"""The model: a sequence of layers, built and tested before training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from everystep.errors import ModelError
from everystep.experiment.catalogue import make_layer
from everystep.experiment.specification import Model

__all__ = ["build_model", "try_model"]


def build_model(model: Model, x: Tensor) -> nn.Sequential:
    """Create the layers, drawing their parameters from torch's global generator (CPU).

    x: a few rows (n, ...): lazy layers infer their sizes from them.

    Raises:
        ModelError: a layer rejects its arguments.
    """
    layers = []
    for index, text in enumerate(model.layers):
        try:
            layers.append(make_layer(text))
        except Exception as error:  # any error that torch raises for the user's arguments
            raise ModelError(f"model.layers[{index}]: {text}: {error}") from None
    made = nn.Sequential(*layers)
    if any(isinstance(layer, LazyModuleMixin) for layer in made.modules()):
        # In training mode, dropout would draw, and batch norm would count these rows.
        _run_through(made.eval(), x, model.layers)
        made.train()
    return made


def try_model(model: nn.Sequential, x: Tensor, layers: list[str], origin: str = "the data") -> Tensor:
    """Run rows x (n, ...) through a copy, as in training, and return its output (n, ...).

    It changes neither the model nor any random generator. origin: the name of the source of x.

    Raises:
        ModelError: names the first layer that does not fit, the expected and the actual shape.
    """
    # Dropout draws in the copy, and the training must begin with the same draws as without the trial.
    with torch.random.fork_rng(devices=[]):
        return _run_through(copy.deepcopy(model), x, layers, origin)


@torch.no_grad()
def _run_through(model: nn.Sequential, x: Tensor, layers: list[str], given: str = "the data") -> Tensor:
    for index, layer in enumerate(model):
        place = f"model.layers[{index}]: {layers[index]}"
        if wrong := _mismatch(layer, x):
            raise ModelError(f"{place} expects {wrong}, but {given} has shape {tuple(x.shape)}")
        try:
            x = layer(x)
        except Exception as error:  # each layer has its own
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"{place} fails on {tuple(x.shape)} {x.dtype} from {given}: {reason}"
            ) from None
        if not isinstance(x, Tensor):
            raise ModelError(
                f"{place} returns a {type(x).__name__}, not one tensor, so no layer can follow it; "
                "train such a model from Python with everystep.train"
            )
        given = f"layers[{index}] ({layers[index]})"
    return x


def _mismatch(layer: nn.Module, x: Tensor) -> str:
    """Return the size that a layer expects of its input x; empty if x has it, or it is not known."""
    for attribute, what, dimension in (
        ("in_features", "features", -1),
        ("in_channels", "channels", 1),
        ("num_features", "features", 1),
        ("num_channels", "channels", 1),
    ):
        count: Any = getattr(layer, attribute, None)
        if isinstance(count, int) and count > 0:
            if -x.ndim <= dimension < x.ndim and x.shape[dimension] == count:
                return ""
            where = "in the last dimension" if dimension == -1 else f"in dimension {dimension}"
            return f"{count} {what} {where}"
    return ""
