"""Moves betas, eps, weight decay and momentum with the batch, as plan and optimizer say; and the
learning rate of each group with every step.
"""

from typing import Any

import torch
from torch.optim import Optimizer

from largebatch.schedules import Hyper, Plan, Point
from largebatch.train.weights.average import WeightAverage


class HyperparameterScaler:
    """Made before any optimizer state is loaded: what the groups hold then is of `base_batch`, and
    their `lr_factor` is what the learning rate of a group is multiplied by.

    Attributes:
        batch_size: what the groups hold now is of this batch size; None before the first step.
    """

    def __init__(
        self, plan: Plan, optimizer: Optimizer, average: WeightAverage | None = None
    ) -> None:
        self._plan, self._average = plan, average
        self._optimizer = optimizer  # whose groups are others once a state is loaded
        self._bases = [Hyper.of_group(group, plan.base_lr) for group in optimizer.param_groups]
        self._factors = [float(group.get("lr_factor", 1.0)) for group in optimizer.param_groups]
        self.batch_size: int | None = None

    def set_lr(self, lr: float) -> None:
        """Give each group the step's learning rate, times its factor."""
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = lr * factor

    def apply(self, point: Point) -> dict[str, Any]:
        """Set what holds at `point`'s batch size; returns what the step's line says of a change.

        That is `batch_change`: the size `from` which it changed (None at the first step) and each
        value that moved, of the first group where it did; nothing where nothing changed.
        """
        if point.batch_size == self.batch_size:
            return {}
        moved: dict[str, Any] = {}
        for group, base in zip(self._optimizer.param_groups, self._bases, strict=True):
            scaled = self._plan.rescale(base, point.batch_size)
            for name in ("betas", "eps", "weight_decay"):
                value = getattr(scaled, name)
                if value is None or value == getattr(Hyper.of_group(group, base.lr), name):
                    continue
                group[name] = value
                moved.setdefault(name, value)
        moved |= self._scale_average(point.batch_size)
        before, self.batch_size = self.batch_size, point.batch_size
        if before:
            moved |= self._correct_momentum(point.lr)
        return {"batch_change": {"from": before} | moved} if before or moved else {}

    def _scale_average(self, batch_size: int) -> dict[str, Any]:
        """Bring the decay of the weights' average to a batch size."""
        average = self._average
        if average is None or average.kind == "schedule_free":
            return {}
        hyper = Hyper(lr=self._plan.base_lr, ema_decay=average.base_decay)
        decay, before = self._plan.rescale(hyper, batch_size).ema_decay, average.decay
        assert decay is not None
        average.decay = decay
        return {} if decay == before else {"ema_decay": decay}

    def _correct_momentum(self, lr: float) -> dict[str, Any]:
        """Bring buffers that hold the last step's learning rate to `lr`, as Goyal et al. 2017 ask.

        Section 3.3 of arXiv:1706.02677. Past updates then follow a change of the batch as they do
        where the learning rate is outside of the buffer.
        """
        moved: dict[str, Any] = {}
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            new = lr * factor
            if not group.get("lr_in_buffer") or group["lr"] in (0.0, new):
                continue
            buffers = [
                self._optimizer.state[param]["momentum_buffer"]
                for param in group["params"]
                if "momentum_buffer" in self._optimizer.state.get(param, {})
            ]
            if buffers:
                grown = new / group["lr"]
                torch._foreach_mul_(buffers, grown)
                moved.setdefault("momentum_buffer", grown)
        return moved
