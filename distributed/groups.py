"""Ranks cut into groups of equal size, neighbours together: a node's, or those near one another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from largebatch.distributed.launchers import Ranks


@dataclass(frozen=True)
class RankGroups:
    """All groups of a run, and this rank's own.

    Attributes:
        number: of groups.
        index: of this rank's.
        within: this rank among those of its group.
        own: the process group of these.
    """

    number: int
    index: int
    within: Ranks
    own: dist.ProcessGroup


def split_ranks(ranks: Ranks, number: int) -> RankGroups:
    """Cut all ranks into `number` groups. Every rank calls it; `number` divides them."""
    size = ranks.size // number
    index = ranks.rank // size
    first = index * size
    own = make_group(range(first, first + size))
    within = replace(
        ranks, rank=ranks.rank - first, size=size, local_size=min(ranks.local_size, size)
    )
    return RankGroups(number, index, within, own)


def make_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Make a process group of these ranks, which all of them call."""
    # A group that is bound to a device is split by all its ranks, and xccl cannot split one
    # (torch-xpu-ops issue 5385).
    dist.distributed_c10d._get_default_group().bound_device_id = None
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
