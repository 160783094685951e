"""Ranks cut into groups of equal size, neighbours together: a node's, or those near one another."""

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
    # xccl cannot split a group that is bound to a device (torch-xpu-ops issue 5385).
    dist.distributed_c10d._get_default_group().bound_device_id = None
    own = dist.new_group([*range(first, first + size)], use_local_synchronization=True)
    assert own is not None
    within = replace(
        ranks, rank=ranks.rank - first, size=size, local_size=min(ranks.local_size, size)
    )
    return RankGroups(number, index, within, own)
