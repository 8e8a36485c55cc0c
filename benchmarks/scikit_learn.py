"""The diabetes experiment and scikit-learn's MLPRegressor on the very same rows: R², over seeds.

`python -m benchmarks.scikit_learn`. The data, its split and its scaling are everystep's; the
regressor has the same layers, and scikit-learn's own defaults otherwise, with as many epochs as it
wants to converge.
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from pathlib import Path

from sklearn.neural_network import MLPRegressor

import everystep
from everystep.experiment.data import make_data
from everystep.experiment.specification import load

__all__ = ["r2_of_both"]


def r2_of_both(seed: int) -> tuple[float, float]:
    """Return R² on the validation rows: everystep's, and MLPRegressor's."""
    experiment = load("diabetes", {"seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        run = everystep.train_experiment(experiment, run=Path(folder) / "run", progress=False)
        measured = {name: value for name, _, value in run.measurements.iter_rows()}
    data = make_data(experiment, "values").tensors()
    regressor = MLPRegressor(hidden_layer_sizes=(32,), max_iter=5000, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regressor.fit(data["x"].numpy(), data["y"].numpy().ravel())
    x, y = data["validation_x"], data["validation_y"]
    return measured["validation_r2"], float(regressor.score(x.numpy(), y.numpy().ravel()))


def main() -> None:
    """Print R² of both for ten seeds (each with a split of its own), and the medians."""
    pairs = [r2_of_both(seed) for seed in range(10)]
    print("seed  everystep  MLPRegressor")
    for seed, (ours, theirs) in enumerate(pairs):
        print(f"{seed:>4}  {ours:>9.3f}  {theirs:>12.3f}")
    medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
    print(f"{'median':<4}{medians[0]:>9.3f}  {medians[1]:>12.3f}")


if __name__ == "__main__":
    main()
