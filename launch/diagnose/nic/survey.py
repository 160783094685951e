"""The records of all nodes, laid on common stretches of time and read for each kind of trouble.

Of each node only a row a kind is kept: there may be 10,624 of them.
"""

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from largebatch.common.robust import Series
from largebatch.launch.diagnose.nic.counters import KINDS, CounterKind
from largebatch.launch.diagnose.nic.record import NodeRecord, read_record
from largebatch.records import RecordError
from largebatch.records.fields import moment
from largebatch.records.reading import MOST_LINE_BYTES, open_file

MOST_BINS: Final = 240
TAIL_BYTES: Final = 2**20  # longer than a line with every counter of eight interfaces
FIRST_SAMPLES: Final = 12  # that tell how far samples are apart
NOTE_SECONDS: Final = 10.0
MANY: Final = 64  # records that are worth starting processes for


@dataclass(frozen=True)
class Reading:
    """One kind over nodes and time: values (nodes, stretches), NaN where a node has no sample; of
    each node the mean over all its time, (nodes,), and the counter that moved most.
    """

    kind: CounterKind
    values: Series
    means: Series
    worst: list[str]


@dataclass(frozen=True)
class NodeRows:
    """One node: its readings, in the order of KINDS, as (values, mean, worst counter)."""

    node: str
    rows: list[tuple[Series, float, str]]
    last: float
    every: float
    longest: float
    interfaces: int
    resets: int
    lost_lines: int


@dataclass(frozen=True)
class Survey:
    """What the nodes' records say together: the borders of the stretches of time, in seconds since
    1970, (stretches + 1,); a reading of each kind whose counters moved anywhere; each node's last
    sample's time; the seconds between two samples, usually (`every`) and on any node at any time
    (`longest`); and the interfaces of a node that counted anything.
    """

    nodes: list[str]
    borders: Series
    readings: list[Reading]
    last: list[float]
    every: float
    longest: float
    interfaces: int
    resets: int
    lost_lines: int


def read_survey(folder: Path, problems: list[str]) -> Survey | None:
    """Of a run's folder, or of a folder of records; None where no node has two samples. A file
    that is no record is noted, and lines that are lost.
    """
    own = folder / "nic"
    paths = sorted((own if own.is_dir() else folder).glob("nic-*.jsonl"))
    spans = []
    for path in paths:
        try:
            span = read_span(path)
        except (OSError, RecordError) as error:
            problems.append(str(error))
            continue
        spans += [] if span is None else [span]
    if not spans:
        return None
    borders, held = borders_of(spans), []
    for path, rows in zip(paths, _all_rows(paths, borders), strict=True):
        if isinstance(rows, str):
            problems.append(rows)
        elif rows is not None:
            held.append(rows)
            if rows.lost_lines:
                problems.append(f"{path}: {rows.lost_lines} line(s) hold no sample")
    return survey(held, borders) if held else None


def _all_rows(paths: Sequence[Path], borders: Series) -> Iterator[NodeRows | str | None]:
    """Of every file, in their order; of many, by all cores."""
    read = partial(_rows_in, borders=borders)
    if len(paths) < MANY:
        yield from map(read, paths)
        return
    noted = time.monotonic()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, rows in enumerate(pool.map(read, paths, chunksize=8)):
            if time.monotonic() - noted > NOTE_SECONDS:
                noted = time.monotonic()
                print(f"largebatch: {number:,} of {len(paths):,} records read", file=sys.stderr)
            yield rows


def _rows_in(path: Path, borders: Series) -> NodeRows | str | None:
    """What is wrong with it, where it is no record."""
    try:
        return rows_of(read_record(path), borders)
    except (OSError, RecordError) as error:
        return str(error)


def read_span(path: Path) -> tuple[float, float, float] | None:
    """First and last time of a record and seconds between its samples, without reading all of it;
    None where it has no two samples.
    """
    first: list[float] = []
    with open_file(path) as file:
        while text := file.readline(MOST_LINE_BYTES):
            first += _time_of(text)
            if len(first) == FIRST_SAMPLES:
                break
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        tail = file.read().splitlines()
    gaps = [after - before for before, after in pairwise(first) if after > before]
    if not gaps:
        return None
    last = next((time for text in reversed(tail) for time in _time_of(text)), first[-1])
    return first[0], max(last, *first), median(gaps)


def _time_of(text: bytes) -> list[float]:
    """The time of a sample; nothing for other lines, and for half of one."""
    try:
        line = json.loads(text)
        return [moment(line["t"])] if isinstance(line, dict) and "t" in line else []
    except (RecursionError, ValueError):
        return []


def borders_of(spans: Sequence[tuple[float, float, float]]) -> Series:
    """Borders of common stretches of time, each longer than a sample takes."""
    first = min(span[0] for span in spans)
    last = max(span[1] for span in spans)
    step = float(np.median([span[2] for span in spans]))
    # A little more than a step, so that every stretch has a sample of every node.
    bins = int(np.clip((last - first) / (1.05 * step), 1, MOST_BINS))
    return np.linspace(first, last, bins + 1)


def rows_of(record: NodeRecord, borders: Series) -> NodeRows | None:
    """None where the record holds no interval."""
    if not len(record.times):
        return None
    return NodeRows(
        record.node,
        [_of_node(kind, record, borders[1:]) for kind in KINDS],
        float(record.times[-1]),
        float(np.median(record.lengths)),
        float(record.lengths.max()),
        len({name.partition("/")[0] for name in record.names}),
        record.resets,
        record.lost_lines,
    )


def survey(nodes: Iterable[NodeRows | None], borders: Series) -> Survey:
    """All nodes together."""
    held = [node for node in nodes if node is not None]
    readings = []
    for place, kind in enumerate(KINDS):
        rows = [node.rows[place] for node in held]
        if any(worst for *_, worst in rows):
            values = np.stack([row for row, _, _ in rows])
            means = np.array([mean for _, mean, _ in rows])
            readings.append(Reading(kind, values, means, [worst for *_, worst in rows]))
    return Survey(
        [node.node for node in held],
        borders,
        readings,
        [node.last for node in held],
        float(np.median([node.every for node in held])),
        max(node.longest for node in held),
        max(node.interfaces for node in held),
        sum(node.resets for node in held),
        sum(node.lost_lines for node in held),
    )


def _of_node(kind: CounterKind, node: NodeRecord, ends: Series) -> tuple[Series, float, str]:
    """Values by stretch of time, the whole time's, and the counter that moved most ("": none)."""
    place = np.minimum(np.searchsorted(ends, node.times - 1e-6), len(ends) - 1)
    lengths = np.bincount(place, node.lengths, len(ends))
    columns = _columns(kind.counters, node)
    if not columns:
        return np.where(lengths > 0, 0.0, np.nan), 0.0, ""
    moved = np.stack([np.bincount(place, node.moved[:, c], len(ends)) for c in columns])
    if kind.over is None:
        below = lengths
    else:
        of = node.moved[:, _columns(kind.over, node)].sum(1)
        below = np.bincount(place, of, len(ends))
    totals = moved.sum(1)
    together = moved.max(0) if kind.worst else moved.sum(0)
    whole = float(totals.max() if kind.worst else totals.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        values = kind.scale * together / below
    # Nothing sent: nothing blocked.
    values = np.where((below == 0) & (lengths > 0), 0.0, values)
    mean = kind.scale * whole / below.sum() if below.sum() > 0 else 0.0
    worst = node.names[columns[int(np.argmax(totals))]] if whole > 0 else ""
    return np.where(lengths > 0, values, np.nan), mean, worst


def _columns(pattern: re.Pattern[str], node: NodeRecord) -> list[int]:
    return [
        column
        for column, name in enumerate(node.names)
        if pattern.fullmatch(name.partition("/")[2])
    ]
