"""A rank of a real gloo world that goes another way at one step."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from largebatch.distributed.rank_dump import answering
from largebatch.records.heartbeat import Heartbeat

HANGING_RANK = 1
LAST_STEP = 5
ELEMENTS = 10


def goes_another_way() -> None:
    time.sleep(600)


def main(run: Path, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    run.mkdir(exist_ok=True)
    with answering(run, rank, size):
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
        )
        if rank > 0:
            train(rank, lambda step: None)
        begun = time.time()
        with Heartbeat(run, size, every_seconds=0.0) as heart:

            def tell(step: int) -> None:
                heart.beat(step, 8 * step)
                seconds = time.time() - begun
                line = {"step": step, "samples": 8 * step, "seconds": seconds}
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")

            train(rank, tell)


def train(rank: int, tell: Callable[[int], None]) -> None:
    for step in range(1, 100):
        if rank == HANGING_RANK and step > LAST_STEP:
            goes_another_way()
        dist.all_reduce(torch.ones(ELEMENTS))
        tell(step)
