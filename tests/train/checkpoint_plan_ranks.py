"""What gloo ranks do with the plans of checkpoints: keep them, make them anew, disagree."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from checkpoint_ranks import Trainee, ranks_here, state_after
from gloo_ranks import Outcome

from largebatch.conf.config import CheckpointConfig
from largebatch.train.checkpoints import plan as checkpoint_plan
from largebatch.train.checkpoints import tensors as checkpoint_tensors
from largebatch.train.checkpoints.checkpoint import Checkpoints


@dataclass(frozen=True)
class Plans:
    """Saves one after another, of which the second is like the first, and the third has a tensor
    more; at the fourth rank 1 takes a tensor for another."""

    folder: str
    sharded: bool

    def do(self) -> Outcome:
        trainee = Trainee("LAMB", self.sharded, seed=0)
        checkpoints = Checkpoints(
            Path(self.folder),
            ranks_here(),
            trainee.tensors(),
            CheckpointConfig(every_samples=64, keep=9),
        )
        counts, same = [], []
        for number in range(4):
            trainee.step(number)
            if number == 2:
                weight = next(trainee.model.parameters())
                trainee.optimizer.state[weight]["of_a_wrapper"] = torch.zeros_like(weight)
            with counted() as found, disagreeing(number == 3 and dist.get_rank() == 1):
                checkpoints.save(state_after(64 * (number + 1)))
            counts.append(found)
        assert checkpoints.failures == []
        for number in reversed(range(4)):  # one that is read sets aside those after it
            other = Trainee("LAMB", not self.sharded, seed=1)
            for each in range(1 + (number >= 2)):
                other.step(each)
            if number >= 2:
                weight = next(other.model.parameters())
                other.optimizer.state[weight]["of_a_wrapper"] = torch.zeros_like(weight)
            path = Path(self.folder) / "checkpoints" / f"samples-{64 * (number + 1):015d}"
            config = CheckpointConfig()
            with counted() as found:
                Checkpoints(Path(self.folder), ranks_here(), other.tensors(), config).load(path)
            counts.append(found)
            again = Trainee("LAMB", self.sharded, seed=0)
            for each in range(number + 1):
                again.step(each)
            expected = again.everything()
            loaded = other.everything()
            same.append(all(torch.equal(loaded[name], expected[name]) for name in expected))
        return {"counts": counts, "same": same}


@dataclass(frozen=True)
class Unread:
    """A load in which rank 1 alone finds that what it reads does not fit."""

    folder: str

    def do(self) -> Outcome:
        trainee = Trainee("AdamW", sharded=False, seed=0)
        trainee.step(0)
        config = CheckpointConfig(every_samples=64)
        checkpoints = Checkpoints(Path(self.folder), ranks_here(), trainee.tensors(), config)
        checkpoints.save(state_after(64))
        planner = checkpoint_tensors.MomentsPlanner
        wrong = ValueError("rank 1's own trouble") if dist.get_rank() == 1 else None
        last, refusal = checkpoints.last, ""
        assert last is not None
        with mock.patch.object(planner, "load_bytes", side_effect=wrong):
            try:
                checkpoints.load(last)
            except ValueError as error:
                refusal = str(error)
        return {"refusal": refusal}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often plans are made, and how often ranks gather what others have pickled."""
    found: dict[str, int] = {}
    with (
        mock.patch.object(checkpoint_plan, "plan_of", wraps=checkpoint_plan.plan_of) as plans,
        mock.patch.object(dist, "gather_object", wraps=dist.gather_object) as gathers,
        mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as keys,
        mock.patch.object(dist, "scatter_object_list", wraps=dist.scatter_object_list) as tells,
    ):
        yield found
    found["plans"] = plans.call_count
    found["pickles"] = gathers.call_count + keys.call_count + tells.call_count


@contextmanager
def disagreeing(does: bool) -> Iterator[None]:
    if not does:
        yield
        return

    def other(*args: Any) -> str:
        return "what no other rank has"

    with mock.patch.object(checkpoint_plan, "digest_of", other):
        yield


def work(job: Plans | Unread) -> Outcome:
    dist.barrier()
    return job.do()
