"""The plan of a run: every sample once, the batch in hand its learning rate, refusals that help."""

import re
from typing import Any

import pytest

from largebatch.schedules import (
    WSD,
    BatchSplit,
    Constant,
    ConstantBatch,
    Cosine,
    Curve,
    GeometricBatch,
    Hyper,
    Plan,
    PlannedStage,
    Polynomial,
    Ramp,
    RampupBatch,
    Seesaw,
    StagedBatch,
)
from largebatch.schedules.scaling import Rule

RAMP = RampupBatch(start=16, increment=8, ramp_samples=3_000, size=64)
RAMPS: list[Ramp] = [
    RAMP,
    ConstantBatch(size=1),
    ConstantBatch(size=333),
    ConstantBatch(size=20_000),
    RampupBatch(start=1, increment=7, ramp_samples=5_000, size=71),
    RampupBatch(start=1, increment=1, ramp_samples=40, size=600),
    GeometricBatch(start=3, factor=3, ramp_samples=9_500, size=729),
    StagedBatch(spec="0:10 5:999 20:7 9990:500"),
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
    assert plan.at(0)[:3] == pytest.approx((0, 16, 0.1 * 16 / 400))
    assert plan.at(500)[:3] == pytest.approx((500, 24, 0.1 * (24 / 16) ** 0.5 * (1 - 100 / 9600)))
    assert plan.at(5200)[:3] == pytest.approx((5200, 64, 0.1 * 2.0 * 0.5))
    assert plan.peak_lr == pytest.approx(0.2)


@pytest.mark.parametrize(("rule", "peak"), [("none", 0.1), ("sqrt", 0.2), ("linear", 0.4)])
def test_the_peak_is_that_of_the_last_batch_size(rule: str, peak: float) -> None:
    assert make_plan(rule=rule).peak_lr == pytest.approx(peak)
    assert make_plan(RAMP, budget_samples=3_041, rule=rule).peak_lr == pytest.approx(peak)


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
@pytest.mark.parametrize("curve", [Constant(), WSD(warmup_samples=1001)], ids=["constant", "wsd"])
def test_the_stages_are_the_run_without_walking_through_it(ramp: Ramp, curve: Curve) -> None:
    plan = make_plan(ramp, curve, rule="sqrt")
    points, walked = list(plan), []
    for step, point in enumerate(points):
        if not walked or walked[-1].batch_size != point.batch_size:
            walked.append(PlannedStage(point.samples, step, point.batch_size, point.lr, 0, 0.0,
                                       point.hyper))  # fmt: skip
        num_steps = walked[-1].num_steps + 1
        walked[-1] = walked[-1]._replace(num_steps=num_steps, last_lr=point.lr)
    assert plan.stages() == walked
    totals = plan.totals()
    assert totals.steps == len(points)
    assert totals.samples == points[-1].samples + points[-1].batch_size
    constant = make_plan(ConstantBatch(size=points[0].batch_size))
    assert totals.steps + totals.steps_saved == len(list(constant))


def test_the_worked_example_of_megatron_in_totals() -> None:
    # --rampup-batch-size 16 8 300000, global batch 1024: the ramp's 1,319 steps, 300,096 samples.
    ramp = RampupBatch(start=16, increment=8, ramp_samples=300_000, size=1024)
    first, second, third, fourth, *_, last = make_plan(ramp, budget_samples=10**6).stages()
    assert [stage[:3] for stage in (first, second, third, fourth)] == [
        (0, 0, 16),
        (2384, 149, 24),
        (4784, 249, 32),
        (7152, 323, 40),
    ]
    assert last[:3] == (300_096, 1319, 1024)


def test_a_run_of_a_trillion_samples_is_planned_at_once() -> None:
    plan = make_plan(StagedBatch(spec="0:768 250B:1536"), budget_samples=10**12)
    first, second = plan.stages()
    assert first.num_steps == -(-250 * 10**9 // 768)
    assert second.samples == first.num_steps * 768
    assert plan.totals().steps == first.num_steps + -(-(10**12 - second.samples) // 1536)


def test_tokens_are_samples_times_those_of_a_sample() -> None:
    plan = Plan(
        ramp=ConstantBatch(size=3), curve=Constant(), budget_samples=10, base_lr=1, base_batch=1,
        tokens_per_sample=2048,
    )  # fmt: skip
    assert plan.totals() == (4, 12, 12 * 2048, 0)


TUNED = Hyper(lr=9.9, betas=(0.95, 0.99), eps=1e-8, weight_decay=0.1, ema_decay=0.99)


def test_a_point_carries_what_the_rule_makes_of_all_that_was_tuned() -> None:
    plan = Plan(
        ramp=RAMP, curve=Cosine(warmup_samples=500), budget_samples=10_000, base_lr=0.1,
        base_batch=16, rule="adam_sde", hyper=TUNED,
    )  # fmt: skip
    for point in plan:
        kappa = point.batch_size / 16
        hyper = point.hyper
        assert hyper.lr == pytest.approx(0.1 * kappa**0.5, rel=1e-12)
        assert hyper.betas == pytest.approx((1 - kappa * 0.05, 1 - kappa * 0.01), rel=1e-12)
        assert hyper.weight_decay == pytest.approx(0.1 * kappa**0.5, rel=1e-12)
        assert point.lr == hyper.lr * Cosine(warmup_samples=500).factor(*point[:2], 10_000)


def test_the_timescale_is_a_share_of_the_run() -> None:
    for base_samples, factor in ((None, 1.0), (10_000, 1.0), (40_000, 4.0)):
        plan = Plan(
            ramp=ConstantBatch(size=64), curve=Constant(), budget_samples=10_000, base_lr=0.1,
            base_batch=16, hold="timescale", base_samples=base_samples, hyper=TUNED,
        )  # fmt: skip
        assert plan.at(0).hyper.weight_decay == pytest.approx(0.1 * 4 * factor, rel=1e-12)


def test_rate_and_reach_follow_the_length_of_the_run() -> None:
    values: dict[str, Any] = {
        "ramp": ConstantBatch(size=16 * 30), "curve": Constant(), "base_lr": 0.1, "base_batch": 16,
        "rule": "adam_sde", "hyper": TUNED, "duration_exponent": 0.5, "base_samples": 10_000,
    }  # fmt: skip
    hyper = Plan(budget_samples=40_000, **values).at(0).hyper  # kappa 30 / 4
    assert hyper.lr == pytest.approx(0.1 * 7.5**0.5, rel=1e-12)
    assert hyper.betas == pytest.approx((1 - 7.5 * 0.05, 1 - 7.5 * 0.01), rel=1e-12)
    with pytest.raises(ValueError, match=r"a batch of 480: from 16 it reaches 319"):
        Plan(budget_samples=10_000, **values)
    with pytest.raises(
        ValueError, match=r"duration_exponent=0\.5 .* give .* scaling\.base_samples"
    ):
        Plan(budget_samples=40_000, **values | {"base_samples": None})


def test_a_trade_of_rate_for_batch_keeps_the_rate_of_the_run_s_length() -> None:
    for longer in (1, 4):
        plan = Plan(
            ramp=Seesaw(start=64, size=256), curve=Cosine(), budget_samples=40_000, base_lr=0.1,
            base_batch=16, rule="sqrt", duration_exponent=0.5, base_samples=40_000 // longer,
        )  # fmt: skip
        assert plan.peak_lr == pytest.approx(0.2 / longer**0.5, rel=1e-12)
        last = plan.stages()[-1]  # whose curve has fallen by the batch's factor of 4, not its root
        assert last.hyper.lr == pytest.approx(plan.peak_lr * 2, rel=1e-12)


def test_a_rule_that_does_not_reach_a_size_of_the_ramp_is_refused_before_the_first_step() -> None:
    for ramp, reached in ((RAMP, True), (ConstantBatch(size=16 * 20), False)):
        values = {"ramp": ramp, "curve": Constant(), "budget_samples": 5000, "base_lr": 1.0}
        if reached:
            Plan(**values, base_batch=16, rule="adam_sde", hyper=TUNED)  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match=r"from 16 it reaches 319"):
                Plan(**values, base_batch=16, rule="adam_sde", hyper=TUNED)  # type: ignore[arg-type]


def test_a_rule_that_moves_the_warm_up_moves_it_for_the_first_batch_size() -> None:
    ramp = GeometricBatch(start=64, ramp_samples=4000, size=256)
    plan = make_plan(ramp, Cosine(warmup_samples=500), rule="legw")
    assert plan.at(0).lr == pytest.approx(0.1 * 2 * 64 / 2000)
    warmed = [point.samples for point in plan if point.lr == point.hyper.lr]
    assert warmed[0] == 2000 - 16  # 31 steps of 64; the 32nd completes the 2,000
    with pytest.raises(ValueError, match=r"^lr\.warmup_samples is 12000, longer than the run"):
        make_plan(ramp, Cosine(warmup_samples=3000), rule="legw")


def test_a_planned_ramp_has_nothing_to_checkpoint() -> None:
    plan = make_plan()
    plan.observe(160, eval_loss=1.0)
    assert plan.state_dict() == {}
    plan.load_state_dict({})
    assert plan == make_plan()
    assert not plan.is_open


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
    with pytest.raises(ValueError, match=r"^batch\.ramp_samples is 3000: .*2999") as refusal:
        make_plan(budget_samples=2_999)
    assert "lower it" in str(refusal.value)
    assert list(make_plan(budget_samples=budget_offered(refusal)))


def test_an_unknown_rule_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"one of none, linear, sqrt, .*, got 'cubic'"):
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


def test_the_micro_batch_stays_and_accumulation_varies() -> None:
    plan = make_plan(GeometricBatch(start=64, ramp_samples=100, size=512))
    assert plan.splits(4, 8) == [
        BatchSplit(64, 4, 2),
        BatchSplit(128, 4, 4),
        BatchSplit(256, 4, 8),
        BatchSplit(512, 4, 16),
    ]
    assert plan.splits(4, None) == [BatchSplit(size, 4, 1) for size in (64, 128, 256, 512)]


def test_every_batch_size_that_does_not_divide_is_named_with_its_nearest() -> None:
    plan = make_plan(RampupBatch(start=8, increment=4, ramp_samples=100, size=48))
    with pytest.raises(
        ValueError, match=r"^a batch size of 12 is not .* nearest .* 8 or 16, "
    ) as at:
        plan.splits(4, 2)
    assert str(at.value).endswith("; neither are 20 (16 or 24), 28 (24 or 32), 36 (32 or 40), "
                                  "44 (40 or 48)")  # fmt: skip
    plan = make_plan(RampupBatch(start=1, increment=1, ramp_samples=100, size=64))
    with pytest.raises(ValueError, match=r"; neither are 3 \(2 or 4\), .*, 26 more$"):
        plan.splits(2, None)


def test_a_last_stage_that_the_budget_never_meets_is_refused() -> None:
    ramp = StagedBatch(spec="0:8 10K:16")
    with pytest.raises(ValueError, match=r"begins at 10000 samples: .* 10000 is over") as refusal:
        make_plan(ramp)
    make_plan(ramp, budget_samples=budget_offered(refusal))
