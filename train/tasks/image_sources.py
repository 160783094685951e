"""Where images come from: an .npz of arrays, or a folder of class folders."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from largebatch.train.data.sampler import Indices

Pixels = npt.NDArray[np.uint8]
"""(images, size, size, channels)."""

_SUFFIXES: Final = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageSource(Protocol):
    """Labelled images that can be read by number."""

    labels: Indices
    """The class of each, (images,)."""
    words: str
    """What it is, for the record."""
    hash: str

    def read(self, indices: Indices) -> Pixels:
        """The images at `indices`."""

    def identities(self) -> list[bytes]:
        """What tells each image from others, wherever it stands."""


def open_source(path: Path, name: str, classes: int, channels: int, size: int) -> ImageSource:
    """The images at `path`, checked against what the configuration says they are.

    Args:
        name: of the key that gave the path.

    Raises:
        ValueError: naming the file or array, what it is and what it has to be.
    """
    if path.is_dir():
        return ImageFolder(path, name, classes, channels, size)
    if path.suffix == ".npz" and path.is_file():
        return Arrays(path, classes, channels, size)
    what = "a file" if path.is_file() else "not there"
    raise ValueError(
        f"{name} must be a folder of class folders or an .npz file with the arrays images and "
        f"labels, got {str(path)!r}, which is {what}"
    )


class Arrays:
    """An .npz file: `images`, uint8 of shape (N, size, size[, channels]), and `labels`, (N,)."""

    def __init__(self, path: Path, classes: int, channels: int, size: int) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                missing = {"images", "labels"} - set(file.files)
                if missing:
                    raise ValueError(
                        f"it has no array {' and no array '.join(sorted(missing))}, but "
                        f"{', '.join(file.files) or 'none'}"
                    )
                images, labels = file["images"], file["labels"]
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read as images and labels: {error}") from error
        self._images = _checked_images(images, path, channels, size)
        self.labels = _checked_labels(labels, path, len(images), classes)
        digest = hashlib.sha256(np.ascontiguousarray(self._images).data)
        digest.update(self.labels.tobytes())
        self.hash, self.words = digest.hexdigest(), f"{len(images)} images of {path.name}"

    def read(self, indices: Indices) -> Pixels:
        return self._images[indices]

    def identities(self) -> list[bytes]:
        """The pixels: copies of an image are one."""
        return [image.tobytes() for image in self._images]


def _checked_images(images: npt.NDArray[Any], path: Path, channels: int, size: int) -> Pixels:
    shaped = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or shaped.shape[1:] != (size, size, channels) or not len(images):
        grey = " or (N, size, size)" if channels == 1 else ""
        raise ValueError(
            f"images in {path} must be uint8 of shape (N, task.size, task.size, task.channels) = "
            f"(N, {size}, {size}, {channels}){grey}, got {images.dtype} of shape {images.shape}"
        )
    return shaped


def _checked_labels(labels: npt.NDArray[Any], path: Path, num_images: int, classes: int) -> Indices:
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels in {path} must be whole numbers of shape ({num_images},), one an image, got "
            f"{labels.dtype} of shape {labels.shape}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels in {path} must be from 0 to {classes - 1} for task.classes={classes}, got "
            f"{low} to {high}"
        )
    return labels.astype(np.int64)


class ImageFolder:
    """A folder for each class, named as the class, with its images; read when they are needed.

    The classes are numbered in the order of their names. Needs Pillow.
    """

    def __init__(self, path: Path, name: str, classes: int, channels: int, size: int) -> None:
        if channels not in _MODES:
            raise ValueError(
                f"task.channels must be one of {', '.join(map(str, _MODES))} for a folder of "
                f"images, got {channels}"
            )
        self._mode, self._size = _MODES[channels], size
        self.classes = sorted(
            child.name for child in path.iterdir()
            if child.is_dir() and not child.name.startswith(".")
        )  # fmt: skip
        if len(self.classes) != classes:
            raise ValueError(
                f"{name}={path} must have task.classes={classes} class folders, got "
                f"{len(self.classes)}: {', '.join(self.classes[:5])}"
                f"{', …' if len(self.classes) > 5 else ''}"
            )
        self._files: list[Path] = []
        labels = []
        for number, of_class in enumerate(self.classes):
            found = sorted(
                file for file in (path / of_class).rglob("*") if file.suffix.lower() in _SUFFIXES
            )
            if not found:
                raise ValueError(f"{path / of_class} must hold images of its class, got none")
            self._files += found
            labels += [number] * len(found)
        self.labels = np.array(labels, np.int64)
        self._names = [file.relative_to(path).as_posix() for file in self._files]
        for file in self._files:
            with self._open(file):
                pass  # a wrong size is reported now, and not in the middle of a run
        sizes = "".join(
            f"{file_name} {file.stat().st_size}\n"
            for file_name, file in zip(self._names, self._files, strict=True)
        )
        self.hash = hashlib.sha256(sizes.encode()).hexdigest()
        self.words = f"{len(self._files)} images of {path.name}/ (hash of names and sizes)"

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        """Pillow's image of a file, its header read and its size checked."""
        try:
            from PIL import Image
        except ImportError as error:
            raise ValueError(
                "a folder of images needs Pillow: pip install pillow, or put them into an .npz file"
            ) from error
        try:
            with Image.open(file) as image:
                if image.size != (self._size, self._size):
                    raise ValueError(
                        f"{file} must be {self._size} by {self._size} pixels, task.size, got "
                        f"{image.size[0]} by {image.size[1]}: scale the images first, or set "
                        "task.size"
                    )
                yield image
        except OSError as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error

    def read(self, indices: Indices) -> Pixels:
        return np.stack([self._pixels(self._files[index]) for index in indices])

    def _pixels(self, file: Path) -> Pixels:
        with self._open(file) as image:
            pixels = np.asarray(image.convert(self._mode), np.uint8)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def identities(self) -> list[bytes]:
        """The names below the folder: contents are not read for this."""
        return [file_name.encode() for file_name in self._names]
