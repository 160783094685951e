"""Collectives carried out on real vectors, rank by rank and round by round, and counted.

Written from the descriptions of the algorithms, not from the formulas that it is there to check. A
round is a list of messages that travel at once; `play` refuses one in which a rank sends or
receives twice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]  # (ranks, elements)
ELEMENT_BYTES = 4
"""What is counted: the vectors stand for FP32; they are FP64 so that sums are exact."""


@dataclass(frozen=True)
class Message:
    source: int
    target: int
    first: int
    last: int
    """Elements first … last - 1."""
    add: bool
    """Added to what the target has there, else it replaces that."""


Round = list[Message]
Schedule = list[Round]


@dataclass
class Count:
    """Along the rounds, and of every rank alone."""

    messages: int = 0
    bytes: int = 0
    added: int = 0
    sent_by: dict[int, int] = field(default_factory=dict)
    sends_by: dict[int, int] = field(default_factory=dict)

    def round(self, messages: Round) -> None:
        sizes = [(m.last - m.first) * ELEMENT_BYTES for m in messages]
        self.messages += 1
        self.bytes += max(sizes)
        self.added += max(size * m.add for m, size in zip(messages, sizes, strict=True))
        for message, size in zip(messages, sizes, strict=True):
            rank = message.source
            self.sent_by[rank] = self.sent_by.get(rank, 0) + size
            self.sends_by[rank] = self.sends_by.get(rank, 0) + 1


def play(schedule: Schedule, vectors: Vectors) -> Count:
    """Carry the rounds out on `vectors`, in place."""
    count = Count()
    for messages in schedule:
        assert messages
        for ranks in ([m.source for m in messages], [m.target for m in messages]):
            assert len(set(ranks)) == len(ranks), "a rank sends or receives twice in a round"
        carried = [vectors[m.source, m.first : m.last].copy() for m in messages]
        for message, values in zip(messages, carried, strict=True):
            place = vectors[message.target, message.first : message.last]
            place[:] = place + values if message.add else values
        count.round(messages)
    return count


def edges(first: int, last: int, parts: int) -> list[int]:
    """Where `parts` blocks of first … last begin and end; block i is edges[i] … edges[i + 1]."""
    return [first + (last - first) * part // parts for part in range(parts + 1)]


def ring_reduce_scatter(ranks: Sequence[int], first: int, last: int) -> Schedule:
    """The i-th rank ends with the sum of block i."""
    p = len(ranks)
    at = edges(first, last, p)
    return [
        [
            Message(ranks[i], ranks[(i + 1) % p], at[block], at[block + 1], add=True)
            for i in range(p)
            for block in [(i - step - 1) % p]
        ]
        for step in range(p - 1)
    ]


def ring_all_gather(ranks: Sequence[int], first: int, last: int) -> Schedule:
    """The i-th rank begins with block i."""
    p = len(ranks)
    at = edges(first, last, p)
    return [
        [
            Message(ranks[i], ranks[(i + 1) % p], at[block], at[block + 1], add=False)
            for i in range(p)
            for block in [(i - step) % p]
        ]
        for step in range(p - 1)
    ]


def ring(ranks: Sequence[int], first: int, last: int) -> Schedule:
    return ring_reduce_scatter(ranks, first, last) + ring_all_gather(ranks, first, last)


def folded(
    ranks: Sequence[int], first: int, last: int, inner: Callable[[Sequence[int]], Schedule]
) -> Schedule:
    """`inner` over a power of two of the ranks, the others folded into their neighbours."""
    q = 1
    while 2 * q <= len(ranks):
        q *= 2
    rest = len(ranks) - q
    pairs = [(ranks[2 * i], ranks[2 * i + 1]) for i in range(rest)]
    active = [odd for _, odd in pairs] + list(ranks[2 * rest :])
    if not pairs:
        return inner(active)
    before = [Message(even, odd, first, last, add=True) for even, odd in pairs]
    after = [Message(odd, even, first, last, add=False) for even, odd in pairs]
    return [before, *inner(active), after]


def recursive_doubling(ranks: Sequence[int], first: int, last: int) -> Schedule:
    def inner(active: Sequence[int]) -> Schedule:
        rounds, distance = [], 1
        while distance < len(active):
            rounds.append(
                [
                    Message(rank, active[i ^ distance], first, last, add=True)
                    for i, rank in enumerate(active)
                ]
            )
            distance *= 2
        return rounds

    return folded(ranks, first, last, inner)


def rabenseifner(ranks: Sequence[int], first: int, last: int) -> Schedule:
    def inner(active: Sequence[int]) -> Schedule:
        q = len(active)
        at = edges(first, last, q)
        halving, doubling, distance = [], [], q // 2
        while distance:
            # Block numbers whose bits above `distance` agree with the rank's are still its own.
            halving.append(
                [
                    Message(rank, active[i ^ distance], at[low], at[low + distance], add=True)
                    for i, rank in enumerate(active)
                    for low in [(i ^ distance) // distance * distance]
                ]
            )
            doubling.append(
                [
                    Message(rank, active[i ^ distance], at[low], at[low + distance], add=False)
                    for i, rank in enumerate(active)
                    for low in [i // distance * distance]
                ]
            )
            distance //= 2
        return halving + doubling[::-1]

    return folded(ranks, first, last, inner)


# ---- two trees


def in_order_tree(size: int) -> dict[int, int]:
    """Child to parent over 0 … size - 1; even numbers are leaves. The root has no entry."""
    parents: dict[int, int] = {}

    def root_of(low: int, high: int) -> int:
        """Of low … high, in which one number is divisible by the highest power of two."""
        level = 1
        while (high // (2 * level)) * 2 * level >= low:
            level *= 2
        return high // level * level

    def grow(low: int, high: int) -> int:
        root = root_of(low, high)
        for child_low, child_high in ((low, root - 1), (root + 1, high)):
            if child_low <= child_high:
                parents[grow(child_low, child_high) - 1] = root - 1
        return root

    grow(1, size)
    return parents


def two_trees(p: int) -> list[dict[int, int]]:
    """Child to parent, in each tree; rank 0 is the root of both. Inner ranks of one are leaves of
    the other.
    """
    size = p - 1
    tree = in_order_tree(size)
    (top,) = set(range(size)) - set(tree)
    trees = []
    for number in (
        lambda i: i,
        (lambda i: size - 1 - i) if size % 2 == 0 else (lambda i: (i + 1) % size),
    ):
        renamed = {number(child) + 1: number(parent) + 1 for child, parent in tree.items()}
        trees.append(renamed | {number(top) + 1: 0})
    return trees


def coloured(trees: Sequence[dict[int, int]]) -> dict[tuple[int, int], int]:
    """0 or 1 for (tree, child): edges that meet as senders, or as receivers, differ.

    A rank sends down at most two edges (it is inner in one tree) and receives from two parents:
    such a bipartite graph falls into paths and even cycles, along which the colours alternate.
    """
    all_edges = [(t, child) for t, tree in enumerate(trees) for child in tree]
    meeting: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for t, child in all_edges:
        meeting.setdefault(("sends", trees[t][child]), []).append((t, child))
        meeting.setdefault(("receives", child), []).append((t, child))
    colours: dict[tuple[int, int], int] = {}
    for start in all_edges:
        waiting = [(start, 0)] if start not in colours else []
        while waiting:
            edge, colour = waiting.pop()
            if edge in colours:
                assert colours[edge] == colour
                continue
            colours[edge] = colour
            t, child = edge
            for at in (("sends", trees[t][child]), ("receives", child)):
                assert len(meeting[at]) <= 2
                waiting += [(other, 1 - colour) for other in meeting[at] if other != edge]
    return colours


def depth(tree: dict[int, int], rank: int) -> int:
    edges_above = 0
    while rank in tree:
        rank, edges_above = tree[rank], edges_above + 1
    return edges_above


def double_tree(ranks: Sequence[int], first: int, last: int, chunks: int) -> Schedule:
    """Half of the vector in each tree, in chunks: up to the root, then down."""
    p = len(ranks)
    if p == 1:
        return []
    trees = two_trees(p)
    colours = coloured(trees)
    depths = [{child: depth(tree, child) for child in tree} for tree in trees]
    height = max(max(of.values()) for of in depths)
    middle = edges(first, last, 2)[1]
    at = [edges(first, middle, chunks), edges(middle, last, chunks)]

    def down(chunk_step: int, colour: int) -> Iterator[tuple[int, int, int, int]]:
        """(parent, child, first, last) of the edges that are used in this round."""
        for (t, child), of_edge in colours.items():
            chunk = chunk_step - (depths[t][child] - 1)
            if of_edge == colour and 0 <= chunk < chunks:
                yield ranks[trees[t][child]], ranks[child], at[t][chunk], at[t][chunk + 1]

    steps = [(step, colour) for step in range(chunks + height - 1) for colour in (0, 1)]
    broadcast = [[Message(a, b, lo, hi, add=False) for a, b, lo, hi in down(*s)] for s in steps]
    reduce = [[Message(b, a, lo, hi, add=True) for a, b, lo, hi in down(*s)] for s in steps[::-1]]
    return reduce + broadcast


# ---- nodes


def side_by_side(schedules: Sequence[Schedule]) -> Schedule:
    return [[m for r in rounds for m in r] for rounds in zip_longest(*schedules, fillvalue=[])]


def hierarchical(
    nodes: int, ranks_per_node: int, elements: int, across: Callable[..., Schedule]
) -> tuple[Schedule, Schedule, Schedule]:
    """In the nodes, between them, in the nodes again; rank = node * ranks_per_node + place."""
    g = ranks_per_node
    of_node = [range(node * g, (node + 1) * g) for node in range(nodes)]
    at = edges(0, elements, g)
    before = side_by_side([ring_reduce_scatter(ranks, 0, elements) for ranks in of_node])
    between = side_by_side(
        [across(range(place, nodes * g, g), at[place], at[place + 1]) for place in range(g)]
    )
    after = side_by_side([ring_all_gather(ranks, 0, elements) for ranks in of_node])
    return before, between, after
