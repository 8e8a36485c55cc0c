"""Files of a run: the one place that opens them.

Names stay within the run, no link is followed, only regular files are read, up to a limit. Files are
written as a whole, and digests detect changed ones. They include the data set while it is small, and the
changes that code made between two steps.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import xxhash

from everystep.bounded import MEMORY, open_regular, parse_json, read_regular
from everystep.errors import RunError
from everystep.recording.connection import FILE_NAME, LOCK_NAME, LOGS
from everystep.recording.facts import DataFileFacts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BATCHES",
    "CHANGES",
    "DATA_FILE",
    "DATA_LIMIT",
    "EXPERIMENT_FILE",
    "PROGRAMS",
    "SNAPSHOTS",
    "Change",
    "FileRow",
    "batch_file",
    "bytes_of",
    "check_data",
    "check_writable_files",
    "completed",
    "files_in",
    "open_own",
    "own_path",
    "program_file",
    "read_data",
    "read_file",
    "read_tensors",
    "remove",
    "row_of_file",
    "state_folder",
    "take_file",
    "write_change",
    "write_data",
    "write_tensors",
    "write_whole",
]

BATCHES, CHANGES, PROGRAMS, SNAPSHOTS = "batches", "changes", "programs", "snapshots"
#: Names of files that belong to a step.
# e.g. `changes/000007.safetensors`, `snapshots/000007/rest.safetensors`; 18 digits fit into 64 bits.
_OF_STEP = re.compile(rf"(?:{CHANGES}|{SNAPSHOTS})/(\d{{1,18}})[./].+")
#: The key of plain data in the metadata of a safetensors file.
_ABOUT = "everystep"
#: Bytes of a file that are digested at a time; in between, other threads run.
_PIECE = 8_000_000
DATA_FILE, EXPERIMENT_FILE = "data.safetensors", "experiment.toml"
#: Data up to this size is stored in the run; of larger data, its size and digest.
DATA_LIMIT = 256_000_000
#: Files that are changed in place: a second name of one would be another run's file.
_CHANGED = (LOCK_NAME, FILE_NAME, *(f"{FILE_NAME}{suffix}" for suffix in LOGS))


class FileRow(NamedTuple):
    """A file in the database: its name within the run, its size, and its XXH3 (128 bits)."""

    name: str
    size: int
    digest: bytes

    @property
    def step(self) -> int | None:
        """Of a state or a change: the step that it follows."""
        match = _OF_STEP.fullmatch(self.name)
        return None if match is None else int(match[1])


def row_of_file(name: str, content: bytes) -> FileRow:
    """Return the row of a file with this content."""
    return FileRow(name, len(content), xxhash.xxh3_128_digest(content))


def program_file(number: int) -> str:
    """Return the name of the file of a program, by its number (from 1) in the run."""
    return f"{PROGRAMS}/{number}.json"


def batch_file(number: int) -> str:
    """Return the name of a file of batches, by its number (from 1) in the run."""
    return f"{BATCHES}/{number}.bin"


def state_folder(step: int) -> str:
    """Return the name of the directory of a state."""
    return f"{SNAPSHOTS}/{step:06d}"


def read_file(directory: Path, row: FileRow) -> bytes:
    """Return the content of a file of a run, checked against its digest.

    Raises:
        RunError: it is missing, larger than it was, changed, or not one of the run.
    """
    path = own_path(directory, row.name)
    try:
        content = read_regular(path, min(row.size, MEMORY), follows_links=False)
    except OSError as error:
        grown = "; it was changed after recording" if error.errno == errno.EFBIG else ""
        raise RunError(f"{_unreadable(path, error)}{grown}") from None
    if row_of_file(row.name, content) != row:
        raise RunError(
            f"{path} was changed after recording: its digest differs; restore it from a copy of the run"
        )
    return content


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


def take_file(source: Path, name: str, target: Path, own_name: str | None = None) -> None:
    """Give a run a file of another run: as a hard link if the file system supports it, or a copy.

    A missing file is left out; both runs report it when it is read. source, target: the directories of
    the runs; own_name: that of the file in the target.

    Raises:
        RunError: the file is unreadable, or does not belong to the run.
        OSError: it cannot be written.
    """
    if not own_path(source, name).is_file():
        return
    taken = own_path(target, own_name or name)
    taken.parent.mkdir(parents=True, exist_ok=True)
    with open_own(source, name) as file:
        # The link must lead to the open file, which is known to be a regular one of the run.
        with suppress(OSError):  # another file system, or one without hard links
            os.link(source / name, taken)
            if os.path.samestat(os.fstat(file.fileno()), taken.lstat()):
                return
            taken.unlink()  # it was exchanged meanwhile
        # Not over a file that is there: it may have been linked already, and be another run's, too.
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
        # One part after the other, since a look at the whole path would follow links within it.
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


def files_in(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield what a directory and those in it have, with its status; links are not followed.

    Other processes may write there, so what is removed meanwhile is left out.
    """
    for folder, folders, names in os.walk(directory):
        for name in sorted([*folders, *names]):
            path = Path(folder) / name
            with suppress(FileNotFoundError):
                yield path, path.lstat()


def check_writable_files(directory: Path) -> None:
    """Check that writing into a run changes nothing outside of it: it has no links.

    Raises:
        RunError: it has one; names it.
    """
    for path, status in files_in(directory):
        is_file = stat.S_ISREG(status.st_mode)
        if not is_file and not stat.S_ISDIR(status.st_mode):
            problem = "is a link, or no regular file"
        # Files that never change may have more names: a fork shares those of its parent.
        elif is_file and path.name in _CHANGED and status.st_nlink > 1:
            problem = "has a second name (a hard link)"
        else:
            continue
        raise RunError(
            f"{path} {problem}, so everystep does not write into this run; copy the run (cp -rL) and "
            "use the copy"
        )


def remove(path: Path) -> None:
    """Remove a file or a directory that nothing names; if it stays, it does no harm."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def completed(path: Path, name: str = "") -> Iterator[Path]:
    """Yield a temporary name for a file or a directory, which gets its own name once it is complete.

    name: the temporary one, if it is to be another than usual.
    """
    # In the same directory, since a rename is atomic within one file system only.
    temporary = path.with_name(name or f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is complete from the moment it exists, also after the power has failed.

    Raises:
        OSError: it cannot be written.
    """
    with completed(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        # Both before the rename: the name must not lead to bytes that a power failure can still lose.
        file.flush()
        os.fsync(file.fileno())


def write_tensors(
    path: Path, name: str, tensors: Mapping[str, Tensor], about: Any = None, *, is_synced: bool = True
) -> FileRow:
    """Write tensors (on the CPU), and plain data about them, as safetensors; return the row of the file.

    path: of the file now; name: within the run, once it is complete.
    """
    from safetensors.torch import save_file

    # A training computes meanwhile: this copies the bytes once, into the file, without Python's lock.
    # One key only: safetensors writes several in no fixed order, and the digest must hold.
    metadata = None if about is None else {_ABOUT: json.dumps(about)}
    save_file(_unshared(tensors), path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it
    digest = xxhash.xxh3_128()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        with memoryview(content) as view:
            for begin in range(0, len(view), _PIECE):
                digest.update(view[begin : begin + _PIECE])
        if is_synced:
            os.fsync(file.fileno())
        return FileRow(name, len(content), digest.digest())


def read_tensors(directory: Path, row: FileRow) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a safetensors file, and the plain data about them, None if it has none.

    Raises:
        RunError: the file is missing, was changed, or is unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = read_file(directory, row)
    try:
        tensors = load(content)
        # `load` drops the plain data. The header is JSON, after its length in 8 bytes.
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, parse_json((header.get("__metadata__") or {}).get(_ABOUT, "null"))
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{directory / row.name} cannot be read: {error}") from None


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous and with separate memory, as safetensors requires."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        alone = tensor.contiguous()
        place = alone.untyped_storage().data_ptr()
        found[name] = alone.clone() if place in taken else alone
        taken.add(place)
    return found


class Change(NamedTuple):
    """What code between two steps changed: tensors by name, and the names of removed ones."""

    tensors: dict[str, Tensor]
    gone: list[str]


def write_change(directory: Path, step: int, tensors: Mapping[str, Tensor], gone: list[str]) -> FileRow:
    """Write tensors (on the CPU) after `step` and the code that followed it. gone: as in `Change`."""
    folder = directory / CHANGES
    folder.mkdir(exist_ok=True)
    name = f"{CHANGES}/{step:06d}.safetensors"
    with completed(directory / name) as file:
        return write_tensors(file, name, tensors, gone or None, is_synced=False)


def write_data(
    directory: Path, tensors: dict[str, Tensor], name: str
) -> tuple[DataFileFacts, list[FileRow]]:
    """Write small data (CPU tensors) into a run; return the fact that describes it, and its file."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    files = []
    if size <= DATA_LIMIT:
        with completed(directory / name) as file:
            files.append(write_tensors(file, name, tensors))
    # Bits also depend on the memory layout of a tensor.
    strides = {key: t.stride() for key, t in tensors.items() if not t.is_contiguous()}
    digest = _digest(tensors)
    fact = DataFileFacts(file=name, stored=bool(files), bytes=size, digest=digest, strides=strides)
    return fact, files


def read_data(directory: Path, row: FileRow, fact: DataFileFacts) -> dict[str, Tensor]:
    """Return the data of a run: x, y, and validation_x and validation_y if it has them.

    Raises:
        RunError: the file is unreadable, or has other data.
    """
    tensors, _ = read_tensors(directory, row)
    place = str(directory / row.name)
    check_data(tensors, fact, place)
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

    # Where elements share memory (stride 0), `copy_` refuses to write.
    if stride is None or len(stride) != tensor.ndim or 0 in stride:
        return tensor.clone()  # in memory of torch's own alignment, which kernels are faster with
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor of any dtype as an array of NumPy's, in the order of its elements."""
    import torch

    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    # The stride of a single element may be any number.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()
