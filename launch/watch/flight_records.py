"""What ranks have recorded of their collectives, read.

From the answers of `distributed/rank_dump.py`, or the pickles that torch writes by itself
(TORCH_FR_DUMP_TEMP_FILE). Imports no torch.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.common.unpickling import AllowListUnpickler
from largebatch.records import Fields, RecordError, printable, read_fields
from largebatch.records.fields import list_of, mapping, must_be, text, whole
from largebatch.records.names import MOST_RANKS
from largebatch.records.reading import parsed, read_bytes


class Group(NamedTuple):
    """A process group as far as its ranks count together: backends of one group count apart."""

    name: str
    about: str
    backend: str

    def __str__(self) -> str:
        return f"{self.about or self.name} ({self.backend})"


class Call(NamedTuple):
    """A rank's entry into a collective."""

    op: str
    sizes: tuple[tuple[int, ...], ...]
    """Of its inputs."""
    done: bool

    def __str__(self) -> str:
        return f"{self.op} {' '.join(str(list(size)) for size in self.sizes)}".strip()


Calls = dict[int, Call]
"""By number."""


_call = cache(Call)  # ranks have most of them in common


@dataclass(frozen=True)
class FlightRecord:
    """What one rank has recorded: the last calls of each group, all where it `is_whole`; the ranks
    of the groups it is in by the group's name, where known; sends and receives that are not done,
    in words.
    """

    rank: int
    calls: dict[Group, Calls]
    members: dict[str, Sequence[int]] = field(default_factory=dict)
    is_whole: bool = False
    waits_p2p: list[str] = field(default_factory=list)


def record_of(held: Mapping[str, Any], rank: int, where: str | None = None) -> FlightRecord:
    """A rank's answer, or torch's own dump, from the file `where`, as a `FlightRecord`; RecordError
    where it is neither.
    """
    dump = Fields(held, where or f"rank {rank}")
    calls: dict[Group, Calls] = {}
    waits_p2p = []
    entries = [*dump.each("collectives" if "collectives" in dump else "entries")]
    for entry in entries:
        backend, _, op = entry.take("profiling_name", text).partition(":")
        name, about = entry.take("process_group", _pair)
        group = Group(name, about, backend)
        done = bool(entry.values.get("retired")) or entry.values.get("state") == "completed"
        if entry.values.get("is_p2p"):
            waits_p2p += [] if done else [f"{op} of {group}"]
            continue
        sizes = entry.take("input_sizes", _sizes)
        number = entry.take("collective_seq_id", whole())
        calls.setdefault(group, {})[number] = _call(op, sizes, done)
    whole_record = any(entry.values.get("record_id") == 0 for entry in entries)
    if dump.problems:
        raise RecordError(dump.problems[0])
    is_whole = bool(dump.values.get("is_whole", whole_record))
    return FlightRecord(rank, calls, dict(_members(dump)), is_whole, waits_p2p)


def _pair(value: Any) -> tuple[str, str]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise must_be("a name and what it is for", value)
    return printable(value[0]), printable(value[1])


def _sizes(value: Any) -> tuple[tuple[int, ...], ...]:
    rows: list[tuple[int, ...]] = []
    for row in value if isinstance(value, list | tuple) else [None]:
        if not isinstance(row, list | tuple) or any(type(size) is not int for size in row):
            raise must_be("lists of whole numbers", value)
        rows.append(tuple(row))
    return tuple(rows)


def _members(dump: Fields) -> Iterable[tuple[str, Sequence[int]]]:
    for name in dump.find_inside("groups"):
        said = dump.find_inside("groups").inside(name)
        key = "range" if "range" in said else "ranks"
        ranks = said.take(key, list_of(whole(0, MOST_RANKS)))
        if key == "range" and (len(ranks) != 3 or ranks[2] == 0):
            raise RecordError(f"{said.where}: range must be a start, a stop and a step")
        yield printable(name), range(*ranks) if key == "range" else ranks
    for name in dump.find_inside("pg_config"):  # torch's; "[]" with gloo
        group = dump.find_inside("pg_config").inside(name)
        listed = group.find("ranks", text) or "[]"
        held = Fields({"ranks": parsed(listed, group.where)}, group.where)
        yield printable(name), held.take("ranks", list_of(whole(0, MOST_RANKS)))


def read(path: Path) -> FlightRecord:
    """A rank's answer (`rank-N.json`), or a file of torch's, whose name ends in the rank;
    ValueError for another file.
    """
    digits = re.search(r"(\d+)(?:\.json)?$", path.name)
    if digits is None:
        raise ValueError(f"{path}: its name must end in the number of a rank")
    try:
        if path.suffix == ".json":
            held: Any = read_fields(path).values
        else:
            held = AllowListUnpickler(io.BytesIO(read_bytes(path))).load()
        return record_of(mapping(held), int(digits[1]), printable(path))
    except RecordError:
        raise
    except Exception as error:  # a pickle may end in any, and so may what it holds
        raise ValueError(f"{path} holds no flight record: {error!r}") from error
