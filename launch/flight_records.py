"""What ranks have recorded of their collectives, read.

From the answers of `train/stacks.py`, or the pickles that torch writes by itself
(TORCH_FR_DUMP_TEMP_FILE). Imports no torch.
"""

import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.train.unpickling import AllowListUnpickler


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


@cache  # ranks have most of them in common
def _call(op: str, sizes: tuple[tuple[int, ...], ...], done: bool) -> Call:
    return Call(op, sizes, done)


@dataclass(frozen=True)
class Record:
    """What one rank has recorded.

    Attributes:
        calls: by group and number; of each group the last ones.
        members: the ranks of the groups it is in, by the group's name, where known.
        is_whole: nothing was dropped since the process began.
        waits_p2p: sends and receives that are not done, in words.
    """

    rank: int
    calls: dict[Group, Calls]
    members: dict[str, Sequence[int]] = field(default_factory=dict)
    is_whole: bool = False
    waits_p2p: list[str] = field(default_factory=list)


def record_of(dump: Mapping[str, Any], rank: int) -> Record:
    """A rank's answer, or torch's own dump, as a `Record`."""
    entries = dump["collectives"] if "collectives" in dump else dump.get("entries", [])
    calls: dict[Group, Calls] = {}
    waits_p2p = []
    for entry in entries:
        backend, _, op = entry["profiling_name"].partition(":")
        name, about = entry["process_group"]
        group = Group(str(name), str(about), backend)
        done = bool(entry["retired"]) or entry["state"] == "completed"
        if entry["is_p2p"]:
            waits_p2p += [] if done else [f"{op} of {group}"]
            continue
        sizes = tuple(tuple(size) for size in entry["input_sizes"])
        calls.setdefault(group, {})[entry["collective_seq_id"]] = _call(op, sizes, done)
    is_whole = dump.get("is_whole", any(entry.get("record_id") == 0 for entry in entries))
    return Record(rank, calls, dict(_members(dump)), is_whole, waits_p2p)


def _members(dump: Mapping[str, Any]) -> Iterable[tuple[str, Sequence[int]]]:
    for name, said in dump.get("groups", {}).items():
        yield name, range(*said["range"]) if "range" in said else said["ranks"]
    for name, said in dump.get("pg_config", {}).items():  # torch's; "[]" with gloo
        yield name, json.loads(said.get("ranks") or "[]")


def read(path: Path) -> Record:
    """A rank's answer (`rank-N.json`), or a file of torch's, whose name ends in the rank.

    Raises:
        ValueError: the file is neither.
    """
    digits = re.search(r"(\d+)(?:\.json)?$", path.name)
    if digits is None:
        raise ValueError(f"{path}: its name must end in the number of a rank")
    try:
        if path.suffix == ".json":
            dump = json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open("rb") as file:
                dump = AllowListUnpickler(file).load()
        return record_of(dump, int(digits[1]))
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no flight record: {error!r}") from error
