"""The noisy quadratic model: exact steps are those of plain iteration, and of simulated descent.

The reference iterates second moments mode by mode with the coefficients written out, as in the
supplement of Zhang et al. 2019 (arXiv:1907.04164), and knows nothing of matrices or lifting.
"""

import doctest
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from largebatch.study.fit import fit_curve
from largebatch.study.nqm import (
    BatchStage,
    Descent,
    Spectrum,
    best_steps,
    loss_after,
    power_law,
    steps,
    steps_to_target,
)
from largebatch.study.nqm.__main__ import main
from largebatch.study.nqm.model import one_step
from largebatch.study.nqm.runs import Simulation

NESTEROV = Descent(momentum=0.9, nesterov=True)

Rate = tuple[Any, float]
"""A learning rate, or several, and a batch size, those of one step."""


def schedule(lr: float | np.ndarray, batch: float | Sequence[BatchStage]) -> Iterator[Rate]:
    """The rate and batch size of each step, without end."""
    stages = [BatchStage(batch_size=batch)] if isinstance(batch, int | float) else batch
    for stage in stages:
        count = 10**9 if stage.steps is None else stage.steps
        yield from ((lr * stage.lr_factor, stage.batch_size) for _ in range(count))


def iterated(
    spectrum: Spectrum,
    descent: Descent,
    lr: float | np.ndarray,
    batch: float | Sequence[BatchStage],
) -> Iterator[Any]:
    """E[L] after 0, 1, 2, … steps, from E[θ²], E[v²], E[θv], and those with the average; of several
    rates side by side.
    """
    h, m, a = spectrum.curvature, descent.momentum, descent.averaging
    lrs = np.asarray(lr)[..., None]  # (rates, 1), of modes (modes,)
    zeros = np.zeros(np.broadcast_shapes(lrs.shape, h.shape))
    tt = mean = mt = zeros + spectrum.initial
    vv = tv = mv = zeros
    for rate, batch_size in schedule(lrs, batch):
        yield np.sum(spectrum.copies * 0.5 * h * (mean if a else tt), axis=-1)
        q = rate * h**-descent.preconditioner
        noise = spectrum.noise / batch_size
        # v' = m v + h θ + ξ
        new_vv = m * m * vv + 2 * m * h * tv + h * h * tt + noise
        # θ' = θ - q (k h θ + n v + k ξ)
        k, n = (1 + m, m * m) if descent.nesterov else (1.0, m)
        b = 1 - q * k * h
        new_tt = b * b * tt - 2 * b * q * n * tv + (q * n) ** 2 * vv + (q * k) ** 2 * noise
        new_tv = b * h * tt + (b * m - q * n * h) * tv - q * n * m * vv - q * k * noise
        # θ̄' = a θ̄ + (1 - a) θ'
        new_mt = b * mt - q * n * mv  # E[θ̄ θ']
        new_mv = m * mv + h * mt  # E[θ̄ v']
        mean = a * a * mean + 2 * a * (1 - a) * new_mt + (1 - a) ** 2 * new_tt
        mt, mv = a * new_mt + (1 - a) * new_tt, a * new_mv + (1 - a) * new_tv
        tt, vv, tv = new_tt, new_vv, new_tv


def losses_of(
    spectrum: Spectrum, descent: Descent, lrs: np.ndarray, batch: float | list[BatchStage]
) -> np.ndarray:
    """E[L] after 0 to 400 steps by plain iteration, a column for each rate."""
    key = id(spectrum), id(descent), id(batch)
    if key not in _losses:
        _losses[key] = np.array([*islice(iterated(spectrum, descent, lrs, batch), 401)])
    return _losses[key]


_losses: dict[tuple[int, int, int], np.ndarray] = {}
"""By objects of the tables below, which stay; two tests look at them."""


def first(losses: Iterator[float], target: float, most: int) -> float:
    """The first step at or below `target`, infinity after `most` steps."""
    found = (step for step, loss in enumerate(islice(losses, most + 1)) if loss <= target)
    return float(next(found, math.inf))


METHODS = {
    "sgd": Descent(),
    "momentum": Descent(momentum=0.9),
    "little momentum": Descent(momentum=0.3),
    "nesterov": Descent(momentum=0.9, nesterov=True),
    "average": Descent(averaging=0.9),
    "average and momentum": Descent(momentum=0.8, averaging=0.95),
    "average and nesterov": Descent(momentum=0.7, nesterov=True, averaging=0.5),
    "preconditioner": Descent(preconditioner=0.5),
    "preconditioner and momentum": Descent(preconditioner=0.75, momentum=0.9),
}
SPECTRA = {
    "power law": power_law(12),
    "other noise": Spectrum(
        [2.0, 0.7, 0.1], noise=[0.1, 3.0, 0.0], initial=[0.5, 0.0, 4.0], copies=[1, 3, 2]
    ),
}
STAGES = {
    "constant": 8.0,
    "ramp": [
        BatchStage(batch_size=2, steps=5),
        BatchStage(batch_size=4, steps=9),
        BatchStage(batch_size=32),
    ],
    "rate in pieces": [
        BatchStage(batch_size=4, steps=3, lr_factor=0.5),
        BatchStage(batch_size=4, steps=20),
        BatchStage(batch_size=4, steps=7, lr_factor=0.3),
        BatchStage(batch_size=4, lr_factor=0.05),
    ],
    "both": [
        BatchStage(batch_size=1, steps=40),
        BatchStage(batch_size=16, steps=1, lr_factor=1.2),
        BatchStage(batch_size=64, lr_factor=0.2),
    ],
}  # fmt: skip
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
staged = pytest.mark.parametrize("batch", STAGES.values(), ids=STAGES)


def rates(spectrum: Spectrum, descent: Descent) -> np.ndarray:
    """From a thousandth of what is stable to all but a fiftieth of it."""
    limit = descent.stable_below / np.max(spectrum.curvature ** (1 - descent.preconditioner))
    return np.array(limit * np.array([1e-3, 0.01, 0.05, 0.2, 0.5, 0.8, 0.98]))


@staged
@every
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_the_expected_loss_is_that_of_plain_iteration(
    spectrum: Spectrum, method: Descent, batch: float | list[BatchStage]
) -> None:
    lrs = rates(spectrum, method)
    losses = losses_of(spectrum, method, lrs, batch)
    for step in (0, 1, 2, 3, 14, 31, 64, 100, 200):
        found = loss_after(spectrum, method, lrs, batch, step)
        np.testing.assert_allclose(found, losses[step], rtol=1e-9)


@staged
@every
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_the_steps_are_the_first_of_plain_iteration(
    spectrum: Spectrum, method: Descent, batch: float | list[BatchStage]
) -> None:
    lrs, most = rates(spectrum, method), 400
    losses = losses_of(spectrum, method, lrs, batch).T
    start = losses[0][0]
    for part in (2.0, 0.4, 0.15, 0.03):
        found = steps_to_target(spectrum, method, lrs, batch, part * start, most)
        expected = [first(iter(loss), part * start, most) for loss in losses]
        np.testing.assert_array_equal(found, expected)


def test_a_loss_that_swings_below_the_target_and_back_has_reached_it() -> None:
    """Where bisection, or lifting without a bound, would find a later crossing."""
    spectrum, descent, lr = (
        Spectrum([1.0, 0.01], noise=[0, 0], initial=[1, 0.5]),
        METHODS["momentum"],
        0.4,
    )
    losses = [*islice(iterated(spectrum, descent, lr, 1.0), 60)]
    target = 1.02 * min(losses[:8])
    step = losses.index(next(loss for loss in losses if loss <= target))
    assert max(losses[step : step + 8]) > 2 * target
    assert steps_to_target(spectrum, descent, lr, 1.0, target) == step


def test_momentum_that_is_left_over_from_a_higher_rate_may_pass_the_minimum() -> None:
    """A mode that would not swing from rest."""
    spectrum, descent = Spectrum([1.0], noise=[0]), METHODS["momentum"]
    stages = [BatchStage(batch_size=1, steps=2), BatchStage(batch_size=1, lr_factor=0.0025)]
    losses = [*islice(iterated(spectrum, descent, 0.39525, stages), 40)]
    target = 1e-8
    (step,) = (step for step, loss in enumerate(losses) if loss <= target)
    assert losses[step - 5] > 100 * target < losses[step + 5]
    assert steps_to_target(spectrum, descent, 0.39525, stages, target) == step


def test_sgd_that_falls_below_the_target_before_its_noise_has_come_in_has_reached_it() -> None:
    spectrum, lr = Spectrum([1.0, 0.01], noise=[0.02, 3.0], initial=[1.0, 0.01]), 0.3
    losses = [*islice(iterated(spectrum, Descent(), lr, 1.0), 3000)]
    target = 1.01 * min(losses)
    assert losses[-1] > 1.5 * target
    step = first(iter(losses), target, 3000)
    assert steps_to_target(spectrum, Descent(), lr, 1.0, target) == step


def test_millions_of_steps_are_as_exact_as_one() -> None:
    """A single mode of SGD has a closed form: s + β^t (1 - s)."""
    h, lr, batch, target = 1e-3, 1e-3, 10.0, 1e-6
    beta = (1 - lr * h) ** 2
    floor = lr**2 * h / batch / (1 - beta)
    fraction = (target / (0.5 * h) - floor) / (1 - floor)
    expected = math.ceil(math.log(fraction) / math.log(beta))
    assert expected > 3e6
    assert steps_to_target(Spectrum([h]), Descent(), lr, batch, target) == expected


@every
def test_the_limit_of_stability_is_where_an_eigenvalue_leaves_the_unit_circle(
    method: Descent,
) -> None:
    h = np.array([0.3])
    limit = method.stable_below / h[0] ** (1 - method.preconditioner)
    for factor in (0.01, 0.5, 0.999, 1.001, 1.3):
        matrix = one_step(Spectrum(h), method, [factor * limit]).matrix[:, :, 0, 0]
        assert (np.max(np.abs(np.linalg.eigvals(matrix))) < 1) == (factor < 1)


@every
def test_a_mode_said_not_to_swing_goes_to_zero_in_one_direction(method: Descent) -> None:
    h = 0.3
    highest = method.monotone_up_to / h ** (1 - method.preconditioner)
    for factor in (0.01, 0.5, 1.0):
        matrix = one_step(Spectrum([h]), method, [factor * highest]).matrix[:, :, 0, 0]
        state = np.array([0.0, 1.0, 1.0])[method.state]
        path = [state[-1]] + [(state := matrix @ state)[-1] for _ in range(300)]
        assert all(before >= after >= 0 for before, after in pairwise(path))


def test_an_average_that_decays_as_fast_as_its_mode_is_exact() -> None:
    """1 - η h = a: the moments' map has no basis of eigenvectors."""
    spectrum, descent = Spectrum([0.5, 0.1]), Descent(averaging=0.9)
    losses = iterated(spectrum, descent, 0.2, 4.0)
    assert first(losses, 0.02, 10_000) == steps_to_target(spectrum, descent, 0.2, 4.0, 0.02)


def test_a_rate_that_cannot_reach_the_target_never_does() -> None:
    spectrum = power_law(50)
    sharp = [1e-9, 0.2, 1.99, 2.0, 2.01, 50.0]
    found = steps_to_target(spectrum, Descent(), sharp, 1.0, 1e-4)
    assert found[0] < math.inf
    assert np.all(np.isinf(found[1:]))
    assert np.all(np.isinf(steps_to_target(spectrum, Descent(momentum=0.9), [0.2, 3.81], 1, 1e-4)))
    assert np.all(np.isinf(steps_to_target(spectrum, Descent(), [1e-3], 64, 1e-2, 1000)))
    # Even where noise takes a while to grow.
    late = Spectrum([1.0, 0.1], noise=[1e-60, 0.0], initial=[0.0, 1.0])
    assert min(islice(iterated(late, Descent(), 2.1, 1.0), 200)) < 1e-3
    assert steps_to_target(late, Descent(), 2.1, 1.0, 1e-3) == math.inf


# Simulated ---------------------------------------------------------------------------------------


def simulated(
    spectrum: Spectrum, descent: Descent, lr: float, batch: float | Sequence[BatchStage], steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of L after 0, 1, … steps of 4,000 descents."""
    rng, size = np.random.default_rng(0), (4000, len(spectrum.curvature))
    theta = rng.standard_normal(size) * np.sqrt(spectrum.initial)
    v, average, losses = np.zeros(size), theta.copy(), []
    for rate, batch_size in islice(schedule(lr, batch), steps + 1):
        losses.append((average if descent.averaging else theta) ** 2 @ spectrum.weights)
        noise = rng.standard_normal(size) * np.sqrt(spectrum.noise / batch_size)
        gradient = spectrum.curvature * theta + noise
        v = descent.momentum * v + gradient
        step = gradient + descent.momentum * v if descent.nesterov else v
        theta = theta - rate * spectrum.curvature**-descent.preconditioner * step
        average = descent.averaging * average + (1 - descent.averaging) * theta
    found = np.array(losses)
    return found.mean(1), found.std(1) / math.sqrt(size[0])


@staged
@every
def test_the_expected_loss_is_the_mean_of_simulated_descents(
    method: Descent, batch: float | list[BatchStage]
) -> None:
    """Within five standard errors at each of ten steps: by chance one test in 40,000 would fail."""
    spectrum = SPECTRA["power law"]
    lr = float(rates(spectrum, method)[3])
    mean, error = simulated(spectrum, method, lr, batch, 60)
    for step in (0, 1, 3, 6, 10, 16, 24, 33, 45, 60):
        found = loss_after(spectrum, method, lr, batch, step)[0]
        assert abs(found - mean[step]) < 5 * error[step]
        assert error[step] < 0.03 * mean[step]


# The best rate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "momentum", "average"])
def test_no_rate_of_a_fine_grid_beats_the_best_by_more_than_it_resolves(name: str) -> None:
    spectrum, descent = power_law(30), METHODS[name]
    sizes = [1, 16, 256]
    best = best_steps(spectrum, descent, sizes, 0.05)
    coarse = descent.stable_below * 2.0 ** (-np.arange(1, 200) / 20)
    for point, size in zip(best, sizes, strict=True):
        around = point.lr * 2.0 ** (np.arange(-100, 101) / 200)
        grid = np.concatenate([coarse, around[around < descent.stable_below]])
        assert point.batch_size == size
        assert point.steps == steps_to_target(spectrum, descent, point.lr, size, 0.05)
        assert point.steps <= math.ceil(
            1.002 * np.min(steps_to_target(spectrum, descent, grid, size, 0.05))
        )
        before, after = (
            loss_after(spectrum, descent, point.lr, size, int(point.steps) - back)[0]
            for back in (1, 0)
        )
        assert point.steps - 1 <= point.crossing <= point.steps
        assert before > 0.05 >= after


def test_given_rates_are_the_only_ones_tried() -> None:
    spectrum = power_law(30)
    (point,) = best_steps(spectrum, Descent(), [16], 0.05, [0.1, 0.2, 2.5])
    assert point.lr in (0.1, 0.2)
    assert point.steps == min(steps_to_target(spectrum, Descent(), [0.1, 0.2], 16, 0.05))
    (missed,) = best_steps(spectrum, Descent(), [16], 0.05, [2.5])
    assert missed.steps == missed.crossing == math.inf


def critical_batch(descent: Descent, sizes: Sequence[float]) -> tuple[float, float]:
    """B_crit and E_min of the paper's problem, target 0.01."""
    points = best_steps(power_law(10_000, groups=60), descent, sizes, 0.01)
    fit = fit_curve(sizes, [point.steps for point in points])
    assert fit is not None
    return fit.b_crit, fit.e_min


def test_momentum_and_preconditioning_raise_the_critical_batch_and_averaging_saves_samples() -> (
    None
):
    """The three findings of the paper's abstract and section 3, on its own problem."""
    sizes = [4.0**k for k in range(2, 10)]
    (plain, samples) = critical_batch(Descent(), sizes)
    assert critical_batch(Descent(momentum=0.9), sizes)[0] > 5 * plain
    assert critical_batch(Descent(preconditioner=0.5), sizes)[0] > 5 * plain
    averaged, fewer = critical_batch(Descent(averaging=0.999), sizes)
    assert fewer < samples / 2
    assert averaged < plain


def test_grouped_modes_stand_for_all() -> None:
    whole, grouped = power_law(10_000), power_law(10_000, groups=300)
    assert len(grouped.curvature) < 300
    assert np.sum(grouped.copies) == 10_000
    assert np.isclose(grouped.weights.sum(), whole.weights.sum(), rtol=1e-12)
    lrs = [0.05, 0.5, 1.8]
    found, expected = (steps_to_target(s, Descent(), lrs, 4096, 0.01) for s in (grouped, whole))
    np.testing.assert_allclose(found, expected, rtol=2e-3)


# What is refused, and the command ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: Spectrum([1.0, 0.0]), "curvature"),
        (lambda: Spectrum([[1.0]]), "curvature"),
        (lambda: Spectrum([1.0], noise=[1.0, 2.0]), "noise must be 1 finite"),
        (lambda: Spectrum([1.0], initial=[-1.0]), "initial"),
        (lambda: Descent(momentum=1.0), "momentum must be >= 0 and < 1, got 1.0"),
        (lambda: Descent(averaging=-0.1), "averaging"),
        (lambda: Descent(nesterov=True), "nesterov=True needs momentum > 0"),
        (lambda: BatchStage(batch_size=0), "batch_size must be > 0, got 0"),
        (lambda: BatchStage(batch_size=1, steps=0), "steps must be >= 1, got 0"),
        (lambda: BatchStage(batch_size=1, lr_factor=0), "lr_factor"),
        (lambda: steps_to_target(power_law(3), Descent(), [0.1, -1], 1, 0.1), "lrs"),
        (lambda: steps_to_target(power_law(3), Descent(), 0.1, 1, 0.0), "target must be > 0"),
        (lambda: steps_to_target(power_law(3), Descent(), 0.1, 0, 0.1), "batch_size"),
        (lambda: loss_after(power_law(3), Descent(), 1, [BatchStage(batch_size=1, steps=2)], 1),
         "the last, and it alone"),
        (lambda: loss_after(power_law(3), Descent(), 1, [BatchStage(batch_size=1)] * 2, 1),
         "the last, and it alone"),
    ],
)  # fmt: skip
def test_a_value_without_sense_is_refused(wrong: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        wrong()


def test_the_example_prints_what_it_says() -> None:
    found = doctest.testmod(steps)
    assert found.attempted > 0
    assert found.failed == 0


def printed(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(words) == 0
    return capsys.readouterr().out.splitlines()


def test_the_command_prints_the_exact_steps_and_critical_batch_of_the_study(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = "study.batch_sizes=[4,64,512,2048]", "study.rule_batches=[]"
    lines = printed([*few, "task.dimension=100"], capsys)
    spectrum, table = power_law(100, 0.5), [line.split() for line in lines[1:5]]
    for row, size in zip(table, (4, 64, 512, 2048), strict=True):
        assert int(row[0]) == size
        for lr, count in ((row[1], row[2]), (row[4], row[5])):
            there = steps_to_target(spectrum, Descent(), float(lr), size, 0.3)
            assert int(count) == pytest.approx(there, abs=1)  # the rate has four digits
        assert math.log(float(row[4]) / 0.45, math.sqrt(2)) == pytest.approx(
            round(math.log(float(row[4]) / 0.45, math.sqrt(2))), abs=1e-3
        )
    for meant, column in (
        ("all rates", 3),
        ("rates of the grid", 6),
        ("runs, rates of the grid", 8),
    ):
        fit = fit_curve([int(row[0]) for row in table], [float(row[column]) for row in table])
        assert fit is not None
        (line,) = (line for line in lines if line.startswith(f"{meant}, n = 1:"))
        told = re.search("critical batch ([0-9.]+)", line)
        assert told is not None
        assert float(told[1]) == pytest.approx(fit.b_crit, rel=1e-2)


@pytest.mark.parametrize("descent", [Descent(), Descent(momentum=0.9), NESTEROV], ids=str)
def test_runs_with_little_noise_need_the_expected_steps(descent: Descent) -> None:
    spectrum = power_law(2000, 0.5)
    simulation = Simulation(spectrum=spectrum, descent=descent, target=0.5, growth=1.0, runs=8)
    lr = 0.5 if descent.momentum == 0 else 0.05
    (best,) = best_steps(spectrum, descent, [4096], 0.5, [lr])
    assert simulation.steps(4096, lr, 1e4) == pytest.approx(best.crossing, rel=0.03)
    assert simulation.steps(4096, lr, 0.8 * best.crossing) == math.inf


def test_a_run_passes_a_target_that_the_expected_loss_stays_above() -> None:
    """The last 3 % of the way are noise: the expected loss ends above, and runs waver below."""
    spectrum, lr, batch = power_law(200, 0.5), 1.0, 8
    floor = float(loss_after(spectrum, Descent(), [lr], batch, 10_000)[0])
    simulation = Simulation(spectrum=spectrum, descent=Descent(), target=0.97 * floor, runs=8)
    assert steps_to_target(spectrum, Descent(), lr, batch, 0.97 * floor) == math.inf
    assert simulation.steps(batch, lr, 10_000) < 1000


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["task=digits"], "task=nqm"),
        (["optim.weight_decay=0.1"], "weight_decay"),
        (["lr=cosine"], "lr=constant"),
        (["lr.warmup_samples=64"], "warm-up"),
        (["clip_norm=1"], "clip_norm"),
        (["target.loss=null"], "target"),
        (["optim.momentum=x"], "optim.momentum"),
        (["optim.momentum=1"], "momentum must be"),
        (["task.dimension=0"], "task.dimension"),
        (["nosuchkey=1"], "nosuchkey"),
    ],
)
def test_the_command_refuses_what_has_no_exact_steps(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("largebatch: ")
    assert told.count("\n") == 1
    assert named in told
