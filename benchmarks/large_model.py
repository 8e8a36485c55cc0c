"""A model of 100 million parameters: memory, time and disk of a recorded training, and of going back.

`python -m benchmarks.large_model [--steps 40] [--layers 12] [--frozen]` trains a language model (12
transformer layers of width 768, AdamW) by its own loop, alone and by `everystep.record`, each in a
process of its own. Then it opens a step, also as where little memory is free, opens the next one,
verifies the run and forks it by its programs, each in a process of its own, too. Memory is what a
process itself holds at most, looked at 20 times a second, without files that it maps.

--frozen: only layer normalizations and the output are trained, as in fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from tests.descent import descend  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import everystep  # noqa: E402
from everystep.step import observe  # noqa: E402

WORDS, WIDTH, LENGTH, BATCH = 16_384, 768, 32, 2
#: The question that is asked as where little memory is free.
IN_FILES = "open a step, with copies in files"
#: Steps that are left out of the median: the first of a process are slower.
WARM_UP = 3


class LanguageModel(nn.Module):
    """Transformer layers with causal attention between an embedding and the logits of the next word."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 12, 4 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, WORDS, bias=False)
        self.logits.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        """Return the logits, (batch, length, WORDS), of the next words of `words` (batch, length)."""
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        x = self.words(words)
        for layer in self.layers:
            x = layer(x, mask, is_causal=True)
        return self.logits(self.norm(x))  # type: ignore[no-any-return]


def train(asked: argparse.Namespace, run: Path | None) -> dict[str, Any]:
    """Train; return the seconds of each step, the losses, and the peak memory of this process."""
    torch.manual_seed(0)
    model = LanguageModel(asked.layers)
    if asked.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = torch.Generator().manual_seed(1)
    batches = (torch.randint(WORDS, (BATCH, LENGTH + 1), generator=rows) for _ in range(asked.steps))
    losses, ends = list[float](), [time.perf_counter()]

    def step(words: Tensor) -> Tensor:
        logits = model(words[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())
        losses.append(descend(optimizer, loss).item())
        ends.append(time.perf_counter())
        return loss

    if run is None:
        for words in batches:
            step(words)
    else:
        with everystep.record(model=model, optimizer=optimizer, run=run) as recording:
            for words in recording.steps(batches):
                recording.log(loss=step(words))
    ends[-1] = time.perf_counter()  # with what is still to be written
    count = sum(p.numel() for p in model.parameters())
    return {"seconds": [b - a for a, b in pairwise(ends)], "losses": losses, "count": count}


def going_back(run: Path, question: str) -> dict[str, Any]:
    """Ask a question; return the seconds that it took."""
    recorded = everystep.open(run)
    middle = len(recorded.losses) // 2 + 1
    asked: dict[str, Any] = {
        "open a step": lambda: recorded[middle],
        IN_FILES: lambda: recorded[middle],
        "open two": lambda: [recorded[number].loss for number in (middle, middle + 1)],
        "verify": recorded.verify,
        "fork": lambda: recorded.fork(middle, lr=3e-4, run=run.with_name("fork"), progress=False),
    }
    if question == IN_FILES:
        observe.HELD_SHARE = 0.0
    began = time.perf_counter()
    asked[question]()
    return {"seconds": [time.perf_counter() - began]}


def memory_held() -> float:
    """Return the bytes of memory of this process, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part is None:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder) / "run")
        return
    held, is_over = [memory_held()], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            held.append(memory_held())

    threading.Thread(target=watch, daemon=True).start()
    trains = asked.part in ("plain", "recorded")
    found = train(asked, asked.run) if trains else going_back(asked.run, asked.part)
    is_over.set()
    print(json.dumps(found | {"memory": max(held)}))


def compare(run: Path) -> None:
    """Print the table."""
    plain, recorded = part("plain"), part("recorded", "--run", str(run))
    if plain["losses"] != recorded["losses"]:
        sys.exit("the losses of the recorded training differ")
    sizes = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    print(f"{plain['count'] / 1e6:.0f} million parameters; the losses are equal")
    print(f"on the disk: {sum(sizes.values()) / 1e9:.2f} GB")
    for path in sorted(run.glob("snapshots/*")):
        print(f"  state {path.name}: {sum(sizes[file] for file in path.iterdir()) / 1e6:,.1f} MB")
    print("\n| | seconds | a step | the slowest | memory, GB |\n| --- | --: | --: | --: | --: |")
    for name, found in (("plain", plain), ("recorded", recorded)):
        seconds, held = found["seconds"], found["memory"] / 1e9
        late = sorted(seconds[WARM_UP:-1])
        times = f"{sum(seconds):.1f} | {statistics.median(late):.2f} | {late[-1]:.2f}"
        print(f"| {name} | {times} | {held:.2f} |", flush=True)
    for name in ("open a step", IN_FILES, "open two", "verify", "fork"):
        found = part(name, "--run", str(run))
        print(f"| {name} | {found['seconds'][0]:.1f} | | | {found['memory'] / 1e9:.2f} |", flush=True)


def part(name: str, *options: str) -> dict[str, Any]:
    """Run a part of the benchmark in a process of its own; return what it prints."""
    command = [sys.executable, "-m", "benchmarks.large_model", *sys.argv[1:], "--part", name, *options]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
