"""What small trainings of many tests have in common."""

import torch
from torch import nn

import everystep

__all__ = ["descend", "trained"]


def descend(optimizer, loss):
    """Zero the gradients, compute and use them, and return the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def trained(model, data, **options):
    """Train by mean squares and gradient descent, unless the options are others; return the run."""
    settings = {"loss": nn.MSELoss(), "progress": False} | options
    settings.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    return everystep.train(model, data, **settings)
