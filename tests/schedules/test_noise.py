"""The noise scale's two estimates, their variances, and what a reading says of itself."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from largebatch.schedules.noise import NoiseScale

TRACE, SMALL, N = 1000.0, 8, 8
BIG = SMALL * N


def flat(d: int) -> NDArray[np.float64]:
    """Variances of one sample's gradient, the same in every direction."""
    return np.full(d, TRACE / d)


def harmonic(d: int) -> NDArray[np.float64]:
    """Variances as 1, 1/2, 1/3, …: a few directions hold most of the noise."""
    weights = 1 / np.arange(1.0, d + 1)
    return TRACE * weights / weights.sum()


def gaussian_pairs(
    steps: int, seed: int = 0, variances: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """(mean squared norm of N small gradients, that of their mean) of each step, ‖G‖² = 1."""
    variances = flat(50) if variances is None else variances
    generator = np.random.default_rng(seed)
    mean = np.full(len(variances), 1 / math.sqrt(len(variances)))
    pairs = []
    for first in range(0, steps, 100):  # as many at once as stay in the cache
        shape = (min(100, steps - first), N, len(variances))
        small = mean + np.sqrt(variances / SMALL) * generator.standard_normal(shape)
        squares = (small**2).sum(2).mean(1), (small.mean(1) ** 2).sum(1)
        pairs.append(np.stack(squares, axis=1))
    return np.concatenate(pairs)


def estimates(pairs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    readings = []
    for small, big in pairs:
        noise = NoiseScale(half_life_samples=1)
        noise.update(small_sq_norm=small, big_sq_norm=big, small_batch=SMALL, big_batch=BIG)
        readings.append(noise.reading())
    return np.array([r.grad_sq_norm for r in readings]), np.array([r.trace for r in readings])


def filled(pairs: NDArray[np.float64], half_life: float) -> NoiseScale:
    noise = NoiseScale(half_life_samples=half_life)
    for small, big in pairs:
        noise.update(small_sq_norm=small, big_sq_norm=big, small_batch=SMALL, big_batch=BIG)
    return noise


@pytest.mark.parametrize(("spectrum", "negative"), [(flat, 0.3), (harmonic, 0.45)])
def test_both_estimates_are_unbiased_and_have_the_variances_of_a_gaussian(
    spectrum: Callable[[int], NDArray[np.float64]], negative: float
) -> None:
    variances = spectrum(100)
    grad, trace = estimates(gaussian_pairs(30_000, variances=variances))
    trace_of_square = (variances**2).sum()
    # Exact: 2 tr(Σ²)/B² (1 + 1/(n-1)) + 4 GᵀΣG / B, and 2 tr(Σ²)/(n-1).
    var_grad = 2 * trace_of_square / BIG**2 * (1 + 1 / (N - 1)) + 4 * variances.mean() / BIG
    var_trace = 2 * trace_of_square / (N - 1)
    assert grad.var() == pytest.approx(var_grad, rel=0.03)
    assert trace.var() == pytest.approx(var_trace, rel=0.03)
    assert grad.mean() == pytest.approx(1.0, abs=4 * math.sqrt(var_grad / len(grad)))
    assert trace.mean() == pytest.approx(TRACE, abs=4 * math.sqrt(var_trace / len(trace)))
    # Why single readings, and clipping before the average, are of no use.
    assert (grad < 0).mean() > negative


def test_two_gradients_written_by_hand() -> None:
    noise = NoiseScale(half_life_samples=10)
    # (3, 0) and (1, 2): squared norms 9 and 5, their mean (2, 1) has 5.
    noise.update(small_sq_norm=7, big_sq_norm=5, small_batch=1, big_batch=2)
    reading = noise.reading()
    assert reading.trace == pytest.approx(4)  # (7 - 5) / (1 - 1/2): the sample covariance's trace
    assert reading.grad_sq_norm == pytest.approx(3)  # (2·5 - 7) / (2 - 1) = g₁·g₂
    assert reading.noise_scale == pytest.approx(4 / 3)
    assert not reading.resolved
    assert reading.standard_error == math.inf


@pytest.mark.parametrize("half_life", [3e4, 1e9])
def test_the_standard_error_is_that_of_the_reading(half_life: float) -> None:
    # The spread of 40 is known to 11 %, the median of theirs better.
    readings = [filled(gaussian_pairs(1000, seed), half_life).reading() for seed in range(40)]
    spread = np.std([r.noise_scale for r in readings], ddof=1)
    stated = np.median([r.standard_error for r in readings])
    assert stated == pytest.approx(spread, rel=0.4)
    within = [abs(r.noise_scale - TRACE) < 2.5 * r.standard_error for r in readings]
    assert np.mean(within) > 0.85


def test_a_short_window_is_unresolved_and_a_long_one_resolved() -> None:
    assert not filled(gaussian_pairs(6, variances=harmonic(50)), 1e9).reading().resolved
    reading = filled(gaussian_pairs(2000), 1e9).reading()
    assert reading.resolved
    assert reading.noise_scale == pytest.approx(TRACE, rel=0.2)


def test_no_gradient_at_all_is_unresolved_however_long() -> None:
    generator = np.random.default_rng(0)
    small = generator.standard_normal((3000, N, 20))
    pairs = np.stack([(small**2).sum(2).mean(1), (small.mean(1) ** 2).sum(1)], axis=1)
    assert not filled(pairs, 1e9).reading().resolved


def test_after_a_half_life_an_estimate_counts_half() -> None:
    noise = NoiseScale(half_life_samples=4)
    noise.update(small_sq_norm=8, big_sq_norm=4, small_batch=2, big_batch=4)  # tr 16, ‖G‖² 0
    noise.update(small_sq_norm=4, big_sq_norm=4, small_batch=2, big_batch=4)  # tr 0, ‖G‖² 4
    reading = noise.reading()
    assert reading.trace == pytest.approx(16 / 3)
    assert reading.grad_sq_norm == pytest.approx(8 / 3)


def test_the_window_is_in_samples_whatever_the_batch() -> None:
    """Twice the batch with the same estimates forgets twice as much an update."""
    one, other = NoiseScale(half_life_samples=64), NoiseScale(half_life_samples=64)
    for trace in (10.0, 10.0, 30.0, 30.0):
        norms = {"small_sq_norm": 1 + trace / 8, "big_sq_norm": 1 + trace / 32}
        one.update(**norms, small_batch=8, big_batch=32)
    for trace in (10.0, 30.0):
        norms = {"small_sq_norm": 1 + trace / 8, "big_sq_norm": 1 + trace / 64}
        other.update(**norms, small_batch=8, big_batch=64)
    assert one.reading().trace == pytest.approx(other.reading().trace)
    assert one.reading().grad_sq_norm == pytest.approx(1.0)


def test_digits_are_kept_when_gradients_shrink_by_many_orders_of_magnitude() -> None:
    first, then = gaussian_pairs(100, seed=3), 1e-8 * gaussian_pairs(300, seed=4)
    half_life = 4 * BIG  # of which the second part has 75: nothing of the first is left
    one, other = (filled(p, half_life).reading() for p in (np.concatenate([first, then]), then))
    assert one.grad_sq_norm == pytest.approx(other.grad_sq_norm, rel=1e-4)
    assert one.standard_error == pytest.approx(other.standard_error, rel=1e-4)
    assert one.resolved == other.resolved


def test_the_state_goes_through_json_and_continues_to_the_bit() -> None:
    pairs = gaussian_pairs(50)
    whole = filled(pairs, 1e4)
    first, second = filled(pairs[:20], 1e4), NoiseScale(half_life_samples=1e4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for small, big in pairs[20:]:
        second.update(small_sq_norm=small, big_sq_norm=big, small_batch=SMALL, big_batch=BIG)
    assert second.reading() == whole.reading()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"small_batch": 64}, "small_batch must be smaller than big_batch, got 64 and 64"),
        ({"small_batch": 128}, "small_batch must be smaller"),
        ({"small_batch": 0}, "small_batch must be a whole number of at least 1"),
        ({"small_sq_norm": math.inf}, "small_sq_norm must be"),
        ({"big_sq_norm": math.nan}, "big_sq_norm must be"),
        ({"big_sq_norm": -1.0}, "big_sq_norm must be"),
    ],
)
def test_what_is_undefined_is_refused_and_changes_nothing(
    change: dict[str, float], named: str
) -> None:
    noise = filled(gaussian_pairs(3), 1e4)
    before = noise.reading()
    pair = {"small_sq_norm": 2.0, "big_sq_norm": 1.0, "small_batch": 8, "big_batch": 64}
    with pytest.raises(ValueError, match=named):
        noise.update(**(pair | change))  # type: ignore[arg-type]
    assert noise.reading() == before


def test_reading_before_the_first_update_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one update"):
        NoiseScale(half_life_samples=1e6).reading()
    with pytest.raises(ValueError, match="half_life_samples must be"):
        NoiseScale(half_life_samples=0)
