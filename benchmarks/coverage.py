"""Which modules and optimizers of torch are trained by a program, and why others are not.

`python -m benchmarks.coverage [--write docs/coverage.md]`. Every sample of torch's own list of
modules (one or two of each), and every optimizer of `torch.optim`, is trained for 50 steps by the
engine and by a loop written out by hand; it counts as "by program" only where losses, parameters and
buffers have the same bits.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.lr_scheduler import StepLR  # noqa: E402

import everystep  # noqa: E402
from everystep.errors import TrainingError  # noqa: E402
from everystep.experiment.batches import Batches  # noqa: E402
from everystep.step.state import same_bits  # noqa: E402
from everystep.training.model_step import Training  # noqa: E402
from everystep.training.stepper import Stepper  # noqa: E402
from everystep.training.writer import Unwritten  # noqa: E402

__all__ = ["coverage_page"]

STEPS = 50
BEGIN, END = "<!-- python -m benchmarks.coverage -->", "<!-- end of coverage -->"

Make = Callable[[], Training]


class Outcome(NamedTuple):
    """How a training went: whether it has the bits of the loop by hand, or why no program ran it."""

    same: bool
    reason: str | None


def main() -> None:
    """Print the tables, or write them into a page between its two marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    target = parser.parse_args().write
    text = coverage_page()
    if target is None:
        print(text)
        return
    before, _, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    target.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def coverage_page() -> str:
    """Return both tables as Markdown."""
    with numerics.in_force(threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = {name: outcome(make) for name, make in _modules()}
        optimizers = {name: outcome(make) for name, make in _optimizers(None)}
        scheduled = {name: outcome(make) for name, make in _optimizers(_step_scheduler)}
    by_program = sorted({name.split("-")[0] for name, each in modules.items() if not each.reason})
    eagerly = {name: each for name, each in modules.items() if each.reason}
    exact = sum(each.same and not each.reason for each in modules.values())
    lines = [
        f"torch {torch.__version__}: of {len(modules)} samples of torch's {_count(modules)} modules, "
        f"{exact} are trained by a program with the bits of the loop by hand, over {STEPS} steps.",
        "",
        f"By program: {', '.join(by_program)}.",
        "",
        "| not by program | because |",
        "|---|---|",
        *(f"| {name} | {each.reason} |" for name, each in eagerly.items()),
        "",
        "| optimizer | by a program, with the same bits | with a scheduler |",
        "|---|---|---|",
    ]
    for name, each in optimizers.items():
        lines.append(f"| {name} | {_word(each)} | {_word(scheduled[name])} |")
    return "\n".join([*lines, ""])


def outcome(make: Make) -> Outcome:
    """Train once by the engine and once by hand, and compare."""
    training, by_hand = make(), make()
    torch.manual_seed(0)
    # Vouched for, since most modules are in one of the tests' own.
    stepper = Stepper(training, Unwritten(), STEPS, "program")
    try:
        stepper.advance(STEPS)
    except TrainingError as error:
        return Outcome(False, str(error))
    finally:
        stepper.watched.finish()
    stepper.finish()
    torch.manual_seed(0)
    losses = torch.stack([_step_by_hand(by_hand, number) for number in range(1, STEPS + 1)])
    state, other = training.named_state(), by_hand.named_state()
    same = same_bits(stepper.collect(), losses) and all(
        same_bits(tensor, other[name]) for name, tensor in state.items()
    )
    return Outcome(same, None)


def _step_by_hand(training: Training, number: int) -> torch.Tensor:
    x, y = training.batch(number)
    loss = training.loss(training.model(x), y)
    training.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    training.optimizer.step()
    if training.scheduler is not None:
        training.scheduler.step()
    return loss.detach()


def _modules() -> Iterable[tuple[str, Make]]:
    settings.register_profile("everystep", deadline=None)
    from tests.step.torch_modules import module_cases

    for case in module_cases():
        yield case.name, lambda case=case: _training(*case.make())  # type: ignore[misc]


def _optimizers(scheduler: Callable[[Any], Any] | None) -> Iterable[tuple[str, Make]]:
    made: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "everystep.GradientDescent": lambda p: everystep.GradientDescent(p, lr=1e-3),
        "SGD": lambda p: torch.optim.SGD(p, 1e-3),
        "SGD(momentum=0.9)": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
        "SGD(momentum=0.9, fused=True)": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, fused=True),
    }
    for name in ("Adam", "AdamW", "Adagrad"):
        cls = getattr(torch.optim, name)
        made[name] = lambda p, cls=cls: cls(p)  # type: ignore[misc]
        made[f"{name}(fused=True)"] = lambda p, cls=cls: cls(p, fused=True)  # type: ignore[misc]
    for name in ("Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"):
        made[name] = getattr(torch.optim, name)
    for name, optimizer in made.items():
        yield name, lambda optimizer=optimizer: _small(optimizer, scheduler)  # type: ignore[misc]
    yield "Muon", lambda: _small(lambda p: torch.optim.Muon(list(p)), scheduler, bias=False)


def _small(optimizer: Any, scheduler: Any, bias: bool = True) -> Training:
    torch.manual_seed(0)
    x, y = torch.randn(64, 20), torch.randn(64, 1)
    layers = nn.Linear(20, 32, bias=bias), nn.ReLU(), nn.Linear(32, 1, bias=bias)
    return _training(nn.Sequential(*layers), x, y, nn.MSELoss(), optimizer, scheduler)


def _training(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    loss: Any,
    optimizer: Any = None,
    scheduler: Any = None,
) -> Training:
    make = optimizer or (lambda p: everystep.GradientDescent(p, lr=1e-3))
    made = make(model.parameters())
    batches = Batches(len(x)).of(x, y)
    return Training(
        model, loss, made, batches, torch.device("cpu"), scheduler=scheduler and scheduler(made)
    )


def _step_scheduler(optimizer: torch.optim.Optimizer) -> StepLR:
    return StepLR(optimizer, step_size=20, gamma=0.5)


def _count(modules: Iterable[str]) -> int:
    return len({name.split("-")[0] for name in modules})


def _word(each: Outcome) -> str:
    return f"no: {each.reason}" if each.reason else "yes" if each.same else "no"


if __name__ == "__main__":
    main()
