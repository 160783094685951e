"""LAMB under FSDP2: `torchrun --nproc-per-node 2 examples/fsdp2.py`.

Each rank holds a part of every tensor; the trust ratios and the clip are those of the whole, so
that this prints what examples/plain_pytorch.py does.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from largebatch.optim import LAMB, param_groups

NUM_STEPS, GLOBAL_BATCH_SIZE = 60, 2048


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Points, and which of ten fixed directions each of them follows most."""
    directions = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    points = torch.randn(GLOBAL_BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ directions).argmax(dim=1)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (world_size,)))
    # After fully_shard, which puts sharded parameters in the place of the model's.
    optimizer = LAMB(param_groups(model, weight_decay=0.01), lr=0.02, max_grad_norm=0.1)

    for step in range(NUM_STEPS):
        points, labels = (values[rank::world_size] for values in batch(step))
        optimizer.zero_grad()
        cross_entropy(model(points), labels).backward()
        optimizer.step()

    with torch.no_grad():
        points, labels = batch(NUM_STEPS)  # not seen before
        scores = model(points)
    if rank == 0:
        accuracy = (scores.argmax(dim=1) == labels).float().mean()
        print(f"loss {cross_entropy(scores, labels):.6f}, accuracy {accuracy:.1%}")
        for name, stats in optimizer.layer_stats().items():
            print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
