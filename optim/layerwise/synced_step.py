"""Inputs of a layer-wise step that all ranks share, and its statistics."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.optim.sharding.layout import Name


@dataclass(frozen=True)
class SyncedStep:
    """Inputs of a step that all ranks decide alike, before any moment is touched."""

    gradients: Mapping[Tensor, Tensor]
    """The local part of each parameter's gradient, as it is, placed like the parameter."""
    divisor: Tensor | None
    """0-d: what every gradient is divided by, loss scale and clip together."""
    skip: Tensor | None
    """0-d bool: where true, nothing may change."""


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
        for layer in self.moved:
            stats = dict(zip(keys, values[layer], strict=True))
            yield self.names[layer], stats | {"adapts": torch.tensor(self.adapts[layer])}
