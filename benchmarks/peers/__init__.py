"""Who trains it: one module for each framework, imported only when it is used.

Every peer starts from the same parameters and data, takes the same number of updates, and returns
its losses, so that none can leave work out.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from benchmarks.workloads import Workload

__all__ = ["PEERS", "PLAIN", "NotComparable", "Peer", "Training"]

#: What is timed: trains and returns the loss of every step, or the mean loss of every epoch where
#: the framework gives no more; a floor returns nothing. Good for one call.
Training = Callable[[], Sequence[float]]


class NotComparable(Exception):  # noqa: N818  (nothing went wrong)
    """The framework does not have this network or this update."""


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Args:
        key: its name on the command line.
        name: its name in the table.
        place: `module:function`; the function takes a workload and an empty folder, does what is
            not timed (data, parameters, the framework's model) and returns the training.
        note: its configuration, what is off, and what differs from the plain loop.
        packages: import name and distribution of each package that it needs besides torch.
        is_floor: computes a part of the step only, so it has no losses.
    """

    key: str
    name: str
    place: str
    note: str
    packages: tuple[tuple[str, str], ...] = ()
    is_floor: bool = False

    @property
    def missing(self) -> list[str]:
        """The distributions that would have to be installed."""
        return [name for module, name in self.packages if importlib.util.find_spec(module) is None]

    def prepare(self, workload: Workload, folder: Path) -> Training:
        """Return the training, ready to start.

        Raises:
            NotComparable: the framework does not have this network or this update.
        """
        module, function = self.place.split(":")
        prepare = getattr(importlib.import_module(module), function)
        return cast(Training, prepare(workload, folder))


PLAIN = Peer(
    "plain",
    "plain PyTorch loop",
    "benchmarks.peers.plain_loop:prepare",
    "The chapter's loop, or torch's fused optimizer, written out by hand; every loss is read at its "
    "step with `.item()` and kept in a list. Records nothing.",
)

_RECORDED = (
    "Everything is recorded: the time is from an empty directory to the finished run on disk, opened "
    "again and its losses read back. It draws the order of the batches itself; the others are handed it."
)

PEERS = [
    PLAIN,
    Peer(
        "everystep-eager",
        "everystep, eager",
        "benchmarks.peers.everystep_train:prepare_eager",
        f'`engine="eager"`. {_RECORDED} Where there is an optimizer, it zeroes gradients without the '
        "mark for torch's profiler that `optimizer.zero_grad()` sets in the plain loop.",
    ),
    Peer(
        "everystep-program",
        "everystep, program",
        "benchmarks.peers.everystep_train:prepare_program",
        '`engine="program"`; capturing and checking the program is within the time. Recorded as above.',
    ),
    Peer(
        "lightning",
        "PyTorch Lightning",
        "benchmarks.peers.lightning_trainer:prepare",
        "`Trainer(barebones=True)`, Lightning's mode for measuring its own overhead: no checkpoints, "
        "logger, progress bar, model summary or sanity check. One epoch of all steps, batches straight "
        "from memory, not a DataLoader; each loss read with `.item()`. The plain loop's optimizer.",
        (("lightning", "lightning"),),
    ),
    Peer(
        "skorch",
        "skorch",
        "benchmarks.peers.skorch_net:prepare",
        'A `NeuralNet` with `callbacks="disable"`, `train_split=None` (no validation), `verbose=0`. One '
        "epoch of all steps, batches straight from memory instead of a DataLoader; the losses are those "
        "of skorch's history. The plain loop's optimizer.",
        (("skorch", "skorch"),),
    ),
    Peer(
        "keras",
        "Keras on torch",
        "benchmarks.peers.keras_model:prepare",
        "Keras' layers, losses and optimizers, `train_on_batch` for every step, which is faster than "
        "`fit` here: no callbacks, progress bar or metrics; not compiled (`jit_compile=False`, its "
        "default on torch). Its Adam adds epsilon before it corrects the bias, torch's after.",
        (("keras", "keras"),),
    ),
    Peer(
        "jax",
        "JAX, step jitted",
        "benchmarks.peers.jax_step:prepare_step",
        "The network as a function, optax's optimizer, buffers donated, losses read at the end; float32 "
        "on the CPU with as many threads as XLA takes (`torch`'s thread setting does not bind it). "
        "Compiled in the first run, which is not among the rounds.",
        (("jax", "jax"), ("optax", "optax")),
    ),
    Peer(
        "jax-scan",
        "JAX, loop in lax.scan",
        "benchmarks.peers.jax_step:prepare_scan",
        "As above, but all steps are one call: nothing can be looked at, or stopped, before the last. "
        "XLA's convolutions are known to be slow within loops on the CPU (jax-ml/jax issue 12868).",
        (("jax", "jax"), ("optax", "optax")),
    ),
    Peer(
        "scikit-learn",
        "scikit-learn",
        "benchmarks.peers.scikit_mlp:prepare",
        "MLPRegressor and MLPClassifier in float32, `alpha=0`, no momentum, no early stopping. Its "
        "gradient is that of half the mean of squares, so `learning_rate_init` is the workload's times "
        "2 rows, and its loss is scaled back. Mini-batches: in an order of its own, and only the mean "
        "loss of each epoch, which is compared to the plain loop's. Its Adam is as Keras'.",
        (("sklearn", "scikit-learn"),),
    ),
    Peer(
        "products",
        "floor: matrix products alone",
        "benchmarks.floors:prepare_products",
        "The `torch.addmm` and `torch.mm` of the forward and the backward pass, into buffers allocated "
        "before, and nothing else: no activations, loss, bias gradients or update.",
        is_floor=True,
    ),
]
