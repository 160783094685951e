"""What ranks do for the tests of small gradients: one batch, its sources, and its squared norms."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from largebatch.schedules import BatchSplit
from largebatch.train.noise.example_gradients import ExampleGradients
from largebatch.train.noise.sharded_gradients import ShardedGradients
from largebatch.train.noise.small_gradients import (
    MicroBatchGradients,
    RankGradients,
    SmallGradients,
    squares,
)

SAMPLES, FEATURES, CLASSES = 24, 7, 5


class Net(nn.Module):
    """Uneven on purpose: no dimension is a multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 11)
        self.norm = nn.LayerNorm(11)
        self.last = nn.Linear(11, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(torch.tanh(self.first(x))))
        return out


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def samples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, FEATURES, generator=generator).to(dtype)
    return x, (x[:, 0] > 0).long()  # two of the classes: the mean gradient is not lost in noise


@dataclass(frozen=True)
class Job:
    """One way to see the small gradients of one batch."""

    source: str
    accumulation: int = 1
    loss_scale: float = 1.0

    def __call__(self) -> dict[str, Any]:
        """(mean squared norm of the small gradients, that of their mean), summed over ranks."""
        split = BatchSplit(SAMPLES, world(), self.accumulation)
        model, source = self.made()
        big: list[Tensor] = []
        for _ in range(2):  # the second time says whether the first left anything behind
            model.zero_grad(set_to_none=True)
            self.backward(model, split)
            small = over_ranks(source.part(split, self.loss_scale))
            whole = squares(source.layers) / self.loss_scale**2
            big.append(over_ranks(whole) if self.source == "sharded" else whole)
        source.remove()
        model.zero_grad(set_to_none=True)
        self.backward(model, split)
        return {
            "names": [*source.layers],
            "small": small,
            "big": big[-1],
            "small_batch": source.small_batch(split),
        }

    def made(self) -> tuple[nn.Module, SmallGradients]:
        model: nn.Module = net()
        if self.source == "sharded":
            for module in (model.first, model.norm, model.last, model):
                fully_shard(module)  # type: ignore[arg-type]
            return model, ShardedGradients(model)
        if self.source == "example":
            replica = DistributedDataParallel(model) if world() > 1 else model
            return replica, ExampleGradients(model)
        if self.source == "rank":
            replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
            return replica, RankGradients(replica)
        replica = DistributedDataParallel(model) if world() > 1 else model
        return replica, MicroBatchGradients(model)

    def backward(self, model: nn.Module, split: BatchSplit) -> None:
        x, y = samples()
        first = dist.get_rank() * split.per_rank if world() > 1 else 0
        for step in range(self.accumulation):
            start = first + step * split.micro_batch_size
            chosen = slice(start, start + split.micro_batch_size)
            last = step == self.accumulation - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            elif isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last
            loss = cross_entropy(model(x[chosen]), y[chosen])
            torch.autograd.backward(loss * (self.loss_scale / self.accumulation))


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def over_ranks(values: Tensor) -> Tensor:
    if world() > 1:
        dist.all_reduce(values)
    return values


def work(job: Job) -> dict[str, Any]:
    return job()
