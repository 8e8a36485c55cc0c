"""What was asked for: the settings of a training by path, and how those of two trainings differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from everystep.recording.facts import TrainingFacts
from everystep.recording.texts import loss_text, model_text, optimizers_text, schedule_text

__all__ = ["asked_differences", "flat"]


def asked_differences(one: TrainingFacts, other: TrainingFacts) -> dict[str, tuple[Any, Any]]:
    """Return what differs in what was asked for, by path, with both values."""
    pair = [flat(_asked(facts)) for facts in (one, other)]
    return {
        path: (pair[0].get(path), pair[1].get(path))
        for path in dict.fromkeys((*pair[0], *pair[1]))
        if pair[0].get(path) != pair[1].get(path)
    }


def _asked(facts: TrainingFacts) -> dict[str, Any]:
    return {
        "device": facts.device,
        "seed": facts.seed,
        "data": facts.data.model_dump(mode="json"),
        "batches": facts.batches.model_dump(),
        "model": {"text": model_text(facts.modules), "parameters": facts.parameters},
        "loss": {"text": loss_text(facts.loss)},
        "optimizer": {"text": optimizers_text(facts.optimizers)},
        "schedule": schedule_text(facts.schedules),
        "clip_norm": facts.clip_norm,
        "evaluate_every": facts.evaluate_every,
        "data.digest": facts.data_file.digest if facts.data_file else None,
    } | dict(_unsaid(facts))


def _unsaid(facts: TrainingFacts) -> Iterator[tuple[str, Any]]:
    """Yield settings of torch's own losses, schedules and optimizers that the texts omit."""
    if facts.loss and facts.loss.is_torchs:
        yield from ((f"loss.{k}", v) for k, v in facts.loss.settings.items() if k != "reduction")
    for name, schedule in facts.schedules.items():
        if schedule.is_torchs:
            yield from ((f"{name}.{key}", value) for key, value in schedule.settings.items())
    for name, optimizer in facts.optimizers.items():
        for place, group in enumerate(optimizer.groups):
            if place and optimizer.is_torchs:
                yield from ((f"{name}.{key}[{place}]", value) for key, value in group.items())


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by path: `optimizer.lr`."""
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{path}.{key}" if path else str(key))
    return found
