"""The noisy quadratic model, exactly: steps to a target loss, and what batch is critical for it."""

from largebatch.study.nqm.model import Descent, Spectrum, power_law
from largebatch.study.nqm.steps import (
    BatchStage,
    BestSteps,
    best_steps,
    loss_after,
    steps_to_target,
)

__all__ = [
    "BatchStage",
    "BestSteps",
    "Descent",
    "Spectrum",
    "best_steps",
    "loss_after",
    "power_law",
    "steps_to_target",
]
