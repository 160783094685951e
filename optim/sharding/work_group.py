"""Ranks that share the work on some parameters, and the way of tensors to the owners and back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

from largebatch.optim.sharding.layout import Name
from largebatch.optim.sharding.redistribution import Redistribution
from largebatch.optim.sharding.rounds import ShardedTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Unit(Protocol):
    """What one rank of a work group works on: a layer."""

    @property
    def name(self) -> Name: ...

    @property
    def dtype(self) -> torch.dtype: ...


Layer = TypeVar("Layer", bound=Unit)


class WorkGroup(Generic[Layer]):
    """Layers that lie over the same ranks; one rank owns each part of the work.

    Attributes:
        dtype: FP32, or FP64 if any layer needs it.
        device: of all collectives.
        group: None: this process works alone.
    """

    def __init__(
        self, layers: Sequence[Layer], tensors: Sequence[ShardedTensor], device: torch.device
    ) -> None:
        self.layers = list(layers)
        wide = any(layer.dtype == torch.float64 for layer in self.layers)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = device
        self.redistribution = Redistribution(tensors, self.dtype, device)

    @property
    def group(self) -> "ProcessGroup | None":
        return self.redistribution.group

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def names(self) -> list[Name]:
        return [layer.name for layer in self.layers]
