"""Fits of S = (S_min^n + (E_min / B)^n)^(1/n), many curves at a time.

With n = 1 this is S = S_min + E_min / B, the hyperbola (S / S_min - 1)(E / E_min - 1) = 1 with
E = B S of McCandlish et al. 2018 (arXiv:1812.06162, equation 2.11). The shape n is ours: larger is
a sharper bend between the two asymptotes, which meet at B_crit = E_min / S_min for any n.

Least squares on log S, since steps span decades and their errors are relative; soft-L1, so one bad
point cannot turn the curve. Newton's method on the logarithms of E_min, B_crit and n, from the best
of a grid of starts, in a trust region, all curves in one array.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST_POINTS: Final = 3
"""Two unknowns, and one point left to contradict them; a free shape needs one more."""
SOFT_L1_SCALE: Final = 0.05  # in log steps: residuals beyond 5 % lose their square
SEARCH_FACTOR: Final = 1000.0  # B_crit is sought this far outside the batch sizes measured
SHAPES: Final = (0.2, 10.0)  # beyond, batch sizes a factor 2 apart see a corner, or no bend

NUM_STARTS: Final = 30
START_SHAPES: Final = (0.5, 1.0, 2.0, 4.0)
MOST_ITERATIONS: Final = 200
SMALLEST_CURVATURE: Final = 1e-12
FINAL_GAIN: Final = 1e-15
SMALLEST_GAIN: Final = 1e-18  # about the square of the step in the logarithms

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]
Rows = NDArray[np.intp] | slice
EVERY: Final = slice(None)


@dataclass(frozen=True)
class Curves:
    """One entry a curve: E_min in samples, B_crit in samples a step, the shape n.

    `rms` is the root mean square of the log residuals (0.04 is 4 %). `bends` is false where B_crit
    ran into the end of where it is sought: there is no bend within a factor 1000 of the batches.
    NaN and false where a curve has too few points.
    """

    e_min: Array
    b_crit: Array
    shape: Array
    rms: Array
    bends: Mask

    @property
    def s_min(self) -> Array:
        """In steps."""
        return self.e_min / self.b_crit

    def each(self, take: Callable[[Any], Any]) -> "Curves":
        """`take` of each array."""
        return Curves(*(take(getattr(self, field.name)) for field in fields(self)))


def fit_many(
    batch_sizes: ArrayLike,
    steps: ArrayLike,
    bounds: ArrayLike = False,
    shape: float | None = 1.0,
) -> Curves:
    """Fit every row of `steps` over its batch sizes.

    Args:
        batch_sizes: (curves, points), or (points,) for all curves alike.
        steps: (curves, points), NaN where a curve has no point there.
        bounds: as steps; true where the steps were not enough. Such a point pulls only while the
            model says that fewer would have done.
        shape: n; None: n is fitted too, between 0.2 and 10.
    """
    log_steps = np.log(np.atleast_2d(np.asarray(steps, dtype=np.float64)))
    log_batch = np.log(np.broadcast_to(np.asarray(batch_sizes, dtype=np.float64), log_steps.shape))
    is_bound = np.broadcast_to(np.asarray(bounds, dtype=np.bool_), log_steps.shape)
    found = np.full((len(log_steps), 3), np.nan)
    rms, bends = np.full(len(log_steps), np.nan), np.zeros(len(log_steps), dtype=np.bool_)
    fewest = FEWEST_POINTS + (shape is None)
    enough = num_distinct(np.where(np.isnan(log_steps) | is_bound, np.nan, log_batch)) >= fewest
    if enough.any():
        problem = _Problem(log_batch[enough], log_steps[enough], is_bound[enough], shape)
        found[enough] = problem.solve()
        rms[enough], bends[enough] = problem.quality(found[enough])
    e_min, b_crit, shapes = np.exp(found.T)
    return Curves(e_min, b_crit, shapes, rms, bends)


def num_distinct(values: Array) -> Counts:
    """How many distinct values each row has, NaN aside."""
    ordered = np.sort(values, axis=1)  # NaN last
    count: Counts = np.sum(np.diff(ordered, axis=1) > 0, axis=1) + ~np.isnan(ordered[:, 0])
    return count


def log_model(unknown: Array, log_batch: Array) -> tuple[Array, Array]:
    """log S at the log batch sizes, and the share q that S_min^n has of S^n.

    Args:
        unknown: logarithms of E_min, B_crit and n along the last axis.
    """
    log_e_min, log_b_crit, log_shape = (unknown[..., i, None] for i in range(3))
    shape = np.exp(log_shape)
    floor, slope = -shape * log_b_crit, -shape * log_batch
    total = np.logaddexp(floor, slope)
    return log_e_min + total / shape, np.exp(floor - total)


class _Problem:
    """Curves to fit; `unknown` is (curves, 3), the logarithms of E_min, B_crit and n."""

    def __init__(
        self, log_batch: Array, log_steps: Array, is_bound: Mask, shape: float | None
    ) -> None:
        self.present = ~np.isnan(log_steps)
        self.log_batch = log_batch
        self.log_steps = np.where(self.present, log_steps, 0.0)
        self.is_bound = is_bound & self.present
        self.shape = shape
        measured = self.present & ~is_bound
        margin = math.log(SEARCH_FACTOR)
        low = np.where(measured, log_batch, np.inf).min(axis=1) - margin
        high = np.where(measured, log_batch, -np.inf).max(axis=1) + margin
        self.measured = measured
        shapes = SHAPES if shape is None else (shape, shape)
        everywhere = np.full(len(low), np.inf)
        self.low = np.stack([-everywhere, low, np.full_like(low, math.log(shapes[0]))], axis=1)
        self.high = np.stack([everywhere, high, np.full_like(low, math.log(shapes[1]))], axis=1)

    def solve(self) -> Array:
        unknown = self._starts()
        radius, cost = np.ones(len(unknown)), self._cost(unknown, EVERY)
        active = np.arange(len(unknown))
        for _ in range(MOST_ITERATIONS):
            step, gain = self._step(unknown[active], active)
            length = np.abs(step).max(axis=1)
            final = gain < FINAL_GAIN  # what the cost, of limited digits, cannot tell any more
            share = np.where(final, 1.0, radius[active] / np.maximum(length, radius[active]))
            step *= share[:, None]
            trial = np.clip(unknown[active] + step, self.low[active], self.high[active])
            trial_cost = self._cost(trial, active)
            better = final | (trial_cost <= cost[active])
            unknown[active[better]], cost[active[better]] = trial[better], trial_cost[better]
            radius[active] = np.where(better, 2.0, 0.25) * np.minimum(radius[active], length)
            active = active[gain > SMALLEST_GAIN]
            if not len(active):
                break
        return unknown

    def quality(self, unknown: Array) -> tuple[Array, Mask]:
        """Root mean square of the residuals, and whether B_crit is inside of where it is sought."""
        residual = np.where(self.measured, self._residual(unknown, EVERY)[0], 0.0)
        rms = np.sqrt(np.sum(residual**2, axis=1) / np.sum(self.measured, axis=1))
        inside = (unknown > self.low) & (unknown < self.high)
        return rms, inside[:, 1]

    def _starts(self) -> Array:
        """Of a grid of B_crit and n, each with the median E_min, the one of least cost."""
        best, least = np.empty((len(self.log_batch), 3)), np.full(len(self.log_batch), np.inf)
        alike = bool(np.all(self.log_batch == self.log_batch[0]))
        log_batch = self.log_batch[:1] if alike else self.log_batch
        middle = (np.sum(self.measured, axis=1)[:, None] - 1) // 2
        shapes = START_SHAPES if self.shape is None else (self.shape,)
        log_b_crits = np.linspace(self.low[:, 1].min(), self.high[:, 1].max(), NUM_STARTS + 2)
        for start in itertools.product([0.0], log_b_crits[1:-1], np.log(shapes)):
            above = self.log_steps - log_model(np.array([start]), log_batch)[0]
            ordered = np.sort(np.where(self.measured, above, np.inf), axis=1)
            log_e_min = np.take_along_axis(ordered, middle, axis=1)
            cost = _soft_l1(self._pulling(log_e_min - above, EVERY))
            better = cost < least
            best[better], least[better] = start, cost[better]
            best[better, 0] = log_e_min[better, 0]
        return np.clip(best, self.low, self.high)

    def _residual(self, unknown: Array, rows: Rows) -> tuple[Array, Array]:
        log_steps, share = log_model(unknown, self.log_batch[rows])
        return self._pulling(log_steps - self.log_steps[rows], rows), share

    def _pulling(self, residual: Array, rows: Rows) -> Array:
        """Residuals that count: none where there is no point, at a bound only those below it."""
        one_sided = np.where(self.is_bound[rows], np.minimum(residual, 0.0), residual)
        return np.where(self.present[rows], one_sided, 0.0)

    def _acts(self, residual: Array, rows: Rows) -> Mask:
        acts: Mask = self.present[rows] & ~(self.is_bound[rows] & (residual == 0))
        return acts

    def _cost(self, unknown: Array, rows: Rows) -> Array:
        return _soft_l1(self._residual(unknown, rows)[0])

    def _step(self, unknown: Array, rows: Rows) -> tuple[Array, Array]:
        """Newton's, with the curvature's absolute value, so that it goes down also where concave;
        and the gain that it promises.

        With q the share of the floor, u = n log(B / B_crit) and h the entropy of (q, 1 - q), log S
        has the gradient (1, -q, -h / n) by the unknowns; both come from dq/du = q (1 - q).
        """
        residual, q = self._residual(unknown, rows)
        n = np.exp(unknown[:, 2, None])
        u = n * (self.log_batch[rows] - unknown[:, 1, None])
        spread = q * (1 - q)
        # q = 1 / (1 + exp(-u)): its entropy is log(1 + exp(-|u|)) + |u| min(q, 1 - q).
        h = np.log1p(np.exp(-np.abs(u))) + np.abs(u) * np.minimum(q, 1 - q)
        slopes = np.stack([np.ones_like(q), -q, -h / n], axis=2)  # (curves, points, unknowns)
        root = np.sqrt(1 + (residual / SOFT_L1_SCALE) ** 2)
        pull, stiffness = residual / root, self._acts(residual, rows) / root**3
        if self.shape is not None:
            slopes = slopes[:, :, :2]
        size = slopes.shape[2]
        gradient = np.einsum("cp,cpi->ci", pull, slopes)
        hessian = np.einsum("cp,cpi,cpj->cij", stiffness, slopes, slopes)
        hessian[:, 1, 1] += np.sum(pull * n * spread, axis=1)
        if size == 3:
            hessian[:, 1, 2] -= np.sum(pull * spread * u, axis=1)
            hessian[:, 2, 1] = hessian[:, 1, 2]
            hessian[:, 2, 2] += np.sum(pull * (h + u**2 * spread) / n, axis=1)
        stuck = ((unknown <= self.low[rows]) & _padded(gradient > 0)) | (
            (unknown >= self.high[rows]) & _padded(gradient < 0)
        )
        stuck = stuck[:, :size]
        gradient[stuck] = 0.0
        hessian[stuck[:, :, None] | stuck[:, None, :]] = 0.0
        hessian[:, range(size), range(size)] += stuck
        values, vectors = np.linalg.eigh(hessian)
        along = np.einsum("cij,ci->cj", vectors, gradient)
        step = along / np.maximum(np.abs(values), SMALLEST_CURVATURE)
        return _padded(-np.einsum("cij,cj->ci", vectors, step)), np.sum(along * step, axis=1)


def _soft_l1(residual: Array) -> Array:
    cost: Array = np.sum(np.sqrt(1 + (residual / SOFT_L1_SCALE) ** 2) - 1, axis=1)
    return cost


def _padded(columns: NDArray[Any]) -> NDArray[Any]:
    """Three columns: a given shape stands still."""
    return np.pad(columns, ((0, 0), (0, 3 - columns.shape[1])))
