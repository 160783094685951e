"""The trade between steps and samples: S = S_min + E_min / B (McCandlish et al. 2018).

S is the steps to target at batch size B, S_min the steps no batch goes below, E_min the samples
no step count goes below; E = B S makes this the same hyperbola as
(S / S_min - 1)(E / E_min - 1) = 1 in arXiv:1812.06162, equation 2.11. B_crit = E_min / S_min is
where both steps and samples are twice their minimum.

Least squares on log S, since steps span decades and their errors are relative; soft-L1, so one
bad point cannot turn the curve. A miss is right-censored: it pulls only while the model says that
fewer steps than were tried would have done. The hyperbola is an assumption: `rms` says how well
it holds, and no interval here covers its failure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from largebatch.study.points import StudyPoint

FEWEST_POINTS = 3  # two unknowns, and one point left to contradict them
SOFT_L1_SCALE = 0.05  # in log steps: residuals beyond 5 % lose their square
SEARCH_FACTOR = 1000.0  # B_crit is sought this far outside the batch sizes measured

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CurveFit:
    """S_min in steps, E_min in samples, B_crit in samples a step, and how far to trust them.

    `b_crit_range` holds the lowest and the highest B_crit over fits that leave one point out. It
    shows how much hangs on a single point and is *not* a confidence interval; None below four
    points. `rms` is the root mean square of the log residuals (0.04 is 4 %). `identified` is true
    where the measured batches reach below B_crit / 4 and above 4 B_crit; elsewhere B_crit is
    an extrapolation.
    """

    s_min: float
    e_min: float
    b_crit: float
    b_crit_range: tuple[float, float] | None
    rms: float
    identified: bool
    num_points: int
    num_censored: int


def fit_points(points: Sequence[StudyPoint]) -> CurveFit | None:
    """`fit_curve` of one optimizer's points; a miss with no known bound is left out."""
    reached = [(point.batch_size, point.steps) for point in points if point.steps is not None]
    missed = [
        (point.batch_size, point.lower_bound) for point in points if point.lower_bound is not None
    ]
    return fit_curve(
        [batch_size for batch_size, _ in reached],
        [steps for _, steps in reached],
        [batch_size for batch_size, _ in missed],
        [bound for _, bound in missed],
    )


def fit_curve(
    batch_sizes: Sequence[float],
    steps: Sequence[float],
    missed_batch_sizes: Sequence[float] = (),
    missed_steps: Sequence[float] = (),
) -> CurveFit | None:
    """Fit S = S_min + E_min / B, or return None with fewer than three distinct batch sizes.

    `missed_steps` are the steps that were not enough at `missed_batch_sizes`. Raises `ValueError`
    for lengths that differ and for values that are not positive and finite.
    """
    batch, log_steps = _logs("batch_sizes", batch_sizes), _logs("steps", steps)
    missed, bounds = _logs("missed_batch_sizes", missed_batch_sizes), _logs("missed", missed_steps)
    for these, those in ((batch, log_steps), (missed, bounds)):
        if len(these) != len(those):
            raise ValueError(f"a step count a batch size is needed, got {len(those)}/{len(these)}")
    if len(set(batch_sizes)) < FEWEST_POINTS:
        return None
    log_e_min, log_b_crit = _solve(batch, log_steps, missed, bounds)
    e_min, b_crit = math.exp(log_e_min), math.exp(log_b_crit)
    residual = _log_model(log_e_min, log_b_crit, batch) - log_steps
    return CurveFit(
        s_min=e_min / b_crit,
        e_min=e_min,
        b_crit=b_crit,
        b_crit_range=_leave_one_out(batch, log_steps, missed, bounds, b_crit),
        rms=float(np.sqrt(np.mean(residual**2))),
        identified=min(batch_sizes) < b_crit / 4 and max(batch_sizes) > 4 * b_crit,
        num_points=len(batch),
        num_censored=len(missed),
    )


def _log_model(log_e_min: float, log_b_crit: float, log_batch: Array) -> Array:
    """log(S_min + E_min / B), as log E_min + log(1 / B_crit + 1 / B)."""
    return log_e_min + np.logaddexp(-log_b_crit, -log_batch)


def _solve(batch: Array, log_steps: Array, missed: Array, bounds: Array) -> tuple[float, float]:
    """Log E_min and log B_crit of the least robust cost; all arguments are logarithms.

    The pair (E_min, B_crit) has the same best curve as (S_min, E_min) and lets B_crit be bounded,
    which perfectly scaling steps (S_min = 0) and steps that never fall (E_min = 0) both need.
    """
    from scipy.optimize import least_squares

    def residuals(unknown: Array) -> Array:
        shortfall = bounds - _log_model(unknown[0], unknown[1], missed)
        reached = _log_model(unknown[0], unknown[1], batch) - log_steps
        return np.concatenate([reached, np.maximum(shortfall, 0.0)])

    def cost(unknown: Array) -> float:
        scaled = residuals(unknown) / SOFT_L1_SCALE
        return float(np.sum(np.sqrt(1 + scaled**2) - 1))

    margin = math.log(SEARCH_FACTOR)
    lowest, highest = float(batch.min()) - margin, float(batch.max()) + margin
    starts = [
        np.array([np.median(log_steps - _log_model(0.0, log_b_crit, batch)), log_b_crit])
        for log_b_crit in np.linspace(lowest, highest, 62)[1:-1]
    ]
    solution = least_squares(
        residuals,
        min(starts, key=cost),
        bounds=([-np.inf, lowest], [np.inf, highest]),
        loss="soft_l1",
        f_scale=SOFT_L1_SCALE,
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
    )
    return float(solution.x[0]), float(solution.x[1])


def _leave_one_out(
    batch: Array, log_steps: Array, missed: Array, bounds: Array, b_crit: float
) -> tuple[float, float] | None:
    if len(batch) <= FEWEST_POINTS:
        return None
    found = [b_crit]
    for left_out in range(len(batch)):
        kept = np.arange(len(batch)) != left_out
        found.append(math.exp(_solve(batch[kept], log_steps[kept], missed, bounds)[1]))
    return min(found), max(found)


def _logs(name: str, values: Sequence[float]) -> Array:
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    return np.log(np.asarray(values, dtype=np.float64))
