"""LAMB with a compiled model and a compiled step: `python examples/compiled.py`.

The step itself stays as it is, in foreach and fused kernels: torch.compile passes it by.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from largebatch.optim import create

NUM_STEPS, BATCH_SIZE = 60, 2048
DIRECTIONS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


def batch(step):
    points = torch.randn(BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ DIRECTIONS).argmax(dim=1)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
optimizer = create(model, "lamb", lr=0.02, weight_decay=0.01, max_grad_norm=0.1)
compiled = torch.compile(model)


@torch.compile
def train(points, labels):
    optimizer.zero_grad()
    cross_entropy(compiled(points), labels).backward()
    optimizer.step()


for step in range(NUM_STEPS):
    train(*batch(step))
print(f"loss {cross_entropy(model(batch(NUM_STEPS)[0]), batch(NUM_STEPS)[1]):.6f}")
for name, stats in optimizer.layer_stats().items():
    print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
