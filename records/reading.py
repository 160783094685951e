"""Reading the JSON files of a run's folder: as streams, within bounds, and from files only."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from largebatch.common.text import printable, shown
from largebatch.records.fields import Fields, RecordError

MOST_BYTES: Final = 64 << 20  # of a file that is read whole
MOST_LINE_BYTES: Final = 16 << 20  # a line with every layer of a model takes a hundredth
_TAIL_BYTES: Final = 64 << 10


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read; never wait for what is none, as a pipe would have it.

    Raises:
        FileNotFoundError: there is none.
        RecordError: it is no file, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        what = getattr(error, "strerror", None) or error
        raise RecordError(f"{printable(path)} cannot be read: {what}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RecordError(f"{printable(path)} is no file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a small file whole."""
    try:
        with open_file(path) as file:
            # Room is made for as much as is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    except RecordError:
        raise
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError(f"{printable(path)} cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise RecordError(f"{printable(path)} has over {most >> 20} MiB: it is no record")
    return data


def parsed(data: bytes | str, where: str) -> Any:
    """Parse JSON."""
    if not data.strip():
        raise RecordError(f"{where} is empty")
    try:
        return json.loads(data)
    except RecursionError:
        raise RecordError(f"{where} is not valid JSON (nested too deeply)") from None
    except ValueError as error:  # bad JSON, bad UTF-8, a number of thousands of digits
        raise RecordError(f"{where} is not valid JSON ({printable(error)})") from None


def _fields(data: bytes, where: str, problems: list[str] | None) -> Fields:
    value = parsed(data, where)
    if not isinstance(value, dict):
        raise RecordError(f"{where} must hold an object, got {shown(value)}")
    return Fields(value, where, problems)


def read_fields(path: Path, problems: list[str] | None = None) -> Fields:
    """Read a file that holds one JSON object.

    Raises:
        FileNotFoundError: there is none.
        RecordError: it cannot be read, or holds something else.
    """
    return _fields(read_bytes(path), printable(path), problems)


def find_fields(path: Path, problems: list[str]) -> Fields | None:
    """Read a file that holds one JSON object; None where there is none, or it is noted as bad."""
    try:
        return read_fields(path, problems)
    except FileNotFoundError:
        return None
    except RecordError as error:
        problems.append(str(error))
        return None


def read_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, Fields]]:
    """Yield (number, object) of the lines of a .jsonl, one after the other.

    Lines that hold no object are passed by, and noted together in one sentence, with what `find`
    has not taken of the others. Half a line at the end is passed by silently: a run that
    was killed may leave one.
    """
    name, bad, first = printable(path), 0, ""
    noted: list[str] = []
    try:
        with open_file(path) as file:
            number = 0
            while line := file.readline(MOST_LINE_BYTES):
                number += 1
                whole = line.endswith(b"\n")
                try:
                    fields = _fields(line, f"{name}:{number}", noted)
                except RecordError as error:
                    if not whole and len(line) < MOST_LINE_BYTES:
                        break
                    bad, first = bad + 1, first or str(error)
                    while not whole and line:  # the rest of a line that is too long
                        line = file.readline(MOST_LINE_BYTES)
                        whole = line.endswith(b"\n")
                else:
                    yield number, fields
                    if noted:
                        bad, first = bad + len(noted), first or noted[0]
                        noted.clear()
    except FileNotFoundError:
        return
    except RecordError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{name} cannot be read further: {error.strerror}")
    finally:
        bad, first = bad + len(noted), first or "".join(noted[:1])
        if bad:
            problems.append(first + f", and {bad - 1} more such" * (bad > 1))


def last_fields(path: Path, problems: list[str]) -> Fields | None:
    """Read the last whole line of a .jsonl that holds an object, without those before it; None
    where there is none, or none near the end.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
            if b"\n" not in tail[:-1] and size > len(tail):  # one line, longer than that
                file.seek(max(0, size - MOST_LINE_BYTES))
                tail = file.read(MOST_LINE_BYTES)
    except FileNotFoundError:
        return None
    except RecordError as error:
        problems.append(str(error))
        return None
    except OSError as error:
        problems.append(f"{printable(path)} cannot be read: {error.strerror}")
        return None
    for line in reversed(tail.splitlines()):
        try:
            return _fields(line, f"{printable(path)}, last line", problems)
        except RecordError:
            continue
    return None
