"""What recording a loop costs: the loop as it is, and by `everystep.record`, alternating in one process.

`python -m benchmarks.record [--rounds N] [--device cuda]`. A step is what one waits for, from one batch
to the next, the first ten left out; recorded steps are written to disk, snapshots among them. Medians
over the rounds. An empty mode is torch's price for a look at each call of the forward pass and of the
loss: a dispatch mode that passes them on.

The second table is of whole trainings, from the call to the closed run: the loop as it is, and
`everystep.train(model, (x, y), ...)`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from tests.descent import descend, trained  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.data import DataLoader, RandomSampler, TensorDataset  # noqa: E402

import everystep  # noqa: E402
from everystep.ops.operators import OperatorMode  # noqa: E402

__all__ = ["main"]

#: Steps that are not timed.
WARM_UP = 10


class Loop(NamedTuple):
    """A training as a loop has it: its model and optimizer, a batch, and the loss of it.

    batch: what the model takes, in a tuple if it is several, and the targets; draws: makes the batch
    within the step; None: the loop has it; loader: of the batches of the loop, None for the same one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Any, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    draws: Callable[[], tuple[Any, Tensor]] | None = None
    loader: DataLoader[Any] | None = None

    def batches(self) -> Iterable[Any]:
        """Return the batches of its steps."""
        return [self.batch] * self.steps if self.loader is None else self.loader


def chapter() -> Loop:
    """The chapter's network."""
    model = nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10))
    batch = torch.randn(64, 1000), torch.randn(64, 10)
    return Loop(model, torch.optim.SGD(model.parameters(), lr=1e-4), batch, functional.mse_loss, 1000)


def shuffled() -> Loop:
    """A small network, on three epochs of shuffled rows, by a DataLoader."""
    model = nn.Sequential(nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 10))
    data = TensorDataset(torch.randn(20_000, 100), torch.randint(0, 10, (20_000,)))
    sampler = RandomSampler(data, num_samples=3 * len(data), generator=torch.Generator())
    loader = DataLoader(data, 64, sampler=sampler)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return Loop(model, optimizer, data[:64], functional.cross_entropy, len(loader), None, loader)


def digits() -> Loop:
    """A small convolutional network on images of digits."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    batch = torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Loop(model, optimizer, batch, functional.cross_entropy, 500)


def transformer() -> Loop:
    """A transformer with a million parameters, on 16 texts of 64 words."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Embedding(1000, 128), nn.TransformerEncoder(layer, 4), nn.Linear(128, 1000))
    ids = torch.randint(0, 1000, (16, 65))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(prediction.flatten(0, 1), target.flatten())

    return Loop(model, optimizer, (ids[:, :-1], ids[:, 1:]), loss, 100)


class _Text(nn.Module):
    """A transformer for texts: each character follows from those before it."""

    def __init__(self, characters: int, width: int, length: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(width, characters, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        h = self.characters(x) + self.places(torch.arange(length, device=x.device))
        mask = self.get_buffer("mask")[:length, :length]
        return self.head(self.layers(h, mask=mask, is_causal=True))  # type: ignore[no-any-return]


def text() -> Loop:
    """A small GPT (4 layers, 128 wide, 64 long), on 12 windows of a text, drawn within the step."""
    return _of_text(150, 64)


def lengths() -> Loop:
    """The small GPT, on 12 windows of one of 57 lengths, drawn within the step."""
    return _of_text(600, 8)


def _of_text(steps: int, shortest: int) -> Loop:
    longest, characters = 64, torch.randint(0, 65, (10_000,))
    model = _Text(65, 128, longest)

    def draws() -> tuple[Tensor, Tensor]:
        length = int(torch.randint(shortest, longest + 1, ()))
        starts = torch.randint(len(characters) - length - 1, (12,))
        pairs = [(characters[i : i + length], characters[i + 1 : i + 1 + length]) for i in starts]
        x, y = zip(*pairs, strict=True)
        return torch.stack(x), torch.stack(y)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(prediction.flatten(0, 1), target.flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Loop(model, optimizer, draws(), loss, steps, draws)


class _Messages(nn.Module):
    """Two rounds of messages along the edges of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 64), nn.Linear(64, 64)])
        self.head = nn.Linear(64, 2)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            sent = layer(nodes)[edges[0]]
            received = torch.zeros(len(nodes), 64, device=nodes.device)
            nodes = received.index_add(0, edges[1], sent).relu()
        return self.head(nodes)  # type: ignore[no-any-return]


def graphs() -> Loop:
    """Messages on a graph of any size, drawn within the step."""
    model = _Messages()

    def draws() -> tuple[Any, Tensor]:
        size = int(torch.randint(200, 600, ()))
        edges = torch.randint(size, (2, int(torch.randint(2 * size, 4 * size, ()))))
        return (torch.randn(size, 16), edges), torch.randint(2, (size,))

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Loop(model, optimizer, draws(), functional.cross_entropy, 300, draws)


class _Packed(nn.Module):
    """A GRU on sequences of many lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layer = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        given = self.embedding(ids), lengths.cpu()
        packed = nn.utils.rnn.pack_padded_sequence(*given, batch_first=True, enforce_sorted=False)
        _, last = self.layer(packed)
        return self.head(last[-1])  # type: ignore[no-any-return]


def packed() -> Loop:
    """A GRU on 16 packed sequences of 5 to 40, drawn within the step."""
    model = _Packed()

    def draws() -> tuple[Any, Tensor]:
        lengths = torch.randint(5, 41, (16,))
        return (torch.randint(50, (16, int(lengths.max()))), lengths), torch.randint(2, (16,))

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Loop(model, optimizer, draws(), functional.cross_entropy, 150, draws)


class _Block(nn.Module):
    """A block of a ResNet: two convolutions, and a way around them."""

    def __init__(self, channels: int, given: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, given, 3, stride, 1, bias=False), nn.BatchNorm2d(given), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(given, given, 3, 1, 1, bias=False), nn.BatchNorm2d(given))
        around = nn.Conv2d(channels, given, 1, stride, bias=False), nn.BatchNorm2d(given)
        self.around = nn.Identity() if (channels, stride) == (given, 1) else nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(self.first(x)) + self.around(x))


def resnet() -> Loop:
    """A ResNet-18 for images of 32 by 32, on 16 of them."""
    sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    sizes += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(_Block(*size) for size in sizes),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)),
    )
    batch = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Loop(model, optimizer, batch, functional.cross_entropy, 100)


def main() -> None:
    """Print a row for each loop."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    rounds = asked.rounds
    print("| | steps | plain, ms a step | under an empty mode | recorded | ratio |")
    print("| --- | --: | --: | --: | --: | --: |")
    for make in (chapter, shuffled, digits, text, lengths, graphs, packed, transformer, resnet):
        _print_row(make, asked.device, rounds)
    print("\n| | steps | plain, s | model and loss, s | ratio |")
    print("| --- | --: | --: | --: | --: |")
    for make in (chapter, digits, transformer, resnet):
        _print_whole_row(make, asked.device, rounds)


def _made(make: Callable[[], Loop], device: str) -> Loop:
    torch.manual_seed(0)
    with torch.device(device):
        return make()


def _print_whole_row(make: Callable[[], Loop], device: str, rounds: int) -> None:
    ways = (_plainly, _as_model)
    seconds: list[list[float]] = [[] for _ in ways]
    for round_ in range(rounds):
        for place in (0, 1) if round_ % 2 else (1, 0):
            loop = _made(make, device)
            with tempfile.TemporaryDirectory() as directory:
                started = time.perf_counter()
                ways[place](loop, Path(directory) / "run")
                seconds[place].append(time.perf_counter() - started)
    plain, recorded = seconds
    ratio = statistics.median(one / two for one, two in zip(recorded, plain, strict=True))
    one, two = statistics.median(plain), statistics.median(recorded)
    name = (make.__doc__ or "").rstrip(".")
    print(f"| {name} | {loop.steps:,} | {one:.3g} | {two:.3g} | {ratio:.2f} |")


def _plainly(loop: Loop, run: Path) -> None:
    losses = [_step(loop, *loop.batch) for _ in range(loop.steps)]
    [float(loss.detach()) for loss in losses]


def _as_model(loop: Loop, run: Path) -> None:
    settings = {"optimizer": loop.optimizer, "steps": loop.steps, "run": run}
    trained(loop.model, loop.batch, loss=loop.loss, **settings)


class _EmptyMode(OperatorMode):  # type: ignore[no-untyped-call]
    """Passes each call on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func._op(*args, **(kwargs or {}))


def _step(loop: Loop, x: Any, y: Tensor, mode: AbstractContextManager[Any] | None = None) -> Tensor:
    with mode or nullcontext():
        loss = loop.loss(loop.model(*x) if isinstance(x, tuple) else loop.model(x), y)
    return descend(loop.optimizer, loss)  # type: ignore[no-any-return]


def _print_row(make: Callable[[], Loop], device: str, rounds: int) -> None:
    plain, passed, recorded = [], [], []
    with tempfile.TemporaryDirectory() as place:
        for _ in range(rounds):
            loop = _made(make, device)
            plain.append(_seconds(loop, loop.batches()))
            loop = _made(make, device)
            passed.append(_seconds(loop, loop.batches(), mode=_EmptyMode()))
            loop = _made(make, device)
            run = Path(place) / "run"
            with everystep.record(run=run, model=loop.model, optimizer=loop.optimizer) as recording:
                batches = recording.steps(loop.batches())
                recorded.append(_seconds(loop, batches, lambda loss: recording.log(loss=loss)))
            shutil.rmtree(run)
    ratio = statistics.median(one / two for one, two in zip(recorded, plain, strict=True))
    times = " | ".join(f"{1e3 * statistics.median(each):.3g}" for each in (plain, passed, recorded))
    name = (make.__doc__ or "").rstrip(".")
    print(f"| {name} | {loop.steps:,} | {times} | {ratio:.2f} |", flush=True)


def _seconds(
    loop: Loop,
    batches: Iterable[Any],
    log: Callable[[Tensor], None] = lambda loss: None,
    mode: AbstractContextManager[Any] | None = None,
) -> float:
    """Run a loop; return the seconds of a step."""
    started, count = 0.0, 0
    for x, y in batches:
        if count == WARM_UP:
            _wait(loop.batch[1].device)
            started = time.perf_counter()
        count += 1
        if loop.draws is not None:
            x, y = loop.draws()
        log(_step(loop, x, y, mode))
    _wait(loop.batch[1].device)
    return (time.perf_counter() - started) / (count - WARM_UP)


def _wait(device: torch.device) -> None:
    """Wait for the device, which may still compute."""
    if device.type != "cpu":
        getattr(torch.get_device_module(device), "synchronize", lambda: None)()


if __name__ == "__main__":
    main()
