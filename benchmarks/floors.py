"""What no step can be faster than: its matrix products, and the machine's peak."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import NotComparable, Training
from benchmarks.workloads import Perceptron, Workload

__all__ = ["flops_a_step", "peak_flops", "prepare_products"]


_Addmm = tuple[Tensor, Tensor, Tensor, Tensor]  # bias, x, weight, out
_Mm = tuple[Tensor, Tensor, Tensor]  # left, right, out


def prepare_products(workload: Workload, folder: Path) -> Training:
    """Return the matrix products of every step, into buffers allocated here; gives no losses.

    Raises:
        NotComparable: the network has more than linear layers.
    """
    if not isinstance(workload.network, Perceptron):
        raise NotComparable("is for linear layers only")
    start = workload.make()
    forward, backward = _products(start.model, start.x[: workload.rows_a_step])

    def compute() -> list[float]:
        with torch.inference_mode():
            for _ in range(workload.steps):
                for bias, x, weight, out in forward:
                    torch.addmm(bias, x, weight, out=out)
                for left, right, out in backward:
                    torch.mm(left, right, out=out)
        return []

    return compute


def _products(model: nn.Module, x: Tensor) -> tuple[list[_Addmm], list[_Mm]]:
    """Return the arguments of the forward and of the backward pass, each in its order."""
    forward: list[_Addmm] = []
    backward: list[_Mm] = []
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.Linear)):
        weight, bias = layer.weight.detach(), layer.bias.detach()
        out = torch.zeros(len(x), layer.out_features)
        gradient = torch.randn_like(out)
        forward.append((bias, x, weight.t(), out))
        products = [(gradient.t(), x, torch.zeros_like(weight))]
        if backward:  # the first layer's input needs no gradient
            products.append((gradient, weight, torch.zeros_like(x)))
        backward = products + backward
        x = torch.randn_like(out)  # stands for the activations: the same shape, other numbers
    return forward, backward


@cache
def flops_a_step(workload: Workload) -> int:
    """Count the floating point operations of the products and convolutions of one plain step."""
    start = workload.make()
    x, y = start.x[: workload.rows_a_step], start.y[: workload.rows_a_step]
    # Within the fused attention nothing is counted; the plain one has the same products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        start.loss(start.model(x), y).backward()
    return int(counter.get_total_flops())


def peak_flops(size: int = 2048, repetitions: int = 6) -> float:
    """Return the most float32 operations a second of a few square `torch.mm`."""
    left, right, out = (torch.randn(size, size) for _ in range(3))
    fastest = float("inf")
    for _ in range(repetitions):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest
