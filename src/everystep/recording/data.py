"""The data set in a run: the tensors themselves if small, else only their digest and shapes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everystep.errors import RunError
from everystep.recording.facts import DataFileFacts
from everystep.recording.files import FileRow, row_of_file, write_whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DATA_FILE", "DATA_LIMIT", "check_data", "read_data", "write_data"]

DATA_FILE = "data.safetensors"
#: Data up to this size is stored in the run; of larger data, its size and digest.
DATA_LIMIT = 256_000_000


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
    # Bits depend on how a tensor lies in memory, too.
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
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
    except SafetensorError as error:
        raise RunError(f"{place} cannot be read: {error}") from None
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
        digest.update(_bytes_of(tensors[name]))
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


def _bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a CPU tensor of any dtype for hashlib, without a copy."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
