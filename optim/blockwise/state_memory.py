"""What the state of a parameter consists of, and how it begins."""

import torch
from torch import Tensor

from largebatch.optim.blockwise.work_group import BlockedLayer

# The running averages whose β may change on the way.
AVERAGES = ("exp_avg", "exp_avg_sq", "factor")

# An entry of the state: elements of gradients so far that were too large to be squared.
DROPPED = "dropped_elements"

# What a block has for each dimension with a factor.
MATRICES = ("factor_", "root_", "basis_")


def new_entry(name: str, shape: tuple[int, ...], layer: BlockedLayer) -> Tensor:
    """An entry of a block's state before its first step; empty where the block is another rank's.

    Roots and bases of nothing are the identity.
    """
    if name.startswith(("root_", "basis_")) and len(shape) == 2:
        return torch.eye(*shape, dtype=layer.dtype, device=layer.device)
    return torch.zeros(shape, dtype=layer.dtype, device=layer.device)
