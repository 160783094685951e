"""Memory maps of which no more is read than is asked for.

By itself Linux reads around every first touch of a page as far as the device's read-ahead goes, up
to megabytes for a sequence of kilobytes, on every rank.
"""

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt


def mapped(path: Path) -> mmap.mmap:
    """The file at `path`, which is not empty; only pages that are touched are read."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    return mapping


def announce(mapping: mmap.mmap, starts: npt.NDArray[np.int64], num_bytes: int) -> None:
    """Say that `num_bytes` from each of `starts` are read next: all are under way at once, instead
    of one page after another.
    """
    for start in starts.tolist():
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, first, start + num_bytes - first)


def announce_all(mapping: mmap.mmap) -> None:
    """Say that the whole is read from front to back."""
    mapping.madvise(mmap.MADV_SEQUENTIAL)
