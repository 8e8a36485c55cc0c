"""What is killed: trainings that go on by themselves when they are called again.

Each is called with a directory. It begins there, or goes on with what a killed process left; it returns
when its last step is taken. Steps that it reports are lines `step<TAB>loss` on `lines`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from everystep import numerics

numerics.prepare()  # before torch computes

import numpy as np  # noqa: E402

# A process that is forked need not import them, which would take most of its time.
import safetensors.torch  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from tests.descent import descend  # noqa: E402
from tests.training import loops  # noqa: E402
from tests.training.loops import LOOPS  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import everystep  # noqa: E402
from everystep.experiment.specification import load  # noqa: E402
from everystep.recording import snapshots  # noqa: E402
from everystep.recording.database import FILE_NAME  # noqa: E402
from everystep.run import Run  # noqa: E402
from everystep.training.from_experiment import train_experiment  # noqa: E402
from everystep.training.from_objects import train_objects  # noqa: E402, F401
from everystep.training.job import StartingPoint  # noqa: E402
from everystep.training.record import Recording  # noqa: E402, F401
from everystep.views.progress import TerminalProgress  # noqa: E402

__all__ = ["STEP_FUNCTION", "TRAININGS", "Training", "named"]

BUDGET = 512_000_000


@dataclass(frozen=True)
class Training:
    """A training that is killed.

    steps: its last step; go: begins or goes on, called with the directory, what was prepared, the last
    step, and where to write lines; prepare: makes what it needs (a parent, say) in a directory, once;
    part: of the table; objects: returns what replays it, None where the run is enough.
    """

    name: str
    part: str
    steps: int
    go: Callable[[Path, Path, int, TextIO], None]
    prepare: Callable[[Path, int], None] | None = None
    objects: Callable[[], dict[str, Any]] | None = None

    def verified(self, place: Path) -> Any:
        """Take every step of its run again."""
        given = self.objects() if self.objects is not None else {}
        return everystep.open(place, **given).verify(processes=1)


TRAININGS: list[Training] = []


def named(names: str | None) -> list[Training]:
    """Return the trainings with these names, separated by commas; all for None.

    Raises:
        SystemExit: there is none of a name.
    """
    if names is None:
        return TRAININGS
    known = {each.name: each for each in TRAININGS}
    if unknown := [name for name in names.split(",") if name not in known]:
        raise SystemExit(f"no training {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def _lines(file: TextIO) -> TerminalProgress:
    def write(text: str) -> None:
        file.write(text)
        file.flush()

    return TerminalProgress(show_header=False, lines=write)


def _is_begun(place: Path) -> bool:
    """Tell whether there is a run; the generators of a process that goes on from a state are others."""
    is_begun = (place / FILE_NAME).exists()
    seed = int(is_begun and bool(Run(place).snapshots))
    random.seed(seed)
    np.random.seed(seed)
    return is_begun


def _goes_on(place: Path) -> bool:
    """Tell whether there is a run to finish."""
    return Run(place).status != "finished"


# Experiments

RANDOM = {"source": "random", "N": 64, "D_in": 8, "D_out": 2, "validation": 0.25}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "sgd-plateau-clipping": {
        "batch_size": 8,
        "max_grad_norm": 0.5,
        "evaluate_every": 5,
        "data": RANDOM,
        "model": {"layers": ["Linear(8, 16)", "Tanh()", "Linear(16, 2)"]},
        "loss": {"name": "MSELoss"},
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "scheduler": {"name": "ReduceLROnPlateau", "patience": 1, "every": "epoch"},
    },
    "adam-dropout-batch-norm": {
        "batch_size": 12,
        "data": RANDOM,
        "model": {
            "layers": ["Linear(8, 16)", "ReLU()", "Dropout(0.2)", "BatchNorm1d(16)", "Linear(16, 2)"]
        },
        "loss": {"name": "MSELoss"},
        "optimizer": {"name": "Adam", "lr": 0.01},
        "scheduler": {"name": "CosineAnnealingLR", "T_max": 1000},
    },
    "chapter-whole-batch": {
        "data": {"source": "random", "N": 16, "D_in": 20, "D_out": 4},
        "model": {"layers": ["Linear(20, 10)", "ReLU()", "Linear(10, 4)"]},
        "loss": {"name": "MSELoss", "reduction": "sum"},
        "optimizer": {"name": "GradientDescent", "lr": 1e-4},
    },
}


def _experiment(name: str) -> Callable[[Path, Path, int, TextIO], None]:
    def go(place: Path, prepared: Path, steps: int, lines: TextIO) -> None:
        if _is_begun(place):
            if _goes_on(place):
                Run(place).resume(progress=_lines(lines))
            return
        loaded = load(EXPERIMENTS[name] | {"steps": steps, "threads": 1})
        outcome = train_experiment(
            loaded, name, StartingPoint(directory=place, budget=BUDGET), _lines(lines)
        )
        if outcome.interrupted:
            raise KeyboardInterrupt

    return go


TRAININGS += [Training(name, "experiment", 1500, _experiment(name)) for name in EXPERIMENTS]


# Objects


class Own(torch.optim.Optimizer):
    """An optimizer of one's own, with a state that is not a tensor."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update; the step size falls with a count."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.mul_(0.9).add_(parameter.grad, alpha=0.1)
                parameter.sub_(mean * (group["lr"] / (1 + 0.01 * state["count"])))


class Rows(Dataset[Any]):
    """Rows that are computed when they are read."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.arange(6, dtype=torch.float32) * 0.1 + row * 0.01
        return x.sin(), x[:2].cos()


def _made() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 2))
    return {"model": model, "loss": nn.MSELoss()}


def _own_optimizer() -> dict[str, Any]:
    made = _made()
    return made | {"optimizer": Own(made["model"].parameters(), lr=0.05)}


def _dataset() -> dict[str, Any]:
    made = _made()
    return made | {"optimizer": torch.optim.AdamW(made["model"].parameters(), lr=0.01)}


def _trained(make: Callable[[], dict[str, Any]], data: Any) -> Callable[..., None]:
    def go(place: Path, prepared: Path, steps: int, lines: TextIO) -> None:
        made = make()
        if _is_begun(place):
            given: dict[str, Any] = {"data": data} if isinstance(data, Dataset) else {}
            if _goes_on(place):
                Run(place).resume(**made, **given, progress=_lines(lines))
            return
        everystep.train(
            made["model"],
            data,
            loss=made["loss"],
            optimizer=made["optimizer"],
            steps=steps,
            batch_size=8,
            threads=1,
            run=place,
            progress=_lines(lines),
        )

    return go


def _tensors() -> tuple[torch.Tensor, torch.Tensor]:
    # No operation of torch may run where processes are forked.
    rows = np.random.default_rng(0)
    x = rows.normal(size=(40, 6)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(x[:, :2]))


TRAININGS += [
    Training(
        "own-optimizer", "objects", 600, _trained(_own_optimizer, _tensors()), objects=_own_optimizer
    ),
    Training("dataset-read-live", "objects", 600, _trained(_dataset, Rows())),
]


# Your own loop


class _Reporting:
    """A recording that reports the steps that are written, as a training by everystep does."""

    def __init__(self, recording: Any, lines: TextIO) -> None:
        self._recording = recording
        shown = _lines(lines)
        recording._advanced = lambda first, losses: shown.advance(first, losses)

    def __enter__(self) -> Any:
        return self._recording.__enter__()

    @property
    def step_count(self) -> int:
        """How many steps the run has."""
        return int(self._recording.step_count)

    def __exit__(self, *error: Any) -> None:
        self._recording.__exit__(*error)


def _recording(place: Path, lines: TextIO, **parts: Any) -> _Reporting:
    # Such short loops would have no state but the first one, at which each would begin again.
    snapshots.REPLAY_SECONDS, snapshots.TIME_SHARE = 0.0, 1e9
    return _Reporting(everystep.record(run=place, resume=True, **parts), lines)


def _loop(name: str) -> Callable[[Path, Path, int, TextIO], None]:
    def go(place: Path, prepared: Path, steps: int, lines: TextIO) -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        made: list[_Reporting] = []

        def counted(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
            """Count from the step at which the loop goes on, as `enumerate` would not."""
            for batch in batches:
                yield made[0].step_count, batch

        def record(**parts: Any) -> _Reporting:
            made.append(_recording(place, lines, **parts))
            return made[0]

        vars(loops)["enumerate"] = counted
        LOOPS[name](steps, record)

    return go


class Noisy(Dataset[Any]):
    """Rows with noise that is drawn when they are read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((6,), row * 0.02) + 0.1 * torch.randn(6)
        return x, x[:2].abs()


def _augmented(workers: int) -> Callable[[Path, Path, int, TextIO], None]:
    def go(place: Path, prepared: Path, steps: int, lines: TextIO) -> None:
        _is_begun(place)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.9)
        loader = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        with _recording(place, lines, **parts) as recording:
            while recording.step_count < steps or recording.is_resuming:
                for x, y in recording.steps(loader):
                    loss = descend(optimizer, nn.functional.mse_loss(model(x), y))
                    scheduler.step()
                    recording.log(loss=loss, size=x.abs().mean())
        assert recording.run.summary().steps >= steps

    return go


OWN = [
    "classifier_with_dropout",
    "gan_with_two_optimizers",
    "language_model_with_accumulation_and_clipping",
    "gradient_scaler_with_an_overflow",
    "two_schedulers_and_layers_unfrozen_on_the_way",
    "averaged_weights_with_batch_norm",
]
TRAININGS += [Training(name.replace("_", "-"), "own loop", 120, _loop(name)) for name in OWN]
TRAININGS += [
    Training("augmentation", "own loop", 120, _augmented(0)),
    Training("loader-with-workers", "own loop", 40, _augmented(2)),
]


# A step function, which ends by a signal, and does not go on


def _function(place: Path, prepared: Path, steps: int, lines: TextIO) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = _tensors()

    def step() -> Any:
        return descend(optimizer, nn.functional.mse_loss(model(x), y))

    parts = {"model": model, "optimizer": optimizer}
    shown = _lines(lines)
    everystep.train(step, None, parts=parts, steps=steps, run=place, progress=shown)


STEP_FUNCTION = Training("step-function", "step function", 4000, _function)


# Forks and measurements


def _parent(place: Path, steps: int) -> None:
    random.seed(0)
    loaded = load(EXPERIMENTS["adam-dropout-batch-norm"] | {"steps": steps, "threads": 1})
    with Path("/dev/null").open("w") as nowhere:
        origin = StartingPoint(directory=place / "parent", budget=BUDGET)
        train_experiment(loaded, "parent", origin, _lines(nowhere))


def _fork(place: Path, prepared: Path, steps: int, lines: TextIO) -> None:
    if _is_begun(place):
        if _goes_on(place):
            Run(place).resume(progress=_lines(lines))
        return
    parent = Run(prepared / "parent")
    parent.fork(steps // 2 + 3, {"optimizer.lr": 0.003}, run=place, progress=_lines(lines))


def _measure(place: Path, prepared: Path, steps: int, lines: TextIO) -> None:
    if not _is_begun(place):
        part = place.with_name("copy")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(prepared / "parent", part)
        part.rename(place)
    for question in ("norm(gradients['0.weight'])", "mean(activations['1'])"):
        Run(place).measure(question, processes=1)


TRAININGS += [
    Training("fork-with-another-lr", "fork", 1500, _fork, prepare=_parent),
    Training("measure", "measure", 1500, _measure, prepare=_parent),
]
