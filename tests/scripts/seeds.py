"""Train with several seeds, as arguments and a configuration ask for it, and summarize them."""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import everystep  # added


@dataclass
class Config:
    hidden: int = 16
    rate: float = 0.05
    momentum: float = 0.9
    epochs: int = 3
    batch: int = 20
    noise: float = 0.3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--set", action="append", default=["hidden=12"], metavar="NAME=VALUE")
    return parser.parse_args()


def configured(settings):
    """The configuration, with some of its settings changed."""
    known = asdict(Config())
    changes = dict(each.split("=") for each in settings)
    return Config(**known | {name: type(known[name])(value) for name, value in changes.items()})


def moons(count, noise):
    """Two half circles, from NumPy's generator."""
    angles, side = np.random.uniform(0, np.pi, count), np.random.randint(0, 2, count)
    points = np.stack([np.cos(angles) + side, np.sin(angles) * (1 - 2 * side) + 0.4 * side], 1)
    return torch.tensor(points + np.random.normal(0, noise, points.shape)).float(), torch.tensor(side)


def shuffled(x, y, size):
    """Batches in the order of Python's generator."""
    order = list(range(len(x)))
    random.shuffle(order)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield x[rows], y[rows]


def train(config, seed, place):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    x, y = moons(200, config.noise)
    test_x, test_y = moons(100, config.noise)
    model = nn.Sequential(nn.Linear(2, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 2))
    optimizer = torch.optim.SGD(model.parameters(), config.rate, momentum=config.momentum)
    scores = []
    parts = {"model": model, "optimizer": optimizer, "scores": scores, "config": asdict(config)}  # added
    with everystep.record(**parts, run=place / f"run-{seed}", resume=True) as recording:  # added
        for epoch in recording.epochs(config.epochs):  # was: range(config.epochs)
            for inputs, labels in recording.steps(shuffled(x, y, config.batch)):  # was: shuffled(...)
                jitter = torch.from_numpy(np.random.normal(0, 0.02, inputs.shape)).float()
                loss = nn.functional.cross_entropy(model(inputs + jitter), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recording.log(loss=loss)  # added
            with torch.no_grad():
                scores.append((model(test_x).argmax(1) == test_y).double().mean().item())
            print(f"seed {seed}, epoch {epoch}: {scores[-1]:.3f}")
    torch.save(model.state_dict(), place / f"seed-{seed}.pt")
    return scores


if __name__ == "__main__":
    options = arguments()
    config = configured(options.set)
    options.out.mkdir(exist_ok=True)
    results = options.out / "results.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    for seed in options.seeds:
        if str(seed) in done:
            continue
        done[str(seed)] = train(config, seed, options.out)
        results.write_text(json.dumps(done))
    last = [scores[-1] for scores in done.values()]
    print(f"{len(last)} seeds: {np.mean(last):.4f} ± {np.std(last):.4f}")
