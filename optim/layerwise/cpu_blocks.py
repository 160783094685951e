"""How LARS and LAMB go over tensors on a CPU, where time is bytes moved and calls made.

A large tensor is *streamed*: all operations of a pass are made on one block of it before the next
block, so that a block comes from memory once and stays in a cache. Small tensors are *packed*: laid
end to end in working memory, so that one call does for all of them what would be a call for each.
Squares are added up in FP32 within blocks, and again in FP64 where FP32 has overflown.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from largebatch.optim.math.tensors import float_of

# Elements of a block, for each thread: a few FP32 tensors of it stay in a core's own cache.
BLOCK_OF_THREAD = 1 << 17

# Elements of a tensor that is packed; longer ones are streamed.
PACKED_AT_MOST = 1 << 16

# Elements of a pack.
PACK = 1 << 20

# Elements of the tensors that are streamed together, where none of them has more.
STREAMED_TOGETHER = 1 << 20

# Packs are multiples of as many elements: no kernel has a rest that it works on by other
# instructions, and what an element comes to does not depend on where it lies.
LINE = 64

# Elements of the directions that may be kept for the second pass: 64 MiB in FP32.
KEPT = 1 << 24


class Scratch:
    """Working memory that is kept from step to step: fresh pages cost more than what is done on
    them. Its size is bounded by that of a block and of the packs.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, start: int, numel: int) -> Tensor:
        """Return `numel` elements from `start` on of the memory of that name."""
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < start + numel:
            before, kept = kept, torch.empty(start + numel, dtype=dtype)
            self._kept[name, dtype] = kept
            if before is not None:  # what others have in it
                kept[: before.numel()] = before
        return kept[start : start + numel]


def blocks_of(*flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the blocks of flat tensors of one length side by side."""
    size = BLOCK_OF_THREAD * torch.get_num_threads()
    return zip(*(torch.split(flat, size) for flat in flats), strict=True)


def products(one: Tensor, other: Tensor) -> list[Tensor]:
    """Return the inner products of the blocks of two flat tensors, 0-d each."""
    pairs = blocks_of(one) if one is other else blocks_of(one, other)
    return [torch.dot(pair[0], pair[-1]) for pair in pairs]


def total(products: Sequence[Tensor]) -> float:
    """Return the sum of 0-d tensors, in FP64."""
    return math.fsum(torch.stack([*products]).tolist()) if products else 0.0


def square_of(flat: Tensor, dtype: torch.dtype, scratch: Scratch) -> float:
    """Return the sum of squares of a flat tensor, taken in `dtype`; finite where the tensor is."""
    if flat.dtype == dtype:
        found = total(products(flat, flat))
    else:
        found = 0.0
        for (block,) in blocks_of(flat):
            wide = scratch.take("wide", dtype, 0, block.numel()).copy_(block)
            found += float_of(torch.dot(wide, wide))
    return found if math.isfinite(found) or dtype == torch.float64 else wide_square(flat)


def wide_square(flat: Tensor) -> float:
    """The same by sums in FP64 from the first: a square of 1e20 is beyond FP32."""
    return float_of(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2


def padded(numel: int) -> int:
    """Return the elements of a pack of so many."""
    return -(-numel // LINE) * LINE


class Pack:
    """How small tensors lie end to end; those of one length are neighbours.

    Attributes:
        shapes: of the tensors, in order.
        numel: of the pack.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = [*shapes]
        self._sizes = [math.prod(shape) for shape in shapes]
        self._used = sum(self._sizes)
        self.numel = padded(self._used)
        self._alike: list[tuple[int, int, int]] = []
        start = 0
        for length, equal in groupby(self._sizes):
            count = len([*equal])
            self._alike.append((start, count, length))
            start += count * length
        self._views: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return the tensors of what is laid out so."""
        parts = torch.split(flat[: self._used], self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def views(self, name: str, flat: Tensor) -> list[Tensor]:
        """As `split`, once for as long as it is the same memory under a name."""
        known = self._views.get(name)
        if known is None or known[0].data_ptr() != flat.data_ptr() or known[0].dtype != flat.dtype:
            known = self._views[name] = flat, self.split(flat)
        return known[1]

    def _rows(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield matrices of the tensors of one length, (count, length)."""
        for start, count, length in self._alike:
            yield flat[start : start + count * length].view(count, length)

    def norms(self, flat: Tensor) -> Tensor:
        """Return the norm of each tensor of what is laid out so, finite where the tensor is."""
        norms = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in self._rows(flat)])
        if flat.dtype == torch.float64 or math.inf not in norms.tolist():
            return norms
        wide = [
            torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in self._rows(flat)
        ]
        return torch.cat(wide)

    def scale(self, flat: Tensor, factors: Tensor) -> None:
        """Multiply each tensor of what is laid out so by its factor."""
        first = 0
        for rows in self._rows(flat):
            rows.mul_(factors[first : first + rows.size(0), None])
            first += rows.size(0)
