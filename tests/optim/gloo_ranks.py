"""Jobs done by several gloo ranks together, in processes of their own."""

import logging
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

Outcome = dict[str, Any]

# Ranks are forked from a process that has imported these once: importing is most of their start.
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
]


def launch(
    work: Callable[[Any], Outcome], jobs: Sequence[Any], world_size: int, folder: Path
) -> list[dict[str, Outcome]]:
    """What each of `world_size` ranks has found in each job, by `str(job)`.

    An exception in a job becomes its outcome, {"error": traceback}. Of a world of one no process
    group is made.
    """
    own = tempfile.mkdtemp(dir=folder)  # a store serves one launch
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        work_as_rank,
        args=(world_size, work, jobs, own),
        nprocs=world_size,
        start_method="forkserver",
    )
    return [torch.load(Path(own) / f"rank{rank}.pt") for rank in range(world_size)]


def work_as_rank(
    rank: int,
    world_size: int,
    work: Callable[[Any], Outcome],
    jobs: Sequence[Any],
    folder: str,
) -> None:
    torch.set_num_threads(1)
    # It advises against sharding one dimension twice, which is what FSDP2 with TP does.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
    outcomes = {}
    for job in jobs:
        try:
            outcomes[str(job)] = work(job)
        except Exception:
            outcomes[str(job)] = {"error": traceback.format_exc()}
    torch.save(outcomes, Path(folder) / f"rank{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def successful(found: Sequence[Outcome]) -> Sequence[Outcome]:
    """What the ranks have found in one job; fails with the traceback of one that has raised."""
    for rank, outcome in enumerate(found):
        assert "error" not in outcome, f"rank {rank}: {outcome['error']}"
    return found
