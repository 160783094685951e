"""Learning rates against batch size, at values that were published or follow by hand."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from largebatch.schedules import (
    HOLDS,
    RULES,
    Constant,
    ConstantBatch,
    Hyper,
    Plan,
    scale,
    scale_lr,
)

# What a rule cannot do without.
OPTIONS = {
    "surge": {"noise_scale": 1000.0},
    "adascale": {"noise_scale": 1000.0},
    "power": {"exponent": 0.3},
}


def test_linear_gives_the_learning_rate_of_imagenet_in_one_hour() -> None:
    # Goyal et al., 1706.02677: 0.1 for each 256 images, hence 3.2 at 8,192.
    assert scale_lr(0.1, 256, 8192, "linear") == pytest.approx(3.2, rel=1e-12)


def test_sqrt_gives_the_learning_rates_of_lamb_for_bert() -> None:
    # You et al., 1904.00962, table 4: 5 / (2^e 1000), where e falls by a half for each doubling.
    batches = [512, 1024, 2048, 4096, 8192, 16384, 32768]
    for batch, exponent in zip(batches, [3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0], strict=True):
        published = 5.0 / (2.0**exponent * 1000)
        assert scale_lr(5e-3, 32768, batch, "sqrt") == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize(("rule", "lr"), [("none", 0.1), ("linear", 0.8), ("sqrt", 0.282842712)])
def test_eight_times_the_batch(rule: str, lr: float) -> None:
    assert scale_lr(0.1, 64, 512, rule) == pytest.approx(lr, rel=1e-8)


@pytest.mark.parametrize("rule", RULES)
def test_the_base_batch_keeps_its_learning_rate_to_the_last_bit(rule: str) -> None:
    assert scale_lr(0.1234, 192, 192, rule, **OPTIONS.get(rule, {})) == 0.1234


@pytest.mark.parametrize("rule", RULES)
def test_scaling_up_and_down_again_returns(rule: str) -> None:
    there = scale_lr(0.3, 256, 4096, rule, **OPTIONS.get(rule, {}))
    back = scale_lr(there, 4096, 256, rule, **OPTIONS.get(rule, {}))
    assert back == pytest.approx(0.3, rel=1e-12)


def test_sqrt_is_the_rule_where_none_is_named() -> None:
    assert scale_lr(0.1, 64, 256) == scale_lr(0.1, 64, 256, "sqrt")


def test_any_function_of_the_ratio_is_a_rule() -> None:
    assert scale_lr(0.1, 64, 256, lambda kappa: kappa**0.25) == pytest.approx(0.1 * 2**0.5)


def test_an_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"one of none, linear, sqrt, .*, got 'cubic'"):
        scale_lr(0.1, 64, 256, "cubic")


def test_impossible_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^base_lr must be a number > 0, got 0.0$"):
        scale_lr(0.0, 64, 256)
    with pytest.raises(
        ValueError, match=r"^base_batch must be a whole number of at least 1 .*got 0$"
    ):
        scale_lr(0.1, 0, 256)
    with pytest.raises(ValueError, match=r"^batch must be a whole number of at least 1 .*got 2.5$"):
        scale_lr(0.1, 64, 2.5)  # type: ignore[arg-type]


TUNED = Hyper(
    lr=1e-3,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.1,
    ema_decay=0.999,
    warmup_samples=10_000,
)


def decay_per_sample(hyper: Hyper, batch: int) -> float:
    assert hyper.weight_decay is not None
    return hyper.lr * hyper.weight_decay / batch


def half_life_samples(rate: float, batch: int) -> float:
    return batch * math.log(0.5) / math.log(rate)


@pytest.mark.parametrize("batch", [32, 128, 256, 384, 512])
def test_the_sde_rule_moves_everything_that_adam_has(batch: int) -> None:
    kappa = batch / 64
    scaled = scale(TUNED, 64, batch, rule="adam_sde")
    assert scaled.lr == pytest.approx(1e-3 * kappa**0.5, rel=1e-12)
    assert scaled.betas == pytest.approx((1 - kappa * 0.1, 1 - kappa * 0.05), rel=1e-12)
    assert scaled.eps == pytest.approx(1e-8 / kappa**0.5, rel=1e-12)
    assert scaled.warmup_samples == 10_000


@pytest.mark.parametrize("batch", [16, 32, 128, 256, 512])
def test_the_sde_rule_keeps_decay_and_average_per_sample(batch: int) -> None:
    scaled = scale(TUNED, 64, batch, rule="adam_sde", hold="per_sample")
    assert scaled == scale(TUNED, 64, batch, rule="adam_sde")
    assert scaled.weight_decay == pytest.approx(0.1 * (batch / 64) ** 0.5, rel=1e-12)
    assert decay_per_sample(scaled, batch) == pytest.approx(decay_per_sample(TUNED, 64), rel=1e-12)
    assert scaled.ema_decay is not None
    before, after = half_life_samples(0.999, 64), half_life_samples(scaled.ema_decay, batch)
    assert after == pytest.approx(before, rel=1e-12)


def test_the_sde_rule_in_numbers() -> None:
    # 1 - 8 (1 - 0.9); and where both rules for beta2 part, 0.95 at 8 and 16 times the batch.
    eight = scale(TUNED, 64, 512, rule="adam_sde").betas
    assert eight == pytest.approx((0.2, 0.6))
    slow = Hyper(lr=1.0, betas=(0.95, 0.95))
    for kappa, sde, half_life in [(8, 0.60, 0.663), (16, 0.20, 0.440)]:
        betas = scale(slow, 1, kappa, rule="adam_sde").betas
        assert betas is not None
        assert betas[1] == pytest.approx(sde, abs=5e-4)
        betas = scale(slow, 1, kappa, rule="half_life").betas
        assert betas is not None
        assert betas == (0.95, pytest.approx(half_life, abs=5e-4))


@pytest.mark.parametrize(("beta", "base", "reach"), [(0.9, 64, 639), (0.95, 256, 5119)])
def test_the_sde_rule_is_refused_from_where_it_ends(beta: float, base: int, reach: int) -> None:
    hyper = Hyper(lr=1.0, betas=(beta, 0.999))
    betas = scale(hyper, base, reach, rule="adam_sde").betas
    assert betas is not None
    assert 0 < betas[0] < 0.01
    for batch in (reach + 1, 2 * reach):
        with pytest.raises(ValueError, match=rf"kappa \(1 - beta1\) < 1, .* reaches {reach}; "):
            scale(hyper, base, batch, rule="adam_sde")
    with pytest.raises(ValueError, match=r"kappa \(1 - beta2\) < 1"):
        scale(Hyper(lr=1.0, betas=(0.99, 0.9)), 1, 10, rule="adam_sde")


def test_without_a_first_moment_the_sde_rule_is_that_of_rmsprop() -> None:
    scaled = scale(Hyper(lr=1.0, betas=(0.0, 0.99)), 64, 64 * 16, rule="adam_sde")
    assert scaled.betas == pytest.approx((0.0, 0.84))
    assert scaled.lr == 4.0


def test_half_life_keeps_beta2_in_samples_and_beta1_as_it_is() -> None:
    for batch in (32, 128, 4096):
        scaled = scale(TUNED, 64, batch, rule="half_life")
        assert scaled.betas is not None
        assert scaled.betas[0] == 0.9
        kept = half_life_samples(scaled.betas[1], batch)
        assert kept == pytest.approx(half_life_samples(0.95, 64), rel=1e-12)
        assert scaled.lr == pytest.approx(1e-3 * (batch / 64) ** 0.25, rel=1e-12)
        other = scale(TUNED, 64, batch, rule="half_life", exponent=0.5)
        assert other.lr == pytest.approx(1e-3 * (batch / 64) ** 0.5, rel=1e-12)


def test_lamb_without_tuning_warms_up_for_the_same_steps_at_every_batch() -> None:
    # You et al., 1904.00962, table 4: warm-up over 1/320 of 1,000,000 steps at 512 … 1/5 of 15,625.
    largest = Hyper(lr=5e-3, warmup_samples=3125 * 32768)
    for batch, steps, share in [(512, 1_000_000, 1 / 320), (4096, 125_000, 1 / 40)]:
        scaled = scale(largest, 32768, batch, rule="lamb_untuned")
        assert scaled.warmup_samples == steps * share * batch == 3125 * batch
    assert scale(largest, 32768, 512, rule="lamb_untuned").lr == pytest.approx(5 / (2**3 * 1000))


def test_legw_gives_the_learning_rates_and_warm_up_epochs_of_its_resnet() -> None:
    # You et al., 1901.08256: 2^2.5 and 0.3125 epochs at 1K, 2^5 and 10 epochs at 32K.
    epoch = 1_280_000
    small = Hyper(lr=2**2.5, warmup_samples=int(0.3125 * epoch))
    large = scale(small, 1024, 32768, rule="legw")
    assert large.lr == pytest.approx(2**5, rel=1e-12)
    assert large.warmup_samples == 10 * epoch


def test_the_surge_peaks_at_the_noise_scale_and_is_symmetric_about_it() -> None:
    noise = 4096.0

    def lr(batch: int) -> float:
        return scale_lr(1.0, 4096, batch, "surge", noise_scale=noise)

    assert lr(4096) == 1.0
    assert lr(1024) == pytest.approx(lr(4096 * 4), rel=1e-12)
    assert lr(1024) == pytest.approx(2 / (2 + 0.5), rel=1e-12)
    assert lr(64) / lr(16) == pytest.approx(2.0, rel=0.02)  # the root, far below


@pytest.mark.parametrize(("kappa", "gain"), [(2, 1.887), (8, 5.630), (64, 13.36), (10**9, 16.63)])
def test_the_gains_of_adascale(kappa: int, gain: float) -> None:
    scaled = scale_lr(1.0, 64, 64 * kappa, "adascale", noise_scale=1000)
    assert scaled == pytest.approx(gain, abs=6e-3 if gain > 10 else 6e-4)


def test_a_power_may_be_any() -> None:
    for exponent in (-0.5, 0.0, 0.383, 2.0):
        scaled = scale(TUNED, 64, 512, rule="power", exponent=exponent)
        assert scaled.lr == pytest.approx(1e-3 * 8**exponent, rel=1e-12)
        assert scaled.betas == TUNED.betas


@pytest.mark.parametrize(
    ("rule", "lr_factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0), ("half_life", 4**0.25)]
)
def test_what_is_held_of_the_weight_decay_is_held(rule: str, lr_factor: float) -> None:
    def scaled(hold: str | None, duration: float = 1.0) -> Hyper:
        return scale(TUNED, 64, 256, rule=rule, hold=hold, duration=duration)

    assert scaled(None).weight_decay == 0.1
    per_step = scaled("per_step")
    assert per_step.weight_decay is not None
    assert per_step.lr * per_step.weight_decay == pytest.approx(1e-4, rel=1e-12)
    per_sample = scaled("per_sample")
    assert decay_per_sample(per_sample, 256) == pytest.approx(1e-4 / 64, rel=1e-12)
    # λ √κ with the root, λ κ at the same learning rate, λ with the linear rule
    assert per_sample.weight_decay == pytest.approx(0.1 * 4 / lr_factor, rel=1e-12)
    # The averaging time as a share of the run: half as slow in a run of twice the samples.
    assert scaled("timescale") == per_sample
    share = 1 / decay_per_sample(scaled("timescale", 2.0), 256) / 2.0
    assert share == pytest.approx(1 / decay_per_sample(TUNED, 64), rel=1e-12)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "adam_sde"])
def test_a_longer_run_takes_a_lower_rate_under_every_rule(rule: str) -> None:
    options = OPTIONS.get(rule, {})
    same = scale(TUNED, 64, 256, rule=rule, **options)
    for exponent, factor in ((0.0, 1.0), (0.5, 1 / 2), (0.3, 0.6597539553864471)):
        longer = scale(
            TUNED, 64, 256, rule=rule, duration=4.0, duration_exponent=exponent, **options
        )
        assert longer.lr == pytest.approx(same.lr * factor, rel=1e-12)
        assert replace(longer, lr=same.lr) == same


def test_the_sde_s_clock_is_a_share_of_the_run() -> None:
    # r = kappa / duration = 4 / 2 in the place of kappa (2512.22382); 4 / 2^(1/2) with half of it.
    complete = scale(TUNED, 64, 256, rule="adam_sde", duration=2.0, duration_exponent=0.5)
    assert complete.lr == pytest.approx(1e-3 * 2**0.5, rel=1e-12)
    assert complete.betas == pytest.approx((0.8, 0.9), rel=1e-12)
    assert complete.eps == pytest.approx(1e-8 / 2**0.5, rel=1e-12)
    assert TUNED.ema_decay is not None
    assert complete.ema_decay == pytest.approx(TUNED.ema_decay**2, rel=1e-12)
    assert complete.warmup_samples == TUNED.warmup_samples
    slower = scale(TUNED, 64, 256, rule="adam_sde", duration=2.0, duration_exponent=0.25)
    assert slower.lr == pytest.approx(1e-3 * 2**0.75, rel=1e-12)
    assert slower.betas == pytest.approx((1 - 0.1 * 2**1.5, 1 - 0.05 * 2**1.5), rel=1e-12)
    # As many samples and half the batch are one clock.
    half = scale(TUNED, 64, 128, rule="adam_sde")
    assert replace(complete, weight_decay=half.weight_decay) == half


def test_the_sde_reaches_further_in_a_longer_run_and_less_far_in_a_shorter() -> None:
    longer = scale(TUNED, 64, 64 * 20, rule="adam_sde", duration=4.0, duration_exponent=0.5)
    assert longer.betas == pytest.approx((0.5, 0.75), rel=1e-12)  # kappa 5
    reach = {"rule": "adam_sde", "duration": 0.5, "duration_exponent": 0.5}
    scale(TUNED, 64, 319, **reach)
    said = (
        r"got 10 \* 0\.1 at a batch of 320 with a kappa 2 times as large .* it reaches 319; raise"
    )
    with pytest.raises(ValueError, match=said):
        scale(TUNED, 64, 320, **reach)


@pytest.mark.parametrize("rule", ["none", "sqrt", "adam_sde"])
def test_weight_decay_is_held_beside_the_rate_of_a_longer_run(rule: str) -> None:
    def scaled(hold: str) -> Hyper:
        return scale(TUNED, 64, 256, rule=rule, hold=hold, duration=2.0, duration_exponent=0.5)

    per_step, timescale = scaled("per_step"), scaled("timescale")
    assert per_step.weight_decay is not None
    assert per_step.lr * per_step.weight_decay == pytest.approx(1e-4, rel=1e-12)
    before = decay_per_sample(TUNED, 64)
    assert decay_per_sample(scaled("per_sample"), 256) == pytest.approx(before, rel=1e-12)
    assert decay_per_sample(timescale, 256) == pytest.approx(before / 2.0, rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_weight_decay_stays_where_nothing_is_held(rule: str) -> None:
    options = OPTIONS.get(rule, {})
    held = scale(TUNED, 64, 256, rule=rule, hold=None, **options)
    assert held.weight_decay == TUNED.weight_decay
    implied = "per_sample" if rule == "adam_sde" else None
    assert scale(TUNED, 64, 256, rule=rule, **options) == scale(
        TUNED, 64, 256, rule=rule, hold=implied, **options
    )
    plan = Plan(
        ramp=ConstantBatch(size=256), curve=Constant(), budget_samples=1000, base_lr=TUNED.lr,
        base_batch=64, rule=partial(RULES[rule], **options), hold=None, hyper=TUNED,
    )  # fmt: skip
    assert plan.at(0).hyper.weight_decay == TUNED.weight_decay


@pytest.mark.parametrize("rule", RULES)
def test_nothing_moves_at_the_base_batch(rule: str) -> None:
    options = OPTIONS.get(rule, {})
    assert scale(TUNED, 192, 192, rule=rule, **options) == TUNED
    for hold in HOLDS:
        assert scale(TUNED, 192, 192, rule=rule, hold=hold, **options) == TUNED


@pytest.mark.parametrize("rule", RULES)
def test_what_an_optimizer_does_not_have_stays_away(rule: str) -> None:
    bare = Hyper(lr=0.1, betas=None, eps=None, weight_decay=None)
    scaled = scale(bare, 64, 128, rule=rule, hold="per_sample", **OPTIONS.get(rule, {}))
    assert replace(scaled, lr=0.1) == bare


def test_a_rule_of_ones_own_is_a_function_like_those_there() -> None:
    def mine(hyper: Hyper, base_batch: int, batch: int) -> Hyper:
        return replace(hyper, lr=hyper.lr + batch - base_batch, betas=(0.5, 0.5))

    scaled = scale(TUNED, 64, 65, rule=mine, hold="per_step")
    assert (scaled.lr, scaled.betas) == (pytest.approx(1.001), (0.5, 0.5))
    assert scaled.weight_decay == pytest.approx(0.1 * 1e-3 / 1.001)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rule": "surge"}, r"^the rule surge needs scaling\.noise_scale: a number"),
        ({"rule": "power"}, r"^the rule power needs scaling\.exponent"),
        ({"rule": "sqrt", "exponent": 1}, r"scaling\.exponent .* rule sqrt, which takes no option"),
        ({"rule": "surge", "noise_scale": 0}, r"scaling\.noise_scale must be a number > 0, got 0"),
        ({"hold": "per_epoch"}, r"one of per_step, per_sample, timescale, rule, got 'per_epoch'"),
        ({"hold": "timescale", "duration": 0}, r"duration must be a number > 0, got 0"),
        ({"duration_exponent": -1}, r"scaling\.duration_exponent must be a number >= 0, got -1"),
    ],
)
def test_what_a_rule_cannot_use_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        scale(TUNED, 64, 256, **arguments)
