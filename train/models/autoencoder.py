"""The deep autoencoder that second-order methods were tried on from the start.

Hinton & Salakhutdinov 2006 (https://doi.org/10.1126/science.1127647): 784-1000-500-250-30 and back,
with a linear code; Martens 2010, and Martens & Grosse 2015 (arXiv:1503.05671, section 13) without
pre-training. Where this differs: GELU in place of the logistic function, and the initial values of
Glorot & Bengio 2010. With tanh a first-order method stays at the mean image for some 200 steps.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from largebatch.schedules import whole_number


class Autoencoder(nn.Module):
    """Vectors of shape (samples, inputs) → logits of the same shape.

    Args:
        widths: of the encoder's layers, the code's last; the decoder has them backwards.
    """

    def __init__(self, inputs: int, widths: Sequence[int] = (1000, 500, 250, 30)) -> None:
        super().__init__()
        sizes = [whole_number(inputs, "model.inputs", 1)]
        sizes += [whole_number(width, "model.widths", 1) for width in widths]
        if len(sizes) == 1:
            raise ValueError("model.widths must name at least the code's width, got []")
        self.encoder, self.decoder = _layers(sizes), _layers(sizes[::-1])

    def forward(self, vectors: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.encoder(vectors))
        return logits


@torch.no_grad()
def _layers(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with GELU between them, and none after the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        linear = nn.Linear(before, after)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])
