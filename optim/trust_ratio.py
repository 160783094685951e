"""The trust ratio: how far a layer may move, measured against the size of its own weights.

A layer is one parameter tensor. LARS (You, Gitman, Ginsburg 2017, Algorithm 1,
https://arxiv.org/abs/1708.03888) and LAMB (You et al. 2020, Algorithm 2,
https://arxiv.org/abs/1904.00962) both make its step proportional to ‖w‖: LARS divides by the norm
of the gradient, LAMB by that of Adam's update. Neither says what happens where a norm is 0. Here
the ratio is then 1, so that a layer initialised with zeros can start to move.
"""

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]


def stacked_norms(tensors: Tensors) -> Tensor:
    """‖t‖₂ of every tensor as one vector, shape (len(tensors),), on the first tensor's device.

    Give it FP32 (or FP64) tensors: the norm of a bf16 tensor would itself be rounded to bf16.
    All norms of a step are asked for in one call. This is where a sharded tensor's norm is to be
    completed across ranks: one vector, hence one collective.
    """
    norms = torch._foreach_norm(tensors)
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def trust_ratio(
    weight_norm: Tensor,
    update_norm: Tensor,
    *,
    trust_coefficient: float = 1.0,
    weight_decay: float = 0.0,
    eps: float = 0.0,
    adapt: bool = True,
) -> Tensor:
    """η‖w‖ / (‖u‖ + λ‖w‖ + ε), and 1 where ‖w‖ or ‖u‖ is 0; elementwise over vectors of norms.

    η is `trust_coefficient`, λ is `weight_decay`. LARS passes all three with u the gradient; LAMB,
    whose u already contains the decay, keeps the defaults: ‖w‖ / ‖u‖. `adapt=False` gives 1.
    A norm that is not finite is not hidden: the ratio is then NaN, infinite or 0.
    """
    if not adapt:
        return torch.ones_like(weight_norm)
    ratio = trust_coefficient * weight_norm / (update_norm + weight_decay * weight_norm + eps)
    return torch.where((weight_norm == 0) | (update_norm == 0), 1.0, ratio)
