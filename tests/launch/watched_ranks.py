"""Gloo ranks that make steps under a heartbeat, until one of them goes astray on purpose.

    python watched_ranks.py RUN MODE

Forked from one process, which ends with the first that fails. Rank 2 of 4 goes astray at step 3.
"""

import multiprocessing
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from largebatch.distributed.rank_dump import answering
from largebatch.records.heartbeat import Heartbeat

SIZE = 4
STRAY = 2
AT_STEP = 3


def go_astray(mode: str) -> None:
    if mode == "sleeps":
        time.sleep(1000)
    elif mode == "calls another":
        dist.broadcast(torch.ones(3), 0)  # to be received: a root may be done at once


def steps(rank: int, run: Path, mode: str) -> None:
    torch.set_num_threads(1)
    with answering(run, rank, SIZE):
        dist.init_process_group(
            "gloo", init_method=f"file://{run}/store-{os.getppid()}", rank=rank, world_size=SIZE
        )
        pairs = [
            dist.new_group([0, 1], group_desc="low"),
            dist.new_group([2, 3], group_desc="high"),
        ]
        with Heartbeat(run, SIZE) if rank == 0 else nullcontext() as heartbeat:
            for step in range(1, 6):
                if step == AT_STEP and rank == STRAY:
                    go_astray(mode)
                dist.all_reduce(torch.ones(2), group=pairs[rank // 2])
                dist.all_reduce(torch.ones(10))
                if heartbeat is not None:
                    heartbeat.beat(step, 8 * step)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = (Path(sys.argv[1]), sys.argv[2])
    arguments[0].mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=steps, args=(rank, *arguments)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
