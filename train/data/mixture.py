"""The order of samples from several sources: whose turn it is at a position, and which sample.

Both are computed from the position alone: no list of samples and no counter is kept, and a run that
is resumed at sample 1e12 begins there at once.

Turns are dealt out by a tree: at each fork the two branches take turns as evenly as whole numbers
allow. At any position the draws of a source so far are within two samples of its share: a fork adds
half a sample to what is passed on of the error above it, the branch's share c of that, and in a
tree that joins the lightest first c is at most 2/3 but for a leaf. (Random draws would stray by the
square root of their number.) What is measured from parts of such a batch, as the noise scale is, is
the noise of stratified samples.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Final

import numpy as np

from largebatch.train.data.sampler import Indices, Sampler, permuted

# Beside the streams of other orders (sampler.py) and of the steps (randomness.py).
_FIRST_STREAM: Final = 1 << 41

MOST_WEIGHT: Final = 2**31
"""Of all sources together, as whole numbers: the products of `_dealt_left` fit 64 bits."""


@dataclass(frozen=True)
class _Fork:
    left: "_Fork | int"
    left_weight: int
    right: "_Fork | int"
    weight: int


def whole_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """`weights` as whole numbers in the same proportions, as small as they can be."""
    unit = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * unit) for weight in weights]
    divisor = gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > MOST_WEIGHT:
        raise ValueError(
            f"the weights of task.sources add up to {sum(whole)} when brought to whole numbers, "
            f"and must to at most {MOST_WEIGHT}: write them with fewer digits"
        )
    return tuple(whole)


def _tree(weights: Sequence[int]) -> _Fork | int:
    """The sources as leaves, the lightest two joined first (Huffman 1952) and of equals the
    earlier, which keeps the errors of the forks above a leaf from adding up.
    """
    heap: list[tuple[int, int, _Fork | int]] = [
        (weight, source, source) for source, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        left_weight, age, left = heapq.heappop(heap)
        right_weight, _, right = heapq.heappop(heap)
        weight = left_weight + right_weight
        heapq.heappush(heap, (weight, age, _Fork(left, left_weight, right, weight)))
    return heap[0][2]


def _dealt_left(turns: Indices, part: int, whole: int) -> Indices:
    """How many of the turns before each of `turns` went left: turns * part / whole, rounded."""
    times, rest = np.divmod(turns, whole)
    left: Indices = times * part + (rest * part + whole // 2) // whole
    return left


def dealt(start: int, count: int, weights: Sequence[int]) -> tuple[Indices, Indices]:
    """Whose turn it is at positions `start` to `start + count`.

    Returns:
        The source, and how many of its samples have been drawn before; both of shape (count,).
    """
    sources = np.empty(count, np.int64)
    draws = np.empty(count, np.int64)

    def deal(node: _Fork | int, places: Indices, turns: Indices) -> None:
        if isinstance(node, int):
            sources[places], draws[places] = node, turns
            return
        before = _dealt_left(turns, node.left_weight, node.weight)
        goes_left = _dealt_left(turns + 1, node.left_weight, node.weight) > before
        deal(node.left, places[goes_left], before[goes_left])
        deal(node.right, places[~goes_left], (turns - before)[~goes_left])

    deal(_tree(weights), np.arange(count), np.arange(start, start + count, dtype=np.int64))
    return sources, draws


@dataclass(frozen=True)
class Mixture(Sampler):
    """Sources by weight, each shuffled anew every epoch of its own.

    Attributes:
        sizes: samples of each source. Sample i of source s is index sizes[0] + … + sizes[s-1] + i.
        weights: of each source, whole numbers.
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]

    def take(self, start: int, count: int) -> Indices:
        """Indices of the samples at positions `start` to `start + count`; shape (count,)."""
        sources, draws = dealt(start, count, self.weights)
        indices = np.empty(count, np.int64)
        for source, size in enumerate(self.sizes):
            here = np.flatnonzero(sources == source)
            epochs, places = np.divmod(draws[here], size)
            first = sum(self.sizes[:source])
            indices[here] = first + permuted(
                places, size, self.seed, _FIRST_STREAM + source, epochs
            )
        return indices
