"""Trainings on a device that is not the CPU, and what can be asked of their runs.

`python -m benchmarks.device [--device cuda]`. Without a device, it simulates one that has memory of its
own (`simulated.cpp`; needs a C++ compiler, and a minute for the first time). Prints for each training
whether it has the bits of a loop without everystep on the same device, and whether each question about
its run is answered rightly; then the reason for each no.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.device import LOOKED_AT
from benchmarks.device.simulated import NAME, path_of

if TYPE_CHECKING:
    from benchmarks.device.trainings import Trained, Training

__all__ = ["main"]

_IS_CHILD = "EVERYSTEP_SIMULATES_A_DEVICE"


def main() -> None:
    """Print the table; exit with 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--device", help="cuda, xpu, mps; default: a simulated one")
    device = parser.parse_args().device
    if device is None and _IS_CHILD not in os.environ:
        with tempfile.TemporaryDirectory() as place:
            variables = os.environ | {"PYTHONPATH": path_of(Path(place)), _IS_CHILD: "1"}
            raise SystemExit(subprocess.call([sys.executable, "-m", "benchmarks.device"], env=variables))
    from everystep import numerics

    numerics.prepare()
    from benchmarks.device.trainings import TRAININGS

    print(f"| training on {device or NAME} | {' | '.join(_QUESTIONS)} |")
    print("| --- |" + " --- |" * len(_QUESTIONS))
    reasons: list[str] = []
    for name, training in TRAININGS.items():
        with tempfile.TemporaryDirectory() as place:
            reasons += _print_row(name, training, device or NAME, Path(place))
    print("", *reasons, sep="\n")
    raise SystemExit(1 if reasons else 0)


def _print_row(name: str, training: Training, device: str, place: Path) -> list[str]:
    """Print whether each question is answered rightly; return the reasons for each no."""
    expected = training.by_hand(device, 0.01)
    run, found = training.by_everystep(device, 0.01, place / "run")
    other, _ = training.by_everystep(device, 0.02, place / "other")
    said, reasons = [], []
    for question, is_right in _QUESTIONS.items():
        try:
            wrong = is_right(run, other, found, expected)
        except Exception as error:  # which is what is looked for
            wrong = f"{type(error).__name__}: {error}"
        is_asked = wrong != _NOT_ASKED
        said.append(("NO" if wrong else "yes") if is_asked else _NOT_ASKED)
        reasons += [f"{name}: {question}: {wrong}"] if wrong and is_asked else []
    print(f"| {name} | {' | '.join(said)} |", flush=True)
    return reasons


#: What a question returns that has no meaning for a training.
_NOT_ASKED = "-"
#: Each takes the run, the same with another learning rate, and what came of it by everystep and by hand;
#: it returns what is wrong.
Question = Callable[[Any, Any, "Trained", "Trained"], str | None]


def _has_same_bits(run: Any, other: Any, found: Trained, expected: Trained) -> str | None:
    import torch

    if found.losses != expected.losses:
        return "other losses"
    wrong = [n for n, t in expected.parameters.items() if not torch.equal(t, found.parameters[n])]
    return f"other {', '.join(wrong)}" if wrong else None


def _verifies(run: Any, other: Any, found: Trained, expected: Trained) -> str | None:
    verification = run.verify(progress=False)
    return None if verification.is_exact else str(verification)


def _opens(run: Any, other: Any, found: Trained, expected: Trained) -> str | None:
    import torch

    step = run[LOOKED_AT]
    wrong = [n for n, t in expected.gradients.items() if not torch.equal(t.cpu(), step.gradients[n])]
    return f"other gradients of {', '.join(wrong)}" if wrong else None


def _measures(run: Any, other: Any, found: Trained, expected: Trained) -> str | None:
    wrong = []
    for name, gradient in expected.gradients.items():
        expression = f"norm(gradients['{name}'])"
        value = run.measure(expression, progress=False).values[LOOKED_AT]
        if abs(value - gradient.norm().item()) > 1e-5 * abs(value):
            wrong.append(f"{expression} is {value}, not {gradient.norm().item()}")
    return "; ".join(wrong) or None


def _says_why(run: Any, other: Any, found: Trained, expected: Trained) -> str | None:
    wrong = []
    for name, gradient in expected.gradients.items():
        index = [size // 2 for size in gradient.shape]
        answer = run.why(LOOKED_AT, f"gradients['{name}']{index}", depth=3)
        if answer.number.value != gradient[tuple(index)].item() or answer.origin != "operation":
            wrong.append(f"gradients['{name}']{index}: {answer!r}")
    return "; ".join(wrong) or None


def _knows_rows(run: Any, other: Any, found: Trained, expected: Trained) -> str | None:
    mean = float(run.rows(LOOKED_AT).loss.mean())
    loss = expected.losses[LOOKED_AT - 1]
    return None if abs(mean - loss) < 1e-5 * abs(loss) else f"the mean of the rows is {mean}, not {loss}"


def _finds_difference(run: Any, other: Any, found: Trained, expected: Trained) -> str | None:
    same = run.diff(run, thorough=True, progress=False)
    causes = str(run.diff(other, progress=False).operation.causes)
    if not same.is_same:
        return f"of a run with itself: {same}"
    return None if "lr" in causes else causes


def _forks(run: Any, other: Any, found: Trained, expected: Trained) -> str | None:
    if run.facts.training.loop is not None:  # its code alone goes on
        return _NOT_ASKED
    fork = run.fork(0, lr=0.02, run=f"{run.directory}-fork", progress=False)
    return None if fork.losses.equals(other.losses) else "other losses than trained from the start"


_QUESTIONS: dict[str, Question] = {
    "same bits": _has_same_bits,
    "verify": _verifies,
    "step": _opens,
    "measure": _measures,
    "why": _says_why,
    "rows": _knows_rows,
    "diff": _finds_difference,
    "fork": _forks,
}

if __name__ == "__main__":
    main()
