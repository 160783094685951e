"""A thread that notices when this rank stays too long in one place, and says where.

A collective that hangs cannot be ended from inside on XPU (xccl has no abort), so that the end of
a hung preflight is the end of the process. The main thread makes the collectives: from another
thread MPI with GPU buffers may hang by itself (pmodels/mpich#7880).
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from largebatch.common.text import and_more
from largebatch.launch.doctor.findings import Finding, error
from largebatch.launch.hosts import places

_LOOK_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Stage:
    """Where a rank is: the number and name of the part, and whether its call has been made."""

    number: int = 0
    name: str = "the start"
    entered: bool = False


class PreflightWatch:
    """`late()` is called once, from its own thread, when a stage takes longer than it may."""

    def __init__(self, seconds: float, late: Callable[[Stage], None]) -> None:
        self.seconds = seconds
        self.stage = Stage()
        self._late = late
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="preflight-watch", daemon=True)

    def __enter__(self) -> "PreflightWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def next(self, name: str) -> None:
        """A stage begins."""
        self.stage = Stage(self.stage.number + 1, name)
        self._since = time.monotonic()

    def enter(self) -> None:
        """The call that all ranks have to make is about to be made."""
        self.stage = Stage(self.stage.number, self.stage.name, True)

    def _look(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            if time.monotonic() - self._since > self.seconds:
                self._late(self.stage)
                return


def hang(
    stages: Mapping[int, Stage], size: int, node_of: Callable[[int], str], seconds: float
) -> list[Finding]:
    """Who holds up whom: from where each rank says it is. Ranks without a word do not answer."""
    silent = [rank for rank in range(size) if rank not in stages]
    found = [lost(silent, node_of, f"has not said a word for {seconds:g} s")] if silent else []
    if not stages:
        return found
    place = min((stage.number, stage.entered) for stage in stages.values())
    there = [rank for rank, stage in stages.items() if (stage.number, stage.entered) == place]
    some = len(there) <= len(stages) // 2
    nodes = tuple(dict.fromkeys(node_of(rank) for rank in there)) if some else ()
    name = stages[there[0]].name
    who = f"{len(there):,} of {size:,} ranks ({format_ranks(there)})"
    if not place[1]:
        found.append(
            error(
                "collective-not-entered",
                f"{who} never made the call of {name}, and hold up all others for {seconds:g} s",
                "the others wait for them without end",
                "leave their nodes out, or look at what these ranks do (py-spy dump --pid PID)",
                nodes,
            )
        )
    elif not silent:
        found.append(
            error(
                "collective-hangs",
                f"{name}: all ranks have called it, and {who} have no answer after {seconds:g} s",
                "the backend or the network between the nodes is at fault",
                "try another algorithm (CCL_ALLREDUCE_SCALEOUT=direct, ring, rabenseifner), "
                "--no-vni where VNIs ran out, and half of the nodes at a time",
                nodes,
            )
        )
    return found


def lost(ranks: list[int], node_of: Callable[[int], str], what: str) -> Finding:
    """rank-silent: ranks that are not there at all."""
    nodes = tuple(dict.fromkeys(node_of(rank) for rank in ranks))
    verb = "rank" if len(ranks) == 1 else "each of the ranks"
    return error(
        "rank-silent",
        f"{verb} {format_ranks(ranks)} ({places(nodes)}) {what}",
        "its node or process has died or cannot reach rank 0, and no collective will end",
        "leave the node out: --nodes N --hostfile-out FILE with a spare node in the allocation",
        nodes,
    )


def format_ranks(ranks: list[int]) -> str:
    return and_more(ranks, 12)
