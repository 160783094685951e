"""Documents of files of text, piece by piece: memory stays flat, however long a file.

A file whose name ends in .jsonl, .ndjson or .json has an object with a text on each line, each a
document; one of .csv, .tsv, .parquet or .arrow (as Hugging Face's datasets are saved) has one in
each row. Any other file is one document, and comes in pieces of about 1 MiB that end where a line
does. All but the columnar ones may be compressed (`compressed.py`). Endings are read in any case of
their letters.
"""

import csv
import importlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from largebatch.common.text import one_line
from largebatch.train.data.compressed import bare_name, opened

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
    """The documents of `path`, whole or in pieces; empty ones left out. `key` is that of the text
    in a JSON line, or the name of a table's column.
    """
    with path.open("rb") as raw:
        head = bytes(raw.peek(16)[:16])
        kind, named = columnar(head, path), _COLUMNS.get(path.suffix.lower())
        if kind is None and named is not None:
            raise ValueError(f"{path} is no {named} file: it begins with {head[:8]!r}")
        if kind is not None:
            found = _of_texts(texts_of_columns(path, kind, key), path)
        else:
            file, suffix = opened(raw, path), bare_name(path).suffix
            if suffix in SEPARATED:
                found = _of_texts(texts_of_rows(file, path, SEPARATED[suffix], key), path)
            else:
                found = _of_lines(file, path, key) if suffix in _LINES else _of_text(file)
        for piece in found:
            yield piece._replace(bytes_read=raw.tell())


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


SEPARATED: Final = {".csv": ",", ".tsv": "\t"}
PARQUET: Final = b"PAR1"
ARROW: Final = b"ARROW1"
_STREAM: Final = b"\xff\xff\xff\xff"
"""What an Arrow stream begins with, which .arrow files of datasets are."""

_LONGEST: Final = 1 << 30


def columnar(head: bytes, path: Path) -> str | None:
    """ "parquet" or "arrow", of a file that begins with `head`; None for another kind."""
    if head.startswith(PARQUET) and head[4:5] < b" ":  # and no text of this beginning
        return "parquet"
    is_stream = head.startswith(_STREAM) and path.suffix.lower() in (".arrow", ".feather")
    return "arrow" if head.startswith(ARROW) or is_stream else None


def texts_of_columns(path: Path, kind: str, key: str) -> Iterator[str | None]:
    """The values of column `key`, batch by batch."""
    try:
        arrow: Any = importlib.import_module("pyarrow")
        if kind == "parquet":
            parquet: Any = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} is of the format {kind}, which needs the package pyarrow: pip install "
            "pyarrow, or write its texts as JSON lines"
        ) from error
    try:
        if kind == "parquet":
            file = parquet.ParquetFile(path)
            _check_column(path, file.schema_arrow.names, key)
            batches = file.iter_batches(columns=[key])
        else:
            batches = _arrow_batches(arrow, path, key)
        for batch in batches:
            column = batch.column(key)
            if not _is_text(arrow, column.type):
                raise ValueError(
                    f"{path}: its column {key!r} is of {column.type}, and no text: name another "
                    "with --key"
                )
            yield from column.to_pylist()
    except arrow.ArrowException as error:
        raise ValueError(f"{path} is no whole {kind} file: {one_line(error)}") from error


def _arrow_batches(arrow: Any, path: Path, key: str) -> Iterator[Any]:
    with path.open("rb") as file:
        whole = file.read(len(ARROW)) == ARROW
    source = arrow.memory_map(str(path))
    reader = arrow.ipc.open_file(source) if whole else arrow.ipc.open_stream(source)
    _check_column(path, reader.schema.names, key)
    if whole:
        return (reader.get_batch(place) for place in range(reader.num_record_batches))
    return iter(reader)


def _is_text(arrow: Any, kind: Any) -> bool:
    kinds = [arrow.types.is_string, arrow.types.is_large_string]
    kinds += [getattr(arrow.types, "is_string_view", lambda kind: False)]
    return any(is_kind(kind) for is_kind in kinds)


def _check_column(path: Path, names: Sequence[str], key: str) -> None:
    if key not in names:
        raise ValueError(
            f"{path} has no column {key!r} (it has {', '.join(names)}): name one with --key"
        )


def texts_of_rows(file: IO[bytes], path: Path, separator: str, key: str) -> Iterator[str]:
    """The values of column `key` in a file of separated values, whose first line names them."""
    csv.field_size_limit(_LONGEST)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, delimiter=separator)
    try:
        _check_column(path, rows.fieldnames or [], key)
        for row in rows:
            yield row[key] or ""
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 after line {rows.line_num} ({error}): convert it"
        ) from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    finally:
        text.detach()
