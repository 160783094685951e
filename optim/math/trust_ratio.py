"""The trust ratio: how far a layer may move, measured against the size of its own weights.

LARS (You, Gitman, Ginsburg 2017, Algorithm 1, https://arxiv.org/abs/1708.03888) and LAMB (You et
al. 2020, Algorithm 2, https://arxiv.org/abs/1904.00962) both make a layer's step proportional to
‖w‖: LARS divides by the norm of the gradient, LAMB by that of Adam's update. The libraries differ
in what bounds it and what happens where a norm is 0. Here, in this order:

1. φ bounds ‖w‖;
2. the ratio is taken;
3. the ratio is bounded;
4. where a norm is 0 the ratio is 1, whatever the bounds: a layer of zeros can start to move
   (with `zero_after_phi`, where φ has not lifted it);
5. a layer that does not adapt has ratio 1, whatever the rest.
"""

import math

import torch
from torch import Tensor

Bounds = tuple[float, float]

UNBOUNDED: Bounds = (0.0, math.inf)

# Which layers adapt that are not decayed: all; none; none that a group excluded from the decay
# that the optimizer has by default.
ADAPT_UNDECAYED = ("always", "never", "unless_excluded")


def trust_ratio(
    weight_norm: Tensor,
    update_norm: Tensor,
    *,
    trust_coefficient: float | Tensor = 1.0,
    weight_decay: float = 0.0,
    eps: float = 0.0,
    weight_norm_bounds: Bounds = UNBOUNDED,
    trust_bounds: Bounds = UNBOUNDED,
    zero_after_phi: bool = False,
    adapt: bool = True,
) -> Tensor:
    """η φ(‖w‖) / (‖u‖ + λ‖w‖ + ε), bounded, and 1 where a norm is 0; over vectors of norms.

    η is `trust_coefficient`, λ is `weight_decay`: LARS passes them and ε, with u the gradient;
    LAMB, whose u already contains the decay, has φ(‖w‖) / ‖u‖. With `zero_after_phi` it is
    φ(‖w‖), not ‖w‖, that has to be 0: a lower bound then moves a layer of zeros too.
    A norm that is not finite is not hidden: the ratio is then NaN, infinite or a bound.
    """
    if not adapt:
        return torch.ones_like(weight_norm)
    bounded = bound(weight_norm, weight_norm_bounds)
    ratio = trust_coefficient * bounded / (update_norm + weight_decay * weight_norm + eps)
    ratio = bound(ratio, trust_bounds)
    zero = (bounded if zero_after_phi else weight_norm) == 0
    return torch.where(zero | (update_norm == 0), 1.0, ratio)


def bound(values: Tensor, bounds: Bounds) -> Tensor:
    """min(max(value, lowest), highest); NaN stays NaN."""
    return values if tuple(bounds) == UNBOUNDED else values.clamp(*bounds)
