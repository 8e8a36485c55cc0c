"""What is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """A two-layer network on random data: N rows, D_in to H to D_out, by the chapter's update."""

    name: str
    N: int
    D_in: int
    H: int
    D_out: int
    steps: int
    lr: float

    def make(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the model, x (N, D_in) and y (N, D_out), the same at every call."""
        torch.manual_seed(0)
        x, y = torch.randn(self.N, self.D_in), torch.randn(self.N, self.D_out)
        layers = nn.Linear(self.D_in, self.H), nn.ReLU(), nn.Linear(self.H, self.D_out)
        return nn.Sequential(*layers), x, y


WORKLOADS = [
    Workload("chapter, 500 steps", 64, 1000, 100, 10, steps=500, lr=1e-4),
    Workload("chapter, 2,000 steps", 64, 1000, 100, 10, steps=2000, lr=1e-6),
]
