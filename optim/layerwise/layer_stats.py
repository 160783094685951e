"""Norms and ratios of a step, as `layer_stats` shows them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.optim.sharding.layout import Name


@dataclass(frozen=True)
class LayerStats:
    """The layers' norms and ratios of a step, vectors over `names`."""

    names: list[Name]
    moved: list[int]
    adapts: list[bool]
    """Whether a layer has a trust ratio, or 1 by choice."""
    weight_norm: Tensor
    update_norm: Tensor
    trust_ratio: Tensor

    def adapting(self) -> Iterator[Name]:
        return (self.names[layer] for layer in self.moved if self.adapts[layer])

    def by_layer(self) -> Iterator[tuple[Name, dict[str, Tensor]]]:
        keys = ("weight_norm", "update_norm", "trust_ratio")
        values = [*zip(*(getattr(self, key).unbind() for key in keys), strict=True)]
        flags = torch.tensor([False, True]).unbind()
        for layer in self.moved:
            stats = dict(zip(keys, values[layer], strict=True))
            yield self.names[layer], stats | {"adapts": flags[self.adapts[layer]]}
