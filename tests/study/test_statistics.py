"""Fits are optima, intervals cover what they say, and published tables give published numbers."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from largebatch.benchmarks import command
from largebatch.benchmarks.statistics import command as bench
from largebatch.study.statistics.published import MLPERF, ZHANG_CBS20
from largebatch.study.statistics.solver import Array, fit_many
from largebatch.study.statistics.student import holm, moderated_means, t_inside, t_quantile

BATCHES = 2.0 ** np.arange(6, 15)
S_MIN, E_MIN = 23.3, 30_200.0


def noisy_steps(num_curves: int, shape: float = 1.0, noise: float = 0.06) -> Array:
    exact = (S_MIN**shape + (E_MIN / BATCHES) ** shape) ** (1 / shape)
    luck = np.random.default_rng(3).normal(size=(num_curves, len(BATCHES)))
    found: Array = exact * np.exp(noise * luck)
    return found


class Reference:
    """The optimum by scipy, of log S_min, log E_min and log n, from many starts.

    Slopes are by complex steps, exact to the last bits; a root of the gradient ends the search, for
    the cost is flat to half its digits around the optimum.
    """

    def __init__(self, steps: Array, free: bool) -> None:
        self.log_steps, self.free = np.log(steps), free
        starts = product([2.0, 4.0], [9.0, 11.0], [-0.5, 0.8] if free else [0.0])
        bounds = [-5.0, 5.0, -1.6][: 2 + free], [10.0, 15.0, 2.3][: 2 + free]
        found = [
            optimize.least_squares(
                self.residual, start[: 2 + free], self.slopes, bounds, loss="soft_l1", f_scale=0.05
            )
            for start in starts
        ]
        best = min(found, key=lambda each: each.cost)
        self.cost = 2 * best.cost
        self.unknown = optimize.root(self.gradient, best.x, tol=1e-14).x
        assert np.abs(self.unknown - best.x).max() < 1e-3

    def log_model(self, unknown: Any) -> Any:
        n = np.exp(unknown[2]) if self.free else 1.0
        return np.log(np.exp(n * unknown[0]) + (np.exp(unknown[1]) / BATCHES) ** n) / n

    def residual(self, unknown: Any) -> Any:
        return self.log_model(unknown) - self.log_steps

    def slopes(self, unknown: Any) -> Any:
        tiny = 1e-30
        moved = np.asarray(unknown) + 1j * tiny * np.eye(len(unknown))
        return np.stack([self.log_model(each).imag / tiny for each in moved], axis=1)

    def gradient(self, unknown: Any) -> Any:
        residual = self.residual(unknown)
        return (residual / np.sqrt(1 + (residual / 0.05) ** 2)) @ self.slopes(unknown)


@pytest.mark.parametrize("free", [False, True])
def test_fits_are_the_optima_that_scipy_finds(free: bool) -> None:
    steps = noisy_steps(20, shape=1.4 if free else 1.0)
    curves = fit_many(BATCHES, steps, shape=None if free else 1.0)
    for index, each in enumerate(steps):
        reference = Reference(each, free)
        log_b_crit = reference.unknown[1] - reference.unknown[0]
        assert abs(math.log(curves.b_crit[index]) - log_b_crit) < 1e-8
        assert abs(math.log(curves.e_min[index]) - reference.unknown[1]) < 1e-8
        if free:
            assert abs(math.log(curves.shape[index]) - reference.unknown[2]) < 1e-7


def test_fits_of_outliers_and_of_little_bend_are_no_worse_than_scipys() -> None:
    steps = noisy_steps(30, noise=0.2)
    steps[::3, 2] *= 4
    steps[1::3, 5:] = np.nan
    curves = fit_many(BATCHES, steps, shape=1.0)
    for index, each in enumerate(steps):
        if np.isnan(each).any():
            continue
        residual = np.log((curves.s_min[index] + curves.e_min[index] / BATCHES) / each)
        cost = 2 * 0.05**2 * np.sum(np.sqrt(1 + (residual / 0.05) ** 2) - 1)
        assert cost <= Reference(each, free=False).cost * (1 + 1e-9)
    assert np.isfinite(curves.b_crit).all()


def test_a_curve_is_fitted_alike_alone_and_among_others() -> None:
    steps = noisy_steps(20)
    steps[4, 7:] = np.nan
    sizes = np.tile(BATCHES, (20, 1))
    sizes[5:] *= 2
    together = fit_many(sizes, steps, shape=None)
    for index in range(20):
        alone = fit_many(sizes[index], steps[index], shape=None)
        assert alone.b_crit[0] == pytest.approx(together.b_crit[index], rel=1e-9)
        assert alone.rms[0] == pytest.approx(together.rms[index], rel=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 14, 31])
def test_students_t_is_scipys(freedom: int) -> None:
    t = np.linspace(0, 30, 61)
    np.testing.assert_allclose(
        t_inside(t, freedom), 1 - 2 * stats.t.sf(t, freedom), rtol=0, atol=1e-14
    )
    for inside in (0.5, 0.95, 1 - 0.05 / 9, 1 - 1e-6):
        expected = stats.t.ppf((1 + inside) / 2, freedom)
        assert t_quantile(inside, freedom) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="1 or more degrees of freedom, got 0"):
        t_inside(1.0, 0)
    with pytest.raises(ValueError, match="> 0 and < 1, got 1"):
        t_quantile(1.0, freedom)


def test_a_moderated_variance_lies_between_its_groups_own_and_that_of_all() -> None:
    values = np.random.default_rng(0).normal(size=(9, 5)) * np.linspace(0.5, 1.5, 9)[:, None]
    own, means = values.var(axis=1, ddof=1), moderated_means(values)
    expected = (6 * own.mean() + 4 * own) / 10  # 32 // 5 = 6 degrees of freedom beside the 4
    np.testing.assert_allclose(means.error**2 * 5, expected, rtol=1e-12)
    assert means.freedom.tolist() == [10] * 9
    alone = moderated_means(values[:1])
    np.testing.assert_allclose(alone.error**2 * 5, own[:1], rtol=1e-12)
    assert alone.freedom.tolist() == [4]


def test_groups_of_one_value_have_a_mean_and_no_more() -> None:
    means = moderated_means(np.array([[1.0, 2.0, 3.0], [4.0, np.nan, np.nan], [np.nan] * 3]))
    np.testing.assert_allclose(means.value, [2.0, 4.0, np.nan])
    assert means.freedom.tolist() == [2, 0, 0]
    assert np.isnan(means.interval(0.95).low).tolist() == [False, True, True]
    assert np.isnan(means.p_values()).tolist() == [False, True, True]


def test_holms_p_never_falls_and_leaves_holes_out() -> None:
    found = holm([[0.04, np.nan, 0.01, 0.03], [0.5, 0.6, 0.7, 0.8]])
    np.testing.assert_allclose(found[0], [0.06, np.nan, 0.03, 0.06])
    np.testing.assert_allclose(found[1], 1.0)


@pytest.fixture(scope="module")
def simulated() -> dict[str, Any]:
    """Four times the 500 studies of the bench's own default: half its chance."""
    return bench.measure(2000, np.random.default_rng(0))


def test_intervals_cover_in_95_of_100_studies(simulated: dict[str, Any]) -> None:
    assert len(simulated["curves"]) == 7
    for row in simulated["curves"]:
        what = f"{row['name']}, {row['seeds']} seeds"
        for key in ("B_crit", "point", "n", "S_min", "E_min", "b_80", "b_50", "cbs20"):
            assert 0.93 <= row["covers"][key]["share"] <= 0.97, f"{key} of {what}"
        assert row["covers"]["band"]["share"] >= 0.93, what
        assert row["covers"]["rate"]["share"] >= 0.93, what
    for pair in simulated["pairs"]:
        for key in ("ratio", "b_crit"):
            assert 0.93 <= pair[key]["share"] <= 0.97, f"{key}, {pair['seeds']} seeds"
        assert pair["band"]["share"] >= 0.93


def test_two_optimizers_that_do_not_differ_are_rarely_told_apart(simulated: dict[str, Any]) -> None:
    for pair in simulated["pairs"]:
        assert pair["false_alarms"] <= 0.08
    five = simulated["pairs"][1]
    assert five["seeds"] == 5
    assert five["found"][1.2] >= 0.9


def test_five_seeds_tell_enough(simulated: dict[str, Any]) -> None:
    rows = [row for row in simulated["curves"] if row["seeds"] == 5]
    assert len(rows) == 3
    for row in rows:
        assert row["covers"]["B_crit"]["half_width"] <= math.log(1.15), row["name"]
        assert row["covers"]["point"]["half_width"] <= math.log(1.09), row["name"]
        assert 8 <= row["trials"] <= 14
    for pair in simulated["pairs"]:
        if pair["seeds"] == 5:
            assert pair["ratio"]["half_width"] <= math.log(1.09)


def test_published_tables_give_the_numbers_known() -> None:
    found = {(row["table"], row["n"] == 1): row for row in bench.published()}
    expected = {"LARS, ResNet-50": (1.12, 43_200), "LAMB, BERT": (1.38, 9600)}
    assert expected.keys() == MLPERF.keys()
    for name, (shape, b_crit) in expected.items():
        assert found[name, False]["n"] == pytest.approx(shape, rel=0.02)
        assert found[name, False]["b_crit"] == pytest.approx(b_crit, rel=0.02)
    assert found["LARS, ResNet-50", True]["b_crit"] == pytest.approx(47_322, rel=0.005)
    assert found["LAMB, BERT", True]["b_crit"] == pytest.approx(12_972, rel=0.005)
    for size, cbs20 in ZHANG_CBS20.items():
        assert found[f"Zhang et al., {size}", True]["cbs20"] == pytest.approx(cbs20, rel=0.03)


RECORDED = Path(__file__).with_name("recorded_steps.csv")
"""Steps of task=bytes to 2.2 nats, in a plain loop of the library's own task, model and optimizers
with the text of Python 3.11's library: 12 seeds at one learning rate for each batch size, steps
interpolated between the evaluations of the usual grid."""


def test_intervals_cover_recorded_steps_too() -> None:
    rows = bench.measure_recorded(RECORDED, 500, np.random.default_rng(0))["curves"]
    assert {row["name"] for row in rows} == {"adamw", "lamb"}
    for row in rows:
        what = f"{row['name']}, {row['seeds']} seeds"
        assert row["covers"]["B_crit"]["share"] >= 0.88, what
        assert row["covers"]["point"]["share"] >= 0.91, what


def test_the_bench_prints_every_row_and_writes_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "record.json"
    assert command.main(["statistics", "--studies", "20", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "AdamW-like, n = 1.4, S = 5" in printed
    assert "LAMB-like, cliff, S = 8" in printed
    record = json.loads(file.read_text())
    assert record["studies"] == 20
    assert len(record["curves"]) == len(bench.CELLS)
    assert len(record["pairs"]) == len(bench.SEEDS)


def test_the_bench_draws_seeds_from_recorded_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["statistics", "--studies", "20", "--recorded", str(RECORDED)]) == 0
    assert "lamb, S = 5" in capsys.readouterr().out
    short = tmp_path / "short.csv"
    short.write_text("optimizer,batch_size,seed,steps\nlamb,64,0,500\nlamb,128,0,\n")
    assert command.main(["statistics", "--recorded", str(short)]) == 2
    assert "all seeds of lamb reached at 1 batch sizes, of 4 or more" in capsys.readouterr().err
    short.write_text("optimizer,batch_size,steps\nlamb,64,500\n")
    assert command.main(["statistics", "--recorded", str(short)]) == 2
    assert "lacks the column seed" in capsys.readouterr().err
    assert command.main(["statistics", "--studies", "0"]) == 2
    assert "--studies must be 1 or more, got 0" in capsys.readouterr().err
