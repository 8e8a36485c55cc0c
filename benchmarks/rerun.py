"""Do the losses of a rerun agree with the loop by hand, run with the same numerics?

`python -m benchmarks.rerun [--python FILE]`. Trains small networks, repeats their steps with different
numerics by `run.rerun`, and runs the loop by hand with these numerics, without everystep, in a new
process, from the same weights (torch draws others under another capability). `--python` is another
interpreter with its own everystep and torch. Prints a table, and exits with 1 if a loss differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tests.descent import trained

import everystep

__all__ = ["main"]

#: Each defines model, loss_of, optimizer, x, y; what follows trains it.
NETWORKS = {
    "chapter": """
torch.manual_seed(0)
x, y = torch.randn(64, 1000), torch.randn(64, 10)
model = nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10))
loss_of, optimizer = nn.MSELoss(reduction="sum"), torch.optim.SGD(model.parameters(), lr=1e-4)
""",
    "convolutions": """
torch.manual_seed(0)
x, y = torch.randn(32, 1, 16, 16), torch.randint(0, 10, (32,))
model = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(),
    nn.Flatten(), nn.Dropout(0.2), nn.Linear(800, 10),
)
loss_of, optimizer = nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3)
""",
    "attention": """
torch.manual_seed(0)
x, y = torch.randn(16, 12, 32), torch.randn(16, 12, 32)
model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
loss_of, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-3)
""",
}
BY_HAND = """
begin = torch.load(sys.argv[2], weights_only=True)
x, y = begin["x"], begin["y"]
model.load_state_dict(begin["model"])
torch.set_rng_state(begin["rng"])
PRECISION
for step in range(int(sys.argv[1])):
    loss = loss_of(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item().hex())
"""
BEFORE = """
import os, sys, torch
from torch import nn
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.set_deterministic_debug_mode("warn")
"""
PLACES: tuple[dict[str, Any], ...] = (
    {"threads": 1},
    {"capability": "default"},
    {"capability": "avx2"},
    {"mkl": "COMPATIBLE"},
    {"mkl": "SSE4_2"},
    {"mkl": "OFF"},
    {"precision": "float64"},
)


def main() -> None:
    """Print a line for each network and each condition."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--python", help="another interpreter, with its own everystep and torch")
    asked = parser.parse_args()
    places = [*PLACES, *([{"python": asked.python}] if asked.python else [])]
    print("| network | condition | first different bits | largest difference | as the loop by hand |")
    print("| --- | --- | --- | --: | --- |")
    wrong = 0
    for name, source in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = _trained(source, Path(folder) / name, asked.steps)
            for place in places:
                wrong += _print_row(name, source, run, place, asked.steps)
    sys.exit(wrong > 0)


def _trained(source: str, directory: Path, steps: int) -> everystep.Run:
    made: dict[str, Any] = {}
    exec(f"import torch\nfrom torch import nn\n{source}", made)
    begin = {"x": made["x"], "y": made["y"], "model": made["model"].state_dict()}
    torch.save(begin | {"rng": torch.get_rng_state()}, directory.parent / "begin.pt")
    settings = {"loss": made["loss_of"], "optimizer": made["optimizer"], "steps": steps}
    run: everystep.Run = trained(made["model"], (made["x"], made["y"]), run=directory, **settings)
    return run


def _print_row(name: str, source: str, run: everystep.Run, place: dict[str, Any], steps: int) -> bool:
    found = run.rerun(**place, progress=False)
    environment = found.place.environment(run.facts.training.numerics)
    # The same first state, and the same data.
    double = "model.double()\nx, y = (t.double() if t.is_floating_point() else t for t in (x, y))"
    by_hand_there = BY_HAND.replace("PRECISION", "" if found.place.precision is None else double)
    command = [found.place.interpreter, "-c", BEFORE + source + by_hand_there]
    command += [str(steps), str(run.directory.parent / "begin.pt")]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    by_hand = [float.fromhex(line) for line in done.stdout.split()]
    is_same = by_hand == found.losses.tolist()
    first = "none"
    if found.operation is not None and found.operation.one is not None:
        operator = found.operation.one.operation.operator
        first = f"#{found.operation.index} of step {found.diverges_at}, {operator.split('.')[1]}"
    elif found.place.precision is not None:
        first = "-"
    what = ", ".join(f"{key} {value}" for key, value in place.items())
    if "python" in place:
        what = f"torch {found.changed.get('torch_version', ['', torch.__version__])[1]}"
    agrees = "same" if is_same else "DIFFERENT"
    far = found.relative.max()
    print(f"| {name} | {what} | {first} | {far:.2g} | {agrees} |", flush=True)
    return not is_same


if __name__ == "__main__":
    main()
