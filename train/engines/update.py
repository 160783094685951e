"""From the gradients of a step to new weights: norm, clip, mask, optimizer. Nothing waits for the
device where the optimizer can be masked on it (torch's `found_inf`, which ours and torch's fused
ones take); another optimizer is asked to step only once the host has seen that it may.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from largebatch.optim.base import ShardedOptimizer
from largebatch.optim.sharding.layout import local
from largebatch.train.engines.precision import LossScale
from largebatch.train.noise.small_gradients import squares_of


class StepMetrics(NamedTuple):
    """Device-side metrics of a step: values to add up over ranks, values equal on all of them, and
    values whose largest is wanted.
    """

    reduced: dict[str, Tensor]
    replicated: dict[str, Tensor]
    maxima: dict[str, Tensor] = {}  # noqa: RUF012 # nobody writes to it

    def __or__(self, other: "StepMetrics") -> "StepMetrics":
        return StepMetrics(
            self.reduced | other.reduced,
            self.replicated | other.replicated,
            self.maxima | other.maxima,
        )

    def over_groups(self, num_ranks: int) -> "StepMetrics":
        """The same where ranks are in groups with a gradient of its own each: what is equal within
        each becomes its mean over the groups, of a norm the root of its mean square.
        """
        parts = {name: value / num_ranks for name, value in self.replicated.items()}
        if "grad_norm" in parts:
            parts["grad_square"] = parts.pop("grad_norm") * self.replicated["grad_norm"]
        return StepMetrics(self.reduced | parts, {}, self.maxima)


class GradientLimits(NamedTuple):
    """Limits on the gradient of a step.

    Attributes:
        clip_norm: gradients of a larger L2 norm are scaled down to it; None: they are not.
        skip_above: a step of a larger norm, or of one that is no number, changes nothing; None:
            every step is made.
    """

    clip_norm: float | None = None
    skip_above: float | None = None


@dataclass
class Update:
    """One optimizer step from `p.grad`, whole on each rank or sharded.

    Attributes:
        copies: ranks that hold the same piece of the gradient, or of that of another group.
        add_up: sums in place over all ranks that share a gradient; None for one rank. Also where
            ranks hold copies: what they decide on must be the same number, to the bit.
        loss_scale: of FP16, whose overflow is no step.
        groups: of ranks, each with a gradient of its own.
    """

    copies: int
    add_up: Callable[[Tensor], object] | None = None
    loss_scale: LossScale | None = None
    groups: int = 1
    _squares: deque[tuple[list[Tensor], Tensor]] = field(default_factory=lambda: deque(maxlen=2))

    def __call__(self, optimizer: Optimizer, limits: GradientLimits) -> StepMetrics:
        """Step and leave no gradients; returns the norm, and what became of the step.

        `grad_square`, a part that is to be reduced, or `grad_norm`; `skipped`, 1 where nothing was
        changed, if it could be; `loss_scale` that the gradients were made with, if any.
        """
        params = [p for group in optimizer.param_groups for p in group["params"]]
        params = [p for p in params if p.grad is not None]
        grads = [local(p.grad) for p in params]
        squares = torch.stack([*squares_of(grads)])
        self._squares.append((params, squares))
        part = squares.sum() if self.copies == 1 else squares.sum() / self.copies
        free = limits.clip_norm is None and limits.skip_above is None and self.loss_scale is None
        if free:
            optimizer.step()
            numbers = StepMetrics({"grad_square": part}, {})
        else:
            numbers = StepMetrics({}, self._limited(optimizer, grads, part, limits))
        optimizer.zero_grad(set_to_none=True)
        return numbers

    def _limited(
        self, optimizer: Optimizer, grads: list[Tensor], part: Tensor, limits: GradientLimits
    ) -> dict[str, Tensor]:
        if self.add_up is None:
            norm = (part * self.copies).sqrt()
        else:
            self.add_up(part)
            norm = part.sqrt() if self.groups == 1 else (part * self.groups).sqrt()
        replicated = {"grad_norm": norm}
        if limits.clip_norm is not None:
            torch._foreach_mul_(grads, (limits.clip_norm / norm).clamp_max(1.0))
        if limits.skip_above is None and self.loss_scale is None:
            optimizer.step()
            return replicated
        if self.loss_scale is not None and hasattr(optimizer, "loss_scale"):
            optimizer.loss_scale = self.loss_scale.value  # it has seen gradients as they went by
        most = math.inf if limits.skip_above is None else limits.skip_above
        # The comparison is false for NaN; an infinite norm is above every limit.
        skip = torch.logical_not((norm <= most) & torch.isfinite(norm)).float()
        masked_step(optimizer, skip)
        replicated["skipped"] = skip
        if self.loss_scale is not None:
            replicated["loss_scale"] = self.loss_scale.value
            self.loss_scale.update(torch.isfinite(norm).logical_not())
        return replicated

    def squares(self, steps_ago: int) -> tuple[list[Tensor], Tensor]:
        """The parameters of a step, and this rank's squared norm of the gradient of each: of the
        last step (0) or of the one before (1). Shape (parameters,).
        """
        return self._squares[-1 - steps_ago]


def masked_step(optimizer: Optimizer, skip: Tensor) -> None:
    """Step where `skip` is 0; where it is 1 nothing changes, moments and step counts included."""
    ours = isinstance(optimizer, ShardedOptimizer)
    if not ours and not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not bool(skip):  # waits for the device
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined] # torch's protocol of scalers
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined] # torch's protocol of scalers
