"""Curves refitted without each seed in turn, and the intervals that follow, on arrays.

Arrays are (curves, batch sizes, seeds) of log steps, NaN where a curve lacks the seed there; what
is fitted has its first column from all seeds, then one column a seed left out.
"""

from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from largebatch.study.statistics.solver import Array, Counts, Curves, Mask, fit_many
from largebatch.study.statistics.student import Interval, t_quantiles

IDENTIFIED_FACTOR: Final = 1.5
SPAN_FACTOR: Final = 4.0


@dataclass(frozen=True)
class Refits:
    """The curves in the form that is printed, n = 1 unless n's own interval excludes it, and with n
    free, where there are enough points for it.

    `freedom` are the degrees of freedom of an interval, 0 for none.
    """

    curves: Curves
    free: Curves
    shape_is_one: Mask
    smallest: Array
    largest: Array
    taking_part: Mask
    freedom: Counts

    @property
    def log_b_crit(self) -> Array:
        return np.log(self.curves.b_crit)

    def at(self, rows: Counts) -> "Refits":
        """Those of some curves."""
        return Refits(
            self.curves.each(lambda array: array[rows]),
            self.free.each(lambda array: array[rows]),
            self.shape_is_one[rows],
            self.smallest[rows],
            self.largest[rows],
            self.taking_part[rows],
            self.freedom[rows],
        )

    def interval(self, quantity: Array, confidence: float) -> Interval:
        """Of the logarithms of a quantity, (curves, 1 + seeds), with Student's t."""
        return jackknifed(quantity, self.taking_part, self.freedom, confidence)

    def identified(self, confidence: float) -> Mask:
        """B_crit within a factor 1.5, and batches that reach a factor 4 to either side of it."""
        b_crit = self.interval(self.log_b_crit, confidence)
        wide = np.maximum(b_crit.high - b_crit.value, b_crit.value - b_crit.low)
        value = self.curves.b_crit[:, 0]
        spanned = (self.smallest <= value / SPAN_FACTOR) & (self.largest >= value * SPAN_FACTOR)
        is_narrow: Mask = wide <= np.log(IDENTIFIED_FACTOR)
        return spanned & is_narrow


def refit(batch_sizes: Array, log_steps: Array, is_bound: Mask, confidence: float) -> Refits:
    """Fit all curves with all seeds and without each, with n = 1 and with n free.

    Each point is the mean of the seeds it has, and a seed that is left out is so wherever it ran.
    An interval has the freedom of the point with the fewest seeds.
    """
    num_seeds = np.sum(~np.isnan(log_steps), axis=2)
    is_point = (num_seeds > 0) & ~is_bound
    fewest = np.where(is_point, num_seeds, log_steps.shape[2]).min(axis=1)
    steps = np.exp(means_without(log_steps))
    rows = steps.reshape(-1, len(batch_sizes))
    bounds = np.repeat(is_bound, steps.shape[1], axis=0)
    hyperbolas, free = (
        fit_many(batch_sizes, rows, bounds, shape).each(lambda a: a.reshape(steps.shape[:2]))
        for shape in (1.0, None)
    )
    taking_part = np.any(~np.isnan(log_steps), axis=1)
    freedom = np.where(is_point.any(axis=1) & hyperbolas.bends[:, 0], fewest - 1, 0)
    shape = jackknifed(np.log(free.shape), taking_part, freedom, confidence)
    is_one = ~((shape.low > 0) | (shape.high < 0))
    return Refits(
        curves=either(is_one[:, None], hyperbolas, free),
        free=free,
        shape_is_one=is_one,
        smallest=np.where(is_point, batch_sizes, np.inf).min(axis=1),
        largest=np.where(is_point, batch_sizes, -np.inf).max(axis=1),
        taking_part=taking_part,
        freedom=freedom,
    )


def means_without(log_steps: Array) -> Array:
    """Means over the seeds, first of all, then without each: (curves, 1 + seeds, batch sizes)."""
    present = ~np.isnan(log_steps)
    filled = np.where(present, log_steps, 0.0)
    count, total = present.sum(axis=2, keepdims=True), filled.sum(axis=2, keepdims=True)
    counts = np.concatenate([count, count - present], axis=2)
    totals = np.concatenate([total, total - filled], axis=2)
    means = np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
    return np.swapaxes(means, 1, 2)


def jackknifed(quantity: Array, taking_part: Mask, freedom: Counts, confidence: float) -> Interval:
    """The value of all seeds ± t times the delete-one jackknife's standard error (Tukey 1958).

    Args:
        quantity: (curves, 1 + seeds), of all seeds first.
        taking_part: (curves, seeds); others do not count.
    """
    value, without = quantity[:, 0], np.where(taking_part, quantity[:, 1:], 0.0)
    count = taking_part.sum(axis=1)
    mean = without.sum(axis=1) / np.maximum(count, 1)
    squares = np.where(taking_part, (without - mean[:, None]) ** 2, 0.0).sum(axis=1)
    error = np.sqrt(squares * (count - 1) / np.maximum(count, 1))
    reach = t_quantiles(confidence, freedom) * error
    return Interval(value, value - reach, value + reach)


def ratio_of_b_crit(refits: Refits, others: Refits, confidence: float) -> Interval:
    """Of log B_crit over that of the others, curve by curve, a seed left out of both at once."""
    return jackknifed(
        refits.log_b_crit - others.log_b_crit,
        refits.taking_part | others.taking_part,
        np.minimum(refits.freedom, others.freedom),
        confidence,
    )


def log_batch_at(refits: Refits, share: float) -> Array:
    """Log batch size that keeps `share` of the sample efficiency of the smallest one.

    A target takes E(B) = B S(B) samples; E(smallest) / E(B) = share. By the fit with n free: the
    batch size asked for lies where the curve bends, so that with n = 1 it is 13 % too small at
    n = 1.1, which five seeds cannot tell from 1. B_crit, between the asymptotes, hardly moves.
    """
    enough = ~np.isnan(refits.free.shape[:, :1])
    curves = either(enough, refits.free, refits.curves)
    n, smallest = curves.shape, refits.smallest
    start = 1 + (smallest[:, None] / curves.b_crit) ** n
    return np.log(curves.b_crit) + np.log(start * share**-n - 1) / n


def either(first: Mask, one: Curves, other: Curves) -> Curves:
    """The curves `one` where `first`, else `other`."""
    return Curves(
        *(
            np.where(first, getattr(one, each.name), getattr(other, each.name))
            for each in fields(one)
        )
    )
