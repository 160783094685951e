"""A node's counters over time, in one file: what `largebatch nic record` writes and reports read.

`nic-NODE.jsonl` holds whole lines only, however the recorder ends. The first one names the
counters; a sample has the time and what has changed, by position in the names:

    {"nic": 1, "node": …, "time": …, "names": […], "every": …}
    {"t": 1746204071.66, "v": [2036, …]}                       the first sample, null: unreadable
    {"t": …, "d": [place, difference, …], "x": [place, …], "b": [place, value, …]}

`d`: changed since the sample before; `x`: gone; `b`: there (again). A later recorder in the same
file begins again with names. A difference is what was seen, negative where a counter went back.
"""

import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from largebatch.common.files import lock
from largebatch.common.text import shown
from largebatch.launch.diagnose.nic.counters import parse
from largebatch.records import RecordError, printable
from largebatch.records.fields import list_of, moment, text
from largebatch.records.reading import MOST_LINE_BYTES, open_file

FORMAT: Final = 1
MOST_BYTES: Final = 64  # of a counter's text
WIDTHS: Final = (32, 48, 56, 64)
"""Bits after which counters may begin again at 0; which of them does is not documented."""
NEAR_END: Final = 0.75
"""Of its width, where a counter that fell has run over rather than begun anew."""


class Recorder:
    """Appends samples of `counters` to a file, which is its own as long as it lives; ValueError
    where another recorder is at work on it. `unreadable` counts what the first sample could not
    read, by the reason.
    """

    def __init__(self, path: Path, node: str, counters: Mapping[str, Path], every: float) -> None:
        self.bytes_written = 0
        self.unreadable: dict[str, int] = {}
        self._paths = [os.fspath(path) for path in counters.values()]
        self._names = list(counters)
        self._last: list[int | None] | None = None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if lock(self._file) is False:
            os.close(self._file)
            raise ValueError(f"another recorder is at work on {path}: one a node is enough")
        # What another recorder was killed in is left as half a line.
        size = os.fstat(self._file).st_size
        self._broken = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        self._write({"nic": FORMAT, "node": node, "time": time.time(), "every": every,
                     "names": self._names})  # fmt: skip

    def sample(self) -> float:
        """Read all counters once and append what has changed; returns the seconds that it took."""
        begun = time.perf_counter()
        now = time.time()
        values = [self._read(path) for path in self._paths]
        if self._last is None:
            self._write({"t": round(now, 3), "v": values})
        else:
            self._write(_change(round(now, 3), self._last, values))
        self._last = values
        return time.perf_counter() - begun

    def _read(self, path: str) -> int | None:
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                return parse(os.read(file, MOST_BYTES))
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            if self._last is None:
                reason = getattr(error, "strerror", None) or "no number in it"
                self.unreadable[reason] = self.unreadable.get(reason, 0) + 1
            return None

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if self._broken:
            text = b"\n" + text
        self._broken = True
        written = os.write(self._file, text)  # one call: a kill leaves all of it or, rarely, half
        if written < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._broken = False
        self.bytes_written += written

    def close(self) -> None:
        os.close(self._file)


def _change(
    now: float, before: Sequence[int | None], values: Sequence[int | None]
) -> dict[str, Any]:
    line: dict[str, Any] = {"t": now, "d": []}
    for place, (old, new) in enumerate(zip(before, values, strict=True)):
        if new == old:
            continue
        if new is None:
            line.setdefault("x", []).append(place)
        elif old is None:
            line.setdefault("b", []).extend((place, new))
        else:
            line["d"].extend((place, new - old))
    return line


# ---- reading

MOST_CELLS: Final = 500_000_000
"""Samples times counters of a node that can have been recorded: 4 GB."""


@dataclass(frozen=True)
class NodeRecord:
    """What one node's counters did; `names` are those of the ones that moved, `resets` the times
    that one went back to begin anew.
    """

    node: str
    times: NDArray[np.float64]
    """Seconds since 1970, at the end of each interval between two samples. (intervals,)"""
    lengths: NDArray[np.float64]
    """Of the intervals, in seconds. (intervals,)"""
    names: list[str]
    moved: NDArray[np.float64]
    """By how much, 0 where it was gone. (intervals, counters that moved)"""
    resets: int = 0
    lost_lines: int = 0


def read_record(path: Path) -> NodeRecord:
    """A node's record; a line of another format counts as lost. RecordError where there is none."""
    reader = _Reader(printable(path))
    with open_file(path) as file:
        while line := file.readline(MOST_LINE_BYTES):
            reader.take(line)
    if reader.node is None:
        raise RecordError(f"{reader.where} holds no record of `largebatch nic record`")
    return reader.record()


class _Reader:
    def __init__(self, where: str) -> None:
        self.where = where
        self.node: str | None = None
        self._columns: dict[str, int] = {}
        """Of the table, by the counters' names: recorders of one file may know different ones."""
        self._own = np.zeros(0, dtype=np.intp)
        self._values = np.zeros(0, dtype=np.uint64)
        self._known = np.zeros(0, dtype=bool)
        self._time: float | None = None
        self._times: list[float] = []
        self._lengths: list[float] = []
        self._moved: list[tuple[NDArray[np.intp], NDArray[np.float64]]] = []
        self._resets = self._lost = 0

    def take(self, text: bytes) -> None:
        try:
            line = json.loads(text)
            if "nic" in line:
                self._begin(line)
            elif self.node is not None:
                self._sample(line)
        except RecordError:
            raise
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            self._lost += 1
            self._time = None  # what came since cannot be laid on an interval

    def _begin(self, line: Mapping[str, Any]) -> None:
        if line["nic"] != FORMAT:
            raise RecordError(
                f"{self.where} is a record in format {shown(line['nic'])}, this version reads "
                f"{FORMAT}: report it with the version of largebatch that has recorded it"
            )
        node, names = text(line["node"]), list_of(text)(line["names"])
        self.node, self._time = node, None
        columns = self._columns
        self._own = np.array([columns.setdefault(n, len(columns)) for n in names], np.intp)
        self._values = np.zeros(len(self._own), dtype=np.uint64)
        self._known = np.zeros(len(self._own), dtype=bool)

    def _sample(self, line: Mapping[str, Any]) -> None:
        now = moment(line["t"])
        if "v" in line:
            self._known = np.array([value is not None for value in line["v"]])
            self._values = np.array([value or 0 for value in line["v"]], dtype=np.uint64)
        places, moved = _halves(line.get("d", []))
        known = self._known[places]
        if not known.all():  # the beginning of the others is in a line that is lost
            places, moved = places[known], [m for m, k in zip(moved, known, strict=True) if k]
        distance = np.array(moved, dtype=np.float64)
        for fallen in np.flatnonzero(distance < 0).tolist():
            distance[fallen] = self._over(int(self._values[places[fallen]]), moved[fallen])
        self._values[places] += _modulo(moved)
        back, values = _halves(line.get("b", []))
        self._values[back], self._known[back] = _modulo(values), True
        self._known[np.array(line.get("x", []), dtype=np.intp)] = False
        # A clock that was set back says nothing of how long it took.
        if self._time is not None and now > self._time:
            moved_columns = self._own[places]
            self._times.append(now)
            self._lengths.append(now - self._time)
            self._moved.append((moved_columns, distance))
        self._time = now

    def _over(self, value: int, difference: int) -> int:
        """How far a counter went that fell from `value`: over its end, or from 0 again."""
        for width in WIDTHS:
            end = 1 << width
            if NEAR_END * end <= value < end:
                return difference + end
        self._resets += 1
        return value + difference

    def record(self) -> NodeRecord:
        assert self.node is not None
        all_names = list(self._columns)
        seen = np.zeros(len(all_names), dtype=bool)
        for columns, _ in self._moved:
            seen[columns] = True
        shown = np.flatnonzero(seen)
        place = np.cumsum(seen) - 1
        if len(self._times) * len(shown) > MOST_CELLS:
            raise RecordError(f"{self.where} has over {MOST_CELLS:,} samples of counters")
        table = np.zeros((len(self._times), len(shown)))
        for row, (columns, distance) in enumerate(self._moved):
            table[row, place[columns]] = distance
        names = [all_names[column] for column in shown]
        times, lengths = np.array(self._times), np.array(self._lengths)
        return NodeRecord(self.node, times, lengths, names, table, self._resets, self._lost)


def _halves(flat: Sequence[int]) -> tuple[NDArray[np.intp], Sequence[int]]:
    """Places, and the numbers beside them."""
    if any(type(value) is not int for value in flat) or any(place < 0 for place in flat[::2]):
        raise ValueError("no places and numbers")
    return np.array(flat[::2], dtype=np.intp), flat[1::2]


def _modulo(numbers: Sequence[int]) -> NDArray[np.uint64]:
    """Modulo 2^64, in which sums of counters are exact."""
    return np.array([number % (1 << 64) for number in numbers], dtype=np.uint64)
