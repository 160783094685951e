"""LARS: momentum SGD with a learning rate of its own for each layer, set by that layer's norms.

You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks",
https://arxiv.org/abs/1708.03888, Algorithm 1. For a layer w with gradient g:

    r = η ‖w‖ / (‖g‖ + β ‖w‖ + ε)     the local learning rate
    b ← μ b + r (g + β w)             the momentum buffer, zero at first
    w ← w - lr · b                    or, with Nesterov momentum, w - lr · (r (g + β w) + μ b)

Algorithm 1 to the letter multiplies lr into the buffer: v ← μ v + lr · r (g + β w); w ← w - v.
Here, as in torch's SGD, lr stays outside. The two are identical while lr is constant (v = lr · b);
when lr changes, lr outside rescales the momentum gathered before, and under a warm-up it moves
further. The paper has neither ε (a guard against dividing by almost nothing) nor Nesterov momentum,
nor does it say what happens where ‖w‖ or ‖g‖ is 0: here r = 1.
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


class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, Algorithm 1); the module says the formula.

    `lr` is a float or a 0-d tensor, read from the group at each step; `momentum` is μ;
    `weight_decay` is β; `trust_coefficient` is η; `eps` is added to the ratio's denominator.
    A group may carry `adapt=False`: its local learning rate is 1, which makes it torch's SGD.
    State of a parameter: `momentum_buffer` (b), none while momentum is 0. In `layer_stats()` the
    `update_norm` is ‖g‖ and the `trust_ratio` r.

    Raises ValueError for an option out of range or a complex parameter, and RuntimeError at `step`
    for a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        *,
        variant: str = "paper",
        maximize: bool = False,
    ) -> None:
        require(variant in VARIANTS, "variant", f"one of {VARIANTS}", repr(variant))
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, options)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        momentum, nesterov = options["momentum"], options["nesterov"]
        trust_coefficient, eps = options["trust_coefficient"], options["eps"]
        require(0 <= momentum < 1, "momentum", "in [0, 1)", momentum)
        require(isinstance(nesterov, bool), "nesterov", "True or False", nesterov)
        require(momentum > 0 or not nesterov, "momentum", "in (0, 1) with nesterov", momentum)
        require(0 < trust_coefficient < math.inf, "trust_coefficient", "> 0", trust_coefficient)
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
        ratios = self._trust_ratios(buckets, [bucket.grads for bucket in buckets], lars_ratio)
        for bucket, ratio in zip(buckets, ratios, strict=True):
            scaled = scaled_gradients(
                bucket.grads, bucket.weights, ratio, bucket.group["weight_decay"]
            )
            descend(bucket, torch._foreach_mul(self._with_momentum(bucket, scaled), bucket.lr))
        return loss

    def _with_momentum(self, bucket: Bucket, scaled: Tensors) -> Tensors:
        """Advance b by the scaled gradients, and return the direction to step in."""
        momentum = bucket.group["momentum"]
        if momentum == 0:
            return scaled
        buffers = self._state_of(bucket, "momentum_buffer")
        advanced = torch._foreach_add(scaled, buffers, alpha=momentum)
        write(buffers, advanced, bucket.skip)
        if bucket.group["nesterov"]:
            return torch._foreach_add(scaled, advanced, alpha=momentum)
        return advanced


def lars_ratio(group: dict[str, Any], weight_norm: Tensor, grad_norm: Tensor) -> Tensor:
    """r = η‖w‖ / (‖g‖ + β‖w‖ + ε)."""
    return trust_ratio(
        weight_norm,
        grad_norm,
        trust_coefficient=group["trust_coefficient"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        adapt=group["adapt"],
    )


def scaled_gradients(
    grads: Tensors, weights: Tensors, ratio: Tensor, weight_decay: float
) -> Tensors:
    """r (g + β w), a new tensor for each layer; `ratio` holds one r a layer, shape (layers,)."""
    scaled = torch._foreach_add(grads, weights, alpha=weight_decay)
    torch._foreach_mul_(scaled, ratio.unbind())
    return scaled
