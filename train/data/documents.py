"""Documents of files of text, piece by piece: memory stays flat, however long a file.

A file whose name ends in .jsonl, .ndjson or .json has an object with a text on each line, each a
document; one of .csv, .tsv, .parquet or .arrow (`tables.py`) has one in each row. Any other file is
one document, and comes in pieces of about 1 MiB that end where a line does. All but the columnar
ones may be compressed (`compressed.py`). Endings are read in any case of their letters.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple

from largebatch.train.data.compressed import bare_name, opened
from largebatch.train.data.tables import SEPARATED, columnar, texts_of_columns, texts_of_rows

_PIECE: Final = 1 << 20
_LONGEST_LINE: Final = 1 << 24
"""A longer one in a text is cut, between two characters of UTF-8."""

_LINES: Final = (".jsonl", ".ndjson", ".json")
_COLUMNS: Final = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}


class TextPiece(NamedTuple):
    text: bytes
    ends_document: bool
    line: int | None
    """Number of its first line in the file; None where that has no lines."""
    bytes_read: int = 0
    """Of the file, by then: what a progress bar shows."""


def check_file(path: Path) -> None:
    """Refuse what is no file."""
    if path.is_file():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is not there, or is no file")
    saved = sorted({file.suffix for file in path.rglob("*.*") if file.suffix in _COLUMNS})
    if (path / "dataset_info.json").exists() or (path / "state.json").exists() or saved:
        kind = saved[0] if saved else ".arrow"
        below = "" if [*path.glob(f"*{kind}")] else "*/"
        raise ValueError(
            f"{path} is a folder, as Hugging Face's datasets are: give the files in it, "
            f"{path}/{below}*{kind}, with --key=COLUMN"
        )
    raise ValueError(f"{path} is a folder: give the files in it, such as {path}/*.jsonl")


def pieces(path: Path, key: str) -> Iterator[TextPiece]:
    """The documents of `path`, whole or in pieces; empty ones left out.

    Args:
        key: of the text in a JSON line, or name of a table's column.
    """
    with path.open("rb") as raw:
        head = bytes(raw.peek(16)[:16])
        kind, named = columnar(head, path), _COLUMNS.get(path.suffix.lower())
        if kind is None and named is not None:
            raise ValueError(f"{path} is no {named} file: it begins with {head[:8]!r}")
        if kind is not None:
            texts = texts_of_columns(path, kind, key)
            found = _of_texts(texts, path)
        else:
            found = _of_file(opened(raw, path), path, key)
        for piece in found:
            yield piece._replace(bytes_read=raw.tell())


def _of_file(file: IO[bytes], path: Path, key: str) -> Iterator[TextPiece]:
    suffix = bare_name(path).suffix
    if suffix in SEPARATED:
        return _of_texts(texts_of_rows(file, path, SEPARATED[suffix], key), path)
    return _of_lines(file, path, key) if suffix in _LINES else _of_text(file)


def _of_texts(texts: Iterable[str | None], path: Path) -> Iterator[TextPiece]:
    return (TextPiece(_utf8(text, path, None), True, None) for text in texts if text)


def _of_text(file: IO[bytes]) -> Iterator[TextPiece]:
    line = 1
    text = _piece(file, b"")
    while text:
        text, rest = _at_character(text)
        following = _piece(file, rest)
        yield TextPiece(text, not following, line)
        line += text.count(b"\n")
        text = following


def _piece(file: IO[bytes], before: bytes) -> bytes:
    text = file.read(_PIECE)
    return before + text + (file.readline(_LONGEST_LINE) if text else b"")


def _at_character(text: bytes) -> tuple[bytes, bytes]:
    """`text` up to the last character that is whole in UTF-8, and the rest."""
    start = len(text) - 1
    while (
        start > max(len(text) - 4, 0) and text[start] & 0xC0 == 0x80
    ):  # 10xxxxxx continues a letter
        start -= 1
    lead = text[start]
    size = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    whole = size <= len(text) - start or start == 0
    return (text, b"") if whole else (text[:start], text[start:])


def _of_lines(file: IO[bytes], path: Path, key: str) -> Iterator[TextPiece]:
    first = True
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if first and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise ValueError(
                f"{path} begins as one JSON list, and one object a line is read: `jq -c '.[]' "
                f"{path} > {path.with_suffix('.jsonl').name}` writes it so"
            )
        first = False
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON ({error}): one object a line is read, and text "
                "files by another name than .jsonl, .ndjson or .json; `jq -c .` writes an object "
                "of many lines in one"
            ) from error
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            held = f"keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"{path}, line {number} has no text {key!r} (it has {held}): name its key with "
                "--key"
            )
        if value[key]:
            yield TextPiece(_utf8(value[key], path, number), True, number)


def _utf8(text: str, path: Path, line: int | None) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        where = "" if line is None else f", line {line}"
        half = ascii(text[error.start])[1:-1]
        raise ValueError(
            f"{path}{where} holds {half}, half of a character of UTF-16, at place {error.start} of "
            "its text, which no UTF-8 can say: leave the document out, or mend it (`jq -c .` "
            "writes U+FFFD in its place)"
        ) from error
