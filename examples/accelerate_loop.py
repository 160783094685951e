"""LAMB in a loop of accelerate: `python examples/accelerate_loop.py`.

accelerate clips the gradients here, also with mixed_precision="bf16" or "fp16", where a step that
overflow masks moves the schedule on no more than the weights. It prints what
examples/plain_pytorch.py prints.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from largebatch.optim import LAMB, param_groups

NUM_STEPS, BATCH_SIZE = 60, 2048


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Points, and which of ten fixed directions each of them follows most."""
    directions = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    points = torch.randn(BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ directions).argmax(dim=1)


def main() -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
    lamb = LAMB(param_groups(model, weight_decay=0.01), lr=0.02)
    schedule = LambdaLR(lamb, lambda step: 1.0)  # yours
    model, optimizer, schedule = accelerator.prepare(model, lamb, schedule)

    for step in range(NUM_STEPS):
        points, labels = batch(step)
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(points), labels))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        points, labels = batch(NUM_STEPS)  # not seen before
        print(f"loss {cross_entropy(model(points), labels):.6f}")
    for name, stats in lamb.layer_stats().items():
        print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")


if __name__ == "__main__":
    main()
