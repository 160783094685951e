"""LAMB under DeepSpeed ZeRO-2: `torchrun --nproc-per-node 2 examples/deepspeed_zero2.py`.

On a machine without an accelerator, put DS_ACCELERATOR=cpu before it. ZeRO gives the optimizer flat
buffers; `bind` tells it where the layers lie in them, so that this prints what
examples/plain_pytorch.py does.
"""

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.optim import LAMB, param_groups
from largebatch.optim.zero import bind

NUM_STEPS, GLOBAL_BATCH_SIZE = 60, 2048


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Points, and which of ten fixed directions each of them follows most."""
    directions = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    points = torch.randn(GLOBAL_BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ directions).argmax(dim=1)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
    config = {
        "train_batch_size": GLOBAL_BATCH_SIZE,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,  # LAMB is not on DeepSpeed's list
        "zero_force_ds_cpu_optimizer": False,
    }
    client = LAMB(param_groups(model, weight_decay=0.01), lr=0.02, max_grad_norm=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=config)
    optimizer = bind(engine)  # on every rank, before the first step

    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    for step in range(NUM_STEPS):
        points, labels = (v[rank::world_size].to(engine.device) for v in batch(step))
        engine.backward(cross_entropy(engine(points), labels))
        engine.step()

    with torch.no_grad():
        points, labels = (v.to(engine.device) for v in batch(NUM_STEPS))  # not seen before
        scores = engine(points)
    if rank == 0:
        accuracy = (scores.argmax(dim=1) == labels).float().mean()
        print(f"loss {cross_entropy(scores, labels):.6f}, accuracy {accuracy:.1%}")
        for name, stats in optimizer.layer_stats().items():
            print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
