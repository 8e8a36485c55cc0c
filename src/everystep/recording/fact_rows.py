"""Facts as rows of a run's database; reading checks them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_jsonable_python

from everystep.errors import RunError
from everystep.recording.facts import Facts, TrainingFacts

__all__ = ["read_facts", "rows_of"]

_OF_RUN = Facts.model_fields.keys() - {"trained"}
_OF_TRAINING = TrainingFacts.model_fields.keys()
#: These are written together, before the first step.
_FROM_THE_BEGINNING = {name for name, field in TrainingFacts.model_fields.items() if field.is_required()}


def rows_of(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return facts by name as rows of the database; halves of surrogate pairs become question marks."""
    assert facts.keys() <= _OF_RUN | _OF_TRAINING
    texts = {
        key: json.dumps(to_jsonable_python(fact, inf_nan_mode="constants"), ensure_ascii=False)
        for key, fact in facts.items()
    }
    return [(key, text.encode("utf-8", "replace").decode()) for key, text in texts.items()]


def read_facts(rows: Iterable[tuple[Any, Any]], path: Path) -> Facts:
    """Return facts from the rows of a run's database; those of a later everystep are left out.

    Raises:
        RunError: one is not what everystep writes, so that the database was changed.
    """
    texts: dict[str, str] = {}
    for key, text in rows:
        try:
            from_json(text)
        except (TypeError, ValueError):
            raise _changed(path, key) from None
        texts[key] = text if isinstance(text, str) else text.decode()
    own = [_member(key, texts[key]) for key in texts if key in _OF_RUN]
    if texts.keys() >= _FROM_THE_BEGINNING:
        trained = [_member(key, texts[key]) for key in texts if key in _OF_TRAINING]
        own.append(_member("trained", f"{{{','.join(trained)}}}"))
    try:
        return Facts.model_validate_json(f"{{{','.join(own)}}}")
    except ValidationError as error:
        place = error.errors(include_input=False)[0]["loc"]
        raise _changed(path, place[1] if place[0] == "trained" else place[0]) from None


def _member(key: str, text: str) -> str:
    return f'"{key}":{text}'


def _changed(path: Path, key: Any) -> RunError:
    return RunError(f"{path} has an invalid value for {str(key)[:80]!r}: the database was changed")
