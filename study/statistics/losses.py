"""Final losses of seeds: their means, and optimizers and batch sizes compared seed by seed.

As steps are (`intervals.py`, `pairs.py`), but of losses themselves, since a difference of losses
means the same wherever it lies and a ratio of steps does. Means have Student's t with variances
moderated over batch sizes, differences are of the same seeds, bands are Bonferroni's, verdicts
Holm's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from largebatch.study.statistics.intervals import Estimate, check_confidence
from largebatch.study.statistics.solver import Array
from largebatch.study.statistics.student import Interval, Means, holm, moderated_means

LossVerdict = Literal["lower", "higher", "not told apart"]


class SeedLoss(NamedTuple):
    """The final loss of one seed, of one optimizer at one batch size."""

    optimizer: str
    batch_size: int
    seed: int
    loss: float


@dataclass(frozen=True)
class MeanLoss:
    """The mean over seeds at one batch size; `band` holds at all batch sizes at once."""

    batch_size: int
    loss: Estimate
    band: Estimate
    num_seeds: int


@dataclass(frozen=True)
class LossDifference:
    """A mean difference over common seeds at one batch size.

    `p` is adjusted over the batch sizes (Holm); with one common seed there is none, nor an
    interval.
    """

    batch_size: int
    difference: Estimate
    band: Estimate
    p: float | None
    verdict: LossVerdict
    num_seeds: int


@dataclass(frozen=True)
class LossPair:
    """`optimizer` less `other`, at the batch sizes where they have a seed in common."""

    optimizer: str
    other: str
    points: tuple[LossDifference, ...]


def loss_means(rows: Sequence[SeedLoss], confidence: float = 0.95) -> dict[str, list[MeanLoss]]:
    """The mean loss of each optimizer at each batch size, in the order of `rows`.

    Raises:
        ValueError: two rows of one optimizer, batch size and seed.
    """
    check_confidence(confidence)
    names, sizes, losses = _array(rows)
    means = moderated_means(losses)
    own, bands = means.interval(confidence), means.bands(confidence)
    count = np.sum(~np.isnan(losses), axis=2)
    return {
        name: [
            MeanLoss(size, _entry(own, one, at), _entry(bands, one, at), int(count[one, at]))
            for at, size in enumerate(sizes)
            if count[one, at]
        ]
        for one, name in enumerate(names)
    }


def loss_pairs(rows: Sequence[SeedLoss], confidence: float = 0.95) -> list[LossPair]:
    """Compare each two optimizers, the later in `rows` less the earlier.

    >>> rows = [
    ...     SeedLoss(name, 64, seed, loss)
    ...     for name, losses in {"adamw": (2.00, 2.02, 1.99), "sgd": (2.10, 2.13, 2.10)}.items()
    ...     for seed, loss in enumerate(losses)
    ... ]
    >>> [pair] = loss_pairs(rows)
    >>> round(pair.points[0].difference.value, 3), pair.points[0].verdict
    (0.107, 'higher')
    """
    check_confidence(confidence)
    names, sizes, losses = _array(rows)
    two = list(combinations(range(len(names)), 2))
    if not two:
        return []
    first, second = (np.array(side) for side in zip(*two, strict=True))
    found = _differences(losses[second] - losses[first], sizes, confidence)
    return [
        LossPair(names[later], names[earlier], tuple(points))
        for (earlier, later), points in zip(two, found, strict=True)
    ]


def batch_excess(
    rows: Sequence[SeedLoss], confidence: float = 0.95
) -> dict[str, list[LossDifference]]:
    """Of each optimizer, the loss at every other batch size less that at its best one."""
    check_confidence(confidence)
    names, sizes, losses = _array(rows)
    if not names:
        return {}
    means = moderated_means(losses).value
    best = np.nanargmin(means, axis=1)
    reference = np.take_along_axis(losses, best[:, None, None], axis=1)
    over = losses - reference
    over[np.arange(len(names)), best] = np.nan
    return dict(zip(names, _differences(over, sizes, confidence), strict=True))


def _differences(
    values: Array, sizes: Sequence[int], confidence: float
) -> list[list[LossDifference]]:
    """Of (…, batch sizes, seeds), NaN where there is no difference."""
    means = moderated_means(values)
    own, bands = means.interval(confidence), means.bands(confidence)
    p, count = holm(means.p_values()), np.sum(~np.isnan(values), axis=2)

    def one(row: int, at: int) -> LossDifference:
        chance = None if np.isnan(p[row, at]) else float(p[row, at])
        return LossDifference(
            sizes[at],
            _entry(own, row, at),
            _entry(bands, row, at),
            chance,
            _verdict(means, row, at, chance is not None and chance <= 1 - confidence),
            int(count[row, at]),
        )

    return [[one(row, at) for at in np.flatnonzero(own).tolist()] for row, own in enumerate(count)]


def _verdict(means: Means, row: int, at: int, is_told: bool) -> LossVerdict:
    if not is_told:
        return "not told apart"
    return "lower" if means.value[row, at] < 0 else "higher"


def _array(rows: Sequence[SeedLoss]) -> tuple[list[str], list[int], Array]:
    """Optimizers, batch sizes, and losses over these and seeds; NaN where there is no such row."""
    names = list(dict.fromkeys(row.optimizer for row in rows))
    sizes = sorted({row.batch_size for row in rows})
    seeds = sorted({row.seed for row in rows})
    losses = np.full((len(names), len(sizes), len(seeds)), np.nan)
    for row in rows:
        cell = names.index(row.optimizer), sizes.index(row.batch_size), seeds.index(row.seed)
        if not np.isnan(losses[cell]):
            raise ValueError(
                f"two rows of optimizer {row.optimizer!r}, batch size {row.batch_size} and seed "
                f"{row.seed}: a final loss needs one row a seed"
            )
        losses[cell] = row.loss
    return names, sizes, losses


def _entry(interval: Interval, *index: int) -> Estimate:
    value, low, high = (
        float(array[index]) for array in (interval.value, interval.low, interval.high)
    )
    return Estimate(value) if np.isnan(low) else Estimate(value, low, high)
