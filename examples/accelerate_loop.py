"""LAMB in a loop of accelerate, which clips: `python examples/accelerate_loop.py`.

With mixed_precision="bf16" or "fp16" too, where a step that overflow masks moves the schedule on no
more than the weights. Ends where examples/plain_pytorch.py does.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from largebatch.optim import create

NUM_STEPS, BATCH_SIZE = 60, 2048
DIRECTIONS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


def batch(step):
    points = torch.randn(BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ DIRECTIONS).argmax(dim=1)


accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
lamb = create(model, "lamb", lr=0.02, weight_decay=0.01)
model, optimizer, schedule = accelerator.prepare(model, lamb, LambdaLR(lamb, lambda step: 1.0))
for step in range(NUM_STEPS):
    points, labels = batch(step)
    optimizer.zero_grad()
    accelerator.backward(cross_entropy(model(points), labels))
    accelerator.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    schedule.step()
print(f"loss {cross_entropy(model(batch(NUM_STEPS)[0]), batch(NUM_STEPS)[1]):.6f}")
for name, stats in lamb.layer_stats().items():
    print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
