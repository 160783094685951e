"""The noisy quadratic model's moments, exact at every step.

Zhang et al. 2019 (https://arxiv.org/abs/1907.04164): L(θ) = ½ Σ h_i θ_i², gradients of a batch of B
are h_i θ_i + ξ_i with Var ξ_i = c_i / B and c = h, θ_0 ~ N(0, I). Whatever is linear in gradient
and state (a step of SGD, momentum, a preconditioner, an average of the weights) sends the state z
of a mode to M z + g ξ, and so its second moments to M E[z zᵀ] Mᵀ + g gᵀ c / B. Only variances
enter: the expected loss is that of any noise which has them, Gaussian or not.

Deviations: momentum and average are rows of one matrix M, and may be combined, where the paper has
a recursion or a closed form for each. Momentum is torch's, whose buffer takes the gradient whole
(v ← m v + g, θ ← θ - η v), and may be Nesterov's.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Spectrum:
    """The modes of a noisy quadratic.

    Args:
        curvature: h; shape (modes,).
        noise: c, the variance of one sample's gradient; None: h.
        initial: E[θ_0²]; None: 1.
        copies: how many equal modes each stands for; None: 1.

    Raises:
        ValueError: shapes that differ, a curvature that is not positive, another negative number.
    """

    def __init__(
        self,
        curvature: ArrayLike,
        *,
        noise: ArrayLike | None = None,
        initial: ArrayLike | None = None,
        copies: ArrayLike | None = None,
    ) -> None:
        self.curvature: Array = np.asarray(curvature, np.float64)
        if self.curvature.ndim != 1 or not np.all((self.curvature > 0) & np.isfinite(curvature)):
            raise ValueError(f"curvature must be a list of finite numbers > 0, got {curvature!r}")
        ones = np.ones_like(self.curvature)
        self.noise = self._of_modes("noise", self.curvature if noise is None else noise)
        self.initial = self._of_modes("initial", ones if initial is None else initial)
        self.copies = self._of_modes("copies", ones if copies is None else copies)
        self.weights: Array = 0.5 * self.curvature * self.copies
        """What E[θ_i²] counts in the expected loss."""

    def _of_modes(self, name: str, values: ArrayLike) -> Array:
        found = np.asarray(values, np.float64)
        if found.shape != self.curvature.shape or not np.all((found >= 0) & np.isfinite(found)):
            count = len(self.curvature)
            raise ValueError(f"{name} must be {count} finite numbers >= 0, got {values!r}")
        return found


def power_law(dimension: int, power: float = 1.0, groups: int | None = None) -> Spectrum:
    """h_i = i^-power for i = 1 … dimension; the paper has dimension 10,000 and power 1.

    Args:
        groups: as about so many modes, the first ones by themselves, the rest in bins of equal
            ratio that keep the sum of h; None: all.
    """
    curvature = np.arange(1, dimension + 1, dtype=np.float64) ** -power
    if groups is None or groups >= dimension:
        return Spectrum(curvature)
    edges = np.unique(np.geomspace(1, dimension + 1, groups + 1).astype(np.int64))
    copies = np.diff(edges).astype(np.float64)
    return Spectrum(np.add.reduceat(curvature, edges[:-1] - 1) / copies, copies=copies)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How a gradient becomes a step.

    Attributes:
        momentum: m of v ← m v + g.
        nesterov: step along g + m v in place of v, as torch has it.
        averaging: decay a of the average θ̄ ← a θ̄ + (1 - a) θ, θ̄_0 = θ_0, whose loss is then meant.
        preconditioner: steps are multiplied by h^-preconditioner; 0 is SGD, 1 Newton's method.

    Raises:
        ValueError: momentum or averaging outside [0, 1); nesterov without momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False
    averaging: float = 0.0
    preconditioner: float = 0.0

    def __post_init__(self) -> None:
        for name in ("momentum", "averaging"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 0 and < 1, got {getattr(self, name)}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True needs momentum > 0, got 0")

    @property
    def state(self) -> list[int]:
        """Which of (v, θ, θ̄) are there; the last is the one whose loss is meant."""
        return [*([0] if self.momentum else []), 1, *([2] if self.averaging else [])]

    @property
    def stable_below(self) -> float:
        """η h^(1 - preconditioner) from which on a mode grows."""
        return 2 * (1 + self.momentum) / (1 + 2 * self.momentum * self.nesterov)

    @property
    def monotone_up_to(self) -> float:
        """η h^(1 - preconditioner) up to which a mode that starts at rest goes to 0 in one
        direction: real, positive roots of z² = tr(M) z - det(M).
        """
        if self.nesterov:
            return ((1 - self.momentum) / (1 + self.momentum)) ** 2
        return (1 - math.sqrt(self.momentum)) ** 2


@dataclass(frozen=True)
class Moments:
    """The map of one step, or of 2^j, for each of several learning rates.

    Attributes:
        matrix: M; shape (state, state, rates, modes).
        noise: what a batch of 1 has added to E[z zᵀ] by its end; the same shape.
    """

    matrix: Array
    noise: Array

    def doubled(self) -> "Moments":
        """Twice as many steps."""
        return Moments(_product(self.matrix, self.matrix), self.after(self.noise) + self.noise)

    def after(self, second: Array) -> Array:
        """E[z zᵀ], without noise, that many steps later."""
        half = _product(self.matrix, second)
        return np.asarray(np.einsum("ij...,kj...->ik...", half, self.matrix))

    def of(self, runs: NDArray[np.intp]) -> "Moments":
        """Those of some of the learning rates."""
        return Moments(self.matrix[:, :, runs], self.noise[:, :, runs])


def _product(left: Array, right: Array) -> Array:
    return np.asarray(np.einsum("ij...,jk...->ik...", left, right))


def one_step(spectrum: Spectrum, descent: Descent, lrs: ArrayLike) -> Moments:
    """The map of one step at each of `lrs`, shape (rates,)."""
    h, m, keep = spectrum.curvature, descent.momentum, descent.state
    rates = np.asarray(lrs, np.float64)[:, None] * h**-descent.preconditioner  # (rates, modes)
    zero = np.zeros_like(rates)
    # What becomes of v, θ and θ̄, each in terms of (v, θ, θ̄, ξ).
    gradient = np.stack([zero, zero + h, zero, zero + 1])
    buffer = gradient + m * np.stack([zero + 1, zero, zero, zero])
    direction = gradient + m * buffer if descent.nesterov else buffer
    weights = np.stack([zero, zero + 1, zero, zero]) - rates * direction
    average = (1 - descent.averaging) * weights
    average[2] += descent.averaging
    rows = np.stack([buffer, weights, average])[keep]
    push = rows[:, 3] * np.sqrt(spectrum.noise)  # (state, rates, modes)
    return Moments(rows[:, keep], push[:, None] * push[None])


def at_start(spectrum: Spectrum, descent: Descent, num_rates: int) -> Array:
    """E[z zᵀ] before the first step; shape (state, state, num_rates, modes)."""
    start = np.array([0.0, 1.0, 1.0])[descent.state]  # v is at rest
    second = start[:, None, None] * start[None, :, None] * spectrum.initial
    return np.repeat(second[:, :, None], num_rates, axis=2)


def expected_loss(spectrum: Spectrum, second: Array) -> Array:
    """E[L] of second moments of shape (state, state, …, modes); shape (…)."""
    return np.asarray(second[-1, -1] @ spectrum.weights)
