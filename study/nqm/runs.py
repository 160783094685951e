"""What single runs on the noisy quadratic model need, by plain simulation: nothing of the loop.

A run reaches its target when its own loss first lies below it, and not when the expected loss does.
Where the learning rate keeps the expected loss near the target for long, the loss of a run wavers
across it early: what a study can find is this first passage, and a curve of it bends elsewhere.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from largebatch.study.nqm.model import Array, Descent, Spectrum
from largebatch.study.nqm.steps import steps_to_target

NEIGHBOURS = 2
"""Rates above the best one by expected losses that runs may prefer, as they pass the target while
the expected loss stays above it."""


class RunSteps(NamedTuple):
    """The rate at which runs need the fewest steps, and their geometric mean; inf: none arrives."""

    lr: float
    steps: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Runs of one model, all looked at on one grid of steps.

    Attributes:
        growth: evaluated after steps 1, 2, 3, …, each at least so many times as far.
        runs: at each rate.
        seed: of all noise.
    """

    spectrum: Spectrum
    descent: Descent
    target: float
    growth: float = 1.03
    runs: int = 32
    seed: int = 0

    def best(self, batch_size: float, lrs: ArrayLike) -> RunSteps:
        """The best of these rates at a batch size, those that are far from it left out."""
        rates = np.sort(np.asarray(lrs, np.float64))
        expected = steps_to_target(self.spectrum, self.descent, rates, batch_size, self.target)
        middle = int(np.argmin(expected))
        found = RunSteps(float(rates[middle]), math.inf)
        for lr in rates[max(0, middle - 1) : middle + NEIGHBOURS + 1]:
            steps = self.steps(batch_size, float(lr), 2 * float(expected[middle]))
            if steps < found.steps:
                found = RunSteps(float(lr), steps)
        return found

    def steps(self, batch_size: float, lr: float, most: float) -> float:
        """The geometric mean of steps to the target, interpolated between evaluations, log steps
        against loss; inf where a run has not arrived after `most` steps.
        """
        spectrum, descent = self.spectrum, self.descent
        chance = np.random.default_rng(self.seed)
        shape = self.runs, len(spectrum.curvature)
        theta = chance.standard_normal(shape) * np.sqrt(spectrum.initial)
        velocity = np.zeros(shape)
        rates = lr * spectrum.curvature**-descent.preconditioner
        deviation = np.sqrt(spectrum.noise / batch_size)
        log_steps = np.full(self.runs, math.inf)
        before, loss_before, due = 0, self._loss(theta), 1
        for step in range(1, math.ceil(most) + 1):
            grad = spectrum.curvature * theta + deviation * chance.standard_normal(shape)
            velocity = descent.momentum * velocity + grad
            along = grad + descent.momentum * velocity if descent.nesterov else velocity
            theta = theta - rates * along
            if step < due:
                continue
            loss = self._loss(theta)
            new = (loss <= self.target) & np.isinf(log_steps)
            share = (loss_before[new] - self.target) / (loss_before[new] - loss[new])
            since = math.log(before) if before else math.log(step)
            log_steps[new] = since + share * (math.log(step) - since)
            if np.all(np.isfinite(log_steps)):
                break
            before, loss_before, due = step, loss, max(step + 1, math.ceil(step * self.growth))
        return float(np.exp(np.mean(log_steps)))

    def _loss(self, theta: Array) -> Array:
        loss: Array = theta**2 @ self.spectrum.weights
        return loss
