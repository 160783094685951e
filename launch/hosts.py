"""Names of nodes: this one's, those of a hostfile, and a few of many in words."""

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from largebatch.common.files import write_whole
from largebatch.common.text import and_more

_NAMED_PLACES: Final = 4


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This node's short name; LARGEBATCH_FAKE_NODE stands in where one machine plays several."""
    return environment.get("LARGEBATCH_FAKE_NODE") or socket.gethostname().split(".")[0]


def places(nodes: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    return and_more(nodes, _NAMED_PLACES) or "nowhere"


def short(line: str) -> str:
    """A hostfile's line as a node is called here."""
    return line.split()[0].split(".")[0]


def host_lines(path: Path) -> list[str]:
    """The hostfile's lines, each node's first one; ValueError where there are none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"the hostfile {path} cannot be read ({error.strerror}): give the allocation's with "
            "--hostfile, or run in a job, where PBS_NODEFILE names it"
        ) from error
    rows = [line.strip() for line in text.splitlines()]
    first = {short(line): line for line in reversed(rows) if line and not line.startswith("#")}
    if not first:
        raise ValueError(f"the hostfile {path} names no node")
    return list(reversed(first.values()))


def write_hosts(lines: Iterable[str], path: Path) -> None:
    """Write a hostfile in one step: a job never reads half of one."""
    write_whole(path, "".join(f"{line}\n" for line in lines), durable=False)
