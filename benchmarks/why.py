"""Whether every line of `why` can be computed again by hand, and how long an answer takes.

`python -m benchmarks.why [--elements 200] [--steps 100000]`. Random numbers of random steps of eight
networks (the chapter's; a convolutional one with batch normalization; a transformer with embeddings; a
GRU; an LSTM; a classifier with dropout and Adam; attention and activation functions; an own loop with
two optimizers), each followed three levels down. Every line is computed again by
`benchmarks.why_by_hand`, from the numbers and the formula that it shows; where it says that the bits are
equal, they must be.
The second table is of an open process: random numbers of random steps of the chapter's network, trained
for 100,000 steps; each answer includes the replay of its step.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from tests.descent import trained  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import everystep  # noqa: E402
from benchmarks.why_by_hand import ALL, complaints  # noqa: E402
from everystep.answers.why import Number, Why  # noqa: E402
from everystep.replay.opened_step import Step  # noqa: E402

__all__ = ["NETWORKS", "asked", "followed"]

STEPS = 40
LEVELS = 3
#: Numbers of an answer that are followed.
BRANCHES = 3


def chapter(place: Path) -> everystep.Run:
    """The network of the chapter."""
    return everystep.train_experiment("two-layer", {"steps": STEPS}, run=place, progress=False)


def convolution(place: Path) -> everystep.Run:
    """Convolutions with strides, groups and padding, batch normalization, pooling; SGD with momentum."""
    x, y = torch.randn(60, 3, 9, 9), torch.randint(0, 4, (60,))
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return _trained(place, model, (x, y), nn.CrossEntropyLoss(), optimizer, 16)


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.1, batch_first=True, activation="gelu"
        )
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.embedding(x)))
        return logits.flatten(0, 1)


def _of_tokens(prediction: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(prediction, target.flatten())


def transformer(place: Path) -> everystep.Run:
    """Embeddings, attention, layer normalization, dropout; AdamW, fused."""
    data = torch.randint(0, 11, (40, 5)), torch.randint(0, 11, (40, 5))
    model = _Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return _trained(place, model, data, _of_tokens, optimizer, 8)


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.recurrent = kind(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return prediction


def gru(place: Path, kind: type[nn.Module] = nn.GRU) -> everystep.Run:
    """A recurrent network over four steps of time; Adam."""
    model = _Recurrent(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = torch.randn(30, 4, 3), torch.randn(30, 2)
    return _trained(place, model, data, nn.MSELoss(), optimizer, 8)


def lstm(place: Path) -> everystep.Run:
    """The same with LSTM cells, which one kernel computes on a CPU."""
    return gru(place, nn.LSTM)


def dropout(place: Path) -> everystep.Run:
    """A classifier with layer normalization and dropout; Adam, foreach."""
    model = nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=True)
    data = torch.randn(50, 12), torch.randint(0, 3, (50,))
    return _trained(place, model, data, nn.CrossEntropyLoss(), optimizer, 10)


class _Bent(nn.Module):
    """Groups of channels, self-attention over places, and several activation functions."""

    def __init__(self) -> None:
        super().__init__()
        self.given = nn.Sequential(nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.Hardswish())
        self.heads = nn.Linear(8, 24)
        self.bent = nn.Sequential(nn.Linear(8, 8), nn.Mish(), nn.Linear(8, 8), nn.PReLU(8), nn.GLU())
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.heads(self.given(x).transpose(1, 2)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        query, key, value = places
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        prediction: Tensor = self.out(self.bent(attended.transpose(1, 2).flatten(2).mean(1)))
        return prediction


def bent(place: Path) -> everystep.Run:
    """Group normalization, attention, Hardswish, Mish, PReLU, GLU; RMSprop."""
    model = _Bent()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    data = torch.randn(40, 3, 7), torch.randint(0, 3, (40,))
    return _trained(place, model, data, nn.CrossEntropyLoss(), optimizer, 8)


def own_loop(place: Path) -> everystep.Run:
    """A recorded loop: two networks against each other, Adam and RMSprop, clipped gradients."""
    maker = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(), nn.Linear(8, 2))
    judge = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
    of_maker = torch.optim.Adam(maker.parameters(), lr=1e-2, weight_decay=0.01)
    of_judge = torch.optim.RMSprop(judge.parameters(), lr=1e-3)
    entropy = nn.BCEWithLogitsLoss()
    parts: dict[str, Any] = {"maker": maker, "judge": judge, "of_maker": of_maker, "of_judge": of_judge}
    with everystep.record(run=place, **parts) as recording:
        for batch in recording.steps([torch.randn(6, 2) for _ in range(STEPS)]):
            made = maker(torch.randn(6, 3))
            of_judge.zero_grad()
            loss = entropy(judge(batch), torch.ones(6, 1))
            loss = loss + entropy(judge(made.detach()), torch.zeros(6, 1))
            loss.backward()
            nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            of_judge.step()
            of_maker.zero_grad()
            entropy(judge(made), torch.ones(6, 1)).backward()
            of_maker.step()
            recording.log(loss=loss)
    return everystep.open(place)


def _trained(
    place: Path,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    loss: object,
    optimizer: object,
    rows: int,
) -> everystep.Run:
    settings = {"loss": loss, "optimizer": optimizer, "steps": STEPS, "batch_size": rows}
    run: everystep.Run = trained(model, data, run=place, **settings)
    return run


NETWORKS: dict[str, Callable[[Path], everystep.Run]] = {
    "chapter": chapter,
    "convolution, batch norm, SGD": convolution,
    "transformer, AdamW fused": transformer,
    "GRU, Adam": gru,
    "LSTM, Adam": lstm,
    "dropout, Adam foreach": dropout,
    "attention, activations, RMSprop": bent,
    "own loop, two optimizers": own_loop,
}


def asked(step: Step, chance: random.Random) -> str:
    """Return the name of a random number of a step."""
    kinds = {
        "gradients": step.gradients,
        "activations": {n: t for n, t in step.activations.items() if isinstance(t, Tensor)},
        "updates": {name: update.after for name, update in step.updates.items()},
    }
    kind = chance.choice([kind for kind, tensors in kinds.items() if tensors] + ["loss"])
    if kind == "loss":
        return kind
    name, tensor = chance.choice([*kinds[kind].items()])
    index = str([chance.randrange(size) for size in tensor.shape]) if tensor.dim() else ""
    return f"{kind}[{name!r}]{'.after' if kind == 'updates' else ''}{index}"


def followed(answer: Why, chance: random.Random, levels: int = LEVELS) -> Iterator[Why]:
    """Yield an answer, and those of some of its numbers, levels deep and into the step before."""
    yield answer
    if levels == 1:
        return
    numbers: list[Number] = answer.numbers
    for number in chance.sample(numbers, min(len(numbers), BRANCHES)):
        following = number if number.is_made else number.earlier
        if following is not None:
            yield from followed(following.why(terms=ALL), chance, levels - 1)


def _checked(name: str, run: everystep.Run, count: int, found: list[str]) -> list[str]:
    """Return a row of the first table; note what is wrong."""
    chance = random.Random(name)
    kinds: Counter[str] = Counter()
    for _ in range(count):
        step = run[chance.randint(2, len(run))]
        answer = step.why(asked(step, chance), terms=ALL)
        for line in followed(answer, chance):
            wrong = complaints(line)
            found += [f"{name}: {each}" for each in wrong]
            kinds[_kind(line)] += 1
            kinds["numbers"] += len(line.numbers)
            kinds["wrong"] += bool(wrong)
    columns = ("equal", "nearly", "not computed", "no rule", "numbers", "wrong")
    return [name, f"{count}", *(f"{kinds[column]:,}" for column in columns)]


def _kind(line: Why) -> str:
    if line.origin != "operation":
        return "from outside"
    if line.unknown:
        return "no rule"
    if line.recomputed is None:
        return "not computed"
    return "equal" if line.is_equal else "nearly"


def _timed(place: Path, steps: int, count: int) -> list[list[str]]:
    """Return the rows of the second table."""
    run = everystep.train_experiment("two-layer", {"steps": steps}, run=place, progress=False)
    # How far apart they are, which decides how long a replay takes, depends on the disk.
    print(f"{steps:,} steps, {len(list(run.directory.glob('snapshots/*')))} snapshots")
    opened = everystep.open(run.directory)
    chance = random.Random(0)
    asked(opened[1], chance)  # the process is open, its first step too
    rows = []
    for name, options in (
        ("one level", {}),
        ("three levels", {"depth": 3}),
        ("5 steps back", {"back": 5}),
    ):
        seconds = []
        for _ in range(count):
            number = chance.randint(10, steps)
            expression = f"gradients['0.weight'][{chance.randrange(100)}, {chance.randrange(1000)}]"
            if "back" in options:
                expression = f"updates{expression.removeprefix('gradients').replace('][', '].after[')}"
            started = time.perf_counter()
            opened.why(number, expression, **options)
            seconds.append(time.perf_counter() - started)
        again = _again(opened, number, expression, options)
        at95 = statistics.quantiles(seconds, n=20)[-1]
        numbers = (statistics.median(seconds), at95, max(seconds), again)
        rows.append([name, f"{count}", *(f"{1000 * each:.1f}" for each in numbers)])
    return rows


def _again(run: everystep.Run, number: int, expression: str, options: dict[str, int]) -> float:
    """Return the seconds of an answer of a step that is open."""
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        run.why(number, expression, **options)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _print(headings: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(headings) + " |")
    print("| --- |" + " --: |" * (len(headings) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    """Print both tables; exit with 1 if a line is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--elements", type=int, default=200, help="numbers that are followed, of all")
    parser.add_argument("--steps", type=int, default=100_000, help="of the run that is timed")
    parser.add_argument("--answers", type=int, default=200, help="answers that are timed, of each kind")
    given = parser.parse_args()
    torch.manual_seed(0)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        count = -(-given.elements // len(NETWORKS))
        rows = [
            _checked(name, network(Path(folder) / f"run-{place}"), count, wrong)
            for place, (name, network) in enumerate(NETWORKS.items())
        ]
        kinds = ["equal", "nearly equal", "not computed", "no rule"]
        _print(["network", "numbers asked for", *kinds, "numbers shown", "wrong"], rows)
        timed = _timed(Path(folder) / "long", given.steps, given.answers)
        _print(["answer", "answers", "median ms", "95% ms", "most ms", "step open ms"], timed)
    for each in wrong:
        print(each)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
