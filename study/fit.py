"""The trade between steps and samples of one curve: S = S_min + E_min / B (McCandlish et al. 2018).

S is the steps to target at batch size B, S_min the steps no batch goes below, E_min the samples
no step count goes below. B_crit = E_min / S_min is where both steps and samples are twice their
minimum. The hyperbola is an assumption: `rms` says how well it holds, and a fit with the shape n
free whether n = 1 does (see `statistics.solver`, which fits many curves at once). How far seeds can
move a fit is for `statistics.intervals` to say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from largebatch.study.statistics.solver import FEWEST_POINTS, Array, fit_many

__all__ = ["FEWEST_POINTS", "CurveFit", "fit_curve"]


@dataclass(frozen=True)
class CurveFit:
    """S_min in steps, E_min in samples, B_crit in samples a step, the shape n.

    `rms` is the root mean square of the log residuals (0.04 is 4 %).
    `identified` is true where the measured batches reach below B_crit / 4 and above 4 B_crit;
    elsewhere B_crit is an extrapolation. `num_censored` counts the misses that bound the fit.
    """

    s_min: float
    e_min: float
    b_crit: float
    rms: float
    identified: bool
    num_points: int
    num_censored: int
    shape: float = 1.0


def fit_curve(
    batch_sizes: Sequence[float],
    steps: Sequence[float],
    missed_batch_sizes: Sequence[float] = (),
    missed_steps: Sequence[float] = (),
    shape: float | None = 1.0,
) -> CurveFit | None:
    """Fit S = (S_min^n + (E_min / B)^n)^(1/n), or return None with too few distinct batch sizes.

    Args:
        missed_steps: what was not enough at `missed_batch_sizes`. Below all that reached, such a
            miss is a lower bound: the run was too short. Beyond, no learning rate held, which the
            curve says nothing of: such a miss leaves the fit.
        shape: n, 1 for the hyperbola; None: n is fitted too. Three batch sizes are needed, with n
            free four.

    Raises:
        ValueError: lengths that differ, or values that are not positive and finite.

    >>> fit = fit_curve([64, 256, 1024, 4096], [340, 100, 40, 25])
    >>> round(fit.s_min), round(fit.e_min), round(fit.b_crit)
    (20, 20480, 1024)
    """
    if shape is not None and not 0 < shape < math.inf:
        raise ValueError(f"shape must be > 0 and finite, got {shape}")
    batch, counts = _checked("batch_sizes", batch_sizes), _checked("steps", steps)
    missed = _checked("missed_batch_sizes", missed_batch_sizes)
    too_few = _checked("missed_steps", missed_steps)
    for these, those in ((batch, counts), (missed, too_few)):
        if len(these) != len(those):
            raise ValueError(f"a step count a batch size is needed, got {len(those)}/{len(these)}")
    if len(set(batch_sizes)) < FEWEST_POINTS + (shape is None):
        return None
    binding = missed < batch.min()
    sizes = np.concatenate([batch, missed[binding]])
    values = np.concatenate([counts, too_few[binding]])
    is_bound = np.arange(len(sizes)) >= len(batch)
    curves = fit_many(sizes, values, is_bound, shape)
    b_crit = float(curves.b_crit[0])
    return CurveFit(
        s_min=float(curves.s_min[0]),
        e_min=float(curves.e_min[0]),
        b_crit=b_crit,
        rms=float(curves.rms[0]),
        identified=min(batch_sizes) < b_crit / 4 and max(batch_sizes) > 4 * b_crit,
        num_points=len(batch),
        num_censored=int(binding.sum()),
        shape=float(curves.shape[0]),
    )


def _checked(name: str, values: Sequence[float]) -> Array:
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    return np.asarray(values, dtype=np.float64)
