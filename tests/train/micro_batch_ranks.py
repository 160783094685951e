"""What ranks find to fit where their devices are not equally full, and what the search leaves."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from engine_ranks import group_of_one
from gloo_ranks import Outcome
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.distributed.ranks import Ranks
from largebatch.optim import KFAC
from largebatch.train.data.sampler import Indices
from largebatch.train.engines.base import Engine
from largebatch.train.engines.ddp import DDP
from largebatch.train.engines.deepspeed import DeepSpeed
from largebatch.train.engines.micro_batch import find_micro_batch_size
from largebatch.train.engines.update import GradientLimits
from largebatch.train.models import MLP
from largebatch.train.tasks import Batch

CPU = torch.device("cpu")
BATCH_SIZE = 64


class Regression:
    """Sample 0, which the search asks for, has the largest gradient by far."""

    def train_batch(self, indices: Indices) -> Batch:
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(BATCH_SIZE, 16, generator=draw)
        inputs[0] *= 100
        chosen = torch.from_numpy(indices)
        return inputs[chosen], inputs[chosen, :8].sin()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return (model(inputs) - targets).square().mean()


def memory(total: int) -> Any:
    """A device's, of which each sample of a pass is believed to take ten bytes."""
    tried: list[int] = []
    return SimpleNamespace(
        tried=tried,
        get_device_properties=lambda device: SimpleNamespace(total_memory=total),
        reset_peak_memory_stats=lambda device: None,
        max_memory_allocated=lambda device: 10 * tried[-1],
        empty_cache=lambda: None,
    )


class Noting(Regression):
    """Tells the device what is tried."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def train_batch(self, indices: Indices) -> Batch:
        self._device.tried.append(len(indices))
        return super().train_batch(indices)


def search(engine: Engine, optimizer: Optimizer, ranks: Ranks, room: int) -> tuple[int, list[int]]:
    """The answer where `room` bytes are left beside the optimizer's state, and what was tried."""
    held = sum(param.numel() for param in engine.model.parameters())
    device: Any = memory(round((room + 8 * held) / 0.9) + 1)
    sizes = [BATCH_SIZE * ranks.size]
    task: Any = Noting(device)
    return find_micro_batch_size(engine, optimizer, task, ranks, sizes, device), device.tried


def of_unequal_devices(job: str) -> Outcome:
    """Rank 0 has room for 64 samples, rank 1 for 17."""
    ranks = Ranks("test", dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    engine = DDP(MLP(16, 32, 8), ranks, CPU)
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    found, tried = search(engine, optimizer, ranks, (640, 170)[ranks.rank])
    return {"found": found, "tried": tried}


def made(engine_name: str) -> tuple[Engine, Optimizer]:
    torch.manual_seed(0)
    if engine_name == "kfac":
        engine: Any = DDP(MLP(16, 32, 8), Ranks(), CPU)
        return engine, KFAC(engine.model, lr=0.01)
    engine = DeepSpeed(MLP(16, 32, 8), Ranks(), CPU, stage=int(engine_name))
    optimizer = torch.optim.AdamW(list(engine.model.named_parameters()), lr=0.01)
    return engine, engine.attach(optimizer, None)


def first_step(engine_name: str) -> Outcome:
    """The gradient norm of a run's first step and, of K-FAC, the norm of its factors, without a
    search and after one.
    """
    group_of_one()
    told: dict[str, list[float]] = {}
    for searched in (False, True):
        engine, optimizer = made(engine_name)
        if searched:
            search(engine, optimizer, Ranks(), 640)
        task: Any = Regression()
        batch = task.train_batch(torch.arange(1, BATCH_SIZE).numpy())
        engine.forward_backward(task, batch, BATCH_SIZE - 1)
        numbers = engine.update(optimizer, GradientLimits(clip_norm=1e9)).replicated
        factors = [s["factor_out"].norm() for s in optimizer.state.values() if "factor_out" in s]
        told[str(searched)] = [float(numbers["grad_norm"]), *map(float, factors)]
    return {"without": told["False"], "after": told["True"]}
