"""Jobs done by several gloo ranks together, in processes of their own."""

import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import Popen, all_ended
from torch.distributed.checkpoint.api import CheckpointException

Outcome = dict[str, Any]


def launch(
    work: Callable[[Any], Outcome],
    jobs: Sequence[Any],
    world_size: int,
    folder: Path,
) -> list[dict[str, Outcome]]:
    """What each of `world_size` ranks has found in each job, by `str(job)`.

    An exception in a job becomes its outcome, {"error": traceback}; the death of a rank becomes
    that of all jobs. In a world of one no process group is made.
    """
    own = Path(tempfile.mkdtemp(dir=folder))  # a store serves one launch
    ranks = []
    for rank in range(world_size):
        with (own / f"rank{rank}.err").open("w") as said:
            call = partial(work_as_rank, rank, world_size, work, jobs, str(own))
            ranks.append(Popen(call, children=False, stderr=said))
    failed = all_ended(ranks)
    if failed is not None:
        said = (own / f"rank{failed}.err").read_text()
        error = f"rank {failed} ended with exit code {ranks[failed].returncode}: {said}"
        return [{str(job): {"error": error} for job in jobs}] * world_size
    return [torch.load(own / f"rank{rank}.pt") for rank in range(world_size)]


def work_as_rank(
    rank: int,
    world_size: int,
    work: Callable[[Any], Outcome],
    jobs: Sequence[Any],
    folder: str,
) -> None:
    torch.set_num_threads(1)
    # What holds for the tests' own process: a warning that our code causes is an error.
    warnings.filterwarnings("error", module=r"largebatch\.")
    # DeepSpeed imports it where it can, a second of a rank's, for a search that nobody makes here.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    # It advises against sharding one dimension twice, which is what FSDP2 with TP does.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=600),
        )
    outcomes = {}
    for job in jobs:
        try:
            outcomes[str(job)] = work(job)
        except (Exception, CheckpointException):  # which is none
            outcomes[str(job)] = {"error": traceback.format_exc()}
    torch.save(outcomes, Path(folder) / f"rank{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """As the ranks compute; and on busy cores threads wait for one another."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def successful(found: Sequence[Outcome]) -> Sequence[Outcome]:
    """What the ranks have found in one job; fails with the traceback of one that has raised."""
    for rank, outcome in enumerate(found):
        assert "error" not in outcome, f"rank {rank}: {outcome['error']}"
    return found
