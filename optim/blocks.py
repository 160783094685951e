"""How a tensor is cut into the blocks that are preconditioned, each with factors of its own.

Neighbouring small dimensions are merged first, the pair with the smallest product before others, as
long as the product fits into a block and more than two dimensions are left: a convolution's kernel
(64, 32, 3, 3) becomes (64, 32, 9). Then every dimension longer than `block_size` is cut into parts
of nearly equal length. Both depend on the shape alone, not on how the tensor is spread over ranks.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from largebatch.optim.spread import Box


@dataclass(frozen=True)
class Block:
    box: Box
    """Where it lies in the tensor, in the tensor's own dimensions."""
    shape: tuple[int, ...]
    """Its shape once dimensions are merged: one factor for each."""

    @property
    def cost(self) -> int:
        """Of its eigendecompositions and products, relative to other blocks'."""
        return sum(n**3 for n in self.shape) + self.box.numel * sum(self.shape)


def blocks_of(shape: Sequence[int], block_size: int, merge_dims: bool) -> tuple[Block, ...]:
    """The blocks of a tensor, in the order of their elements; none where it is not a matrix.

    A tensor is one where at least two dimensions are longer than 1.
    """
    groups = merged_dims(shape, block_size if merge_dims else 0)
    if len(groups) < 2 or 0 in shape:
        return ()
    lengths = [math.prod(shape[dim] for dim in group) for group in groups]
    blocks = []
    for parts in itertools.product(*(even_parts(length, block_size) for length in lengths)):
        start, size = [0] * len(shape), list(shape)
        for group, (first, length) in zip(groups, parts, strict=True):
            if len(group) == 1:  # merged ones fit into a block as they are
                start[group[0]], size[group[0]] = first, length
        box = Box(tuple(start), tuple(size))
        blocks.append(Block(box, tuple(length for _, length in parts)))
    return tuple(blocks)


def merged_dims(shape: Sequence[int], limit: int) -> list[list[int]]:
    """The dimensions longer than 1, in groups of neighbours with products up to `limit`."""
    groups = [[dim] for dim, length in enumerate(shape) if length != 1]
    while len(groups) > 2:
        products = [
            math.prod(shape[dim] for dim in (*left, *right))
            for left, right in itertools.pairwise(groups)
        ]
        smallest = min(products)
        if smallest > limit:
            break
        place = products.index(smallest)
        groups[place : place + 2] = [groups[place] + groups[place + 1]]
    return groups


def even_parts(length: int, limit: int) -> list[tuple[int, int]]:
    """(start, length) of the fewest parts up to `limit`, as equal as they can be."""
    count = math.ceil(length / limit)
    ends = [length * part // count for part in range(count + 1)]
    return [(start, end - start) for start, end in itertools.pairwise(ends)]
