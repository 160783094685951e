"""Documents of text files and JSON lines, piece by piece: memory stays flat, however long a file.

A file whose name ends in .jsonl, .ndjson or .json has an object with a text on each line, each a
document. Any other file is one document, and comes in pieces of about 1 MiB that end where a line
does. Both may be compressed by gzip (.gz).
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple

_PIECE: Final = 1 << 20
_LONGEST_LINE: Final = 1 << 24
"""A longer one in a text is cut, between two characters of UTF-8."""


class Piece(NamedTuple):
    text: bytes
    ends_document: bool
    bytes_read: int
    """Of the file, by then: what a progress bar shows."""


def is_json_lines(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix in (".jsonl", ".ndjson", ".json")


def pieces(path: Path, key: str) -> Iterator[Piece]:
    """The documents of `path`, whole or in pieces; empty ones left out.

    Args:
        key: of the text in a JSON line.

    Raises:
        ValueError: a line that holds no such text, by its number.
    """
    with path.open("rb") as raw:
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
        try:
            found = _of_lines(file, path, key) if is_json_lines(path) else _of_text(file)
            for text, ends_document in found:
                yield Piece(text, ends_document, raw.tell())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}") from error


def _of_text(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    text = _piece(file, b"")
    while text:
        text, rest = _at_character(text)
        following = _piece(file, rest)
        yield text, not following
        text = following


def _piece(file: IO[bytes], before: bytes) -> bytes:
    text = file.read(_PIECE)
    return before + text + (file.readline(_LONGEST_LINE) if text else b"")


def _at_character(text: bytes) -> tuple[bytes, bytes]:
    """`text` up to the last character that is whole in UTF-8, and the rest."""
    start = len(text) - 1
    while start > max(len(text) - 4, 0) and text[start] & 0xC0 == 0x80:  # 10xxxxxx goes on
        start -= 1
    lead = text[start]
    size = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    whole = size <= len(text) - start or start == 0
    return (text, b"") if whole else (text[:start], text[start:])


def _of_lines(file: IO[bytes], path: Path, key: str) -> Iterator[tuple[bytes, bool]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON ({error}): one object a line is read, and text "
                "files by another name than .jsonl, .ndjson or .json"
            ) from error
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            held = f"keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"{path}, line {number} has no text {key!r} (it has {held}): name its key with "
                "--key"
            )
        if value[key]:
            yield value[key].encode(errors="surrogatepass"), True
