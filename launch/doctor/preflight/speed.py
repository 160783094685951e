"""Which node is slow. A collective runs at the pace of the slowest, so nodes are timed in pairs:
a slow node is slow with every partner, and its partners are fast without it.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from largebatch.launch.doctor.findings import Finding, warning

if TYPE_CHECKING:
    import torch

    from largebatch.launch.doctor.preflight.collectives import Collectives

ROUNDS: Final = {"fast": 3, "full": 5}
NUM_BYTES: Final = {"fast": 1 << 20, "full": 16 << 20}
_REPEATS: Final = 3
_FACTOR: Final = 2.0
_FACTOR_OF_FEW: Final = 4.0
_MANY_NODES: Final = 16
_DEVIATIONS: Final = 3.5
FEWEST_NODES: Final = 3


def partners(num_nodes: int, rounds: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs in which no two nodes meet twice: the first of a round-robin tournament.

    An odd node sits out, another one in each round.
    """
    seats = list(range(num_nodes + num_nodes % 2))  # the last may be a bye
    found = []
    for _ in range(min(rounds, len(seats) - 1)):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([pair for pair in pairs if max(pair) < num_nodes])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def peer_in(
    pairs: Sequence[tuple[int, int]], node: int, local_rank: int, rows: Sequence[Sequence[int]]
) -> int | None:
    """The rank that `rows[node][local_rank]` is timed with in a round, if any."""
    for one, other in pairs:
        if node in (one, other):
            row = rows[other if node == one else one]
            return row[local_rank] if local_rank < len(row) else None
    return None


def seconds_with(
    peer: int, num_bytes: int, device: "torch.device", collectives: "Collectives"
) -> float:
    """The shortest of a few exchanges of `num_bytes` each way; the first warms up."""
    import torch

    given = torch.ones(num_bytes // 4, device=device)
    output = torch.empty_like(given)
    best = math.inf
    for repeat in range(_REPEATS + 1):
        started = time.perf_counter()
        collectives.exchange(peer, output, given)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - started)
    return best


def slow_nodes(gb_per_second: Mapping[str, float]) -> list[Finding]:
    """node-slow: 3.5 robust deviations below the median of the rates' logarithms.

    The deviation is 1.4826 times the median distance from the median, which one bad node cannot
    move (Iglewicz and Hoaglin 1993, whence 3.5); it is taken so large that a slow node is below
    half the median, and below a quarter among fewer than 16 nodes, whose spread is hardly known.
    Below three nodes nothing can be said.
    """
    if len(gb_per_second) < FEWEST_NODES:
        return []
    usual = statistics.median(gb_per_second.values())
    below = {node: math.log(usual / rate) for node, rate in gb_per_second.items()}
    spread = 1.4826 * statistics.median(map(abs, below.values()))
    least = math.log(_FACTOR if len(gb_per_second) >= _MANY_NODES else _FACTOR_OF_FEW)
    bound = max(least, _DEVIATIONS * spread)
    return [
        warning(
            "node-slow",
            f"{rate:.3g} GB/s with its best partner, where nodes have {usual:.3g} (median of "
            f"{len(gb_per_second)})",
            "every collective of every rank waits for this node",
            "leave it out: --nodes N --hostfile-out FILE with a spare node in the allocation",
            (node,),
        )
        for node, rate in gb_per_second.items()
        if below[node] > bound
    ]


def rates(
    rounds: Sequence[Sequence[tuple[int, int]]],
    nodes: Sequence[str],
    seconds: Mapping[int, Sequence[float | None]],
    rows: Sequence[Sequence[int]],
    num_bytes: int,
) -> dict[str, float]:
    """GB/s each way that each node reached with its best partner, all its ranks together. `seconds`
    are those of each rank in each round; None where it sat out.
    """
    best: dict[str, float] = {}
    for number, pairs in enumerate(rounds):
        for node in {node for pair in pairs for node in pair}:
            taken = [seconds[rank][number] for rank in rows[node] if rank in seconds]
            rate = sum(num_bytes / 1e9 / one for one in taken if one)
            best[nodes[node]] = max(best.get(nodes[node], 0.0), rate)
    return best
