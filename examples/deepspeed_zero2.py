"""LAMB under DeepSpeed ZeRO-2: `torchrun --nproc-per-node 2 examples/deepspeed_zero2.py`.

Without an accelerator put DS_ACCELERATOR=cpu before it. Ends where examples/plain_pytorch.py does.
"""

import deepspeed
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from largebatch.optim import create
from largebatch.optim.zero import bind

NUM_STEPS, GLOBAL_BATCH_SIZE = 60, 2048
DIRECTIONS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
CONFIG = {"train_batch_size": GLOBAL_BATCH_SIZE, "zero_optimization": {"stage": 2},
          "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # fmt: skip


def batch(step):
    points = torch.randn(GLOBAL_BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points.to(engine.device), (points @ DIRECTIONS).argmax(dim=1).to(engine.device)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
client = create(model, "lamb", lr=0.02, weight_decay=0.01, max_grad_norm=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=CONFIG)
optimizer = bind(engine)  # where the layers lie in ZeRO's flat buffers; before the first step
rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
for step in range(NUM_STEPS):
    points, labels = (values[rank::world_size] for values in batch(step))
    engine.backward(cross_entropy(engine(points), labels))
    engine.step()
if rank == 0:
    print(f"loss {cross_entropy(engine(batch(NUM_STEPS)[0]), batch(NUM_STEPS)[1]):.6f}")
    for name, stats in optimizer.layer_stats().items():
        print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
deepspeed.comm.destroy_process_group()
