"""LAMB: Adam whose step is rescaled, layer by layer, to the size of the layer's weights.

You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
https://arxiv.org/abs/1904.00962v5, Algorithm 2. For a layer w with gradient g, at its step t:

    m ← β₁ m + (1 - β₁) g             v ← β₂ v + (1 - β₂) g²
    m̂ = m / (1 - β₁ᵗ)                 v̂ = v / (1 - β₂ᵗ)
    u = m̂ / (√v̂ + ε) + λ w            the update, weight decay included
    r = ‖w‖ / ‖u‖                     the trust ratio
    w ← w - lr · r · u

Where the paper leaves a choice, `variant="paper"` takes φ, the paper's scaling of ‖w‖, as the
identity (no bounds), adapts every layer, sets r = 1 where ‖w‖ or ‖u‖ is 0, and clips nothing.
"""

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.layerwise import (
    Bucket,
    LayerwiseOptimizer,
    descend,
    evaluate,
    require,
    write,
)
from largebatch.optim.trust_ratio import Tensors, trust_ratio

VARIANTS = ("paper",)


class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments (You et al. 2020, Algorithm 2); the module says the formula.

    `lr` is a float or a 0-d tensor, read from the group at each step; `betas` are β₁ and β₂; `eps`
    is added to √v̂; `weight_decay` λ is part of the update and of its norm. A group may carry
    `adapt=False`: its trust ratio is 1, which makes it AdamW.
    State of a parameter: `exp_avg` (m), `exp_avg_sq` (v), `step` (t).

    Raises ValueError for an option out of range or a complex parameter, and RuntimeError at `step`
    for a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        variant: str = "paper",
        maximize: bool = False,
    ) -> None:
        require(variant in VARIANTS, "variant", f"one of {VARIANTS}", repr(variant))
        options = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, options)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        betas, eps = options["betas"], options["eps"]
        in_range = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        require(in_range, "betas", "two numbers in [0, 1)", betas)
        require(0 <= eps < math.inf, "eps", "in [0, inf)", eps)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss, if any."""
        loss = evaluate(closure)
        buckets = self._collect()
        updates = [self._update(bucket) for bucket in buckets]
        ratios = self._trust_ratios(buckets, updates, lamb_ratio)
        for bucket, update, ratio in zip(buckets, updates, ratios, strict=True):
            torch._foreach_mul_(update, (bucket.lr * ratio).unbind())
            descend(bucket, update)
        return loss

    def _update(self, bucket: Bucket) -> Tensors:
        """Advance t, m and v by one gradient, and return u."""
        beta1, beta2 = bucket.group["betas"]
        step = self._steps_of(bucket)
        exp_avg = self._state_of(bucket, "exp_avg")
        exp_avg_sq = self._state_of(bucket, "exp_avg_sq")
        write(step, torch._foreach_add(step, 1), bucket.skip)
        average(exp_avg, bucket.grads, beta1, bucket.skip)
        average(exp_avg_sq, torch._foreach_mul(bucket.grads, bucket.grads), beta2, bucket.skip)

        update = adam_direction(exp_avg, exp_avg_sq, step, (beta1, beta2), bucket.group["eps"])
        torch._foreach_add_(update, bucket.weights, alpha=bucket.group["weight_decay"])
        return update


def average(averages: Tensors, values: Tensors, beta: float, skip: Tensor | None) -> None:
    """average ← β · average + (1 - β) · value, in place; untouched where `skip`."""
    if skip is None:
        torch._foreach_lerp_(averages, values, 1 - beta)
    else:
        write(averages, torch._foreach_lerp(averages, values, 1 - beta), skip)


def adam_direction(
    exp_avg: Tensors, exp_avg_sq: Tensors, step: Tensors, betas: tuple[float, float], eps: float
) -> Tensors:
    """m̂ / (√v̂ + ε), a new tensor for each layer; `step` counts from 1."""
    t = torch.stack([*step]).to(exp_avg[0].dtype)
    direction = torch._foreach_div(exp_avg, bias_correction(t, betas[0]).unbind())
    denominator = torch._foreach_div(exp_avg_sq, bias_correction(t, betas[1]).unbind())
    torch._foreach_sqrt_(denominator)
    torch._foreach_add_(denominator, eps)
    torch._foreach_div_(direction, denominator)
    return direction


def bias_correction(step: Tensor, beta: float) -> Tensor:
    """1 - βᵗ as -expm1(t·log β): the plain difference loses half of FP32's digits for β near 1."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(step * log_beta)


def lamb_ratio(group: dict[str, Any], weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """r = ‖w‖ / ‖u‖."""
    return trust_ratio(weight_norm, update_norm, adapt=group["adapt"])
