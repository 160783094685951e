"""Lists of tensor shapes that an optimizer's step is timed on."""

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Inventory:
    """The tensors of one model."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes))


def transformer(width: int = 512, num_blocks: int = 8, vocabulary: int = 8192) -> Inventory:
    """A decoder with tied embeddings and rotary positions: few tensors, and memory is the limit."""
    norm = [(width,), (width,)]
    block = [
        *norm,
        *linear(width, 3 * width),  # queries, keys and values
        *linear(width, width),
        *norm,
        *linear(width, 4 * width),
        *linear(4 * width, width),
    ]
    return Inventory("transformer", ((vocabulary, width), *(block * num_blocks), *norm))


def linear(num_in: int, num_out: int) -> list[Shape]:
    return [(num_out, num_in), (num_out,)]


def small_tensors(num_each: int = 200) -> Inventory:
    """Gains, small matrices and convolution kernels: they fit a cache, and calls are the limit."""
    return Inventory("small tensors", ((64,), (32, 32), (16, 16, 3, 3)) * num_each)
