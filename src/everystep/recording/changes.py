"""Changes: tensors that code between two steps changed, one file per such step."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from everystep.bounded import parse_json
from everystep.errors import RunError
from everystep.recording.files import FileRow, row_of_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FOLDER", "Change", "changes_in", "read_change", "write_change"]

FOLDER = "changes"
_NAME = re.compile(rf"{FOLDER}/(\d{{1,18}})\.safetensors")


class Change(NamedTuple):
    """What code between two steps changed: tensors by name, and the names of removed ones."""

    tensors: dict[str, Tensor]
    gone: list[str]


def write_change(
    directory: Path, step: int, tensors: dict[str, Tensor], gone: Sequence[str] = ()
) -> FileRow:
    """Write tensors (on the CPU) as they are after `step` and the code that followed it.

    gone: the names of removed tensors.
    """
    from safetensors.torch import save

    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{step:06d}.tmp"
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(own, {"gone": json.dumps([*gone])} if gone else None)
    temporary.write_bytes(content)
    row = row_of_file(f"{FOLDER}/{step:06d}.safetensors", content)
    temporary.rename(directory / row.name)
    return row


def changes_in(files: Iterable[str]) -> dict[int, str]:
    """Return the files of changes among those of a run, by step."""
    matches = [match for match in map(_NAME.fullmatch, files) if match is not None]
    return {int(match[1]): match[0] for match in matches}


def read_change(content: bytes, place: Path) -> Change:
    """Return what changed. content: of the file at `place`.

    Raises:
        RunError: the file is unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        gone = parse_json((header.get("__metadata__") or {}).get("gone", "[]"))
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{place} cannot be read: {error}") from None
    return Change(tensors, [*map(str, gone)] if isinstance(gone, list) else [])
