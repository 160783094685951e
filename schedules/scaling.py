"""How the learning rate moves with the batch size.

Each rule is a function of the ratio kappa = batch / base_batch. None of them knows where the noise
stops: beyond the critical batch size the best learning rate stops rising, whatever the rule says.
"""

import math
from collections.abc import Callable
from typing import Final

from largebatch.schedules.counts import real_number, whole_number

Rule = Callable[[float], float]


def keep(kappa: float) -> float:
    """No scaling: the factor is 1."""
    del kappa
    return 1.0


def linear(kappa: float) -> float:
    """kappa: for SGD in the noise-dominated regime, with warm-up (Goyal et al., 1706.02677)."""
    return kappa


def sqrt(kappa: float) -> float:
    """sqrt(kappa): keeps the variance of an SGD increment (Krizhevsky, 1404.5997); the learning-
    rate part of the rule for Adam-like optimizers (Malladi et al., 2205.10287), whose betas and eps
    are left alone here."""
    return math.sqrt(kappa)


RULES: Final[dict[str, Rule]] = {"none": keep, "linear": linear, "sqrt": sqrt}


def scale_lr(base_lr: float, base_batch: int, batch: int, rule: str | Rule = "sqrt") -> float:
    """The learning rate at global batch size `batch`, given the one tuned at `base_batch`.

    Args:
        base_lr: learning rate at `base_batch`.
        base_batch: global batch size, in samples, at which `base_lr` was chosen.
        batch: global batch size, in samples.
        rule: a name in `RULES`, or any function of kappa = batch / base_batch.

    Raises:
        ValueError: an unknown rule, or a value out of range.
    """
    base_lr = real_number(base_lr, "base_lr", above=0.0)
    kappa = whole_number(batch, "batch", 1) / whole_number(base_batch, "base_batch", 1)
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"the scaling rule must be one of {', '.join(RULES)}, got {rule!r}")
        rule = RULES[rule]
    return base_lr * rule(kappa)
