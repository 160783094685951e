"""Studies made up in arrays: the protocol of a study, on a surrogate of what training comes to.

The surrogate is fitted to 3,516 runs of `task=bytes`. Log steps are a parabola in the log rate
around an optimum that follows the batch size, plus a seed's luck: correlated by 0.85 between batch
sizes a factor 2 apart and by 0.9 between rates a factor √2 apart, so that a lucky seed is lucky all
along the curve. Two optimizers with the same seeds, and so the same initial weights, share half of
it (AdamW and LAMB, 12 seeds: correlations of 0.41 to 0.73 at seven batch sizes). With a cliff, as
LAMB's, a rate beyond an edge misses the target, and the edge is another for each seed.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.random import Generator

from largebatch.study.statistics.solver import Array, Counts

BATCH_SIZES: Final[Array] = np.exp2(np.arange(6.0, 15.0))  # 64 to 16,384
S_MIN: Final = 23.0
E_MIN: Final = 30_000.0
OFFSETS: Final[Array] = np.arange(-4.0, 5.0)  # of the rates tried from the optimum, in √2-steps
STEP_LOG: Final = float(np.log(2) / 2)
RATE_EXPONENT: Final = 0.45  # of the optimal rate against the batch size
WANDER: Final = 0.12  # of the optimum about that line, in √2-steps

BATCH_CORRELATION: Final = 0.85  # a doubling
RATE_CORRELATION: Final = 0.9  # a √2-step
SEED_CORRELATION: Final = 0.5  # of two optimizers with the same seeds

NEAR: Final = float(np.log(1.12))  # a rate this close to the best is confirmed
MOST_CONFIRMED: Final = 3


@dataclass(frozen=True)
class Landscape:
    """How steps depend on the rate, and how far seeds differ."""

    name: str
    curvature: float
    """Log steps a square √2-step off the optimum."""
    luck: tuple[tuple[float, float], ...]
    """Batch sizes, and the standard deviation of log steps over seeds there."""
    edge: float | None = None
    """Where the cliff is, in √2-steps beyond the optimum."""
    edge_spread: float = 0.12

    @property
    def deviations(self) -> Array:
        sizes, deviations = zip(*self.luck, strict=True)
        found: Array = np.interp(np.log(BATCH_SIZES), np.log(sizes), deviations)
        return found


ADAMW_LIKE: Final = Landscape(
    "AdamW-like",
    curvature=0.08,
    luck=((64, 0.077), (256, 0.074), (1024, 0.088), (4096, 0.089), (16_384, 0.055)),
)
LAMB_LIKE: Final = Landscape(
    "LAMB-like, cliff",
    curvature=0.075,
    luck=((64, 0.087), (256, 0.062), (1024, 0.053), (4096, 0.041), (16_384, 0.02)),
    edge=0.6,
)


@dataclass(frozen=True)
class SimulatedStudies:
    """Arrays over studies, batch sizes and seeds, of one optimizer at the rates chosen for it."""

    log_steps: Array
    """(studies, batch sizes, report seeds)"""
    truth: Array
    """(studies, batch sizes): the mean of log steps over all seeds there are, at these rates."""
    log_rates: Array
    """(studies, batch sizes)"""
    trials: float
    """Runs a point, on average."""


def draw_luck(
    num_studies: int, num_seeds: int, generator: Generator, like: Array | None = None
) -> Array:
    """(studies, 2 selecting seeds and `num_seeds` others, batch sizes, rates), of variance 1.

    Args:
        like: that of another optimizer with the same seeds: correlated with it by SEED_CORRELATION.
    """
    doublings = np.log2(BATCH_SIZES)
    over_batches = _root(BATCH_CORRELATION ** np.abs(doublings[:, None] - doublings))
    over_rates = _root(RATE_CORRELATION ** np.abs(OFFSETS[:, None] - OFFSETS))
    size = (num_studies, 2 + num_seeds, len(BATCH_SIZES), len(OFFSETS))
    luck: Array = over_batches @ generator.normal(size=size) @ over_rates.T
    if like is not None:
        luck = np.sqrt(1 - SEED_CORRELATION) * luck + np.sqrt(SEED_CORRELATION) * like
    return luck


def simulate(
    landscape: Landscape, luck: Array, generator: Generator, shape: float = 1.0
) -> SimulatedStudies:
    """Two seeds select the rates, and the others report at these.

    The first climbs: its trials reach on either side to a rate that needs over 12 % more steps than
    the best, or misses. Of those within 12 %, the best three at most run the second. Of the rates
    that reached on both, the one of least mean log steps is chosen. Where a report seed misses
    there, all of them move to the next lower rate.
    """
    optimum = _optima(len(luck), generator)
    off = OFFSETS + np.round(optimum)[..., None] - optimum[..., None]
    true = np.log((S_MIN**shape + (E_MIN / BATCH_SIZES) ** shape) ** (1 / shape))
    means = true[:, None] + landscape.curvature * off**2  # (studies, batch sizes, rates)
    log_steps = means[:, None] + landscape.deviations[:, None] * luck
    if landscape.edge is not None:
        spread = generator.normal(size=log_steps.shape[:3]) * landscape.edge_spread
        beyond = off[:, None] > landscape.edge + spread[..., None]
        log_steps = np.where(beyond, np.inf, log_steps)
    chosen, num_selecting = _select(log_steps[:, 0], log_steps[:, 1])
    reported = np.moveaxis(log_steps[:, 2:], 1, -1)  # (studies, batch sizes, rates, seeds)
    may = np.isfinite(reported).all(axis=-1) & (np.arange(len(OFFSETS)) <= chosen[..., None])
    final = np.where(may, np.arange(len(OFFSETS)), -1).max(axis=-1)
    assert final.min() >= 0  # four √2-steps below the optimum every seed reaches
    moves = 1 + chosen - final
    return SimulatedStudies(
        log_steps=np.take_along_axis(reported, final[..., None, None], axis=2)[:, :, 0],
        truth=_at(means, final),
        log_rates=STEP_LOG * (np.round(optimum) + OFFSETS[final]),
        trials=float(np.mean(num_selecting + reported.shape[-1] * moves)),
    )


def _optima(num_studies: int, generator: Generator) -> Array:
    """Of the rate, in √2-steps of the grid: (studies, batch sizes)."""
    slope = RATE_EXPONENT * np.log(BATCH_SIZES / BATCH_SIZES[0]) / STEP_LOG
    start = generator.uniform(-0.5, 0.5, (num_studies, 1))
    wander = WANDER * generator.normal(size=(num_studies, len(BATCH_SIZES)))
    optima: Array = start + slope + wander
    return optima


def _root(correlation: Array) -> Array:
    return np.linalg.cholesky(correlation).astype(np.float64)


def _select(first: Array, second: Array) -> tuple[Counts, Counts]:
    """The index of the rate that two seeds choose, and how many runs that took."""
    index = np.arange(len(OFFSETS))
    best = first.argmin(axis=-1)[..., None]
    far = first > first.min(axis=-1, keepdims=True) + NEAR
    left = np.where(far & (index < best), index, 0).max(axis=-1)
    right = np.where(far & (index > best), index, len(OFFSETS) - 1).min(axis=-1)
    rank = first.argsort(axis=-1).argsort(axis=-1)
    confirmed = ~far & (rank < MOST_CONFIRMED)
    score = np.where(confirmed, first + second, np.inf)
    # Where the second seed misses at all of them, the lowest is as near as the protocol gets.
    nowhere = np.isinf(score).all(axis=-1)
    chosen = np.where(nowhere, confirmed.argmax(axis=-1), score.argmin(axis=-1))
    return chosen, right - left + 1 + confirmed.sum(axis=-1)


def _at(values: Array, index: Counts) -> Array:
    taken: Array = np.take_along_axis(values, index[..., None], axis=2)[..., 0]
    return taken
