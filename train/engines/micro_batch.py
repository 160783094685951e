"""`engine.micro_batch_size=auto`: the largest that fits an accelerator's memory, with a margin.

Memory grows in proportion to the micro-batch, so two small ones tell what a larger one takes. The
answer is tried before it is given. (Trying ever larger ones until memory runs out would leave the
other ranks waiting for the one that ran out first.)
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import Optimizer

from largebatch.common.memory import ran_out
from largebatch.distributed.ranks import Ranks
from largebatch.optim.sharding.layout import local
from largebatch.train.engines.base import Engine
from largebatch.train.tasks import Task

MARGIN: Final = 0.1
"""Of the device's memory that stays free: fragments, and collectives of other sizes."""

_STATE_BYTES: Final = 8
"""Of a parameter: two FP32 moments, which the first step allocates."""


def candidates(batch_sizes: Sequence[int], data_parallel_size: int) -> list[int]:
    """Micro-batches that divide each rank's share of every batch size, smallest first."""
    common = math.gcd(*(size // data_parallel_size for size in batch_sizes))
    return [size for size in range(1, common + 1) if common % size == 0]


def largest_that_fits(
    sizes: Sequence[int], peak_bytes: Callable[[int], int], limit: float
) -> int | None:
    """The largest of `sizes`, smallest first, that takes at most `limit` bytes; None: not one.

    Args:
        peak_bytes: the most that a pass with that many samples takes; asked of sizes that should
            fit.
    """
    first = peak_bytes(sizes[0])
    if first > limit:
        return None
    if len(sizes) == 1:
        return sizes[0]
    second = peak_bytes(sizes[1])
    per_sample = max(0.0, (second - first) / (sizes[1] - sizes[0]))
    believed = [s for s in sizes if first + per_sample * (s - sizes[0]) <= limit]
    while len(believed) > 1 and peak_bytes(believed[-1]) > limit:
        believed.pop()
    return believed[-1]


def find_micro_batch_size(
    engine: Engine,
    optimizer: Optimizer,
    task: Task,
    ranks: Ranks,
    batch_sizes: Sequence[int],
    memory: Any = None,
) -> int:
    """The same on every rank: what fits the fullest of their devices. Nothing of the passes that
    are made for it is left.

    Args:
        memory: the module of the device that tells of its memory; None: torch's.

    Raises:
        ValueError: no accelerator, not even one sample fits, or memory ran out on the way with
            several ranks, or so that the device is lost.
    """
    device = engine.device
    if memory is None:
        memory = memory_of(device)
    # Not mem_get_info: what is free XPU tells only with ZES_ENABLE_SYSMAN=1.
    total = memory.get_device_properties(device).total_memory
    held = sum(local(p.detach()).numel() for p in engine.model.parameters() if p.requires_grad)

    def peak_bytes(size: int) -> int:
        memory.reset_peak_memory_stats(device)
        indices = np.zeros(size, np.int64)
        try:
            engine.forward_backward(task, task.train_batch(indices), size * ranks.size)
        except Exception as error:
            if not ran_out(error):
                raise
            # Other ranks wait in a collective, and a device that is lost tries nothing more.
            if ranks.size > 1 or not isinstance(error, torch.OutOfMemoryError):
                raise ValueError(_too_much(size, total, device, str(error))) from error
            peak = sys.maxsize
        else:
            peak = int(memory.max_memory_allocated(device))
        engine.discard(optimizer)
        memory.empty_cache()
        return over_ranks(peak, dist.ReduceOp.MAX, ranks, device)

    limit = int((1 - MARGIN) * total) - _STATE_BYTES * held
    # A shard is not as large on every rank, and all are to try the same.
    limit = over_ranks(limit, dist.ReduceOp.MIN, ranks, device)
    found = largest_that_fits(candidates(batch_sizes, ranks.size), peak_bytes, limit)
    if found is None:
        raise ValueError(_too_much(1, total, device, f"with {MARGIN:.0%} to spare"))
    return found


def _too_much(size: int, total: int, device: torch.device, why: str) -> str:
    fault = "not even one sample fits" if size == 1 else f"{size} samples do not fit"
    way_out = "" if size == 1 else ", or give engine.micro_batch_size a smaller number"
    return (
        f"engine.micro_batch_size=auto: {fault} the {total / 2**30:.1f} GiB of {device} "
        f"({' '.join(why.split())[:200]}): shard the model (engine=fsdp), set "
        f"engine.activation_checkpointing=true{way_out}"
    )


def memory_of(device: torch.device) -> Any:
    """Torch's module that tells of the memory of `device`."""
    if device.type == "cpu":
        raise ValueError(
            "engine.micro_batch_size=auto measures the memory of an accelerator: on a CPU give a "
            "number, or null for the whole local batch"
        )
    return torch.get_device_module(device)


def over_ranks(num_bytes: int, op: Any, ranks: Ranks, device: torch.device) -> int:
    """The same on every rank."""
    if ranks.size == 1:
        return num_bytes
    packed = torch.tensor([num_bytes], dtype=torch.int64, device=device)
    dist.all_reduce(packed, op=op)
    return int(packed)
