"""Memory maps that read no more than is asked for and keep no file open.

By itself Linux reads around every first touch of a page as far as the device's read-ahead goes, up
to megabytes for a sequence of kilobytes, on every rank. And Python's own maps keep a descriptor
each (until 3.13, which can do without): a set of 1,300 files would need more than the 1,024 that a
process may usually have. So the C library is asked itself.
"""

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong
]  # fmt: skip
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED: Final = ctypes.c_void_p(-1).value


class FileMap:
    """The file at `path`, which is not empty, mapped for reading; only pages that are touched are
    read. It stays the file that it was when it is replaced under its name.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot be mapped: {os.strerror(number)}", str(path))
        self._address, self._size = address, size
        self._bytes = (ctypes.c_ubyte * size).from_address(address)
        # With the last view of it, not with this object.
        weakref.finalize(self._bytes, _LIBC.munmap, address, size).atexit = False
        self._advise(mmap.MADV_RANDOM, 0, size)

    def array(self, dtype: "npt.DTypeLike", count: int = -1, offset: int = 0) -> npt.NDArray[Any]:
        """`count` values from byte `offset` on, or all; read-only, and left where they are."""
        values: npt.NDArray[Any] = np.frombuffer(memoryview(self._bytes), dtype, count, offset)
        values.flags.writeable = False  # a page that is written to ends the process
        return values

    def announce(self, starts: npt.NDArray[np.int64], num_bytes: int) -> None:
        """Say that `num_bytes` from each of `starts` are read next: all are under way at once,
        instead of one page after another.
        """
        for start in starts.tolist():
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._advise(mmap.MADV_WILLNEED, first, start + num_bytes - first)

    def announce_all(self) -> None:
        """Say that the whole is read from front to back."""
        self._advise(mmap.MADV_SEQUENTIAL, 0, self._size)

    def _advise(self, advice: int, start: int, length: int) -> None:
        _LIBC.madvise(
            self._address + start, length, advice
        )  # advice: no harm where it is not taken
