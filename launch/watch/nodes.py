"""The nodes of a command that is started again: which of them failed, and which take their places.

The launcher's own words name a node that is lost; of a run that stood still its ranks do, by what
they answered. A node that is named by nobody keeps its place.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from largebatch.launch import node_faults
from largebatch.launch.hosts import host_lines, short, write_hosts
from largebatch.records import find_fields
from largebatch.records.fields import RANKS, whole
from largebatch.records.names import MOST_RANKS, WATCH

LINE: Final = 4096  # characters of a line that are looked at


class Nodes:
    """A hostfile that the command reads at each start, and which is rewritten here between two;
    ValueError where it names no node. `spares` holds good nodes that stand by, taken from the first
    line on, and need not be there; to `bad` those that were taken out are appended, for the jobs
    that follow.
    """

    def __init__(self, hostfile: Path, spares: Path | None, bad: Path | None) -> None:
        self._hostfile, self._bad = hostfile, bad
        self.lines = host_lines(hostfile)
        standing_by = spares is not None and spares.exists() and spares.read_text(encoding="utf-8")
        self._spares = [line for line in (standing_by or "").splitlines() if line.strip()]

    def take_out(self, faults: "Faults", silent: Sequence[int], world_size: int) -> list[str]:
        """Put spares in the places of the nodes that failed, as far as there are any; returns what
        was done, in words. `silent` are ranks that held a run up which stood still; its ranks lie
        on the nodes in blocks, in the hostfile's order.
        """
        names = [short(line) for line in self.lines]
        blamed = {node: why for node, why in faults.lost.items() if node in names}
        if not blamed and world_size:
            held_up = {names[rank * len(names) // world_size] for rank in silent}
            if len(held_up) <= len(names) / 2:  # else it is no node's own fault
                blamed = {node: "its ranks held the run up" for node in names if node in held_up}
        if not blamed:
            first = [(node, why) for node, why in faults.died.items() if node in names]
            blamed = dict(first[:1])  # the others may have died of it
        changes = []
        for node, why in blamed.items():
            self._remember(node, why)
            if not self._spares:
                changes.append(f"no spare is left for {node} ({why}): it is tried again")
                continue
            spare = self._spares.pop(0)
            self.lines[names.index(node)] = spare
            changes.append(f"{short(spare)} takes the place of {node} ({why})")
        write_hosts(self.lines, self._hostfile)
        return changes

    def _remember(self, node: str, why: str) -> None:
        if self._bad is not None:
            with self._bad.open("a", encoding="utf-8") as file:
                file.write(f"{node} {why}\n")

    @property
    def environment(self) -> dict[str, str]:
        """Where the ranks meet: on the first node, wherever MASTER_ADDR named the first before."""
        if "MASTER_ADDR" not in os.environ:
            return {}
        suffix = os.environ.get("LARGEBATCH_HSN_SUFFIX")
        first = self.lines[0].split()[0]
        return {"MASTER_ADDR": f"{short(first)}.{suffix}" if suffix else first}


class Faults:
    """Passes on what a command prints, and notes the nodes that its launcher names, with the line:
    as `lost` those that do not answer or whose hardware failed, as `died` those of ranks that died
    and other ends of connections that failed.
    """

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}
        self.died: dict[str, str] = {}
        self._threads: list[threading.Thread] = []

    def listen(self, streams: Iterable[tuple[IO[bytes], int]]) -> None:
        """Read each stream to its end in a thread, and write it to its descriptor as it comes."""
        for stream, to in streams:
            thread = threading.Thread(target=self._pass_on, args=(stream, to), daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        """Wait for the last words; what a process that cannot be killed still holds is not."""
        for thread in self._threads:
            thread.join(5.0)

    def _pass_on(self, stream: IO[bytes], to: int) -> None:
        rest = b""
        while text := os.read(stream.fileno(), 1 << 16):
            with suppress(OSError):  # a full disk, say: the command continues
                left = text
                while left:
                    left = left[os.write(to, left) :]
            *lines, rest = (rest + text).split(b"\n")
            rest = rest[-LINE:]
            for line in lines:
                self.look(line[:LINE].decode("utf-8", "replace"))
        self.look(rest.decode("utf-8", "replace"))
        stream.close()

    def look(self, line: str) -> None:
        """Note what a line says of a node."""
        for node_of, held in (
            (node_faults.hardware, self.lost), (node_faults.lost, self.lost),
            (node_faults.shepherd, self.lost), (node_faults.died, self.died),
            (node_faults.peer, self.died),
        ):  # fmt: skip
            if (node := node_of(line)) is not None:
                held.setdefault(node, line.strip()[:160])


def held_up(run: Path) -> tuple[list[int], int]:
    """Ranks that held the run up when it last stood still, and its size; none where nobody says."""
    paths = sorted((run / WATCH).glob("*/report.json"))
    report = find_fields(paths[-1], []) if paths else None
    if report is None:
        return [], 0
    ranks = report.find("culprits", RANKS) or report.find("silent", RANKS) or []
    return ranks, report.find_inside("heartbeat").find("world_size", whole(1, MOST_RANKS)) or 0
