"""LARS: momentum SGD with a learning rate of its own for each layer, set by that layer's norms.

You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks",
https://arxiv.org/abs/1708.03888, Algorithm 1. For a layer w with gradient g:

    r = η ‖w‖ / (‖g‖ + β ‖w‖ + ε)     the local learning rate
    b ← μ b + r (g + β w)             the momentum buffer, zero at first
    w ← w - lr · b                    or, with Nesterov momentum, w - lr · (r (g + β w) + μ b)

Algorithm 1 to the letter multiplies lr into the buffer: v ← μ v + lr · r (g + β w); w ← w - v. That
is `variant="lr_inside"`. In `variant="paper"`, as in torch's SGD, lr stays outside. The two are
identical while lr is constant (v = lr · b); when lr changes, lr outside rescales the momentum
gathered before, and under a warm-up it moves further. The paper has neither ε (a guard against
dividing by almost nothing) nor Nesterov momentum, nor does it say what happens where ‖w‖ or ‖g‖ is
0: here r = 1. The variants are bundles of keywords, no more: `VARIANTS`, and docs/variants.md.
"""

import math
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.base import Group
from largebatch.optim.layerwise import lars_on_cpu
from largebatch.optim.layerwise.chunks import ChunkGroup, Way, descend, norms_of
from largebatch.optim.layerwise.optimizer import LayerwiseOptimizer
from largebatch.optim.layerwise.step_inputs import SyncedStep
from largebatch.optim.math.tensors import Tensors, float_of, scalar, write
from largebatch.optim.math.trust_ratio import UNBOUNDED, trust_ratio
from largebatch.optim.options import require, require_one_of, resolved

PAPER: dict[str, Any] = {
    "eps": 1e-8,
    "denominator": "sum",
    "lr_in_buffer": False,
    "clip_to_lr": False,
    "max_grad_norm": math.inf,
    "adapt_undecayed": "always",
    "zero_norm": "one",
}

VARIANTS = MappingProxyType(
    {
        "paper": PAPER,
        "larc": PAPER | {"clip_to_lr": True, "zero_norm": "no_decay"},
        "joint": PAPER | {"denominator": "joint", "eps": 0.0},
        "lr_inside": PAPER | {"lr_in_buffer": True, "eps": 0.0},
    }
)


class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, Algorithm 1); the module says the formula.

    `lr` is a float or a one-element tensor, read from the group at each step; `momentum` is μ;
    `weight_decay` is β; `trust_coefficient` is η; `eps` is added to the ratio's denominator.
    The keywords, where None stands for what the variant says:

    - `denominator`: "sum", ‖g‖ + β‖w‖; "joint", ‖g + βw‖.
    - `lr_in_buffer`: multiply lr into the momentum buffer.
    - `clip_to_lr`: r ← min(r / lr, 1), so that lr · r never exceeds lr (LARC).
    - `max_grad_norm`: g ← g / max(1, ‖g‖ / max_grad_norm), first of all, the norm over all groups.
    - `adapt_undecayed`: which groups with weight_decay 0 have a trust ratio: "always", "never", or
      "unless_excluded" from a decay that is the `weight_decay` the optimizer was built with.
    - `zero_norm`: "one", r = 1 where ‖w‖ or ‖g‖ is 0; "no_decay", in addition a layer whose
      gradient is 0 does not decay in that step: r = 0. ("joint" knows no norm of the gradient
      alone, and does not see this.)
    - `master_weights`: keep an FP32 copy of parameters of a narrower dtype in the state, so that
      steps too small for them are not lost. A weight set from outside afterwards is not seen.

    A group may carry `adapt=False` (r = 1, which makes it torch's SGD), `norm_groups`, `norm_dim`.
    State of a parameter: `momentum_buffer` (b), none while momentum is 0; `master_weight`. In
    `layer_stats()` the `update_norm` is ‖g‖ (‖g + βw‖ for "joint") and the `trust_ratio` r.

    Raises ValueError for an option out of range or a parameter it cannot treat, and RuntimeError at
    `step` for a sparse gradient.

    >>> layer = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = LARS([layer], lr=1.0, momentum=0.0, trust_coefficient=0.1)
    >>> layer.grad = torch.tensor([0.06, 0.08])
    >>> optimizer.step()
    >>> layer.data  # moved by a tenth of its norm, whatever the gradient's norm
    tensor([2.7000, 3.6000])
    """

    _known_state = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float | None = None,
        nesterov: bool = False,
        *,
        variant: str = "paper",
        denominator: str | None = None,
        lr_in_buffer: bool | None = None,
        clip_to_lr: bool | None = None,
        max_grad_norm: float | None = None,
        adapt_undecayed: str | None = None,
        zero_norm: str | None = None,
        maximize: bool = False,
        master_weights: bool = False,
    ) -> None:
        if lr is None:
            raise TypeError(
                "LARS has no default learning rate, because what is right grows with the batch and "
                f"with 1 / trust_coefficient, which is {trust_coefficient}: give lr, often 1 to 30 "
                "for a trust coefficient of 0.001."
            )
        given = {
            "eps": eps,
            "denominator": denominator,
            "lr_in_buffer": lr_in_buffer,
            "clip_to_lr": clip_to_lr,
            "max_grad_norm": max_grad_norm,
            "adapt_undecayed": adapt_undecayed,
            "zero_norm": zero_norm,
        }
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
            "maximize": maximize,
            "master_weights": master_weights,
        }
        self.variant = variant
        super().__init__(params, options | resolved(VARIANTS, variant, given))

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        momentum, nesterov = options["momentum"], options["nesterov"]
        trust_coefficient = options["trust_coefficient"]
        require(isinstance(nesterov, bool), "nesterov", "True or False", nesterov)
        require(momentum > 0 or not nesterov, "momentum", "in (0, 1) with nesterov", momentum)
        require(0 < trust_coefficient < math.inf, "trust_coefficient", "> 0", trust_coefficient)
        require_one_of(options, "denominator", ("sum", "joint"))
        require_one_of(options, "lr_in_buffer", (False, True))
        require_one_of(options, "clip_to_lr", (False, True))
        require_one_of(options, "zero_norm", ("one", "no_decay"))

    def _make_step(self) -> None:
        plan = self._plan()
        synced = self._sync(plan)
        states = self._make_state(plan)
        if synced.is_skipped:
            return
        on_cpu = self._on_cpu(plan, synced, states)

        def first(chunks: ChunkGroup) -> tuple[Tensor, Tensor]:
            if chunks.way is not Way.GENERAL:
                return lars_on_cpu.measure(chunks, on_cpu)
            return self._measure(chunks, synced)

        def second(chunks: ChunkGroup, ratio: Tensor) -> None:
            inside, outside = self._rates(chunks.group)
            scale = ratio * scalar(inside, ratio)
            if chunks.way is not Way.GENERAL:
                lars_on_cpu.descend(chunks, on_cpu, scale, float_of(outside))
            else:
                self._descend(chunks, scale, outside, synced)

        self._walk(plan, first, second)

    def _measure(self, chunks: ChunkGroup, synced: SyncedStep) -> tuple[Tensor, Tensor]:
        """‖w‖, and ‖g‖ or ‖g + β w‖, of each chunk."""
        weights, grads = self._weights(chunks), self._gradients(chunks, synced)
        if chunks.group["denominator"] == "joint":
            grads = decayed(grads, weights, chunks.group)
        return norms_of(chunks, weights), norms_of(chunks, grads)

    def _rates(self, group: Group) -> tuple[float | Tensor, float | Tensor]:
        """What is multiplied into the buffer, and what is not."""
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        return (lr, 1.0) if group["lr_in_buffer"] else (1.0, lr)

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        return self._known_state if group["momentum"] else ()

    def _ratio(self, group: Group, weight_norm: Tensor, update_norm: Tensor) -> Tensor:
        """r = η‖w‖ / (‖g‖ + β‖w‖ + ε), or η‖w‖ / (‖g + βw‖ + ε); for LARC min(r / lr, 1)."""
        coefficient, bounds = group["trust_coefficient"], UNBOUNDED
        if group["clip_to_lr"]:
            coefficient, bounds = coefficient / scalar(group["lr"], weight_norm), (0.0, 1.0)
        ratio = trust_ratio(
            weight_norm,
            update_norm,
            trust_coefficient=coefficient,
            weight_decay=group["weight_decay"] if group["denominator"] == "sum" else 0.0,
            eps=group["eps"],
            trust_bounds=bounds,
            adapt=self._adapts(group),
        )
        if group["zero_norm"] == "no_decay" and self._adapts(group):
            # Without a gradient there is nothing but decay to scale.
            ratio = torch.where((update_norm == 0) & (weight_norm != 0), 0.0, ratio)
        return ratio

    def _descend(
        self, chunks: ChunkGroup, scale: Tensor, outside: float | Tensor, synced: SyncedStep
    ) -> None:
        """Advance b and move the weights."""
        group, weights = chunks.group, self._weights(chunks)
        grads = self._gradients(chunks, synced)
        if group["momentum"] and not group["nesterov"]:
            steps = self._plain_momentum(chunks, grads, weights, scale, synced.skip)
        else:
            scaled = torch._foreach_mul(decayed(grads, weights, group), scale.unbind())
            steps = self._nesterov_momentum(chunks, scaled, synced.skip)
        descend(chunks, weights, self._params_of(chunks), steps, outside, synced.skip)

    def _plain_momentum(
        self,
        chunks: ChunkGroup,
        grads: Tensors,
        weights: Tensors,
        scale: Tensor,
        skip: Tensor | None,
    ) -> Tensors:
        """b ← μ b + scale · (g + β w), which is the direction to step in."""
        group, buffers = chunks.group, self._state_of(chunks, "momentum_buffer")
        advanced = buffers if skip is None else [buffer.clone() for buffer in buffers]
        torch._foreach_mul_(advanced, group["momentum"])
        torch._foreach_addcmul_(advanced, grads, scale.unbind())
        if group["weight_decay"]:
            torch._foreach_addcmul_(advanced, weights, scale.unbind(), value=group["weight_decay"])
        if skip is not None:
            write(buffers, advanced, skip)
        return advanced

    def _nesterov_momentum(
        self, chunks: ChunkGroup, scaled: Tensors, skip: Tensor | None
    ) -> Tensors:
        """b ← μ b + s, s = scale · (g + β w); the direction is s + μ b, or s without momentum."""
        momentum = chunks.group["momentum"]
        if momentum == 0:
            return scaled
        buffers = self._state_of(chunks, "momentum_buffer")
        advanced = torch._foreach_add(scaled, buffers, alpha=momentum)
        write(buffers, advanced, skip)
        return torch._foreach_add(scaled, advanced, alpha=momentum)


def decayed(grads: Tensors, weights: Tensors, group: Group) -> Tensors:
    """g + β w; the gradients themselves where nothing decays."""
    if not group["weight_decay"]:
        return grads
    return torch._foreach_add(grads, weights, alpha=group["weight_decay"])
