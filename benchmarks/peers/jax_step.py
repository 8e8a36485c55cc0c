"""JAX: the same networks as functions, the step jitted, or the whole loop in one `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from torch import Tensor

from benchmarks.peers import Training
from benchmarks.peers.jax_networks import forward, parameters_of
from benchmarks.workloads import Workload

__all__ = ["prepare_scan", "prepare_step"]

Step = Callable[..., tuple[Any, Any, Any]]


def prepare_step(workload: Workload, folder: Path) -> Training:
    """Return the Python loop over the jitted step; compiled in the first run of a workload."""
    parameters, x, y = _start(workload)
    order = workload.order()
    batches = [None] * workload.steps if order is None else list(order.int().numpy())
    step = _jitted_step(workload)

    def train() -> list[float]:
        own = jax.tree.map(jnp.copy, parameters)  # the step takes over what it is given
        state = _optimizer(workload).init(own)
        losses = []
        for rows in batches:
            own, state, loss = step(own, state, x, y, rows)
            losses.append(loss)
        # Read at the end, so that a step need not wait for the one before it.
        return [float(loss) for loss in losses]

    return train


def prepare_scan(workload: Workload, folder: Path) -> Training:
    """Return the one call that runs all steps; compiled in the first run of a workload."""
    parameters, x, y = _start(workload)
    order = workload.order()
    rows = None if order is None else jnp.asarray(order.int().numpy())
    run = _jitted_run(workload)

    def train() -> list[float]:
        losses: list[float] = np.asarray(run(parameters, x, y, rows)).tolist()
        return losses

    return train


@cache
def _jitted_step(workload: Workload) -> Any:
    return jax.jit(_step(workload), donate_argnums=(0, 1))


@cache
def _jitted_run(workload: Workload) -> Any:
    step = _step(workload)

    def run(parameters: Any, x: Any, y: Any, order: Any) -> Any:
        def body(carry: Any, rows: Any) -> Any:
            *carry, loss = step(*carry, x, y, rows)
            return tuple(carry), loss

        carry = parameters, _optimizer(workload).init(parameters)
        return jax.lax.scan(body, carry, order, length=workload.steps)[1]

    return jax.jit(run)


def _step(workload: Workload) -> Step:
    """Return the step: parameters and optimizer state to those after it, and its loss."""
    optimizer = _optimizer(workload)

    def loss_of(parameters: Any, x: Any, y: Any) -> Any:
        prediction = forward(workload.network, parameters, x)
        if workload.data == "random":
            return jnp.sum(jnp.square(prediction - y))
        return optax.softmax_cross_entropy_with_integer_labels(prediction, y).mean()

    def step(parameters: Any, state: Any, x: Any, y: Any, rows: Any) -> tuple[Any, Any, Any]:
        if rows is not None:
            x, y = x[rows], y[rows]
        loss, gradients = jax.value_and_grad(loss_of)(parameters, x, y)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    return step


def _optimizer(workload: Workload) -> optax.GradientTransformation:
    match workload.update:
        case "gradient descent":
            return optax.sgd(workload.lr)
        case "Adam":
            return optax.adam(workload.lr)
        case "AdamW":
            return optax.adamw(workload.lr, weight_decay=1e-2)


def _start(workload: Workload) -> tuple[Any, Any, Any]:
    start = workload.make()
    return parameters_of(start.model), _array(start.x), _array(start.y)


def _array(tensor: Tensor) -> Any:
    array = tensor.numpy()
    return jnp.array(array.astype(np.int32) if array.dtype == np.int64 else array)
