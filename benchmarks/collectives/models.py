"""What a collective costs: alpha seconds a message, beta a byte, gamma a byte added up.

p ranks hold n bytes each. Time passes in rounds. In a round every rank sends at most one message
and receives at most one, both at once; a round lasts alpha, plus beta for each byte of its longest
message, plus gamma for each byte that the busiest rank adds up. A `Cost` counts messages, bytes and
added bytes along these rounds. For n that divides into the blocks of an algorithm the counts are
exact; what contention, topology and overlap do to them is in none of the formulas.

Which all-reduce is the fastest by it is projection: a formula, nothing that ran. What it proposes
is to be measured, and checked for value, before it is used: one release of oneCCL was reported to
add up wrongly with Rabenseifner's algorithm.

lg is the logarithm to base 2, q the greatest power of two in p.

Sources:
    Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH,
        IJHPCA 19(1), 2005 (trees, recursive doubling, Rabenseifner's algorithm).
    Patarasuk, Yuan: Bandwidth Optimal All-reduce Algorithms, JPDC 69(2), 2009 (ring).
    Sanders, Speck, Träff: Two-tree Algorithms for Full Bandwidth Broadcast, Reduction and Scan,
        Parallel Computing 35(12), 2009 (double binary tree).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

ELEMENT_BYTES: Final = 4  # the finest piece that a pipeline can send: an FP32 number


@dataclass(frozen=True)
class Link:
    """What one rank pays: seconds a message, seconds a byte, seconds a byte added up."""

    alpha: float
    beta: float
    gamma: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (0 <= value < math.inf):
                raise ValueError(f"{name} must be a number of seconds of at least 0, got {value}")


@dataclass(frozen=True)
class Cost:
    """Along the rounds of a collective: messages, bytes sent, bytes added up."""

    messages: float = 0.0
    bytes: float = 0.0
    added: float = 0.0

    def seconds(self, link: Link) -> float:
        return link.alpha * self.messages + link.beta * self.bytes + link.gamma * self.added

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.messages + other.messages, self.bytes + other.bytes, self.added + other.added
        )


def floor_lg(ranks: int) -> int:
    return ranks.bit_length() - 1


# ---- the parts of an all-reduce


def reduce_scatter(ranks: int, nbytes: float) -> Cost:
    """Ring: (p-1) alpha + n (p-1)/p (beta + gamma). Patarasuk and Yuan, section 3."""
    return Cost(ranks - 1, nbytes * (ranks - 1) / ranks, nbytes * (ranks - 1) / ranks)


def all_gather(ranks: int, nbytes: float) -> Cost:
    """Ring: (p-1) alpha + n (p-1)/p beta, n what every rank has in the end. Thakur et al., 4.1."""
    return Cost(ranks - 1, nbytes * (ranks - 1) / ranks)


# ---- all-reduce


def ring(ranks: int, nbytes: float) -> Cost:
    """2 (p-1) alpha + 2 n (p-1)/p beta + n (p-1)/p gamma. Patarasuk and Yuan, section 3."""
    return reduce_scatter(ranks, nbytes) + all_gather(ranks, nbytes)


def fold(ranks: int, nbytes: float) -> Cost:
    """What a number of ranks that is no power of two adds: 2 alpha + 2 n beta + n gamma.

    Of the first 2 (p - q) ranks each even one gives its vector to the odd one beside it, waits, and
    is given the sum. Thakur et al., 4.5; oneCCL's Rabenseifner folds the same way.
    """
    return Cost() if ranks == 1 << floor_lg(ranks) else Cost(2, 2 * nbytes, nbytes)


def recursive_doubling(ranks: int, nbytes: float) -> Cost:
    """lg q (alpha + n beta + n gamma), and the fold. Thakur et al., 4.5."""
    steps = floor_lg(ranks)
    return Cost(steps, steps * nbytes, steps * nbytes) + fold(ranks, nbytes)


def rabenseifner(ranks: int, nbytes: float) -> Cost:
    """2 lg q alpha + 2 n (q-1)/q beta + n (q-1)/q gamma, and the fold. Thakur et al., 4.5.

    Recursive halving scatters the sums, recursive doubling gathers them.
    """
    steps = floor_lg(ranks)
    share = nbytes * (1 - 0.5**steps)
    return Cost(2 * steps, 2 * share, share) + fold(ranks, nbytes)


def tree_height(ranks: int) -> int:
    """Edges from the root to the deepest rank, in either of the two trees: floor(lg(p-1)) + 1.

    The root stands above both; each spans the other p - 1 ranks in order.
    """
    return floor_lg(ranks - 1) + 1


def double_tree(ranks: int, nbytes: float, chunks: int) -> Cost:
    """4 (k+h-1) alpha + 2 n (k+h-1)/k beta + n (k+h-1)/k gamma: k chunks a tree, of height h.

    Each half of the vector climbs one tree to the root and comes down again, a chunk an edge in
    every second round. Sanders, Speck and Träff overlap the two colours of edges between levels and
    so reach nearly half the height's part; the usual short form, 2 lg p alpha + 2 n beta, is the
    limit of k chunks that cost nothing.
    """
    if ranks == 1:
        return Cost()
    rounds = chunks + tree_height(ranks) - 1
    carried = nbytes * rounds / chunks
    return Cost(4 * rounds, 2 * carried, carried)


def best_chunks(ranks: int, nbytes: float, link: Link) -> int:
    """The number of chunks with which `double_tree` is fastest.

    The derivative of its seconds vanishes at √(n (h-1) (2 beta + gamma) / 4 alpha).
    """
    most = max(1, int(nbytes / 2 / ELEMENT_BYTES))
    if ranks == 1:
        return 1
    spread = nbytes * (tree_height(ranks) - 1) * (2 * link.beta + link.gamma)
    if spread >= 4 * link.alpha * most**2:
        return most
    below = max(1, math.floor(math.sqrt(spread / (4 * link.alpha))))
    return min(below, below + 1, key=lambda k: double_tree(ranks, nbytes, k).seconds(link))


AllReduce = Callable[[int, float, Link], Cost]

ALL_REDUCE: Final[Mapping[str, AllReduce]] = {
    "ring": lambda ranks, nbytes, link: ring(ranks, nbytes),
    "recursive_doubling": lambda ranks, nbytes, link: recursive_doubling(ranks, nbytes),
    "rabenseifner": lambda ranks, nbytes, link: rabenseifner(ranks, nbytes),
    "double_tree": lambda ranks, nbytes, link: double_tree(
        ranks, nbytes, best_chunks(ranks, nbytes, link)
    ),
}
"""By oneCCL's names. Its `direct` is whatever the MPI library does: no formula holds for it."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal size. `out` is the link through one network interface that nobody shares."""

    ranks_per_node: int
    adapters: int
    inside: Link
    out: Link

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "adapters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    @property
    def shared_out(self) -> Link:
        """Of one rank, while all of its node send through the node's interfaces."""
        share = max(1.0, self.ranks_per_node / self.adapters)
        return replace(self.out, beta=self.out.beta * share)


def hierarchical(cluster: Cluster, nodes: int, nbytes: float, algorithm: str) -> tuple[Cost, Cost]:
    """All-reduce of oneCCL's `topo`: the costs inside the nodes and between them.

    Reduce-scatter over the g ranks of a node, all-reduce of n / g bytes over the nodes by
    `algorithm`, g of them side by side, all-gather in the node.
    """
    ranks = cluster.ranks_per_node
    inside = reduce_scatter(ranks, nbytes) + all_gather(ranks, nbytes)
    return inside, ALL_REDUCE[algorithm](nodes, nbytes / ranks, cluster.shared_out)


def hierarchical_seconds(cluster: Cluster, nodes: int, nbytes: float, algorithm: str) -> float:
    inside, out = hierarchical(cluster, nodes, nbytes, algorithm)
    return inside.seconds(cluster.inside) + out.seconds(cluster.shared_out)


def binary(nbytes: float) -> str:
    """A number of bytes as people write it: 1536 is 1.5K."""
    for power, suffix in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if nbytes >= 2**power:
            return f"{nbytes / 2**power:g}{suffix}"
    return f"{nbytes:g}"


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
