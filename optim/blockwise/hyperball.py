"""Hyperball: weights on a sphere, and steps that are a fraction of its radius.

Wen et al. 2026, "Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball
Optimization", https://arxiv.org/abs/2606.16899. With u the step of any optimizer and R the norm
that a layer began with:

    w ← R · normalized(w - lr · R · u / ‖u‖)

So the learning rate is the angle by which a layer turns, for every layer alike, and weight decay
has nothing left to do. It is the trust ratio of LARS and LAMB taken to its end.

The norms are those of the whole layer, which a step reduces anyway. Of w - lr R u / ‖u‖, which no
rank knows before the step is made, it is taken to be R √(1 + lr²), as it is where u is at right
angles to w; what that misses by, lr times the cosine between the two, the next step begins with
taking away:

    w ← (R w / ‖w‖ - lr · R · u / ‖u‖) / √(1 + lr²)

So directions are the paper's, at no further collective; between steps the norm is R to lr times
that cosine, and exactly R when the rate has gone to 0. A layer that begins as zeros has no sphere
and takes the optimizer's own steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from largebatch.optim.math.tensors import root, scalar

RADIUS = "radius"
"""The entry of the state: R; 0 before the first step, -1 for a layer that began as zeros."""


class Sphere(NamedTuple):
    """What becomes of a layer: w ← keep · w - rate · u, all 0-d."""

    keep: Tensor
    rate: Tensor
    radius: Tensor


def on_sphere(
    weight_square: Tensor, step_square: Tensor, radius: Tensor, lr: float | Tensor
) -> Sphere:
    """Return a layer's step from ‖w‖², ‖u‖² and the R of the state, all 0-d and of one device."""
    weight, step = root(weight_square), root(step_square)
    rate = scalar(lr, weight)
    begun = torch.where(weight > 0, weight, -1.0).to(radius.dtype)  # as the state keeps it
    radius = torch.where(radius == 0, begun, radius).to(weight.dtype)
    has = (radius > 0) & (weight > 0)
    shrink = torch.where(step > 0, torch.rsqrt(1 + rate * rate), 1.0)
    keep = torch.where(has, radius / weight * shrink, 1.0)
    turned = torch.where(step > 0, rate * radius / step * shrink, 0.0)
    return Sphere(keep, torch.where(has, turned, rate), radius)
