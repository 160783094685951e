"""What the rates tried around a point say: how far off the best one a rate may be, and where the
target is missed."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Final

from largebatch.study.points import StudyPoint

NEAR: Final = 1.1
"""A rate is in the basin where it needs at most this many times the steps of the best."""


@dataclass(frozen=True)
class Basin:
    """The rates that cost at most 10 %, on the seed that tried most of them.

    Attributes:
        low, high: the ends, as tried; the true ones lie beyond, as far as the next rate.
        next_below, next_above: the rates next to the ends, where more steps are needed; None: no
            such rate was tried.
        first_miss: the lowest rate above the point's own at which a run missed or diverged.
    """

    low: float
    high: float
    next_below: float | None
    next_above: float | None
    first_miss: float | None


def basin_of(point: StudyPoint) -> Basin | None:
    """The basin around a point; None where it missed."""
    if point.missed or point.lr is None:
        return None
    by_seed: dict[int, dict[float, float | None]] = defaultdict(dict)
    for trial in point.basin:
        by_seed[trial.seed][trial.lr] = trial.steps
    with_own = {seed: rates for seed, rates in by_seed.items() if rates.get(point.lr) is not None}
    steps = max(with_own.values(), key=len)
    rates = sorted(steps)
    least = min(taken for taken in steps.values() if taken is not None)

    def is_near(rate: float) -> bool:
        taken = steps[rate]
        return rate == point.lr or (taken is not None and taken <= NEAR * least)

    low = high = rates.index(point.lr)
    while low > 0 and is_near(rates[low - 1]):
        low -= 1
    while high < len(rates) - 1 and is_near(rates[high + 1]):
        high += 1
    missed = [
        trial.lr
        for trial in point.basin
        if trial.lr > point.lr and trial.outcome in ("missed", "diverged")
    ]
    return Basin(
        rates[low],
        rates[high],
        rates[low - 1] if low else None,
        rates[high + 1] if high + 1 < len(rates) else None,
        min(missed, default=None),
    )
