"""Changes: tensors that code between two steps changed, one file per such step."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from everystep.errors import RunError
from everystep.recording.files import own_path

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FOLDER", "change_files", "gone_in", "read_change", "remove_changes", "write_change"]

FOLDER = "changes"
_NAME = re.compile(r"(\d{1,18})\.safetensors")


def write_change(
    directory: Path, step: int, tensors: dict[str, Tensor], gone: Sequence[str] = ()
) -> None:
    """Write tensors (on the CPU) as they are after `step` and the code that followed it.

    gone: the names of removed tensors.
    """
    from safetensors.torch import save

    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{step:06d}.tmp"
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    temporary.write_bytes(save(content, {"gone": json.dumps([*gone])} if gone else None))
    temporary.rename(folder / f"{step:06d}.safetensors")


def change_files(directory: Path) -> dict[int, str]:
    """Return the files of a run by step; their names are as within the run."""
    folder = directory / FOLDER
    if not folder.is_dir():
        return {}
    names = sorted(path.name for path in folder.iterdir())
    matches = [match for match in map(_NAME.fullmatch, names) if match is not None]
    return {int(match[1]): f"{FOLDER}/{match[0]}" for match in matches}


def read_change(directory: Path, name: str) -> dict[str, Tensor]:
    """Read what changed.

    Raises:
        RunError: the file is missing or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = own_path(directory, name)
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def gone_in(directory: Path, name: str) -> list[str]:
    """Return the names of removed tensors.

    Raises:
        RunError: as `read_change`.
    """
    from safetensors import SafetensorError, safe_open

    path = own_path(directory, name)
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("gone", "[]"))
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    return [*map(str, found)] if isinstance(found, list) else []


def remove_changes(directory: Path, after: int) -> None:
    """Remove what changed after steps later than `after`."""
    for step, name in change_files(directory).items():
        if step > after:
            (directory / name).unlink(missing_ok=True)
