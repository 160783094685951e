"""Learning rate traded for batch size: where, by how much, and what stays the same."""

import math
from itertools import pairwise

import pytest

from largebatch.schedules import (
    WSD,
    Constant,
    Cosine,
    CoupledRamp,
    Curve,
    InverseSqrt,
    LateSwitch,
    Linear,
    Plan,
    Seesaw,
    Smith,
    StepDecay,
)

BUDGET = 1_000_000


def planned(ramp: CoupledRamp, curve: Curve, budget: int = BUDGET, rule: str = "none") -> Plan:
    return Plan(
        ramp=ramp, curve=curve, budget_samples=budget, base_lr=0.1, base_batch=16, rule=rule
    )


def test_seesaw_cuts_by_the_root_where_the_cosine_is_halved() -> None:
    plan = planned(Seesaw(start=16, size=128), Cosine())
    stages = plan.stages()
    assert [stage.batch_size for stage in stages] == [16, 32, 64, 128]
    for rises, stage in enumerate(stages):
        # (1 + cos(pi x)) / 2 = 2^-rises
        place = BUDGET * math.acos(2 * 2.0**-rises - 1) / math.pi
        before = stages[rises - 1].batch_size if rises else 1
        assert place - 1e-3 <= stage.samples < place + before + 1
        if rises < 3:
            assert stage.lr == pytest.approx(0.1 * 2 ** (-rises / 2), rel=1e-12)
            assert stage.last_lr == stage.lr
    assert stages[3].lr == pytest.approx(0.1 * 2**-1.5, rel=1e-3)


def test_from_the_cap_on_seesaw_follows_the_curve() -> None:
    plan = planned(Seesaw(start=16, size=64), Linear(final_fraction=0.01))
    for samples in (760_000, 800_000, 990_000):
        factor = Linear(final_fraction=0.01).factor(samples, 1, BUDGET)
        assert plan.at(samples).lr == pytest.approx(0.1 * factor * 2, rel=1e-12)
    assert plan.at(BUDGET).lr == pytest.approx(0.1 * 0.01 * 2, rel=1e-12)


@pytest.mark.parametrize("curve", [Linear(), Cosine(), WSD(warmup_samples=10_000)])
def test_seesaw_keeps_what_adam_goes_by(curve: Curve) -> None:
    # lr / sqrt(batch) against the curve alone: within one factor of it, and at it where it rises.
    plan, factor = planned(Seesaw(start=16, size=512), curve), 2.0
    for samples in range(20_000, 990_000, 7919):
        point = plan.at(samples)
        alone = 0.1 * curve.factor(samples, 1, BUDGET)
        stairs = point.lr / math.sqrt(point.batch_size / 16)
        assert 1 - 1e-9 <= stairs / alone <= factor + 1e-9


def test_seesaw_in_small_steps_takes_the_integral_of_the_curve() -> None:
    # Batches of start / f take the integral of f over the run in steps: a half, for a line.
    plan = planned(Seesaw(start=1000, size=10**6, factor=1.01), Linear(), 10**8)
    assert plan.totals().steps / 10**5 == pytest.approx(0.5, abs=0.01)


def test_seesaw_grows_as_far_as_the_curve_falls() -> None:
    plan = planned(Seesaw(start=16, size=1024), Cosine(final_fraction=0.2))
    assert [stage.batch_size for stage in plan.stages()] == [16, 32, 64]
    assert plan.at(BUDGET - 1).lr == pytest.approx(0.1 / 2)
    assert planned(Seesaw(start=16, size=40), Cosine()).final_batch_size == 40


@pytest.mark.parametrize("curve", [Constant(), Cosine(final_fraction=0.6)])
def test_seesaw_without_a_fall_is_refused(curve: Curve) -> None:
    with pytest.raises(ValueError, match="a learning rate that falls to 1/2 of its peak"):
        planned(Seesaw(start=16, size=64), curve)


def test_smith_raises_the_batch_instead_of_dropping_the_learning_rate() -> None:
    # Smith et al. 2018: drops by 5, batches of 128, 640 and 3,200.
    curve = StepDecay(drop_factor=0.2, drop_fractions=[0.3, 0.6, 0.8])
    stages = planned(Smith(start=128, size=3200), curve).stages()
    assert [stage.batch_size for stage in stages] == [128, 640, 3200]
    assert [stage.lr for stage in stages] == pytest.approx([0.1, 0.1, 0.1])
    assert stages[2].last_lr == pytest.approx(0.1 / 5)  # the third drop comes at the cap


def test_smith_keeps_the_noise_of_the_drops_up_to_the_cap_and_beyond() -> None:
    curve = StepDecay(drop_factor=0.3, drop_fractions=[0.25, 0.5, 0.75])
    plan = planned(Smith(start=100, size=700), curve)
    assert plan.final_batch_size == 700
    for samples in range(0, BUDGET, 9973):
        point = plan.at(samples)
        alone = 0.1 * curve.factor(samples, 1, BUDGET) / 100
        assert point.lr / point.batch_size == pytest.approx(alone, rel=1e-12)
    assert plan.at(BUDGET // 2).batch_size == 700
    assert plan.at(BUDGET).lr == pytest.approx(0.1 * 7 * 0.027)


def test_smith_needs_drops() -> None:
    with pytest.raises(ValueError, match=r"trades the drops of lr=step; .* use batch=seesaw"):
        planned(Smith(start=16, size=64), Cosine())


def test_seesaw_trades_drops_as_they_are() -> None:
    curve = StepDecay(drop_factor=0.1, drop_fractions=[0.5])
    before, after = planned(Seesaw(start=16, size=1024), curve).stages()
    assert (before.batch_size, after.batch_size) == (16, 160)
    assert after.lr == pytest.approx(before.lr / 10**0.5, rel=1e-12)


def test_a_late_switch_comes_at_its_share_of_the_run() -> None:
    plan = planned(LateSwitch(start=10, size=1000, switch_fraction=0.9), Linear(), 10_000, "sqrt")
    before, after = plan.stages()
    assert (after.samples, after.step, after.batch_size) == (9000, 900, 1000)
    assert plan.at(9000).lr == pytest.approx(0.1 * (1000 / 16) ** 0.5 * 0.1)
    assert before.lr == pytest.approx(0.1 * (10 / 16) ** 0.5)
    with pytest.raises(
        ValueError, match="must leave a step to switch for, got 1 of 10000 samples in steps of 10"
    ):
        planned(LateSwitch(start=10, size=100, switch_fraction=1), Linear(), 10_000)


@pytest.mark.parametrize("ramp", [Seesaw(start=32, size=256), Smith(start=32, size=320)])
def test_the_peak_is_the_rules_at_the_start_and_the_rest_its_own(ramp: CoupledRamp) -> None:
    plan = planned(ramp, StepDecay(), rule="linear")
    assert plan.peak_lr == plan.at(0).lr == pytest.approx(0.2)
    exponent = 0.5 if isinstance(ramp, Seesaw) else 1.0
    for before, after in pairwise(plan.stages()):
        growth = after.batch_size / before.batch_size
        assert after.lr == pytest.approx(before.lr * 0.1 * growth**exponent)


@pytest.mark.parametrize(
    "curve",
    [Cosine(warmup_samples=30_000), InverseSqrt(warmup_samples=1000), WSD(shape="sqrt")],
)
def test_a_seesaw_neither_skips_nor_repeats_a_sample(curve: Curve) -> None:
    plan = planned(Seesaw(start=16, size=512), curve)
    seen = 0
    for point in plan:
        assert point.samples == seen
        seen += point.batch_size
    assert seen == plan.totals().samples >= BUDGET
