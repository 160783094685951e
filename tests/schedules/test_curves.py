"""The learning rate's curve: how it rises, where it peaks, where it ends."""

from typing import Any

import pytest

from largebatch.schedules import (
    WSD,
    Constant,
    ConstantBatch,
    Cosine,
    Curve,
    GeometricBatch,
    InverseSqrt,
    Linear,
    Plan,
    Polynomial,
    Ramp,
    RampupBatch,
    StagedBatch,
    StepDecay,
)

BUDGET = 10_000
RAMPS: list[Ramp] = [
    ConstantBatch(size=7),
    ConstantBatch(size=250),
    RampupBatch(start=8, increment=8, ramp_samples=2_000, size=64),
    RampupBatch(start=50, increment=25, ramp_samples=9_000, size=500),
    GeometricBatch(start=4, ramp_samples=9_000, size=256),
    StagedBatch(spec="0:10 1K:100 9890:1K"),
]
CURVES: list[type[Curve]] = [Constant, Linear, Cosine, Polynomial, StepDecay, InverseSqrt, WSD]
# Those that end at a fraction of the peak.
DECAYING: list[type[Linear] | type[Cosine] | type[Polynomial] | type[WSD]] = [
    Linear,
    Cosine,
    Polynomial,
    WSD,
]


def factors(curve: Curve, ramp: Ramp, budget: int = BUDGET) -> list[tuple[int, int, float]]:
    """Samples before each step, its batch size and its factor."""
    plan = Plan(ramp=ramp, curve=curve, budget_samples=budget, base_lr=1.0, base_batch=1)
    return [(point.samples, point.batch_size, point.lr) for point in plan]


def test_the_warm_up_is_linear_and_wastes_no_step_at_zero() -> None:
    warmed = factors(Constant(warmup_samples=100), ConstantBatch(size=10), 130)
    assert [factor for *_, factor in warmed] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0], rel=1e-15
    )


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("ramp", RAMPS, ids=str)
def test_the_step_that_completes_the_warm_up_takes_the_peak_exactly(
    curve: type[Curve], ramp: Ramp
) -> None:
    steps = factors(curve(warmup_samples=1001), ramp)
    completing = next(i for i, (seen, size, _) in enumerate(steps) if seen + size >= 1001)
    assert steps[completing][2] == 1.0
    assert all(factor < 1.0 for *_, factor in steps[:completing])
    assert all(factor <= 1.0 for *_, factor in steps)


def test_without_warm_up_the_first_step_takes_the_peak() -> None:
    for curve in set(CURVES) - {InverseSqrt}:
        assert curve().factor(0, 1, BUDGET) == 1.0
    assert InverseSqrt(timescale_samples=1).factor(0, 1, BUDGET) == 1.0


def test_a_constant_curve_stays_at_its_peak() -> None:
    assert {factor for *_, factor in factors(Constant(), RAMPS[2])} == {1.0}


@pytest.mark.parametrize(
    ("curve", "quarters"),
    [
        (Cosine(), [1.0, 0.853553390593, 0.5, 0.146446609407, 0.0]),
        (Cosine(final_fraction=0.2), [1.0, 0.882842712475, 0.6, 0.317157287525, 0.2]),
        (Linear(), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (Linear(final_fraction=0.2), [1.0, 0.8, 0.6, 0.4, 0.2]),
        (Polynomial(), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (StepDecay(drop_factor=0.2), [1.0, 1.0, 0.2, 0.04, 0.04]),
        (StepDecay(drop_samples=[1001, 3000]), [1.0, 1.0, 0.1, 0.01, 0.01]),
        (InverseSqrt(timescale_samples=1000), [1.0, 2**-0.5, 3**-0.5, 0.5, 5**-0.5]),
        (WSD(decay_fraction=0.5), [1.0, 1.0, 1.0, 0.5, 0.0]),
        (WSD(decay_samples=3000, final_fraction=0.1), [1.0, 1.0, 0.7, 0.4, 0.1]),
        (WSD(decay_samples=4000, shape="cosine"), [1.0, 0.853553390593, 0.5, 0.146446609407, 0.0]),
        (WSD(decay_samples=4000, shape="sqrt"), [1.0, 0.5, 0.292893218813, 0.133974596216, 0.0]),
        (WSD(decay_samples=0), [1.0, 1.0, 1.0, 1.0, 1.0]),
        (Polynomial(power=2), [1.0, 0.5625, 0.25, 0.0625, 0.0]),
        (
            Polynomial(power=0.5, final_fraction=0.5),
            [1.0, 0.933012701892, 0.853553390593, 0.75, 0.5],
        ),
    ],
)
def test_a_decay_at_its_quarters(curve: Curve, quarters: list[float]) -> None:
    marks = [curve.factor(samples, 1, 4000) for samples in (0, 1000, 2000, 3000, 4000)]
    assert marks == pytest.approx(quarters, abs=1e-12)


def test_the_decay_runs_from_the_end_of_the_warm_up_to_the_budget() -> None:
    curve = Polynomial(warmup_samples=2000)
    marks = [curve.factor(samples, 1, 10_000) for samples in (2000, 4000, 6000, 10_000)]
    assert marks == pytest.approx([1.0, 0.75, 0.5, 0.0])


@pytest.mark.parametrize("curve", DECAYING)
@pytest.mark.parametrize("ramp", RAMPS, ids=str)
def test_the_decay_ends_at_the_budget_under_any_ramp(
    curve: type[Linear] | type[Cosine] | type[Polynomial] | type[WSD], ramp: Ramp
) -> None:
    decaying = curve(warmup_samples=500, final_fraction=0.1)
    steps = factors(decaying, ramp)
    after = [factor for seen, _, factor in steps if seen >= 500]
    assert after == sorted(after, reverse=True)
    assert after[-1] > 0.1
    seen, size, _ = steps[-1]
    assert seen < BUDGET <= seen + size
    assert decaying.factor(BUDGET, size, BUDGET) == pytest.approx(0.1, abs=1e-15)
    assert decaying.factor(2 * BUDGET, size, BUDGET) == pytest.approx(0.1, abs=1e-15)


@pytest.mark.parametrize("curve", CURVES)
def test_after_the_warm_up_the_batch_size_does_not_move_the_curve(
    curve: type[Curve],
) -> None:
    decaying = curve(warmup_samples=100)
    assert len({decaying.factor(5000, size, BUDGET) for size in (1, 64, 4096)}) == 1


def test_a_warm_up_as_long_as_the_run_is_all_there_is() -> None:
    steps = factors(Cosine(warmup_samples=100), ConstantBatch(size=20), 100)
    assert [factor for *_, factor in steps] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("curve", "keys", "sentence"),
    [
        (
            Constant,
            {"warmup_samples": -1},
            r"^lr\.warmup_samples must be .* at least 0 .*, got -1$",
        ),
        (Cosine, {"warmup_samples": 1.5}, r"^lr\.warmup_samples must be .*, got 1\.5$"),
        (Cosine, {"final_fraction": 1.5}, r"^lr\.final_fraction .* >= 0 and <= 1, got 1\.5$"),
        (Polynomial, {"final_fraction": -0.1}, r"^lr\.final_fraction .* >= 0 and <= 1, got -0\.1$"),
        (Polynomial, {"power": 0}, r"^lr\.power must be a number > 0, got 0$"),
        (StepDecay, {"drop_factor": 0}, r"^lr\.drop_factor .* > 0 and <= 1, got 0$"),
        (StepDecay, {"drop_fractions": [0.7, 0.5]}, r"^lr\.drop_fractions must rise, got \[0\.7"),
        (StepDecay, {"drop_samples": [10, 10]}, r"^lr\.drop_samples must rise, got \[10, 10\]$"),
        (InverseSqrt, {}, r"^lr\.timescale_samples must be given where lr\.warmup_samples is 0"),
        (WSD, {"decay_fraction": 2}, r"^lr\.decay_fraction .* >= 0 and <= 1, got 2$"),
        (WSD, {"shape": "bow"}, r"^lr\.shape must be one of linear, cosine, sqrt, got 'bow'$"),
    ],
)
def test_impossible_values_are_refused_by_name(
    curve: type[Curve], keys: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        curve(**keys)


def test_counts_may_be_written_as_people_write_them() -> None:
    assert Cosine(warmup_samples="1e3") == Cosine(warmup_samples=1000)  # type: ignore[arg-type]


def test_the_inverse_root_is_that_of_the_transformer() -> None:
    # Vaswani et al.: min(step^-0.5, step warmup^-1.5), here as a factor on its peak.
    curve = InverseSqrt(warmup_samples=4000)
    for samples in (4000, 8000, 100_000):
        assert curve.factor(samples, 1, 10**6) == pytest.approx((4000 / samples) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
def test_a_drop_comes_with_the_first_step_at_or_after_it(ramp: Ramp) -> None:
    for seen, _, factor in factors(StepDecay(drop_factor=0.5, drop_samples=[3000, 9000]), ramp):
        assert factor == (1.0 if seen < 3000 else 0.5 if seen < 9000 else 0.25)


@pytest.mark.parametrize(
    ("curve", "sentence"),
    [
        (
            StepDecay(drop_samples=[BUDGET]),
            rf"drops at {BUDGET} samples, where the run of {BUDGET} is over",
        ),
        (
            StepDecay(warmup_samples=5001),
            r"^lr\.warmup_samples is 5001, longer than the 5000 samples",
        ),
        (
            WSD(warmup_samples=5000, decay_samples=5001),
            r"sum of lr\.warmup_samples and lr\.decay_samples is 10001, .* to 10001 or more$",
        ),
        (
            WSD(warmup_samples=9000),
            r"^lr\.decay_fraction is 0\.2 of the run, .* leaves 0\.1: lower",
        ),
    ],
)
def test_a_curve_that_the_budget_cuts_off_is_refused(curve: Curve, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        factors(curve, RAMPS[0])
