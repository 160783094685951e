"""LAMB in a plain training loop: `python examples/plain_pytorch.py`."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from largebatch.optim import create

NUM_STEPS, BATCH_SIZE = 60, 2048
DIRECTIONS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


def batch(step):
    """Points, and which of ten fixed directions each of them follows most."""
    points = torch.randn(BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ DIRECTIONS).argmax(dim=1)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
# Biases and normalisation neither decay nor adapt.
optimizer = create(model, "lamb", lr=0.02, weight_decay=0.01, max_grad_norm=0.1)

for step in range(NUM_STEPS):
    points, labels = batch(step)
    optimizer.zero_grad()
    cross_entropy(model(points), labels).backward()
    optimizer.step()

points, labels = batch(NUM_STEPS)  # not seen before
print(f"loss {cross_entropy(model(points), labels):.6f}")
for name, stats in optimizer.layer_stats().items():
    print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
