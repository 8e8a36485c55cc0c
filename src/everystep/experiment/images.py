"""A directory of images as arrays: a subdirectory for each class, as torchvision's `ImageFolder` has it.

They are decoded once, to bytes in the cache directory. What is trained on is as `ToTensor` makes it:
(C, H, W) in float32, from 0 to 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from everystep.bounded import open_regular
from everystep.errors import DataError, Fault
from everystep.experiment.prepared_rows import Reading, SourceArray
from everystep.experiment.source_files import Conversion, SourceFile, converted
from everystep.experiment.specification import ImagesData

__all__ = ["convert_images", "image_files"]

#: The formats that are read, and their suffixes; other files are skipped. Pillow opens no others: for
#: EPS, for example, it starts a program.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: To be raised when the conversion of images changes.
_FORMAT = 1
#: Images that are converted together.
_TOGETHER = 256


def image_files(folder: Path) -> list[Path]:
    """Return the images of a directory, in the order of `ImageFolder`: by class, directory and name.

    Raises:
        DataError: Pillow is not installed; or there is no such directory, or a class has no images.
    """
    if find_spec("PIL") is None:
        raise DataError('source = "images" needs Pillow, which is not installed: pip install pillow')
    classes = sorted(each for each in folder.glob("*") if each.is_dir() and each.name[0] != ".")
    if not classes:
        raise DataError(f"data.path: {folder} must be a directory with a subdirectory for each class")
    found, faults = list[Path](), list[Fault]()
    for each in classes:
        files = [file for file in each.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()]
        found += sorted(files, key=lambda file: (str(file.parent), file.name))
        faults += [] if files else [Fault(each.name, f"has no images ({', '.join(_SUFFIXES)})")]
    if faults:
        raise DataError(faults, str(folder))
    return found


def convert_images(
    data: ImagesData, sources: tuple[SourceFile, ...], progress: Reading
) -> tuple[SourceArray, SourceArray]:
    """Return x (N, C, H, W), and y (N): the name of the class of each image.

    Raises:
        DataError: lists the images that cannot be read, or that differ in size from the first.
    """
    files = [Path(file) for each in sources for file in each.files]

    def convert(_: Path) -> Conversion:
        return Conversion(len(files), _parts(files, data), {})

    asked = {"format": _FORMAT, "path": data.path, "size": data.size, "grayscale": data.grayscale}
    x, y, *_ = converted(f"images/{Path(data.path).name[:50]}", sources, convert, progress, **asked)
    return SourceArray(x, unit=255), SourceArray(y)


def _parts(files: list[Path], data: ImagesData) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield x in bytes, and y, some at a time."""
    names = [file.relative_to(data.path) for file in files]
    classes = np.array([name.parts[0] for name in names])
    faults, first = list[Fault](), None
    for begin in range(0, len(files), _TOGETHER):
        part = slice(begin, begin + _TOGETHER)
        images = []
        for file, name in zip(files[part], names[part], strict=True):
            try:
                image = _pixels(file, data)
            except Exception as error:  # each format has its own
                faults.append(Fault(str(name), f"cannot be read: {error}"))
                continue
            first = first or (name, image.shape)
            if image.shape != first[1]:
                size, its = (f"{height} x {width}" for height, width, _ in (image.shape, first[1]))
                problem = f"has {size} pixels, but {first[0]} has {its}"
                faults.append(Fault(str(name), f"{problem}; set data.size = [height, width]"))
            images.append(image)
        # All images are looked at, so that every fault is reported; with one, nothing is kept.
        if not faults:
            yield np.stack(images).transpose(0, 3, 1, 2), classes[part]
    if faults:
        raise DataError(faults, data.path)


def _pixels(file: Path, data: ImagesData) -> np.ndarray:
    """Return an image as bytes (H, W, C), converted and resized as torchvision does."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings(action="ignore"), open_regular(file) as content:
        try:
            opened = Image.open(content, formats=_FORMATS)
        except UnidentifiedImageError:
            raise ValueError("it is not an image, or of another format") from None
        if opened.mode[0] in "IF":  # Pillow would cut every value above 255
            raise ValueError("its pixels have more than 8 bits; save it with 8 bits a channel")
        image = opened.convert("L" if data.grayscale else "RGB")
        if data.size is not None:
            height, width = data.size
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, -1)
