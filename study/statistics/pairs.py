"""Two optimizers on the same seeds: which needs fewer steps, at which batch size, and how sure.

A seed that is fast with one optimizer tends to be fast with the other, so the logarithms of the
steps are compared seed by seed. Nothing is said of what may be chance: of the batch sizes of two
optimizers that are the same, one is told apart in at most 5 of 100 studies (Holm 1979).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from largebatch.study.statistics.intervals import (
    Estimate,
    check_confidence,
    estimate,
    refit_table,
)
from largebatch.study.statistics.jackknife import ratio_of_b_crit
from largebatch.study.statistics.student import holm, moderated_means
from largebatch.study.statistics.table import table_of

Told = Literal["fewer", "more", "not told apart"]


@dataclass(frozen=True)
class PairPoint:
    """The steps of one optimizer over those of the other at one batch size.

    `ratio` is the geometric mean over their common seeds, and `band` is wider: with its confidence
    the bands of all the pair's batch sizes hold at once (Bonferroni). `p` is adjusted over them
    (Holm); `verdict` says which needs fewer steps where p is at most 1 - confidence. With one
    common seed there are no intervals and no p.
    """

    batch_size: int
    ratio: Estimate
    band: Estimate
    p: float | None
    verdict: Told
    num_seeds: int


@dataclass(frozen=True)
class Pair:
    """`optimizer` over `other`: at the batch sizes where both reached with a seed in common.

    `b_crit` is the ratio of their critical batch sizes, each from the form printed for it, or None
    where one has no fit; a seed is left out of both fits at once.
    """

    optimizer: str
    other: str
    points: tuple[PairPoint, ...]
    b_crit: Estimate | None


def pairs(rows: Iterable[Any], confidence: float = 0.95) -> list[Pair]:
    """Compare each two optimizers, the later in `rows` over the earlier.

    Args:
        rows: as `intervals` takes them.
        confidence: of each interval; 1 - confidence is the most that Holm's p may be.

    Raises:
        ValueError: as `intervals`.

    >>> rows = [
    ...     {"optimizer": name, "batch_size": 64, "seed": seed, "steps": steps}
    ...     for name, found in {"adamw": (450, 430, 480), "lamb": (500, 481, 530)}.items()
    ...     for seed, steps in enumerate(found)
    ... ]
    >>> [pair] = pairs(rows)
    >>> pair.optimizer, pair.other, round(pair.points[0].ratio.value, 2), pair.points[0].verdict
    ('lamb', 'adamw', 1.11, 'more')
    """
    check_confidence(confidence)
    table = table_of(rows)
    two = list(combinations(range(len(table.optimizers)), 2))
    if not two:
        return []
    first, second = (np.array(side) for side in zip(*two, strict=True))
    differences = table.points[second] - table.points[first]
    means = moderated_means(differences)
    ratios, bands = means.interval(confidence), means.bands(confidence)
    p = holm(means.p_values())
    num_seeds = np.sum(~np.isnan(differences), axis=2)
    refits = refit_table(table, confidence)
    b_crit = ratio_of_b_crit(refits.at(second), refits.at(first), confidence)

    def point(pair: int, at: int) -> PairPoint:
        chance = None if np.isnan(p[pair, at]) else float(p[pair, at])
        is_told = chance is not None and chance <= 1 - confidence
        side: Told = "fewer" if means.value[pair, at] < 0 else "more"
        return PairPoint(
            batch_size=int(table.batch_sizes[at]),
            ratio=estimate(ratios, pair, at),
            band=estimate(bands, pair, at),
            p=chance,
            verdict=side if is_told else "not told apart",
            num_seeds=int(num_seeds[pair, at]),
        )

    return [
        Pair(
            optimizer=table.optimizers[later],
            other=table.optimizers[earlier],
            points=tuple(point(pair, at) for at in np.flatnonzero(num_seeds[pair]).tolist()),
            b_crit=None if np.isnan(b_crit.value[pair]) else estimate(b_crit, pair),
        )
        for pair, (earlier, later) in enumerate(two)
    ]
