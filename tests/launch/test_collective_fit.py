"""Alpha and beta are found again in times that were made with them, and doubted where they must."""

import numpy as np
import pytest

from largebatch.benchmarks.collectives.fit import Timing, fit_link, fits
from largebatch.benchmarks.collectives.models import ALL_REDUCE, Link

ALPHA, BETA = 3e-6, 5e-10
SIZES = [2**power for power in range(3, 27, 2)]


def timings(
    seed: int,
    noise: float,
    ranks: tuple[int, ...] = (2, 4, 6),
    algorithm: str = "ring",
    sizes: list[int] = SIZES,
) -> list[Timing]:
    drawn = np.random.default_rng(seed)
    link = Link(ALPHA, BETA)
    return [
        Timing(p, n, ALL_REDUCE[algorithm](p, n, link).seconds(link) * drawn.normal(1, noise))
        for p in ranks
        for n in sizes
    ]


@pytest.mark.parametrize("algorithm", [*ALL_REDUCE])
def test_exact_times_give_alpha_and_beta_back(algorithm: str) -> None:
    fit = fit_link(timings(0, 0.0, algorithm=algorithm), algorithm)
    # The chunks of the double tree are whole numbers that the fit has to find as well.
    close = 0.02 if algorithm == "double_tree" else 1e-6
    assert (fit.alpha, fit.beta) == pytest.approx((ALPHA, BETA), rel=close)
    assert fit.doubts == ()


def test_standard_errors_cover_as_often_as_they_should() -> None:
    alphas, betas = [], []
    for seed in range(300):
        fit = fit_link(timings(seed, 0.1))
        alphas.append((fit.alpha - ALPHA) / fit.alpha_error)
        betas.append((fit.beta - BETA) / fit.beta_error)
    for errors in (alphas, betas):
        assert np.std(errors) == pytest.approx(1, abs=0.2)
        assert np.mean(np.abs(errors) < 1.96) > 0.9


def test_a_few_wild_times_move_the_fit_little() -> None:
    clean = timings(1, 0.05)
    wild = [
        Timing(t.ranks, t.nbytes, t.seconds * 8) if i % 9 == 4 else t for i, t in enumerate(clean)
    ]
    fit = fit_link(wild)
    assert fit.alpha == pytest.approx(ALPHA, rel=0.15)
    assert fit.beta == pytest.approx(BETA, rel=0.15)


@pytest.mark.parametrize("algorithm", ["ring", "recursive_doubling", "rabenseifner"])
def test_the_algorithm_behind_the_times_spreads_least(algorithm: str) -> None:
    found = fits(timings(2, 0.02, ranks=(2, 4, 8, 16, 32), algorithm=algorithm))
    assert found[0].algorithm == algorithm
    assert found[1].spread > 2 * found[0].spread


def test_a_poor_fit_says_why() -> None:
    noisy = fit_link(timings(3, 0.0) + [Timing(4, n, 1e-3) for n in SIZES * 2])
    assert any("off the model" in doubt for doubt in noisy.doubts)
    small = [fit_link(timings(seed, 0.02, sizes=[8, 16, 24, 32])).doubts for seed in range(40)]
    assert all("factor of 1000" in " ".join(doubts) for doubts in small)
    # Two standard errors above 0 by chance: one time in forty.
    assert sum("beta is not resolved" in " ".join(doubts) for doubts in small) >= 35


def test_times_that_fall_with_the_size_leave_beta_at_zero() -> None:
    falling = [Timing(2, n, 1e-3 / (1 + i)) for i, n in enumerate(SIZES)]
    fit = fit_link(falling)
    assert fit.beta == 0
    assert any("beta is not resolved" in doubt for doubt in fit.doubts)


def test_too_few_times_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5 or more times .* got 2"):
        fit_link([Timing(1, 8, 1e-6)] * 20 + [Timing(2, 8, 1e-6)] * 2)
