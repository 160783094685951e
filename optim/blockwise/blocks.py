"""How a tensor is cut into the blocks that are preconditioned, each with factors of its own.

Neighbouring small dimensions are merged first, the pair with the smallest product before others, as
long as the product fits into a block and more than two dimensions are left. Dimension 0 stays by
itself: it counts outputs, or matrices of a stack, and a kernel (64, 32, 3, 3) becomes (64, 288).

A dimension longer than `max_preconditioner_dim` has no factor and is not cut, as in the code of
SOAP's authors (`max_precond_dim`, https://github.com/nikhilvyas/SOAP): blocks of such a tensor are
preconditioned along the other dimensions only, and a tensor without any other has no blocks. Every
other dimension longer than `block_size` is cut into parts of nearly equal length. All of it depends
on the shape alone, not on how the tensor is spread over ranks.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from largebatch.optim.sharding.layout import Name, split_sizes
from largebatch.optim.sharding.placement import Box, whole_box


@dataclass(frozen=True)
class Block:
    box: Box
    """Where it lies in the tensor, in the tensor's own dimensions."""
    shape: tuple[int, ...]
    """Its shape once dimensions are merged."""
    dims: tuple[int, ...]
    """Those of `shape` that have a factor; none where it is worked on without."""

    @property
    def cost(self) -> int:
        """Of its eigendecompositions and products, relative to other blocks'."""
        if not self.dims:  # products with the Gram matrix of the shorter side
            return self.box.numel * min(self.shape)
        sides = [self.shape[dim] for dim in self.dims]
        return sum(n**3 for n in sides) + self.box.numel * sum(sides)


def blocks_of(
    shape: Sequence[int],
    block_size: int,
    merge_dims: bool,
    max_preconditioner_dim: int | None = None,
    sides: str = "both",
) -> tuple[Block, ...]:
    """The blocks of a tensor, in the order of their elements; none where nothing of it has factors.

    At least two dimensions have to be longer than 1.

    Args:
        max_preconditioner_dim: the longest dimension that has factors; None: all have.
        sides: "both": all of these; "one": the shortest of them, the first among equals.
    """
    longest = math.inf if max_preconditioner_dim is None else max_preconditioner_dim
    groups = merged_dims(shape, min(block_size, longest) if merge_dims else 0)
    if len(groups) < 2 or 0 in shape:
        return ()
    lengths = [math.prod(shape[dim] for dim in group) for group in groups]
    dims = tuple(dim for dim, length in enumerate(lengths) if length <= longest)
    if not dims:
        return ()
    if sides == "one":
        dims = (min(dims, key=lambda dim: lengths[dim]),)
    blocks = []
    limits = [block_size if dim in dims else length for dim, length in enumerate(lengths)]
    for parts in itertools.product(*map(even_parts, lengths, limits)):
        start, size = [0] * len(shape), list(shape)
        for group, (first, length) in zip(groups, parts, strict=True):
            if len(group) == 1:  # merged ones fit into a block as they are
                start[group[0]], size[group[0]] = first, length
        box = Box(tuple(start), tuple(size))
        blocks.append(Block(box, tuple(length for _, length in parts), dims))
    return tuple(blocks)


def matrices_of(
    shape: Sequence[int], norm_groups: int | Sequence[int] | None, norm_dim: int, name: Name = ""
) -> tuple[Block, ...]:
    """The matrices of a tensor, (its first dimension, all others), in the order of their elements.

    Several where it is split along `norm_dim`; a part that is one slice of a tensor of three
    dimensions or more, such as an expert of a stack, is the matrix of that slice.

    Args:
        norm_groups: number of equal parts, or their sizes; None: one.

    Raises:
        ValueError: a split that does not fit.
    """
    if 0 in shape:
        return ()
    if norm_groups is None:
        return (Block(whole_box(shape), as_matrix(shape), ()),)
    sizes, dim = split_sizes(shape, name, norm_groups, norm_dim), norm_dim % len(shape)
    blocks = []
    for begin, end in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        start, size = [0] * len(shape), list(shape)
        start[dim], size[dim] = begin, end - begin
        is_slice = len(shape) > 2 and size[dim] == 1
        own = [length for place, length in enumerate(size) if place != dim] if is_slice else size
        blocks.append(Block(Box(tuple(start), tuple(size)), as_matrix(own), ()))
    return tuple(blocks)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor of two dimensions or more."""
    return shape[0], math.prod(shape[1:])


def merged_dims(shape: Sequence[int], limit: float) -> list[list[int]]:
    """The dimensions longer than 1, in groups of neighbours with products up to `limit`."""
    groups = [[dim] for dim, length in enumerate(shape) if length != 1]
    while len(groups) > 2:
        products = [
            math.inf if left == [0] else math.prod(shape[dim] for dim in (*left, *right))
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
