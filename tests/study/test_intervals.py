"""Rows of seeds become estimates with intervals, and what seeds cannot tell has none."""

import math
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest

from largebatch.study.fit import fit_curve
from largebatch.study.statistics.intervals import CurveEstimates, Estimate, intervals
from largebatch.study.statistics.student import t_quantile
from largebatch.study.statistics.table import SeedSteps

BATCHES = [2**power for power in range(6, 15)]
S_MIN, E_MIN = 23.0, 30_000.0


def study(
    num_seeds: int = 5,
    batches: Sequence[int] = BATCHES,
    noise: float = 0.06,
    shape: float = 1.0,
    optimizer: str = "adamw",
    seed: int = 0,
) -> list[SeedSteps]:
    luck = np.random.default_rng(seed).normal(size=(num_seeds, len(batches)))
    return [
        SeedSteps(
            optimizer,
            batch,
            2 + index,
            (S_MIN**shape + (E_MIN / batch) ** shape) ** (1 / shape) * math.exp(noise * each),
            rate=0.005 * math.sqrt(batch / 64),
        )
        for index, row in enumerate(luck)
        for batch, each in zip(batches, row, strict=True)
    ]


def only(rows: Sequence[object], confidence: float = 0.95) -> CurveEstimates:
    (found,) = intervals(rows, confidence).values()
    return found


def known(estimate: Estimate | None) -> tuple[float, float, float]:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.value < estimate.high
    return estimate.value, estimate.low, estimate.high


def curve_estimates(found: CurveEstimates) -> Iterator[Estimate | None]:
    for name in ("s_min", "e_min", "b_crit", "shape", "cbs20", "b_80", "b_50"):
        yield getattr(found, name)


def test_b_crit_has_the_interval_of_the_jackknife_over_seeds() -> None:
    rows = study(4)

    def b_crit(without: int | None) -> float:
        logs = {
            batch: [
                math.log(row.steps or 0)
                for row in rows
                if row.batch_size == batch and row.seed != without
            ]
            for batch in BATCHES
        }
        fit = fit_curve(BATCHES, [math.exp(sum(each) / len(each)) for each in logs.values()])
        assert fit is not None
        return math.log(fit.b_crit)

    left_out = [b_crit(seed) for seed in range(2, 6)]
    mean = sum(left_out) / 4
    error = math.sqrt(3 / 4 * sum((each - mean) ** 2 for each in left_out))
    found = only(rows)
    assert found.shape_is_one
    reach = t_quantile(0.95, 3) * error
    expected = [math.exp(b_crit(None) + side * reach) for side in (0, -1, 1)]
    assert known(found.b_crit) == pytest.approx(expected, rel=1e-8)


def test_a_point_is_the_geometric_mean_with_a_band_wider_than_its_interval() -> None:
    rows = study(5)
    found = only(rows)
    assert [point.batch_size for point in found.points] == BATCHES
    for point in found.points:
        value, low, high = known(point.steps)
        logs = [math.log(row.steps or 0) for row in rows if row.batch_size == point.batch_size]
        assert value == pytest.approx(math.exp(sum(logs) / 5))
        assert value / low == pytest.approx(high / value)
        _, band_low, band_high = known(point.band)
        ratio = t_quantile(1 - 0.05 / 9, 10) / t_quantile(0.95, 10)
        assert math.log(band_high / value) == pytest.approx(ratio * math.log(high / value))
        assert band_low < low
        assert (point.num_seeds, point.num_missed) == (5, 0)
        assert point.rate == pytest.approx(0.005 * math.sqrt(point.batch_size / 64))


def test_luck_that_a_seed_has_everywhere_leaves_b_crit_alone_and_moves_the_points() -> None:
    rows = [replace(row, steps=(row.steps or 0) * 1.1**row.seed) for row in study(5, noise=0.0)]
    found = only(rows)
    assert found.b_crit is not None
    assert found.b_crit.low == pytest.approx(found.b_crit.high, rel=1e-6)
    assert found.b_crit.value == pytest.approx(E_MIN / S_MIN, rel=1e-6)
    assert known(found.points[0].steps)[2] > 1.1 * known(found.points[0].steps)[0]
    assert known(found.s_min)[2] > 1.1 * known(found.s_min)[0]


def test_with_one_seed_there_are_values_and_no_intervals() -> None:
    found = only(study(1))
    for each in (*curve_estimates(found), *(point.steps for point in found.points)):
        assert each is not None
        assert (each.low, each.high) == (None, None)
    assert found.shape_is_one
    assert not found.identified


@pytest.mark.parametrize(("shape", "is_one"), [(1.0, True), (1.6, False), (0.6, False)])
def test_the_printed_fit_has_the_shape_that_the_seeds_tell(shape: float, is_one: bool) -> None:
    found = only(study(8, noise=0.03, shape=shape))
    assert found.shape_is_one == is_one
    _, low, high = known(found.shape)
    assert low < shape < high
    assert (low < 1 < high) == is_one
    assert found.b_crit is not None
    assert found.b_crit.value == pytest.approx(E_MIN / S_MIN, rel=0.1)
    assert found.identified
    assert found.rms is not None
    assert 0 < found.rms < 0.03


@pytest.mark.parametrize("shape", [1.0, 1.4])
def test_batch_sizes_of_an_efficiency_are_where_the_samples_are(shape: float) -> None:
    found = only(study(2, noise=1e-6, shape=shape))

    def samples(batch: float) -> float:
        return ((batch * S_MIN) ** shape + E_MIN**shape) ** (1 / shape)

    for estimate, share in ((found.b_80, 0.8), (found.b_50, 0.5), (found.cbs20, 1 / 1.2)):
        assert estimate is not None
        assert samples(64) / samples(estimate.value) == pytest.approx(share, rel=1e-3)
    assert found.cbs20 is not None
    if shape == 1:  # Zhang et al.: 0.2 E_min / S_min + 1.2 of their optimal batch size
        assert found.cbs20.value == pytest.approx(0.2 * E_MIN / S_MIN + 1.2 * 64, rel=1e-3)


def test_b_crit_is_identified_where_seeds_agree_and_batches_reach_to_both_sides() -> None:
    assert only(study(5)).identified
    assert not only(study(5, BATCHES[:5])).identified  # 1,024 at most
    assert not only(study(5, BATCHES[4:])).identified
    assert not only(study(3, noise=0.5)).identified


def test_the_rates_exponent_is_the_slope_and_knows_the_grid() -> None:
    value, low, high = known(only(study(5)).rate_exponent)
    assert value == pytest.approx(0.5)
    # Rates on a line, as a grid of factors √2 gives them: rounding to it stays.
    assert 0.04 < high - value < 0.09
    assert value - low == pytest.approx(high - value)
    assert only([replace(row, rate=None) for row in study(2)]).rate_exponent is None


def test_a_batch_size_where_a_seed_missed_is_no_point() -> None:
    rows = [
        replace(row, steps=None) if (row.batch_size, row.seed) == (16_384, 3) else row
        for row in study(5)
    ]
    found, without = only(rows), only([row for row in study(5) if row.batch_size < 16_384])
    last = found.points[-1]
    assert (last.steps, last.band, last.num_seeds, last.num_missed) == (None, None, 5, 1)
    assert found.b_crit == without.b_crit
    assert found.points[0].band == without.points[0].band


def test_a_miss_at_the_small_end_bounds_the_curve_where_its_limit_is_known() -> None:
    rows = study(4, BATCHES[4:], noise=0.02)
    missed = [SeedSteps("adamw", 64, 2 + index, None) for index in range(4)]
    bound = [replace(row, at_least=3000.0) for row in missed]
    free, unknown, bounded = only(rows), only([*missed, *rows]), only([*bound, *rows])
    assert free.e_min is not None
    assert unknown.e_min == pytest.approx(free.e_min)
    assert bounded.e_min is not None
    assert bounded.e_min.value > 1.2 * free.e_min.value
    assert bounded.points[0].steps is None
    low = [replace(row, at_least=5.0) for row in missed]
    slack = only([*low, *rows])
    assert slack.e_min is not None
    assert slack.e_min.value == pytest.approx(free.e_min.value, rel=1e-9)


def test_a_seed_that_is_missing_at_some_sizes_counts_where_it_ran() -> None:
    rows = [row for row in study(5) if row.seed < 5 or row.batch_size < 4096]
    found = only(rows)
    assert [point.num_seeds for point in found.points] == [5] * 6 + [3] * 3
    _, low, high = known(found.b_crit)
    full = known(only(study(5)).b_crit)
    # The freedom of three seeds, 2: t is 4.30 instead of 2.78.
    assert math.log(high / low) > math.log(full[2] / full[1])
    lonely = only([row for row in study(5) if row.seed == 2 or row.batch_size < 16_384])
    assert lonely.b_crit is not None
    assert (lonely.b_crit.low, lonely.b_crit.high) == (None, None)
    assert lonely.points[-1].steps is not None
    assert lonely.points[-1].steps.low is None
    assert known(lonely.points[0].steps)


def test_too_few_batch_sizes_have_points_and_no_curve() -> None:
    two, three = only(study(3, BATCHES[:2])), only(study(3, BATCHES[::4]))
    assert list(curve_estimates(two)) == [None] * 7
    assert [known(point.steps) for point in two.points]
    assert three.shape is None
    assert three.shape_is_one
    assert known(three.b_crit)
    assert known(three.b_80)


def test_steps_without_a_bend_have_no_interval() -> None:
    rows = [replace(row, steps=1e6 / row.batch_size) for row in study(3)]
    found = only(rows)
    assert found.b_crit is not None
    assert found.b_crit.low is None
    assert not found.identified


def test_rows_may_be_mappings_or_tuples_and_optimizers_keep_their_order() -> None:
    rows = study(3, optimizer="sgd") + study(3, optimizer="adamw", seed=1)
    Row = namedtuple("Row", ["Index", "optimizer", "batch_size", "seed", "steps", "rate"])
    tuples = [
        Row(index, r.optimizer, np.int64(r.batch_size), np.int64(r.seed), r.steps, r.rate)
        for index, r in enumerate(rows)
    ]
    expected = intervals(rows)
    assert list(expected) == ["sgd", "adamw"]
    assert intervals(list(map(asdict, rows))) == expected
    assert intervals(tuples) == expected
    # As pandas writes a miss.
    lost = [replace(row, steps=None) if row.batch_size == 64 else row for row in rows]
    holes = [asdict(row) | {"steps": row.steps or math.nan} for row in lost]
    assert intervals(holes) == intervals(lost)
    assert intervals([]) == {}


def test_impossible_rows_are_refused_by_name() -> None:
    row = SeedSteps("adamw", 64, 2, 400.0)
    with pytest.raises(
        ValueError, match=r"two rows of optimizer 'adamw', batch size 64 and seed 2"
    ):
        intervals([row, row])
    with pytest.raises(ValueError, match=r"steps must be a number > 0.*got -1"):
        intervals([replace(row, steps=-1.0)])
    with pytest.raises(ValueError, match=r"batch_size must be a whole number of at least 1"):
        intervals([replace(row, batch_size=0)])
    with pytest.raises(ValueError, match=r"needs optimizer, batch_size, seed and steps"):
        intervals([{"optimizer": "adamw", "steps": 3}])
    with pytest.raises(ValueError, match=r"confidence must be > 0 and < 1.*got 95"):
        intervals([row], confidence=95)
