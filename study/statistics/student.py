"""Student's t for whole degrees of freedom; means with variances moderated over groups; Holm."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from largebatch.study.statistics.solver import Array, Counts, Mask

PRIOR_SHARE: Final = 5  # this many degrees of freedom of other groups count for one of this
MOST_PRIOR_FREEDOM: Final = 6


def t_inside(t: ArrayLike, freedom: int) -> Array:
    """The chance that Student's t lies within ±t (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).

    >>> round(float(t_inside(1.0, 1)), 9)
    0.5
    """
    if freedom < 1:
        raise ValueError(f"Student's t needs 1 or more degrees of freedom, got {freedom}")
    angle = np.arctan(np.abs(np.asarray(t, dtype=np.float64)) / math.sqrt(freedom))
    is_odd = freedom % 2
    cosine = np.cos(angle)
    term, total = cosine**is_odd, np.zeros_like(angle)
    for power in range(is_odd, freedom - 1, 2):
        total = total + term
        term = term * cosine**2 * (power + 1) / (power + 2)
    inside = np.sin(angle) * total
    return 2 / math.pi * (angle + inside) if is_odd else inside


@lru_cache(maxsize=1024)
def t_quantile(inside: float, freedom: int) -> float:
    """The t that Student's t stays within, to both sides, with the chance `inside`.

    >>> round(t_quantile(0.95, 4), 4)
    2.7764
    """
    if not 0 < inside < 1:
        raise ValueError(f"a chance must be > 0 and < 1, got {inside}")
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < inside:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < inside else (low, middle)
    return high


def t_quantiles(inside: float, freedom: Counts) -> Array:
    """`t_quantile` of each; NaN where the freedom is 0."""
    found = np.full(freedom.shape, np.nan)
    for value in np.unique(freedom[freedom > 0]):
        found[freedom == value] = t_quantile(inside, int(value))
    return found


@dataclass(frozen=True)
class Interval:
    """Arrays of logarithms; low and high are NaN where there is no interval."""

    value: Array
    low: Array
    high: Array

    def covers(self, truth: Array) -> Mask:
        return (self.low <= truth) & (truth <= self.high)


@dataclass(frozen=True)
class Means:
    """Arrays (…, groups): means, their standard errors, and the degrees of freedom of these.

    Where the freedom is 0 there is no interval, nor a p.
    """

    value: Array
    error: Array
    freedom: Counts

    def interval(self, confidence: float) -> Interval:
        """Of each mean by itself."""
        reach = t_quantiles(confidence, self.freedom) * self.error
        return Interval(self.value, self.value - reach, self.value + reach)

    def bands(self, confidence: float) -> Interval:
        """Of all the means along the last axis together (Bonferroni)."""
        reach = np.full(self.value.shape, np.nan)
        counts = np.sum(self.freedom > 0, axis=-1)
        for count in np.unique(counts[counts > 0]):
            one = 1 - (1 - confidence) / int(count)
            reach[counts == count] = t_quantiles(one, self.freedom[counts == count])
        reach *= self.error
        return Interval(self.value, self.value - reach, self.value + reach)

    def p_values(self) -> Array:
        """Of each mean being 0, by Student's t to both sides."""
        p = np.full(self.value.shape, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):  # seeds may agree to the last bit
            t = np.where(self.value == 0, 0.0, np.abs(self.value) / self.error)
        for freedom in np.unique(self.freedom[self.freedom > 0]):
            here = self.freedom == freedom
            p[here] = 1 - t_inside(t[here], int(freedom))
        return p


def moderated_means(values: Array) -> Means:
    """Means over the last axis, the variance of each group drawn towards that of all groups.

    With d degrees of freedom in a group, (d0 s0² + d s²) / (d0 + d), where s0² is the mean of all
    groups' s², weighted by d: the moderated variance of Smyth 2004 (doi:10.2202/1544-6115.1027). He
    estimates d0 from thousands of groups; here it is a fifth of the other groups' freedom, at most
    6, for there are about nine groups and they are not independent: a seed is fast or slow at
    neighbouring batch sizes alike, with a correlation of 0.85, so that nine variances are worth two
    independent ones.

    Args:
        values: (…, groups, members), NaN where a group lacks the member.
    """
    present = ~np.isnan(values)
    count = present.sum(axis=-1)
    filled = np.where(present, values, 0.0)
    mean = filled.sum(axis=-1) / np.maximum(count, 1)
    squares = np.where(present, (values - mean[..., None]) ** 2, 0.0).sum(axis=-1)
    own = np.maximum(count - 1, 0)
    all_groups = own.sum(axis=-1, keepdims=True)
    pooled = squares.sum(axis=-1, keepdims=True) / np.maximum(all_groups, 1)
    prior = np.minimum((all_groups - own) // PRIOR_SHARE, MOST_PRIOR_FREEDOM)
    variance = (prior * pooled + squares) / np.maximum(prior + own, 1)
    return Means(
        value=np.where(count > 0, mean, np.nan),
        error=np.where(own > 0, np.sqrt(variance / np.maximum(count, 1)), np.nan),
        freedom=np.where(own > 0, prior + own, 0),
    )


def holm(p: ArrayLike) -> Array:
    """Adjusted p of the tests along the last axis, NaN aside (Holm 1979, Scand. J. Stat. 6:65).

    Where those ≤ alpha are rejected, at most a share alpha of families has a false rejection.

    >>> holm([0.01, 0.04, 0.03]).round(9).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, axis=-1)  # NaN last
    ordered = np.take_along_axis(values, order, axis=-1)
    left = np.sum(~np.isnan(values), axis=-1, keepdims=True) - np.arange(values.shape[-1])
    adjusted = np.minimum(np.maximum.accumulate(ordered * left, axis=-1), 1.0)
    found = np.empty_like(adjusted)
    np.put_along_axis(found, order, adjusted, axis=-1)
    return found
