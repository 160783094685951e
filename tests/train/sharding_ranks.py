"""What ranks hold and compute of one small model under each way to share it among nodes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from collective_ranks import Reductions
from gloo_ranks import Outcome
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from largebatch.distributed.ranks import Ranks
from largebatch.train.engines.base import Engine
from largebatch.train.engines.ddp import DDP
from largebatch.train.engines.fsdp import FSDP
from largebatch.train.engines.update import GradientLimits
from largebatch.train.models import Transformer
from largebatch.train.tasks import Batch

CPU = torch.device("cpu")
BATCH_SIZE = 8


@dataclass(frozen=True)
class Way:
    """An engine with keys of its own, on nodes of `local_size` ranks."""

    local_size: int
    engine: str = "fsdp"
    keys: tuple[tuple[str, Any], ...] = ()


class Language:
    """Next tokens of drawn ones."""

    def train_batch(self, indices: Any) -> Batch:
        draw = torch.Generator().manual_seed(3)
        tokens = torch.randint(0, 30, (BATCH_SIZE, 9), generator=draw)[torch.from_numpy(indices)]
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def model() -> nn.Module:
    torch.manual_seed(0)
    return Transformer(vocabulary=30, dim=16, depth=2, heads=2, max_length=16)


def ranks_of(local_size: int) -> Ranks:
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks("test", rank, size, rank % local_size, local_size)


def three_steps(engine: Engine) -> dict[str, Tensor]:
    """The whole weights after them."""
    params = list(engine.model.named_parameters())
    optimizer = torch.optim.AdamW(params, lr=0.01)
    share = BATCH_SIZE // engine.data_parallel_size
    mine = np.arange(share) + share * dist.get_rank()
    task: Any = Language()
    for _ in range(3):
        engine.forward_backward(task, task.train_batch(mine), BATCH_SIZE)
        engine.update(optimizer, GradientLimits())
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in params
    }


def shared(way: Way) -> Outcome:
    """Weights after three steps, how often the model is held, and what was reduced how often."""
    made: Any = {"fsdp": FSDP, "ddp": DDP}[way.engine]
    try:
        engine = made(model(), ranks_of(way.local_size), CPU, **dict(way.keys))
    except ValueError as error:
        return {"refused": str(error)}
    with Reductions() as reductions:
        weights = three_steps(engine)
    return {"weights": weights, "copies": engine.gradient_copies,
            "reductions": dict(reductions.seen)}  # fmt: skip
