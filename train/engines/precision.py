"""Compute precision. Weights, gradients, and their sums over micro-batches and over
ranks are FP32 in all of them: what is added up rounds once, whatever the accumulation.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The name of one, and what follows from it on `device`.

    Attributes:
        dtype: that matrix products compute in.
        loss_scale: of FP16, whose gradients would underflow; None for the others.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.dtype = name, DTYPES[name]
        self._device = device
        self.loss_scale = LossScale(device) if name == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it products compute in `dtype`, and norms, softmax and losses in FP32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self.dtype)

    def agree(self) -> None:
        """Bring the loss scales of all ranks together; every rank calls it."""
        if self.loss_scale is not None:
            self.loss_scale.agree()

    def state_dict(self) -> dict[str, float]:
        return {} if self.loss_scale is None else self.loss_scale.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.loss_scale is not None and state:
            self.loss_scale.load_state_dict(state)


class LossScale:
    """What the loss is multiplied with, on the device: halved by each step that overflows, doubled
    after `interval` steps without one (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

    A power of two, so that dividing by it again is exact.
    """

    FIRST: Final = 2.0**16
    LEAST: Final = 2.0**-14
    """Below it the scale underflows itself; gradients that still overflow have diverged."""

    def __init__(self, device: torch.device, interval: int = 2000) -> None:
        self.value = torch.full((), self.FIRST, device=device)
        self._good = torch.zeros((), device=device)  # steps since it last moved
        self._interval = interval

    def update(self, overflowed: Tensor) -> None:
        """After a step; `overflowed` is 0-d, 1 where the step was none."""
        bad = overflowed.bool()
        good = torch.where(bad, 0.0, self._good + 1)
        grown = good >= self._interval
        factor = torch.where(bad, 0.5, torch.where(grown, 2.0, 1.0))
        self.value = (self.value * factor).clamp_min(self.LEAST)
        self._good = torch.where(grown, 0.0, good)

    def agree(self) -> None:
        """Take the smallest of all ranks', and the fewest steps since one moved."""
        least = torch.stack([self.value, self._good])
        dist.all_reduce(least, dist.ReduceOp.MIN)
        self.value, self._good = least.unbind()

    def state_dict(self) -> dict[str, float]:
        return {"loss_scale": float(self.value), "good_steps": float(self._good)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = torch.full_like(self.value, state["loss_scale"])
        self._good = torch.full_like(self._good, state["good_steps"])
