"""Training on several gloo ranks, in processes of their own, for every row of the table."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from optimizer_rows import ROWS, Row
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

NUM_STEPS = 8
RANK_BATCH_SIZE = 4


def train(row: Row, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """Weights after a few steps on this rank's share of batches of 2 x RANK_BATCH_SIZE samples.

    In FP64: the first steps of Adam-like updates are the sign of the gradient, and the order in
    which FP32 gradients are summed decides the sign of those near zero.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    samples = torch.randn(NUM_STEPS, 2 * RANK_BATCH_SIZE, 6, dtype=torch.float64)
    targets = torch.randn(NUM_STEPS, 2 * RANK_BATCH_SIZE, 3, dtype=torch.float64)
    replica: nn.Module = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = row.make(replica.parameters())
    for x, y in zip(samples[:, rank::world_size], targets[:, rank::world_size], strict=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(replica(x), y).backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def train_as_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    """Train every row as one of `world_size` ranks and save its weights in `folder`."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    weights = {row.name: train(row, rank, world_size) for row in ROWS}
    torch.save(weights, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
