"""Which all-reduce a cost model holds for the fastest, by message size and number of nodes.

All of it is projection: a formula with an alpha and a beta in it, nothing that ran. What it
proposes is to be measured, and checked for value, before it is used: one release of oneCCL was
reported to add up wrongly with Rabenseifner's algorithm.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from largebatch.benchmarks.collectives.models import (
    ALL_REDUCE,
    ELEMENT_BYTES,
    Cluster,
    floor_lg,
    hierarchical_seconds,
)

AURORA_NODES: Final = 10_624
AURORA_RANKS_PER_NODE: Final = 12
AURORA_ADAPTERS: Final = 8
MOST_BYTES: Final = 2**38  # of a message; no threshold is looked for above it
STEPS_AN_OCTAVE: Final = 4


@dataclass(frozen=True)
class Range:
    """Message sizes in bytes for which one algorithm is the fastest; `last` None: all above."""

    algorithm: str
    first: int
    last: int | None


@dataclass(frozen=True)
class Projected:
    nodes: int
    nbytes: int
    seconds: dict[str, float]
    """By algorithm between the nodes."""

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)


def project(
    cluster: Cluster, nodes: int, nbytes: int, algorithms: Iterable[str] = ALL_REDUCE
) -> Projected:
    """Seconds of an all-reduce of `nbytes` over `nodes`, reduced inside each node first."""
    seconds = {
        name: hierarchical_seconds(cluster, nodes, nbytes, name)
        for name in algorithms
        if is_used(name, nodes, nbytes / cluster.ranks_per_node)
    }
    return Projected(nodes, nbytes, seconds)


def is_used(algorithm: str, nodes: int, scale_out_bytes: float) -> bool:
    """oneCCL takes Rabenseifner's only where each of the folded nodes has an element to itself."""
    return algorithm != "rabenseifner" or scale_out_bytes >= ELEMENT_BYTES << floor_lg(nodes)


def ranges(
    cluster: Cluster, nodes: int, algorithms: Sequence[str] = tuple(ALL_REDUCE)
) -> list[Range]:
    """The fastest algorithm between the nodes by the size of what travels there.

    That is the message over the ranks of a node: each of them all-reduces its own share.
    """

    def fastest(size: int) -> str:
        return project(cluster, nodes, size * cluster.ranks_per_node, algorithms).fastest

    sizes = sorted(
        {
            round(ELEMENT_BYTES * 2 ** (step / STEPS_AN_OCTAVE))
            for step in range(STEPS_AN_OCTAVE * floor_lg(MOST_BYTES // ELEMENT_BYTES))
        }
    )
    found = [Range(fastest(sizes[0]), 0, None)]
    for low, high in pairwise(sizes):
        if fastest(high) == found[-1].algorithm:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            if fastest(middle) == found[-1].algorithm:
                low = middle
            else:
                high = middle
        *done, last = found
        found = [*done, Range(last.algorithm, last.first, low), Range(fastest(high), high, None)]
    return found


def oneccl_settings(found: Sequence[Range]) -> dict[str, str]:
    """The environment that would choose so: `algorithm:first-last;…` in bytes, `max` at the end."""
    parts = [
        f"{row.algorithm}:{row.first}-{'max' if row.last is None else row.last}" for row in found
    ]
    return {"CCL_ALLREDUCE": "topo", "CCL_ALLREDUCE_SCALEOUT": ";".join(parts)}
