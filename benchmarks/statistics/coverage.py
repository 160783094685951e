"""How often the intervals of many studies hold the truth, and how wide they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.random import Generator

from largebatch.benchmarks.statistics.surrogate import BATCH_SIZES
from largebatch.study.statistics.intervals import EFFICIENCIES, rate_exponent
from largebatch.study.statistics.jackknife import (
    Refits,
    either,
    log_batch_at,
    ratio_of_b_crit,
    refit,
)
from largebatch.study.statistics.solver import Array, Curves
from largebatch.study.statistics.student import Interval, holm, moderated_means

CONFIDENCE: Final = 0.95
EFFECTS: Final = (1.1, 1.2)


@dataclass(frozen=True)
class Coverage:
    """The share of intervals that hold the truth, and the median half-width of their logarithm."""

    share: float
    half_width: float

    @classmethod
    def of(cls, interval: Interval, truth: Array) -> "Coverage":
        reach = float(np.nanmedian(interval.high - interval.value))
        return cls(float(interval.covers(truth).mean()), reach)

    @classmethod
    def of_all(cls, interval: Interval, truth: Array) -> "Coverage":
        """Of bands, which hold where they do at every batch size."""
        reach = float(np.nanmedian(interval.high - interval.value))
        return cls(float(interval.covers(truth).all(axis=-1).mean()), reach)


@dataclass(frozen=True)
class PairCoverage:
    """Of the ratios of two optimizers' steps and of their B_crit.

    `false_alarms` is the share of studies that tell two optimizers apart which do not differ, at
    some batch size; `found` the share that does where one needs more steps by a factor.
    """

    ratio: Coverage
    band: Coverage
    b_crit: Coverage
    false_alarms: float
    found: Mapping[float, float]


@dataclass(frozen=True)
class Measured:
    """Studies, what they print, and the fits of the truth with n = 1 and n free."""

    log_steps: Array
    """(studies, batch sizes, seeds)"""
    truth: Array
    """(studies, batch sizes)"""
    refits: Refits
    true: Refits

    @classmethod
    def of(cls, batch_sizes: Array, log_steps: Array, truth: Array) -> "Measured":
        unbounded = np.zeros(truth.shape, dtype=np.bool_)
        refits, true = (
            refit(batch_sizes, values, unbounded, CONFIDENCE)
            for values in (log_steps, truth[:, :, None])
        )
        return cls(log_steps, truth, refits, true)

    @property
    def true_curves(self) -> Curves:
        """In the form that each study prints: with one seed, as the truth has, n = 1 is assumed."""
        return either(self.refits.shape_is_one[:, None], self.true.curves, self.true.free)


def curve_coverage(studies: Measured) -> dict[str, Coverage]:
    """Of all that is said of one optimizer."""
    refits, true, curves = studies.refits, studies.true, studies.true_curves
    values = {
        "S_min": (refits.curves.s_min, curves.s_min),
        "E_min": (refits.curves.e_min, curves.e_min),
        "B_crit": (refits.curves.b_crit, curves.b_crit),
        "n": (refits.free.shape, true.free.shape),
    }
    found = {
        name: Coverage.of(refits.interval(np.log(value), CONFIDENCE), np.log(truth[:, 0]))
        for name, (value, truth) in values.items()
    }
    for name, share in EFFICIENCIES.items():
        interval = refits.interval(log_batch_at(refits, share), CONFIDENCE)
        found[name] = Coverage.of(interval, log_batch_at(true, share)[:, 0])
    means = moderated_means(studies.log_steps)
    found["point"] = Coverage.of(means.interval(CONFIDENCE), studies.truth)
    found["band"] = Coverage.of_all(means.bands(CONFIDENCE), studies.truth)
    return found


def rate_coverage(log_rates: Array, truth: float) -> Coverage:
    """Of the exponent of the rate against the batch size; its half-width is no logarithm."""
    found = [rate_exponent(BATCH_SIZES, rates[:, None], CONFIDENCE) for rates in log_rates]
    ends = np.array([(each.low, each.value, each.high) for each in found if each])
    low, value, high = ends.astype(np.float64).T
    return Coverage.of(Interval(value, low, high), np.full(len(value), truth))


def pair_coverage(one: Measured, other: Measured) -> PairCoverage:
    """Of `other` over `one`, study by study and seed by seed."""
    difference, truth = other.log_steps - one.log_steps, other.truth - one.truth
    means = moderated_means(difference)
    true = np.log(other.true_curves.b_crit / one.true_curves.b_crit)[:, 0]
    told = {
        factor: told_apart(difference - truth[..., None] + np.log(factor))
        for factor in (1.0, *EFFECTS)
    }
    return PairCoverage(
        ratio=Coverage.of(means.interval(CONFIDENCE), truth),
        band=Coverage.of_all(means.bands(CONFIDENCE), truth),
        b_crit=Coverage.of(ratio_of_b_crit(other.refits, one.refits, CONFIDENCE), true),
        false_alarms=told.pop(1.0),
        found=told,
    )


def told_apart(differences: Array) -> float:
    """The share of studies that tell two optimizers apart at some batch size."""
    p = holm(moderated_means(differences).p_values())
    return float((p <= 1 - CONFIDENCE).any(axis=-1).mean())


def resampled(
    batch_sizes: Array, log_steps: Array, num_seeds: int, num_studies: int, generator: Generator
) -> Measured:
    """Studies whose seeds are drawn, with replacement, from recorded ones, the population.

    Args:
        log_steps: (batch sizes, seeds) as recorded, without holes.
    """
    drawn = generator.integers(log_steps.shape[1], size=(num_studies, num_seeds))
    studies = np.moveaxis(log_steps[:, drawn], 1, 0)  # (studies, batch sizes, seeds)
    truth = np.broadcast_to(log_steps.mean(axis=1), studies.shape[:2])
    return Measured.of(batch_sizes, studies, truth)
