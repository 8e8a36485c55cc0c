"""The steps of which ordinary models a program can repeat, and why not those of the others.

`python -m benchmarks.ordinary_models [name ...]`. The smallest architecture of each family of
torchvision, and some of Hugging Face, with weights drawn here: each is trained by everystep and by a
loop written out by hand, and must have the same bits. A library that is not installed is left out, by
name; `pip install -e ".[bench]"` installs them all. With names, only models with one of them in their
name.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from tests.training.by_hand import Made, by_hand, by_train, contents  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from everystep.errors import EverystepError  # noqa: E402

__all__ = ["main"]

STEPS, ROWS = 3, 2

#: The smallest architecture of each family of torchvision that classifies pictures, and the width of the
#: pictures; settings beside the number of classes, where there are any.
TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "convnext_tiny": (64, {}),
    "densenet121": (64, {}),
    "efficientnet_b0": (64, {}),
    "googlenet": (64, {"init_weights": False}),
    "inception_v3": (299, {"init_weights": False}),
    "maxvit_t": (224, {}),
    "mnasnet0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "regnet_y_400mf": (64, {}),
    "resnet18": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {}),
    "vgg11": (32, {}),
    "vit_b_32": (64, {"image_size": 64}),
}


@dataclass(frozen=True)
class Model:
    """A model of a library, and how it is trained.

    make: returns new objects; the same numbers at every call.
    """

    library: str
    name: str
    make: Callable[[], Made]
    steps: int
    batch_size: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    is_repeated: whether programs repeat all steps; reason: if they do not, why; differs: the first thing
    that has other bits than in the loop by hand, None if there is none; seconds: that it took.
    """

    is_repeated: bool
    reason: str
    differs: str | None
    seconds: float


def main() -> None:
    """Train all models, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only models with this in their name")
    names = parser.parse_args().names
    models = [
        model
        for source in (torchvision_models, hugging_face_models)
        for model in source()
        if not names or any(name in f"{model.library} {model.name}" for name in names)
    ]
    outcomes = {}
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        os.environ["XDG_CACHE_HOME"] = cache
        warnings.simplefilter("ignore")
        for model in models:
            print(f"{model.library}: {model.name}", file=sys.stderr, flush=True)
            outcomes[model] = train_twice(model)
            gc.collect()
    print("\n".join([*summary(outcomes), "", *table(outcomes)]))


def train_twice(model: Model) -> Outcome:
    """Train by hand and by everystep, and compare."""
    batch_size = model.batch_size
    made = model.make()
    losses = by_hand(made, steps=model.steps, batch_size=batch_size)
    expected = fingerprints(contents(made))
    del made
    made = model.make()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        try:
            # Snapshots are of no use here: of the larger models, they would take a gigabyte each.
            options = {"steps": model.steps, "batch_size": batch_size, "snapshot_budget": 1}
            run = by_train(made, run=f"{place}/run", **options)
        except EverystepError as error:
            seconds = time.perf_counter() - begin
            return Outcome(False, f"refused: {error}", "no training", seconds)
        seconds = time.perf_counter() - begin
        engine = run.facts.training.engine
        found = fingerprints(contents(made))
        names = [name for name in expected | found if expected.get(name) != found.get(name)]
        if run.losses["loss"].to_list() != losses:
            names.insert(0, "loss")
    reason = engine.reason or "" if engine.eager_from is not None else ""
    return Outcome(engine.eager_from is None, reason, names[0] if names else None, seconds)


def fingerprints(found: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each entry, since the bits of a large model need not be kept."""
    digests = {}
    for name, value in found.items():
        digest = sha256()
        for part in value if isinstance(value, tuple) else (value,):
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digests[name] = digest.hexdigest()
    return digests


def summary(outcomes: Mapping[Model, Outcome]) -> Iterator[str]:
    """Yield one line for each library."""
    yield f"torch {torch.__version__}:"
    for library in dict.fromkeys(model.library for model in outcomes):
        those = [outcome for model, outcome in outcomes.items() if model.library == library]
        repeated = sum(outcome.is_repeated for outcome in those)
        same = sum(outcome.differs is None for outcome in those)
        counts = (
            f"of {len(those)}, {repeated} repeated by programs, {same} with the bits of the loop by hand"
        )
        yield f"- {library}: {counts}"


def table(outcomes: Mapping[Model, Outcome]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield "| library | model | taken | same bits | seconds | because |"
    yield "|---|---|---|---|--:|---|"
    for model, outcome in outcomes.items():
        cells = [
            model.library,
            model.name,
            "repeated" if outcome.is_repeated else "by Python alone",
            "yes" if outcome.differs is None else f"no: {outcome.differs}",
            f"{outcome.seconds:.1f}",
            outcome.reason,
        ]
        yield "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


# The models.


def torchvision_models() -> Iterator[Model]:
    """Yield one model of each family of torchvision."""
    if not _is_there("torchvision"):
        return
    from torchvision import models

    for name, (width, settings) in TORCHVISION.items():
        build = partial(models.get_model, name, weights=None, num_classes=10, **settings)
        yield Model("torchvision", name, partial(_of_pictures, build, width), STEPS)


def hugging_face_models() -> Iterator[Model]:
    """Yield models of transformers, with configurations of a few thousand parameters."""
    if not _is_there("transformers"):
        return
    for name, make in (("BERT", _bert), ("GPT-2", _gpt2), ("ViT", _vit)):
        yield Model("Hugging Face", name, make, STEPS)


class Logits(nn.Module):
    """A model of transformers, without what it gives beside its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits for x, the model's first argument."""
        logits: Tensor = self.model(x).logits
        return logits


def _of_pictures(build: Callable[[], nn.Module], width: int) -> Made:
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 3, width, width), torch.randint(10, (ROWS,))
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Made(model, x, y, _with_auxiliary_outputs, optimizer)


def _with_auxiliary_outputs(output: Any, y: Tensor) -> Tensor:
    """Return the cross entropy; GoogLeNet and Inception give the logits of their inner layers too."""
    if not isinstance(output, tuple):
        return cross_entropy(output, y)
    main, *others = output
    loss = cross_entropy(main, y)
    for logits in others:
        loss = loss + 0.3 * cross_entropy(logits, y)
    return loss


def _bert() -> Made:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    config = BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16, num_labels=3)
    return _of_transformers(
        lambda: BertForSequenceClassification(config),
        lambda: (torch.randint(50, (ROWS, 12)), torch.randint(3, (ROWS,))),
    )


def _gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)
    return _of_transformers(
        lambda: GPT2LMHeadModel(config),
        lambda: (torch.randint(50, (ROWS, 12)), torch.randint(50, (ROWS, 12))),
    )


def _vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)
    return _of_transformers(
        lambda: ViTForImageClassification(config),
        lambda: (torch.randn(ROWS, 3, 16, 16), torch.randint(3, (ROWS,))),
    )


def _of_transformers(build: Callable[[], nn.Module], draw: Callable[[], tuple[Tensor, Tensor]]) -> Made:
    torch.manual_seed(0)
    x, y = draw()
    model = Logits(build()).train()
    return Made(model, x, y, _of_logits, torch.optim.AdamW(model.parameters(), lr=1e-3))


def _of_logits(logits: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))


def _is_there(library: str) -> bool:
    try:
        __import__(library)
    except ImportError:
        print(f"{library}: left out, for it is not installed", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    main()
