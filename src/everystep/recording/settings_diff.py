"""The settings of a training, one by one, and how those of two trainings differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from everystep.recording.facts import (
    Described,
    Facts,
    LossFacts,
    ModuleFacts,
    OptimizerFacts,
    SchedulerFacts,
    TrainingFacts,
)
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import value_text, whole_text

__all__ = [
    "Setting",
    "config_differences",
    "flat",
    "renamed",
    "same_value",
    "settings_of",
    "settings_that_differ",
]

Pair = tuple[Any, Any]


# e.g. Setting("optimizer", "", "SGD", "lr", (0.1, 0.2)), shown as `SGD: lr 0.1 | 0.2`, and
# Setting("model", "3", None, None, ("ReLU()", "Tanh()"), True), shown as `module 3: ReLU() | Tanh()`.
class Setting(NamedTuple):
    """A setting that differs between two trainings.

    kind: `model`, `loss`, `optimizer`, `scheduler`, `batches`, `seed`, ...; path: of the module, or the
    name of one of several optimizers; owner: the class that has it; name: None if it is an object as a
    whole, or the kind is enough; values: in both, None if one has none; is_torchs: whether code of torch
    or everystep alone reads it.
    """

    kind: str
    path: str
    owner: str | None
    name: str | None
    values: Pair
    is_torchs: bool = True

    @property
    def is_name(self) -> bool:
        """Whether it is only a name of code that is not torch's: of a class, or of a function."""
        if self.is_torchs or self.name is not None or not all(self.values):
            return False
        arguments = [str(value).partition("(")[2] for value in self.values]
        return self.kind in _OBJECTS and arguments[0] == arguments[1]

    @property
    def listed(self) -> str:
        """Its name in a list of settings: `model.3 Dropout.p`."""
        place = ".".join(filter(None, (self.kind, self.path)))
        named = ".".join(filter(None, (self.owner, self.name)))
        return f"{place}{' ' if self.owner else '.'}{named}" if named else place

    def __str__(self) -> str:
        """Return its text as a cause, with both values: `module 3 Dropout: p 0.2 | 0.21`."""
        kind = {"model": "module" if self.path else "model", "optimizer": ""}.get(self.kind, self.kind)
        place = " ".join(filter(None, (kind, self.path, self.owner))) or self.kind
        is_whole = self.name is None and self.kind in _OBJECTS
        one, other = (str(v) if is_whole else value_text(v) for v in self.values)
        return f"{place}: {f'{self.name} ' if self.name else ''}{one} | {other}"


#: Kinds of settings that are objects, shown by their class.
_OBJECTS = {"model", "loss", "optimizer", "scheduler", "part"}


def config_differences(one: Facts, other: Facts) -> dict[str, Pair]:
    """Return how the configs that users gave differ, by their names in a list, with both values."""
    return {each.listed: each.values for each in _named("config", one.config, other.config)}


def renamed(one: TrainingFacts, other: TrainingFacts) -> list[str]:
    """Return which differing settings are only names, as a list shows them.

    That is a class or a function of the user; and the source of the data, if the data is the same.
    """
    digests = [facts.data_file.digest if facts.data_file else None for facts in (one, other)]
    is_same_data = digests[0] is not None and digests[0] == digests[1]
    found = settings_that_differ(one, other)
    return [e.listed for e in found if e.is_name or (e.kind == "data" and is_same_data)]


def settings_that_differ(
    one: TrainingFacts, other: TrainingFacts, *, of_own_classes: bool = True
) -> list[Setting]:
    """Return the settings that differ between two trainings.

    of_own_classes: include attributes of classes that are not torch's own, which may be counters, and
    attributes of modules that torch does not print.
    """
    digests = [facts.data_file.digest if facts.data_file else None for facts in (one, other)]
    found = [
        *_plain("device", one.device, other.device),
        *_plain("seed", one.seed, other.seed),
        # Without rows that were passed for validation, and in older runs, there is nothing to compare.
        *(
            each
            for each in _named("data", _data(one), _data(other))
            if each.name != "validation_digest" or all(each.values)
        ),
        *_batches(one, other),
        *_objects("model", one.modules, other.modules, of_own_classes),
    ]
    # Their number follows from the modules: it is a difference only where these show none.
    if not any(each.kind == "model" for each in found):
        found += _plain("parameters", one.parameters, other.parameters)
    found += _losses(one.loss, other.loss, of_own_classes)
    found += _objects("optimizer", one.optimizers, other.optimizers, of_own_classes)
    found += _objects("scheduler", one.schedulers, other.schedulers, of_own_classes)
    found += _plain("max_grad_norm", one.max_grad_norm, other.max_grad_norm)
    found += _plain("evaluate_every", one.evaluate_every, other.evaluate_every)
    if one.loop and other.loop and of_own_classes:
        parts = _named("part", one.loop.parts, other.loop.parts, is_torchs=False)
        found += [each._replace(path=each.name or "", name=None) for each in parts]
    return [*found, *_named("data", {"digest": digests[0]}, {"digest": digests[1]})]


def _data(facts: TrainingFacts) -> dict[str, Any]:
    """Return the settings of the data; how its rows are numbered follows from them."""
    return facts.data.model_dump(mode="json", exclude={"split_seed", "dropped"})


def _plain(kind: str, one: Any, other: Any) -> list[Setting]:
    return [] if same_value(one, other) else [Setting(kind, "", None, None, (one, other))]


def _batches(one: TrainingFacts, other: TrainingFacts) -> Iterator[Setting]:
    """Yield what differs in the rule for batches, except for what follows from other settings."""
    # These follow from the rows and the batch size, and the seed from that of the training if it is the
    # same number.
    pair = [each.batches.model_dump(exclude={"steps_per_epoch"}) for each in (one, other)]
    seeds = pair[0]["seed"], pair[1]["seed"]
    follows = {"seed"} if seeds == (one.seed, other.seed) else set()
    yield from (each for each in _named("batches", pair[0], pair[1]) if each.name not in follows)


def _named(
    kind: str,
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    path: str = "",
    owner: str | None = None,
    *,
    is_torchs: bool = True,
) -> Iterator[Setting]:
    pair = flat(dict(one)), flat(dict(other))
    for name in dict.fromkeys((*pair[0], *pair[1])):
        values = pair[0].get(name), pair[1].get(name)
        if not same_value(*values):
            yield Setting(kind, path, owner, name, values, is_torchs)


def _objects(
    kind: str, one: Mapping[str, Described], other: Mapping[str, Described], of_own_classes: bool
) -> Iterator[Setting]:
    """Yield what differs in objects of a kind: optimizers and schedulers by name, modules by path."""
    for name in dict.fromkeys((*one, *other)):
        a, b = one.get(name), other.get(name)
        is_module = isinstance(a or b, ModuleFacts)
        # An only optimizer is called `optimizer`, which would be shown twice.
        path = "" if name == kind and not is_module else name
        if a is None or b is None or a.class_name != b.class_name:
            # The contents of a module that only one of them has are not listed again.
            parent = path.rpartition(".")[0]
            if not path or not is_module or (parent in one) == (parent in other):
                texts = a and whole_text(a), b and whole_text(b)
                both = all(each is None or each.is_torchs for each in (a, b))
                yield Setting(kind, path, None, None, texts, both)
            continue
        both = a.is_torchs and b.is_torchs
        named = partial(_named, kind, path=path, owner=a.class_name, is_torchs=both)
        if isinstance(a, ModuleFacts) and isinstance(b, ModuleFacts):
            is_printed_same = a.arguments == b.arguments and a.is_torchs == b.is_torchs
            found = [*named(a.settings, b.settings)] if of_own_classes or not is_printed_same else []
            if not found and a.arguments != b.arguments:  # of an attribute that is not plain
                found = [Setting(kind, path, a.class_name, "arguments", (a.arguments, b.arguments))]
            yield from found
            continue
        if of_own_classes or both or isinstance(a, OptimizerFacts):
            yield from named(a.settings, b.settings)
        if isinstance(a, SchedulerFacts) and isinstance(b, SchedulerFacts):
            yield from named({"every": a.every}, {"every": b.every})


def _losses(one: LossFacts | None, other: LossFacts | None, of_own_classes: bool) -> Iterator[Setting]:
    pair = [{} if loss is None else {"loss": loss} for loss in (one, other)]
    yield from _objects("loss", pair[0], pair[1], of_own_classes)
    if one is not None and other is not None and one.class_name == other.class_name:
        # Without the loss itself, which was compared.
        inner = [{path: m for path, m in loss.modules.items() if path} for loss in (one, other)]
        yield from _objects("loss", inner[0], inner[1], of_own_classes)


def settings_of(run: RecordedRun) -> dict[str, Any]:
    """Return the settings of a run, by path: of its experiment, or else of its config."""
    facts = run.facts
    experiment = None if facts.trained is None else run.experiment(facts.trained)
    return flat(dict(facts.config) if experiment is None else experiment)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by path: `optimizer.lr`."""
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{path}.{key}" if path else str(key))
    return found


def same_value(one: Any, other: Any) -> bool:
    """Return whether two plain values are the same: NaN is NaN, and 0.0 is not -0.0."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    if isinstance(one, float) and isinstance(other, float):
        signs = math.copysign(1, one) == math.copysign(1, other)
        return (one == other and signs) or (one != one and other != other)
    return bool(one == other)
