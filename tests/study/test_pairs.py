"""Optimizers are compared seed by seed, and told apart only where chance is no answer."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from largebatch.study.statistics.intervals import intervals
from largebatch.study.statistics.pairs import Pair, pairs
from largebatch.study.statistics.table import SeedSteps

BATCHES = [2**power for power in range(6, 15)]


def study(factors: dict[str, float], num_seeds: int = 5, own: float = 0.02) -> list[SeedSteps]:
    """Seeds that differ by 8 %, alike for all optimizers, and by `own` for each."""
    generator = np.random.default_rng(0)
    common = 0.08 * generator.normal(size=num_seeds)
    return [
        SeedSteps(
            name,
            batch,
            seed,
            factor * (23 + 30_000 / batch) * math.exp(common[seed] + own * generator.normal()),
        )
        for name, factor in factors.items()
        for batch in BATCHES
        for seed in range(num_seeds)
    ]


def only(rows: Sequence[SeedSteps]) -> Pair:
    (found,) = pairs(rows)
    return found


def test_common_luck_cancels_in_the_ratio() -> None:
    rows = study({"adamw": 1.0, "lamb": 1.08}, own=0.01)
    pair = only(rows)
    assert (pair.optimizer, pair.other) == ("lamb", "adamw")
    assert [point.batch_size for point in pair.points] == BATCHES
    alone = intervals(rows)["adamw"].points
    for point, single in zip(pair.points, alone, strict=True):
        assert point.verdict == "more"
        assert point.p is not None
        assert point.p <= 0.05
        assert point.ratio.value == pytest.approx(1.08, rel=0.05)
        assert point.ratio.low is not None
        assert point.ratio.high is not None
        assert point.band.low is not None
        assert point.band.low < point.ratio.low < point.ratio.value < point.ratio.high
        assert single.steps is not None
        assert single.steps.high is not None
        assert point.ratio.high / point.ratio.value < single.steps.high / single.steps.value
        assert point.num_seeds == 5


def test_the_ratio_is_the_geometric_mean_over_seeds_in_common() -> None:
    rows = [
        row for row in study({"adamw": 1.0, "lamb": 1.1}) if row.seed or row.optimizer == "lamb"
    ]
    first = only(rows).points[0]
    steps = {(row.optimizer, row.seed): row.steps or 0 for row in rows if row.batch_size == 64}
    logs = [math.log(steps["lamb", seed] / steps["adamw", seed]) for seed in range(1, 5)]
    assert first.num_seeds == 4
    assert first.ratio.value == pytest.approx(math.exp(sum(logs) / 4))


def test_who_comes_first_in_the_rows_is_the_one_compared_with() -> None:
    rows = study({"adamw": 1.0, "lamb": 1.08})
    pair, reversed_pair = only(rows), only(rows[::-1])
    assert (reversed_pair.optimizer, reversed_pair.other) == ("adamw", "lamb")
    for one, other in zip(pair.points, reversed_pair.points, strict=True):
        assert one.ratio.value == pytest.approx(1 / other.ratio.value)
        assert one.p == pytest.approx(other.p)
        assert (one.verdict, other.verdict) == ("more", "fewer")


def test_what_may_be_chance_is_not_told_apart() -> None:
    pair = only(study({"adamw": 1.0, "lamb": 1.0}, own=0.08))
    assert {point.verdict for point in pair.points} == {"not told apart"}
    assert all(point.p is not None and point.p > 0.05 for point in pair.points)


def test_p_counts_the_batch_sizes_looked_at() -> None:
    rows = study({"adamw": 1.0, "lamb": 1.05}, own=0.04)
    for point, alone in (
        (point, only([row for row in rows if row.batch_size == point.batch_size]).points[0])
        for point in only(rows).points
    ):
        assert point.ratio.value == pytest.approx(alone.ratio.value)
        assert alone.band == alone.ratio  # one batch size: nothing to share the chance with


def test_the_ratio_of_critical_batch_sizes_is_that_of_the_two_printed() -> None:
    rows = study({"adamw": 1.0, "lamb": 1.0})
    found, pair = intervals(rows), only(rows)
    one, other = found["lamb"].b_crit, found["adamw"].b_crit
    assert one is not None
    assert other is not None
    assert pair.b_crit is not None
    assert pair.b_crit.value == pytest.approx(one.value / other.value)
    assert pair.b_crit.low is not None
    assert pair.b_crit.high is not None
    assert pair.b_crit.low < 1 < pair.b_crit.high


def test_one_seed_in_common_has_ratios_and_no_verdicts() -> None:
    pair = only(study({"adamw": 1.0, "lamb": 2.0}, num_seeds=1))
    for point in pair.points:
        assert (point.ratio.low, point.p, point.verdict) == (None, None, "not told apart")
    assert pair.b_crit is not None
    assert pair.b_crit.low is None


def test_batch_sizes_that_one_missed_or_lacks_are_left_out() -> None:
    rows = [
        replace(row, steps=None) if row.optimizer == "lamb" and row.batch_size == 64 else row
        for row in study({"adamw": 1.0, "lamb": 1.1})
        if row.optimizer == "lamb" or row.batch_size < 16_384
    ]
    assert [point.batch_size for point in only(rows).points] == BATCHES[1:-1]


def test_each_two_optimizers_are_a_pair() -> None:
    found = pairs(study({"sgd": 1.4, "adamw": 1.0, "lamb": 1.1}))
    names = [(pair.optimizer, pair.other) for pair in found]
    assert names == [("adamw", "sgd"), ("lamb", "sgd"), ("lamb", "adamw")]
    assert pairs(study({"adamw": 1.0})) == []
    assert pairs([]) == []


def test_seeds_that_agree_to_the_last_bit_are_told_apart_or_equal() -> None:
    rows = [
        SeedSteps(name, 64, seed, steps)
        for name, steps in (("a", 100.0), ("b", 100.0), ("c", 50.0))
        for seed in range(3)
    ]
    same, fewer, also = pairs(rows)
    assert (same.points[0].p, same.points[0].verdict) == (1.0, "not told apart")
    assert (fewer.points[0].p, fewer.points[0].verdict) == (0.0, "fewer")
    assert also.points[0].verdict == "fewer"
