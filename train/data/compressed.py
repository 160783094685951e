"""What a file is by its first bytes, and the bytes that a compressed one holds.

The content decides: a compressed file is read as what it holds whatever it is called, and one that
is called compressed and is not is refused.
"""

import bz2
import importlib
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

_HEAD: Final = 512
_CHUNK: Final = 1 << 18


class Compression(NamedTuple):
    name: str
    begins: bytes
    """A pattern."""
    endings: tuple[str, ...]
    decompressor: Callable[[], Any]
    """Makes an object with `decompress`, `eof` and `unused_data`, for one stream."""


def _zstd() -> Any:
    try:
        package: Any = importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise ValueError(
            "is compressed by zstd, which needs the package zstandard: pip install zstandard, or "
            "unpack it (zstd -d)"
        ) from error
    return package.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


COMPRESSIONS: Final = (
    Compression("gzip", rb"\x1f\x8b\x08", (".gz", ".gzip"), lambda: zlib.decompressobj(31)),
    # The block that follows too: a text may well begin with BZh.
    Compression("bzip2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", (".bz2",), bz2.BZ2Decompressor),
    Compression("xz", rb"\xfd7zXZ\x00", (".xz",), lzma.LZMADecompressor),
    Compression("lzma", rb"\x5d\x00\x00", (".lzma",), lzma.LZMADecompressor),
    Compression("zstd", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", (".zst", ".zstd"), _zstd),
)

_OTHERS: Final = {
    b"\x04\x22\x4d\x18": "compressed by lz4: unpack it",
    b"\x02\x21\x4c\x18": "compressed by lz4: unpack it",
    b"\x1f\x9d": "compressed by compress: unpack it (uncompress)",
    b"LZIP": "compressed by lzip: unpack it",
    b"\x89LZO\0": "compressed by lzop: unpack it",
    b"\xff\xfe": "text in UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "text in UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xff\x06\0\0sNaPpY": "compressed by snappy: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it, and give the files of text in it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it, and give the files of text in it",
    b"Rar!\x1a\x07": "a RAR archive: unpack it, and give the files of text in it",
    b"Obj\x01": "an Avro file: write its texts as JSON lines",
    b"SQLite format 3\0": "an SQLite database: write its texts as JSON lines",
    b"\x89HDF\r\n": "an HDF5 file: write its texts as JSON lines",
    b"%PDF-": "a PDF: extract its text first",
    b"\x93NUMPY": "an array of NumPy's: it holds no text",
    b"MMIDIDX\0": "the index of tokens that are made already",
}
"""What other files begin with that would be taken for text, and are none."""

_TAR: Final = (257, b"ustar")


def opened(raw: IO[bytes], path: Path) -> IO[bytes]:
    """The bytes that the file `raw` at `path` holds, decompressed where it is compressed."""
    found = compression_of(raw)
    named = {ending: known.name for known in COMPRESSIONS for ending in known.endings}
    wanted = named.get(path.suffix.lower())
    if wanted is not None and found is None:
        raise ValueError(f"{path} is no whole {wanted} file: it begins with {_head(raw)[:8]!r}")
    file: IO[bytes] = raw
    if found is not None:
        file = io.BufferedReader(_Decompressed(raw, path, found), _CHUNK)
        if compression_of(file) is not None:
            raise ValueError(f"{path} is compressed twice: unpack it once")
    head = _head(file)
    for begins, what in _OTHERS.items():
        if head.startswith(begins):
            raise ValueError(f"{path} is {what}")
    if head[_TAR[0] :].startswith(_TAR[1]):
        raise ValueError(f"{path} is a tar archive: unpack it, and give the files of text in it")
    return file


def bare_name(path: Path) -> Path:
    """`path` without the ending of a compression, in small letters."""
    name = path.name.lower()
    for known in COMPRESSIONS:
        for ending in known.endings:
            name = name.removesuffix(ending)
    return Path(name)


def compression_of(file: IO[bytes]) -> Compression | None:
    """Which compression the content of `file` is of, which is left where it stands."""
    head = _head(file)
    return next((known for known in COMPRESSIONS if re.match(known.begins, head)), None)


def _head(file: IO[bytes]) -> bytes:
    peek = getattr(file, "peek", None)
    assert peek is not None  # both files on disk and decompressed ones are buffered
    return bytes(peek(_HEAD)[:_HEAD])


class _Decompressed(io.RawIOBase):
    """One stream after another, as `cat a.gz b.gz` makes them; a cut one is refused."""

    def __init__(self, raw: IO[bytes], path: Path, compression: Compression) -> None:
        self._raw, self._path, self._of = raw, path, compression
        self._stream: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (chunk := self._raw.read(_CHUNK)):
                if self._stream is not None:
                    raise ValueError(
                        f"{self._path} is no whole {self._of.name} file: it is cut short"
                    )
                return 0
            if not self._input:
                self._input = chunk
            self._output = self._decompress()
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _decompress(self) -> bytes:
        if self._stream is None:
            self._input = self._input.lstrip(b"\0")  # padding between streams
            if not self._input:
                return b""
        try:
            if self._stream is None:
                self._stream = self._of.decompressor()
            found: bytes = self._stream.decompress(self._input)
        except ValueError as error:
            raise ValueError(f"{self._path} {error}") from error
        except Exception as error:  # each package has an error class of its own
            raise ValueError(f"{self._path} is no whole {self._of.name} file: {error}") from error
        self._input = b""
        if self._stream.eof:
            self._input, self._stream = self._stream.unused_data, None
        return found
