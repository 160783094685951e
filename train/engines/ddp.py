"""DDP: replicated parameters, and one gradient all-reduce a step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.distributed.groups import RankGroups
from largebatch.distributed.ranks import Ranks
from largebatch.train.engines.base import OfGradients
from largebatch.train.engines.precision import Precision
from largebatch.train.noise.example_gradients import ExampleGradients
from largebatch.train.noise.small_gradients import (
    MicroBatchGradients,
    RankGradients,
    SmallGradients,
)

_LATENCY_BYTES: Final = 400_000
"""What a node's interfaces carry while one message is under way: 2 µs (assumed) x 8 x 25 GB/s, an
Aurora node's. `largebatch bench collectives` measures both."""
_LATENCY_SHARE: Final = 0.1
_FEWEST_BUCKETS: Final = 16
"""The last one is reduced when the backward pass is over: a sixteenth of the traffic is seen."""


def bucket_size(gradient_bytes: int, num_nodes: int) -> float | None:
    """MiB of gradients in one of DDP's all-reduces; None: torch's own, 25.

    A ring between nodes sends 2 (nodes - 1) messages and 2 n bytes through a node for a bucket of
    n: its latency is that share of its time which is wanted at n = nodes x _LATENCY_BYTES / share.
    It is no more than a sixteenth of all, so that reducing overlaps with the backward pass, and
    never below torch's own, which small models and single nodes keep. 28 GB on 64 nodes: 256 MB in
    105 all-reduces; on 3,200: 1.75 GB in 16, where 25 MiB would be 1,120 of 12.8 ms of latency.
    """
    if num_nodes < 2:
        return None
    wanted = num_nodes * _LATENCY_BYTES / _LATENCY_SHARE
    size = min(wanted, gradient_bytes / _FEWEST_BUCKETS) / 2**20
    return size if size > 25 else None


class DDP(OfGradients):
    """Replicated parameters, one gradient all-reduce a step, whatever the micro-batches.

    Args:
        groups: of ranks, each of which averages gradients for itself; None: all ranks are one.
        bucket_mb: MiB of gradients in one all-reduce; None: by `bucket_size`.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        device: torch.device,
        micro_batch_size: int | None = None,
        precision: Precision | None = None,
        groups: RankGroups | None = None,
        *,
        bucket_mb: float | None = None,
    ) -> None:
        super().__init__(model.to(device), ranks, device, micro_batch_size, precision, groups)
        if groups is not None:
            self.across = dist.group.WORLD  # all ranks of a group hold the same
        within = self._within
        if within.size > 1:
            held = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            self._replica = DistributedDataParallel(
                self.model,
                gradient_as_bucket_view=True,
                bucket_cap_mb=bucket_mb or bucket_size(held, within.size // within.local_size),
                process_group=None if groups is None else groups.own,
            )

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        if not is_last and isinstance(self._replica, DistributedDataParallel):
            return self._replica.no_sync()
        return nullcontext()

    def small_gradients(self, kind: str) -> SmallGradients:
        if kind == "example":
            return ExampleGradients(self.model)
        if kind == "micro_batch":
            return MicroBatchGradients(self.model)
        assert kind == "rank"
        if not isinstance(self._replica, DistributedDataParallel):
            raise ValueError(
                f"noise.small=rank needs at least 2 ranks{' a group' * bool(self.groups)}, got 1: "
                "use noise.small=micro_batch or example"
            )
        return RankGradients(self._replica)
