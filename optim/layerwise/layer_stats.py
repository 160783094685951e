"""Norms and ratios of a step, as `layer_stats` shows them."""

from collections.abc import Iterable, Iterator
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

    def adapting_ratios(self) -> Tensor | None:
        """Of the layers that have one, as a vector; None where there is no such layer."""
        places = [layer for layer in self.moved if self.adapts[layer]]
        if len(places) == len(self.names):
            return self.trust_ratio
        ratios = self.trust_ratio.unbind()
        return torch.stack([ratios[layer] for layer in places]) if places else None

    def by_layer(self) -> Iterator[tuple[Name, dict[str, Tensor]]]:
        keys = ("weight_norm", "update_norm", "trust_ratio")
        values = [*zip(*(getattr(self, key).unbind() for key in keys), strict=True)]
        flags = torch.tensor([False, True]).unbind()
        for layer in self.moved:
            stats = dict(zip(keys, values[layer], strict=True))
            yield self.names[layer], stats | {"adapts": flags[self.adapts[layer]]}


def adapting_ratios(parts: Iterable[LayerStats]) -> Tensor | None:
    """The trust ratios of what adapts in all parts of a step; None where nothing does."""
    found = [stats.adapting_ratios() for stats in parts]
    ratios = [each for each in found if each is not None]
    if len(ratios) < 2:
        return ratios[0] if ratios else None
    return torch.cat(ratios)
