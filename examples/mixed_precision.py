"""LAMB with autocast, a GradScaler, accumulation and a clip: `python examples/mixed_precision.py`.

A step whose gradients overflow changes nothing, and nothing waits for the device to find out.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from largebatch.optim import create

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_STEPS, BATCH_SIZE, ACCUMULATION = 60, 2048, 4
DIRECTIONS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


def batch(step):
    points = torch.randn(BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points.to(DEVICE), (points @ DIRECTIONS).argmax(dim=1).to(DEVICE)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
optimizer = create(model.to(DEVICE), "lamb", lr=0.02, weight_decay=0.01)
scaler = torch.amp.GradScaler(DEVICE)
for step in range(NUM_STEPS):
    optimizer.zero_grad()
    for points, labels in zip(*(v.chunk(ACCUMULATION) for v in batch(step)), strict=True):
        with torch.autocast(DEVICE, torch.float16):
            loss = cross_entropy(model(points), labels) / ACCUMULATION
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
print(f"loss {cross_entropy(model(batch(NUM_STEPS)[0]), batch(NUM_STEPS)[1]):.6f}")
for name, stats in optimizer.layer_stats().items():
    print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
