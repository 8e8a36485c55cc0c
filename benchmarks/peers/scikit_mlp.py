"""scikit-learn's MLPRegressor and MLPClassifier, started from the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import Tensor, nn

from benchmarks.peers import NotComparable, Training
from benchmarks.workloads import SEED, Perceptron, Start, Workload

__all__ = ["prepare"]


def prepare(workload: Workload, folder: Path) -> Training:
    """Return the training from making the estimator to its loss curve.

    Raises:
        NotComparable: not a network or an update that scikit-learn has.
    """
    if not isinstance(workload.network, Perceptron):
        raise NotComparable("has linear layers only")
    if workload.update == "AdamW":
        raise NotComparable("has no AdamW")
    start = workload.make()
    x, y = start.x.numpy(), start.y.numpy()
    if workload.data == "random":
        y = y.ravel() if y.shape[1] == 1 else y
        # Its loss is half the mean of squares over rows and outputs, but its gradient that of half
        # their mean over rows: the sum of squares has 2 * rows times that gradient.
        lr, unit = workload.lr * 2 * workload.rows, 2.0 * start.y.numel()
    else:
        lr, unit = workload.lr, 1.0

    def train() -> list[float]:
        estimator = _estimator(workload, start, lr)
        estimator.fit(x, y)
        return [unit * float(loss) for loss in estimator.loss_curve_]

    return train


def _estimator(workload: Workload, start: Start, lr: float) -> Any:
    assert isinstance(workload.network, Perceptron)
    base = MLPRegressor if workload.data == "random" else MLPClassifier
    parameters = _parameters(start.model)
    return _started(base, parameters)(
        hidden_layer_sizes=workload.network.sizes[1:-1],
        solver="sgd" if workload.update == "gradient descent" else "adam",
        momentum=0.0,
        nesterovs_momentum=False,
        alpha=0.0,
        learning_rate_init=lr,
        batch_size=workload.rows_a_step,
        shuffle=workload.batch_size is not None,
        random_state=SEED,
        max_iter=workload.epochs,
        n_iter_no_change=workload.epochs + 1,  # it must not stop early
    )


def _parameters(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return the weight (inputs, outputs) and the bias of every linear layer."""

    def copied(tensor: Tensor) -> Any:
        return np.ascontiguousarray(tensor.detach().numpy()).copy()

    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [(copied(layer.weight.T), copied(layer.bias)) for layer in linear]


def _started(base: Any, parameters: list[tuple[Any, Any]]) -> Any:
    """Return the estimator's class, its first parameters being these: it has no public way."""
    remaining = iter(parameters)

    class Started(base):  # type: ignore[misc]
        def _init_coef(self, fan_in: int, fan_out: int, dtype: Any) -> tuple[Any, Any]:
            return next(remaining)

    return Started
