"""A rank whose all-reduce adds up wrongly at one size: what value checks are there for."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from largebatch.benchmarks.collectives import steps
from largebatch.distributed.ranks import Ranks

WRONG_ELEMENTS = 256
WRONG_RANKS = (1, 2)


def work_as_rank(rank: int, size: int, port: int, job: steps.CollectiveJob, folder: str) -> None:
    torch.set_num_threads(1)
    right = steps.COLLECTIVES["all_reduce"]

    def all_reduce(taken: Tensor, given: Tensor) -> None:
        right(taken, given)
        if rank in WRONG_RANKS and len(taken) == WRONG_ELEMENTS:
            taken[3] += 1
            taken[5] = float("nan")

    steps.COLLECTIVES["all_reduce"] = all_reduce
    found = steps.measure(Ranks("nproc", rank, size, rank, size, "127.0.0.1", port), job)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps([asdict(row) for row in found]))
