"""LAMB under FSDP2, as in the plain loop: `torchrun --nproc-per-node 2 examples/fsdp2.py`."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from largebatch.optim import create

NUM_STEPS, GLOBAL_BATCH_SIZE = 60, 2048
DIRECTIONS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


def batch(step):
    points = torch.randn(GLOBAL_BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ DIRECTIONS).argmax(dim=1)


dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
fully_shard(model, mesh=dist.init_device_mesh("cpu", (world_size,)))
# After fully_shard, which puts sharded parameters in the place of the model's.
optimizer = create(model, "lamb", lr=0.02, weight_decay=0.01, max_grad_norm=0.1)
for step in range(NUM_STEPS):
    points, labels = (values[rank::world_size] for values in batch(step))
    optimizer.zero_grad()
    cross_entropy(model(points), labels).backward()
    optimizer.step()
loss = cross_entropy(model(batch(NUM_STEPS)[0]), batch(NUM_STEPS)[1])
if rank == 0:
    print(f"loss {loss:.6f}")
    for name, stats in optimizer.layer_stats().items():
        print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
dist.destroy_process_group()
