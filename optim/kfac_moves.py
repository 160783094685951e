"""What layers are moved by in a step of K-FAC, and the numbers that it is known by."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.optim.curvature_layers import Layer
from largebatch.optim.kfac_teams import Numbers, Team
from largebatch.optim.tensors import root


@dataclass(frozen=True)
class Move:
    """What a team's layers are to be moved by."""

    team: Team
    parts: Iterator[tuple[Tensor, Tensor]]
    """U of each parameter by its layer's scale, as far as it lies here; to be taken by every rank,
    team after team."""
    numbers: Numbers
    ratios: Mapping[Layer, Tensor]
    """r of each layer, times its scale."""


def stats_of(numbers: Mapping[str, Tensor], ratio: Tensor) -> dict[str, Tensor]:
    norms = numbers["update"] * numbers["gradient"]
    return {
        "weight_norm": root(numbers["weight"]),
        "update_norm": ratio * root(numbers["update"]),
        "trust_ratio": ratio / torch.where(numbers["scale"] > 0, numbers["scale"], 1.0),
        "cosine": torch.where(norms > 0, numbers["product"] * norms.rsqrt(), 0.0),
        "condition_number": numbers["condition"],
    }
