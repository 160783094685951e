"""What the state of a parameter consists of, how it begins, and how much memory it takes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.optim.blockwise.blocks import Block
from largebatch.optim.blockwise.work_group import BlockedLayer
from largebatch.optim.math.tensors import compute_dtype
from largebatch.optim.sharding.layout import Name

Shapes = Mapping[str, tuple[int, ...]]

# The running averages whose β may change on the way.
AVERAGES = ("exp_avg", "exp_avg_sq", "factor")

# An entry of the state: elements of gradients so far that were too large to be squared.
DROPPED = "dropped_elements"

# What a block has for each dimension with a factor.
MATRICES = ("factor_", "root_", "basis_")


@dataclass(frozen=True)
class ParamState:
    """One parameter and what is kept for it."""

    name: Name
    param: Tensor
    blocks: Sequence[Block]
    shapes: Sequence[Shapes]
    """Of the entries of each block."""
    beside: int
    """Elements of what lies like the parameter."""

    def numel(self, prefixes: tuple[str, ...] = ("",)) -> int:
        """Elements of the blocks' entries whose names begin so."""
        entries = (entry for shapes in self.shapes for entry in shapes.items())
        return sum(math.prod(shape) for name, shape in entries if name.startswith(prefixes))


def memory_in_words(parts: Iterable[ParamState]) -> str:
    """What the state of all parameters takes once each has had a gradient."""
    weights = state = matrices = 0
    partly: list[str] = []
    for part in parts:
        size = compute_dtype(part.param).itemsize
        weights += part.param.numel() * part.param.element_size()
        state += (part.numel() + part.beside) * size
        matrices += part.numel(MATRICES) * size
        if part.blocks and len(part.blocks[0].dims) < len(part.blocks[0].shape):
            partly.append(f"{part.name} {tuple(part.param.shape)}")
    text = (
        f"State of all parameters, over all ranks that share it: {state / 1e6:.3g} MB for "
        f"{weights / 1e6:.3g} MB of them; factors and what is made of them: {matrices / 1e6:.3g} MB"
    )
    return text + (f"\nNo factor along a long dimension: {', '.join(partly)}" if partly else "")


def new_entry(name: str, shape: tuple[int, ...], layer: BlockedLayer) -> Tensor:
    """An entry of a block's state before its first step; empty where the block is another rank's.

    Roots and bases of nothing are the identity.
    """
    if name.startswith(("root_", "basis_")) and len(shape) == 2:
        return torch.eye(*shape, dtype=layer.dtype, device=layer.device)
    return torch.zeros(shape, dtype=layer.dtype, device=layer.device)
