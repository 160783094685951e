"""The fit of one curve recovers what it should, and says what it cannot know."""

import math
from statistics import median

import numpy as np
import pytest

from largebatch.study.fit import fit_curve

BATCHES = [2**power for power in range(6, 15)]  # 64 ... 16,384
S_MIN, E_MIN = 23.3, 30_200.0


def steps_at(batch_size: float, s_min: float = S_MIN, e_min: float = E_MIN) -> float:
    return s_min + e_min / batch_size


@pytest.mark.parametrize(
    ("s_min", "e_min"), [(23.3, 30_200.0), (40.9, 37_200.0), (3.0, 2_000.0), (5e4, 3e8)]
)
def test_exact_steps_give_their_constants_back(s_min: float, e_min: float) -> None:
    fit = fit_curve(BATCHES, [steps_at(batch, s_min, e_min) for batch in BATCHES])
    assert fit is not None
    assert fit.s_min == pytest.approx(s_min, rel=1e-8)
    assert fit.e_min == pytest.approx(e_min, rel=1e-8)
    assert fit.b_crit == pytest.approx(e_min / s_min, rel=1e-8)
    assert fit.shape == 1
    assert fit.rms < 1e-8
    assert steps_at(fit.b_crit, fit.s_min, fit.e_min) == pytest.approx(2 * s_min, rel=1e-8)


@pytest.mark.parametrize("shape", [0.6, 1.0, 1.4, 3.0])
def test_exact_steps_give_their_shape_back(shape: float) -> None:
    steps = [(S_MIN**shape + (E_MIN / batch) ** shape) ** (1 / shape) for batch in BATCHES]
    fit = fit_curve(BATCHES, steps, shape=None)
    given = fit_curve(BATCHES, steps, shape=shape)
    assert fit is not None
    assert given is not None
    assert fit.shape == pytest.approx(shape, rel=1e-6)
    assert fit.b_crit == pytest.approx(E_MIN / S_MIN, rel=1e-6)
    assert given.b_crit == pytest.approx(E_MIN / S_MIN, rel=1e-8)


def test_the_order_of_the_points_does_not_matter() -> None:
    noisy = [steps_at(batch) * (1.05 if batch % 3 == 1 else 0.97) for batch in BATCHES]
    forward = fit_curve(BATCHES, noisy)
    backward = fit_curve(BATCHES[::-1], noisy[::-1])
    assert forward is not None
    assert backward is not None
    assert forward.b_crit == pytest.approx(backward.b_crit, rel=1e-9)


def test_one_outlier_moves_the_critical_batch_little() -> None:
    steps = [steps_at(batch) for batch in BATCHES]
    steps[4] *= 3
    fit = fit_curve(BATCHES, steps)
    assert fit is not None
    assert fit.b_crit == pytest.approx(E_MIN / S_MIN, rel=0.05)
    assert fit.rms == pytest.approx(math.log(3) / 3, rel=0.05)  # it is not hidden either


def test_a_miss_at_the_small_end_lifts_the_curve() -> None:
    batches, steps = [1024, 2048, 4096, 8192], [steps_at(batch) for batch in BATCHES[4:8]]
    free = fit_curve(batches, steps)
    bounded = fit_curve(batches, steps, [64], [4 * steps_at(64)])
    assert free is not None
    assert bounded is not None
    assert bounded.num_censored == 1
    assert steps_at(64, free.s_min, free.e_min) == pytest.approx(steps_at(64), rel=1e-6)
    assert steps_at(64, bounded.s_min, bounded.e_min) > 1.3 * steps_at(64)


def test_a_miss_below_the_curve_changes_nothing() -> None:
    batches, steps = BATCHES[1:], [steps_at(batch) for batch in BATCHES[1:]]
    fit = fit_curve(batches, steps, [64], [0.5 * steps_at(64)])
    assert fit is not None
    assert fit.b_crit == pytest.approx(E_MIN / S_MIN, rel=1e-8)
    assert fit.num_censored == 1


def test_a_miss_beyond_or_amid_the_batches_says_nothing_of_the_curve() -> None:
    steps = [steps_at(batch) for batch in BATCHES]
    fit = fit_curve(BATCHES[:-1], steps[:-1], [16_384, 300], [10 * steps[-1], 10 * steps[0]])
    assert fit is not None
    assert fit.b_crit == pytest.approx(E_MIN / S_MIN, rel=1e-8)
    assert fit.num_censored == 0


def test_two_missed_large_batches_move_the_critical_batch_by_less_than_five_per_cent() -> None:
    """Held at twice their neighbour's steps, as bounds, they moved it by 23 % (seeds: 8 %)."""
    generator = np.random.default_rng(1)
    moved = []
    for _ in range(60):
        luck = np.exp(0.08 / math.sqrt(5) * generator.normal(size=len(BATCHES)))
        steps = [steps_at(batch) * each for batch, each in zip(BATCHES, luck, strict=True)]
        whole = fit_curve(BATCHES, steps)
        missed = fit_curve(BATCHES[:-2], steps[:-2], BATCHES[-2:], [2 * steps[-3]] * 2)
        assert whole is not None
        assert missed is not None
        moved.append(math.log(missed.b_crit / whole.b_crit))
    assert abs(median(moved)) < 0.03
    assert median(map(abs, moved)) < 0.05


def test_a_critical_batch_outside_the_batches_is_not_identified() -> None:
    inside = fit_curve(BATCHES, [steps_at(batch) for batch in BATCHES])
    left = fit_curve(BATCHES[:5], [steps_at(batch) for batch in BATCHES[:5]])
    right = fit_curve(BATCHES[4:], [steps_at(batch) for batch in BATCHES[4:]])
    assert inside is not None
    assert inside.identified
    assert left is not None
    assert not left.identified
    assert right is not None
    assert not right.identified


@pytest.mark.parametrize("steps", [[640.0, 320.0, 160.0, 80.0], [50.0, 50.0, 50.0, 50.0]])
@pytest.mark.parametrize("shape", [1.0, None])
def test_steps_without_a_bend_end_finite_and_unidentified(
    steps: list[float], shape: float | None
) -> None:
    fit = fit_curve([64, 128, 256, 512], steps, shape=shape)
    assert fit is not None
    assert math.isfinite(fit.b_crit)
    assert fit.s_min > 0
    assert not fit.identified


def test_fewer_than_three_batch_sizes_have_no_fit() -> None:
    assert fit_curve([], []) is None
    assert fit_curve([64, 128], [500, 250]) is None
    assert fit_curve([64, 64, 128], [500, 510, 250]) is None
    assert fit_curve([64, 128], [500, 250], [256], [100]) is None
    assert fit_curve([64, 256, 1024], [500, 140, 50]) is not None
    assert fit_curve([64, 256, 1024], [500, 140, 50], shape=None) is None


def test_impossible_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"steps must be > 0 and finite, got 0"):
        fit_curve([64, 128, 256], [500, 0, 100])
    with pytest.raises(ValueError, match=r"batch_sizes must be > 0 and finite, got -1"):
        fit_curve([64, -1, 256], [500, 200, 100])
    with pytest.raises(ValueError, match="2/3"):
        fit_curve([64, 128, 256], [500, 200])
    with pytest.raises(ValueError, match=r"shape must be > 0 and finite, got 0"):
        fit_curve([64, 128, 256], [500, 200, 100], shape=0)
