"""The texts in a column of a table: .csv and .tsv, Parquet, and the Arrow files that Hugging Face's
datasets are saved as. A row is a document.
"""

import csv
import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

from largebatch.common.text import one_line

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
