"""What a study's seeds say about each curve, with intervals that cover.

Seeds differ by about 8 % in steps, mostly by their initial weights: a seed is fast at neighbouring
batch sizes alike, and the errors of points are largely one error. What a curve gives (S_min, E_min,
B_crit, n, CBS20, B_80, B_50) therefore has its interval from the seeds as wholes: the delete-one
jackknife (Tukey 1958), refitted without each seed in turn, on a logarithmic scale, with Student's t
of one degree of freedom less than there are seeds. A point has Student's t, its variance moderated
over batch sizes (Smyth 2004, see `moderated_means`): it covers on average over batch sizes, and
less where one of them is far noisier than the others.

The seeds must not be those that chose the learning rates. Where an optimizer lacks a seed at some
batch size, the point is the mean of those it has, a seed that is left out is so wherever it ran,
and the curve's degrees of freedom are those of the point with the fewest seeds, so that intervals
are then too wide rather than too narrow; a point with one seed leaves the curve without intervals.
`largebatch bench statistics` simulates studies and counts how often the intervals cover.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from largebatch.study.statistics.jackknife import Refits, log_batch_at, means_without, refit
from largebatch.study.statistics.solver import Array
from largebatch.study.statistics.student import Interval, moderated_means, t_quantile
from largebatch.study.statistics.table import StepsTable, table_of

RATE_CORRELATION: Final = 0.2  # of the errors of the chosen rates, a doubling of the batch size
EFFICIENCIES: Final = {"cbs20": 1 / 1.2, "b_80": 0.8, "b_50": 0.5}


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, which is None to both sides where the seeds cannot tell."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class PointEstimate:
    """Steps to the target at one batch size: the geometric mean over seeds, and its interval.

    `band` is wider: with its confidence the bands of all the optimizer's points hold at once
    (Bonferroni). Both are None where any seed missed, since a mean over those that reached would
    be too good. `rate` is the geometric mean of the learning rates.
    """

    batch_size: int
    steps: Estimate | None
    band: Estimate | None
    num_seeds: int
    num_missed: int
    rate: float | None


@dataclass(frozen=True)
class CurveEstimates:
    """What the seeds say about one optimizer's curve; None where too few batch sizes reached.

    `s_min` is in steps, `e_min` in samples, batch sizes in samples a step. The fit that they come
    from has n = 1, S = S_min + E_min / B, unless the interval of n excludes 1: then `shape_is_one`
    is false and its n is `shape`, so that steps at B_crit are 2^(1/n) S_min. `shape` itself always
    comes from a fit with n free, which needs four batch sizes.

    `b_80` and `b_50` are where a run still has 80 % and 50 % of the sample efficiency of the
    smallest batch size that reached; `cbs20` is where it takes 20 % more samples than there (Zhang
    et al. 2024, arXiv:2410.21676, who count from their optimal batch size, with n = 1). They come
    from the fit with n free: they lie where the curve bends. B_crit is `identified` where its
    interval is within a factor 1.5 of it and batch sizes reach a factor 4 to either side.

    `rate_exponent` is the slope of log rate over log batch size (0.5: the square-root rule). The
    rates were chosen by other seeds, so that its interval is from the line's residuals: see
    `rate_exponent`. `rms` is of the printed fit's log residuals (0.04 is 4 %).
    """

    optimizer: str
    points: tuple[PointEstimate, ...]
    s_min: Estimate | None = None
    e_min: Estimate | None = None
    b_crit: Estimate | None = None
    shape: Estimate | None = None
    cbs20: Estimate | None = None
    b_80: Estimate | None = None
    b_50: Estimate | None = None
    rate_exponent: Estimate | None = None
    shape_is_one: bool = True
    identified: bool = False
    rms: float | None = None


def intervals(rows: Iterable[Any], confidence: float = 0.95) -> dict[str, CurveEstimates]:
    """What `rows` say about each optimizer, in the order in which they first appear.

    Args:
        rows: one a seed, at the learning rate that was chosen: `SeedSteps`, or anything with its
            fields as attributes or keys (a list of dicts, `DataFrame.itertuples()`).
        confidence: of each interval by itself, and of all bands of an optimizer together.

    Raises:
        ValueError: a value that cannot be, or two rows of one optimizer, batch size and seed.

    >>> rows = [
    ...     {"optimizer": "lamb", "batch_size": b, "seed": s, "steps": (20 + 20_000 / b) * luck}
    ...     for b in (64, 256, 1024, 4096, 16384)
    ...     for s, luck in enumerate((0.95, 1.0, 1.05))
    ... ]
    >>> b_crit = intervals(rows)["lamb"].b_crit
    >>> round(b_crit.value), round(b_crit.low), round(b_crit.high)
    (1000, 1000, 1000)
    """
    check_confidence(confidence)
    table = table_of(rows)
    if not table.optimizers:
        return {}
    curves = _curves(refit_table(table, confidence), confidence)
    points = _points(table, confidence)
    return {
        name: CurveEstimates(
            optimizer=name,
            points=points[index],
            rate_exponent=rate_exponent(table.batch_sizes, table.log_rates[index], confidence),
            **curves[index],
        )
        for index, name in enumerate(table.optimizers)
    }


def refit_table(table: StepsTable, confidence: float) -> Refits:
    return refit(table.batch_sizes, table.used, table.is_bound, confidence)


def check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be > 0 and < 1 (0.95 is usual), got {confidence!r}")


def estimate(interval: Interval, *index: int) -> Estimate:
    """One entry of an interval of logarithms, as the numbers that they are of."""
    value, low, high = (
        math.exp(array[index]) for array in (interval.value, interval.low, interval.high)
    )
    return Estimate(value) if math.isnan(low) else Estimate(value, low, high)


def rate_exponent(batch_sizes: Array, log_rates: Array, confidence: float) -> Estimate | None:
    """The slope of log rate over log batch size, by least squares with Student's t; no log scale.

    The rates lie on a grid, and the seeds that chose them are the same at all batch sizes. So the
    error of a rate is at least that of rounding to the grid, also where rates happen to lie on a
    line, and errors are correlated, by 0.2 a doubling.

    Args:
        log_rates: (batch sizes, seeds), NaN where there is none.
    """
    means = means_without(log_rates[None])[0, 0]
    known = ~np.isnan(means)
    x, y = np.log(batch_sizes[known]), means[known]
    if len(x) < 2:
        return None
    design = np.stack([np.ones_like(x), x], axis=1)
    solve = np.linalg.pinv(design)
    slope = float(solve[1] @ y)
    freedom = len(x) - 2
    if freedom < 1:
        return Estimate(slope)
    left = np.eye(len(x)) - design @ solve
    correlation = RATE_CORRELATION ** (np.abs(x[:, None] - x) / math.log(2))
    gaps = np.diff(np.unique(y.round(6)))
    rounding = float(gaps.min()) ** 2 / 12 if len(gaps) else 0.0
    variance = max(float(y @ left @ y / np.trace(left @ correlation)), rounding)
    error = math.sqrt(float(solve[1] @ correlation @ solve[1]) * variance)
    reach = t_quantile(confidence, freedom) * error
    return Estimate(slope, slope - reach, slope + reach)


def _curves(refits: Refits, confidence: float) -> list[dict[str, Any]]:
    """The fields of `CurveEstimates` that come from fits, an entry an optimizer."""
    curves = refits.curves
    quantities = {
        "s_min": np.log(curves.s_min),
        "e_min": np.log(curves.e_min),
        "b_crit": np.log(curves.b_crit),
        "shape": np.log(refits.free.shape),
    }
    for name, share in EFFICIENCIES.items():
        quantities[name] = log_batch_at(refits, share)
    found = {name: refits.interval(logs, confidence) for name, logs in quantities.items()}
    identified = refits.identified(confidence)
    return [
        {
            name: None if math.isnan(interval.value[index]) else estimate(interval, index)
            for name, interval in found.items()
        }
        | {
            "shape_is_one": bool(refits.shape_is_one[index]),
            "identified": bool(identified[index]),
            "rms": None if math.isnan(rms) else float(rms),
        }
        for index, rms in enumerate(curves.rms[:, 0])
    ]


def _points(table: StepsTable, confidence: float) -> list[tuple[PointEstimate, ...]]:
    means = moderated_means(table.points)
    steps, bands = means.interval(confidence), means.bands(confidence)
    log_rates = means_without(table.log_rates)[:, 0]
    num_missed = table.missed.sum(axis=2)
    num_seeds = num_missed + np.sum(~np.isnan(table.log_steps), axis=2)

    def point(one: int, at: int) -> PointEstimate:
        reached = not math.isnan(means.value[one, at])
        rate = math.exp(log_rates[one, at])
        return PointEstimate(
            batch_size=int(table.batch_sizes[at]),
            steps=estimate(steps, one, at) if reached else None,
            band=estimate(bands, one, at) if reached else None,
            num_seeds=int(num_seeds[one, at]),
            num_missed=int(num_missed[one, at]),
            rate=None if math.isnan(rate) else rate,
        )

    return [
        tuple(point(one, at) for at in np.flatnonzero(num_seeds[one]).tolist())
        for one in range(len(table.optimizers))
    ]
