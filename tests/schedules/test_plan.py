"""The plan of a run: every sample once, the batch in hand its learning rate, refusals that help."""

import re

import pytest

from largebatch.schedules import (
    Constant,
    ConstantBatch,
    Cosine,
    Curve,
    Plan,
    Polynomial,
    Ramp,
    RampupBatch,
)
from largebatch.schedules.scaling import Rule

RAMP = RampupBatch(start=16, increment=8, ramp_samples=3_000, size=64)
RAMPS: list[Ramp] = [
    RAMP,
    ConstantBatch(size=1),
    ConstantBatch(size=333),
    ConstantBatch(size=20_000),
    RampupBatch(start=1, increment=7, ramp_samples=5_000, size=71),
]


def make_plan(
    ramp: Ramp = RAMP,
    curve: Curve | None = None,
    budget_samples: int = 10_000,
    rule: str | Rule = "none",
) -> Plan:
    return Plan(
        ramp=ramp,
        curve=curve or Constant(),
        budget_samples=budget_samples,
        base_lr=0.1,
        base_batch=16,
        rule=rule,
    )


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
def test_the_steps_neither_skip_nor_repeat_a_sample(ramp: Ramp) -> None:
    covered = [
        sample
        for point in make_plan(ramp)
        for sample in range(point.samples, point.samples + point.batch_size)
    ]
    assert covered == list(range(len(covered)))
    assert len(covered) >= 10_000


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
def test_the_run_ends_with_the_first_step_that_reaches_its_budget(ramp: Ramp) -> None:
    *_, last = make_plan(ramp)
    assert last.samples < 10_000 <= last.samples + last.batch_size


def test_no_batch_is_cut_where_the_budget_is_not_a_multiple() -> None:
    assert [point.batch_size for point in make_plan(ConstantBatch(size=400), None, 1000)] == [
        400,
        400,
        400,
    ]
    assert len(list(make_plan(ConstantBatch(size=500), None, 1000))) == 2


def test_a_plan_can_be_entered_at_any_of_its_steps() -> None:
    plan = make_plan(curve=Cosine(warmup_samples=500), rule="sqrt")
    points = list(plan)
    for index in (0, 1, 57, len(points) - 1):
        assert list(plan.steps_from(points[index].samples)) == points[index:]
        assert plan.at(points[index].samples) == points[index]
    assert list(plan.steps_from(10_000)) == []
    assert list(plan) == points


def test_the_learning_rate_is_that_of_the_batch_in_hand_times_the_curve() -> None:
    plan = make_plan(curve=Polynomial(warmup_samples=400), rule="sqrt")
    # 16, 24, … 64 over 3,000 samples: an increment each 500.
    assert plan.at(0) == pytest.approx((0, 16, 0.1 * 16 / 400))
    assert plan.at(500) == pytest.approx((500, 24, 0.1 * (24 / 16) ** 0.5 * (1 - 100 / 9600)))
    assert plan.at(5200) == pytest.approx((5200, 64, 0.1 * 2.0 * 0.5))
    assert plan.peak_lr == pytest.approx(0.2)


@pytest.mark.parametrize(("rule", "peak"), [("none", 0.1), ("sqrt", 0.2), ("linear", 0.4)])
def test_the_peak_is_that_of_the_last_batch_size(rule: str, peak: float) -> None:
    assert make_plan(rule=rule).peak_lr == pytest.approx(peak)
    assert make_plan(RAMP, budget_samples=3_000, rule=rule).peak_lr == pytest.approx(peak)


def budget_offered(refusal: pytest.ExceptionInfo[ValueError]) -> int:
    found = re.search(r"raise budget\.samples to (\d+)", str(refusal.value))
    assert found, str(refusal.value)
    return int(found[1])


def test_a_warm_up_longer_than_the_run_is_refused_with_budgets_that_would_do() -> None:
    curve = Cosine(warmup_samples=12_000)
    with pytest.raises(ValueError, match=r"^lr\.warmup_samples is 12000, .*10000") as refusal:
        make_plan(curve=curve)
    assert "lower it" in str(refusal.value)
    assert list(make_plan(curve=curve, budget_samples=budget_offered(refusal)))


def test_a_ramp_that_the_budget_cuts_off_is_refused_with_budgets_that_would_do() -> None:
    with pytest.raises(ValueError, match=r"^batch\.ramp_samples is 3000, .*2999") as refusal:
        make_plan(budget_samples=2_999)
    assert "lower it" in str(refusal.value)
    assert list(make_plan(budget_samples=budget_offered(refusal)))


def test_an_unknown_rule_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="one of none, linear, sqrt, got 'cubic'"):
        make_plan(rule="cubic")


def test_impossible_values_are_refused_by_the_key_that_sets_them() -> None:
    values = {"budget_samples": 100, "base_lr": 0.1, "base_batch": 16}
    keys = {"budget_samples": "budget.samples", "base_lr": "optim.lr"}
    for name in values:
        key = keys.get(name, "scaling.base_batch")
        with pytest.raises(ValueError, match=rf"^{re.escape(key)} must be .*, got 0$"):
            Plan(ramp=ConstantBatch(size=8), curve=Constant(), **values | {name: 0})  # type: ignore[arg-type]


def test_counts_may_be_written_as_people_write_them() -> None:
    assert make_plan(budget_samples="1e4") == make_plan()  # type: ignore[arg-type]


def test_batch_sizes_that_ranks_and_micro_batches_divide_pass() -> None:
    make_plan().check_divisible(2, 4)
    make_plan().check_divisible(8, None)
    make_plan().check_divisible(1, 1)


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "refused", "nearest"),
    [(4, 4, 24, [16, 32]), (12, None, 16, [12, 24]), (3, 8, 16, [24]), (32, None, 16, [32])],
)
def test_a_batch_size_that_does_not_divide_is_refused_with_the_nearest_that_would(
    ranks: int, micro_batch: int | None, refused: int, nearest: list[int]
) -> None:
    with pytest.raises(ValueError, match=rf"^a batch size of {refused} is not ") as refusal:
        make_plan().check_divisible(ranks, micro_batch)
    sentence = str(refusal.value)
    assert f"{ranks} rank(s) times micro-batch {micro_batch or 1}" in sentence
    offered = sentence.partition("nearest batch size is ")[2].partition(",")[0]
    assert [int(number) for number in re.findall(r"\d+", offered)] == nearest
    for size in nearest:
        make_plan(ConstantBatch(size=size)).check_divisible(ranks, micro_batch)
