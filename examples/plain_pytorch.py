"""LAMB in a plain training loop: `python examples/plain_pytorch.py`."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.optim import LAMB, param_groups

NUM_STEPS, BATCH_SIZE = 60, 2048


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Points, and which of ten fixed directions each of them follows most."""
    directions = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    points = torch.randn(BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ directions).argmax(dim=1)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
    # Biases and normalisation neither decay nor adapt.
    optimizer = LAMB(param_groups(model, weight_decay=0.01), lr=0.02, max_grad_norm=0.1)

    for step in range(NUM_STEPS):
        points, labels = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(points), labels).backward()
        optimizer.step()

    with torch.no_grad():
        points, labels = batch(NUM_STEPS)  # not seen before
        scores = model(points)
    accuracy = (scores.argmax(dim=1) == labels).float().mean()
    print(f"loss {cross_entropy(scores, labels):.6f}, accuracy {accuracy:.1%}")
    for name, stats in optimizer.layer_stats().items():
        print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")


if __name__ == "__main__":
    main()
