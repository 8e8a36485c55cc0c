"""Files of a run: the one place that opens them.

Names stay within the run, no link is followed, only regular files are read, up to a limit. Files are
written as a whole, and digests detect changed ones. They include the data set while it is small, and the
changes that code made between two steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import xxhash

from everystep.bounded import MEMORY, open_regular, parse_json, read_regular
from everystep.errors import RunError
from everystep.recording.facts import DataFileFacts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CHANGES",
    "DATA_FILE",
    "DATA_LIMIT",
    "Change",
    "FileRow",
    "bytes_of",
    "changes_in",
    "check_data",
    "check_writable_files",
    "has_own",
    "open_own",
    "own_path",
    "program_file",
    "read_change",
    "read_data",
    "read_file",
    "read_own",
    "read_tensors",
    "row_of_file",
    "sweep",
    "take_file",
    "write_change",
    "write_data",
    "write_whole",
]

CHANGES = "changes"
_NAME = re.compile(rf"{CHANGES}/(\d{{1,18}})\.safetensors")
DATA_FILE = "data.safetensors"
#: Data up to this size is stored in the run; of larger data, its size and digest.
DATA_LIMIT = 256_000_000
#: Files that are changed in place: a second name of one would be another run's file.
_CHANGED = ("run.sqlite", "run.sqlite-wal", "run.sqlite-shm", "run.sqlite-journal", "run.lock")


class FileRow(NamedTuple):
    """A file in the database: its name within the run, its size, and its XXH3 (128 bits)."""

    name: str
    size: int
    digest: bytes


def row_of_file(name: str, content: bytes) -> FileRow:
    """Return the row of a file with this content."""
    return FileRow(name, len(content), xxhash.xxh3_128_digest(content))


def program_file(number: int) -> str:
    """Return the name of the file of a program, by its number (from 1) in the run."""
    return f"programs/{number}.json"


def read_file(directory: Path, row: FileRow) -> bytes:
    """Return the content of a file of a run, checked against its digest.

    Raises:
        RunError: it is missing, or was changed.
    """
    content = read_own(directory, row.name, row.size)
    if row_of_file(row.name, content) != row:
        raise RunError(
            f"{directory / row.name} was changed after recording: its digest differs; restore it from "
            "a copy of the run"
        )
    return content


def read_own(directory: Path, name: str, limit: int) -> bytes:
    """Return the content of a file of a run. limit: bytes that it may have.

    Raises:
        RunError: it is missing, cannot be read, is larger, or is not one of the run.
    """
    path = own_path(directory, name)
    try:
        return read_regular(path, min(limit, MEMORY), follows_links=False)
    except OSError as error:
        raise _unreadable(path, error) from None


def open_own(directory: Path, name: str) -> BinaryIO:
    """Open a file of a run for reading.

    Raises:
        RunError: it is missing, cannot be read, or is not one of the run.
    """
    path = own_path(directory, name)
    try:
        return open_regular(path, follows_links=False)
    except OSError as error:
        raise _unreadable(path, error) from None


def has_own(directory: Path, name: str) -> bool:
    """Return whether a run has a file of this name.

    Raises:
        RunError: the name is not one of the run, as in `own_path`.
    """
    return own_path(directory, name).is_file()


def take_file(source: Path, name: str, target: Path, own_name: str | None = None) -> None:
    """Give a run a file of another run: as a hard link if the file system supports it, or a copy.

    source, target: the directories of the runs; own_name: that of the file in the target.

    Raises:
        RunError: the file is missing, unreadable, or does not belong to the run.
        OSError: it cannot be written.
    """
    taken = own_path(target, own_name or name)
    taken.parent.mkdir(parents=True, exist_ok=True)
    with open_own(source, name) as file:
        with suppress(OSError):  # another file system, or one without hard links
            os.link(source / name, taken)
            if os.path.samestat(os.fstat(file.fileno()), taken.lstat()):
                return
            taken.unlink()  # it was exchanged meanwhile
        with taken.open("xb") as copy:
            shutil.copyfileobj(file, copy)
        shutil.copystat(source / name, taken, follow_symlinks=False)


def own_path(directory: Path, name: str) -> Path:
    """Return the path of something in a run's directory, which need not exist.

    Raises:
        RunError: the name leads out of the directory, directly or by a link, or to something other than
            a file or a directory (reading a pipe or a device may never end); or it is not accessible.
    """
    given = PurePath(name)
    is_own = bool(given.parts) and not given.anchor and ".." not in given.parts
    place = directory
    try:
        for part in given.parts if is_own else ():
            place /= part
            mode = place.lstat().st_mode
            is_own &= stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _unreadable(place, error) from None
    except ValueError:  # a NUL in it
        is_own = False
    if not is_own:
        raise RunError(
            f"{directory} refers to a link, a file outside the run, or what is not a regular file: "
            f"{name!r:.200}"
        )
    return directory / name


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path!s:.200} cannot be read: {error.strerror or error}")


def check_writable_files(directory: Path) -> None:
    """Check that writing into a run changes nothing outside of it: it has no links.

    Raises:
        RunError: it has one; names it.
    """
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
            is_file = stat.S_ISREG(status.st_mode)
            is_shared = is_file and name in _CHANGED and status.st_nlink > 1
            if not is_plain or is_shared:
                what = (
                    "has a second name (a hard link)" if is_shared else "is a link, or no regular file"
                )
                raise RunError(
                    f"{path} {what}, so everystep does not write into this run; copy the run "
                    "(cp -rL) and use the copy"
                )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is complete from the moment it exists, also after the power has failed.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a directory."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


class Change(NamedTuple):
    """What code between two steps changed: tensors by name, and the names of removed ones."""

    tensors: dict[str, Tensor]
    gone: list[str]


def write_change(
    directory: Path, step: int, tensors: dict[str, Tensor], gone: Sequence[str] = ()
) -> FileRow:
    """Write tensors (on the CPU) after `step` and the code that followed it.

    gone: the names of removed tensors.
    """
    from safetensors.torch import save

    folder = directory / CHANGES
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{step:06d}.tmp"
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(own, {"gone": json.dumps([*gone])} if gone else None)
    temporary.write_bytes(content)
    row = row_of_file(f"{CHANGES}/{step:06d}.safetensors", content)
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
    tensors, gone = read_tensors(content, "gone", str(place))
    return Change(tensors, [*map(str, gone)] if isinstance(gone, list) else [])


def read_tensors(content: bytes, key: str, place: str) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a safetensors file, and the value that its metadata has as JSON under a key.

    Raises:
        RunError: the file is unreadable; names its place.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, parse_json((header.get("__metadata__") or {}).get(key, "null"))
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{place} cannot be read: {error}") from None


def write_data(
    directory: Path, tensors: dict[str, Tensor], name: str = DATA_FILE
) -> tuple[DataFileFacts, list[FileRow]]:
    """Write small data (CPU tensors) into a run; return the fact that describes it, and its file."""
    from safetensors.torch import save

    size = sum(tensor.nbytes for tensor in tensors.values())
    is_small = size <= DATA_LIMIT
    files = []
    if is_small:
        content = save(_unshared(tensors))
        write_whole(directory / name, content)
        files.append(row_of_file(name, content))
    # Bits also depend on the memory layout of a tensor.
    strides = {key: t.stride() for key, t in tensors.items() if not t.is_contiguous()}
    fact = DataFileFacts(
        file=name, stored=is_small, bytes=size, digest=_digest(tensors), strides=strides
    )
    return fact, files


def read_data(content: bytes, place: Path, fact: DataFileFacts) -> dict[str, Tensor]:
    """Return the data of a run: x, y, and validation_x and validation_y if it has them.

    content: of the file at `place`.

    Raises:
        RunError: the file is unreadable, or has other data.
    """
    tensors, _ = read_tensors(content, "", str(place))
    check_data(tensors, fact, str(place))
    try:
        return {name: _laid_out(t, fact.strides.get(name)) for name, t in tensors.items()}
    except RuntimeError:
        raise RunError(
            f"{place} has no data with the recorded strides: the database was changed"
        ) from None


def check_data(tensors: dict[str, Tensor], fact: DataFileFacts, place: str) -> None:
    """Check that data is that of a run.

    Raises:
        RunError: it is not; names the digests.
    """
    digest = _digest(tensors)
    if digest != fact.digest:
        raise RunError(
            f"{place} is not the data that the run was trained on: its digest is {digest[:12]}..., "
            f"but the run recorded {fact.digest[:12]}...; restore the original file"
        )


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def _laid_out(tensor: Tensor, stride: tuple[int, ...] | None) -> Tensor:
    """Return the tensor as it lay in memory when it was trained on."""
    import torch

    if stride is None or len(stride) != tensor.ndim or 0 in stride:
        return tensor.clone()  # in memory of torch's own alignment, which kernels are faster with
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous and with separate memory, as safetensors requires."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        taken = {other.untyped_storage().data_ptr() for other in found.values()}
        alone = tensor.contiguous()
        found[name] = alone.clone() if alone.untyped_storage().data_ptr() in taken else alone
    return found


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a CPU tensor of any dtype as an array of NumPy's."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
