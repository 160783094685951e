"""Ramps that follow the noise: what each policy asks for, and when a ramp does what it asks."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from largebatch.schedules import (
    CABS,
    Constant,
    DiveBatch,
    Goodput,
    NoiseRamp,
    NoiseScale,
    NormTest,
    Plan,
    SqrtNoise,
)
from largebatch.schedules.noise_driven import StepTimes, best_goodput, least_noise_scale

NOISE_SCALE = 1000.0

# Each asks, of `readings`, for the noise scale, or next to it.
POLICIES: dict[str, Callable[..., NoiseRamp]] = {
    "sqrt_noise": lambda **keys: SqrtNoise(exchange_rate=NOISE_SCALE, **keys),
    "norm_test": NormTest,
    "divebatch": DiveBatch,
    "cabs": CABS,
    "goodput": Goodput,
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def readings(noise_scale: float = NOISE_SCALE, **others: float) -> dict[str, float]:
    """An exact state in which every policy asks for about `noise_scale`."""
    grad = 0.25
    return {
        "noise_scale": noise_scale,
        "noise_scale_error": 0.0,
        "noise_resolved": 1.0,
        "grad_sq_norm": grad,
        "grad_trace": noise_scale * grad,
        "batch_size": 64.0,
        "loss": 2.0,
        "eval_loss": 2.1,
        "lr": 8.0,  # lr / loss = 1 / ‖G‖²
    } | others


def seconds(batch_size: float) -> float:
    """A step's time of which a / b is the noise scale."""
    return 0.1 + 0.1 / NOISE_SCALE * batch_size


def boundaries(
    ramp: NoiseRamp, states: list[dict[str, float]], begin: int = 0
) -> list[tuple[int, int]]:
    """Observe after every step; each boundary's samples and the batch size from there on."""
    taken, samples = [], begin
    for state in states:
        samples += ramp.batch_size
        ramp.observe(samples, state | {"step_seconds": seconds(ramp.batch_size)})
        taken.append((samples, ramp.batch_size))
    return taken


def sizes_after(ramp: NoiseRamp, states: list[dict[str, float]]) -> list[int]:
    return [size for _, size in boundaries(ramp, states)]


def rest(ramp: NoiseRamp, state: dict[str, float]) -> int:
    """Where the ramp stays in one and the same state."""
    return sizes_after(ramp, [state] * 100)[-1]


def rung_below(asked: float, start: int) -> int:
    """The largest start · 2^k of at most `asked`."""
    return int(start * 2 ** math.floor(math.log2(asked / start) + 1e-9))


# What the policies ask for


@pytest.mark.parametrize(("eta", "multiple"), [(0.5, 3), (math.sqrt(0.5), 1), (0.2, 24)])
@pytest.mark.parametrize("begin", [1, 10**6])
def test_the_norm_test_repeated_comes_to_its_fixed_point(
    eta: float, multiple: int, begin: int
) -> None:
    policy, batch = NormTest(start=1, size=2, eta=eta), begin
    for _ in range(1000):
        batch = int(policy.desired(batch, readings()))
    # From above, rounding up holds it where it is less than 1 / (1 - η²) <= 2 samples too high.
    assert multiple * NOISE_SCALE - 1e-6 <= batch <= multiple * NOISE_SCALE + 2


@pytest.mark.parametrize(("eta", "multiple"), [(0.5, 3), (math.sqrt(0.5), 1), (0.2, 24)])
@pytest.mark.parametrize("start", [1, 3, 5, 7, 375, 125, 1501, 751])
def test_a_norm_test_ramp_rests_at_the_last_rung_below_its_fixed_point(
    eta: float, multiple: int, start: int
) -> None:
    # 375 and 125 have the fixed points among their rungs, 1501 and 751 rungs just above them.
    ramp = NormTest(start=start, size=start * 2**20, eta=eta, votes=1)
    assert rest(ramp, readings()) == max(start, rung_below(multiple * NOISE_SCALE, start))


def test_the_norm_test_is_the_variance_of_a_batch_against_its_squared_norm() -> None:
    policy, eta, state = NormTest(start=1, size=2, eta=0.3), 0.3, readings()
    for batch in (8, 64, 512, 4096, 9000, 11_000, 50_000):
        variance = state["grad_trace"] / batch
        passes = variance <= eta**2 * (state["grad_sq_norm"] + variance)
        assert (policy.desired(batch, state) <= batch) == passes


@pytest.mark.parametrize("rate", [10.0, 1000.0, 3e5])
def test_the_square_root_law_costs_least(rate: float) -> None:
    asked = SqrtNoise(start=1, size=2, exchange_rate=rate).desired(1, readings())
    batches = np.geomspace(1, 1e7, 200_001)
    cost = (1 + NOISE_SCALE / batches) * (rate + batches)  # steps in samples, and the samples
    assert asked == pytest.approx(batches[cost.argmin()], rel=1e-3)


def test_divebatch_asks_for_the_gradient_diversity_of_a_set() -> None:
    gradients = np.random.default_rng(0).standard_normal((200, 5)) + 0.3
    n, mean = len(gradients), gradients.mean(0)
    diversity = (gradients**2).sum() / (gradients.sum(0) ** 2).sum()
    grad, trace = (mean**2).sum(), ((gradients - mean) ** 2).sum() / n
    asked = DiveBatch(start=1, size=2, delta=0.3).desired(1, readings(trace / grad))
    assert asked == pytest.approx(0.3 * n * diversity, rel=1e-12)


def test_cabs_asks_for_the_most_sure_gain_a_sample() -> None:
    loss, lr, trace = 0.8, 0.05, 4000.0
    # Gain of an SGD step at smoothness 1/lr is lr/2 (‖G‖² - tr Σ / B) at least; ‖G‖² as 2 loss/lr.
    batches = np.geomspace(1, 1e6, 400_001)
    gain = lr / 2 * (2 * loss / lr - trace / batches) / batches
    asked = CABS(start=1, size=2).desired(1, readings(loss=loss, lr=lr, grad_trace=trace))
    assert asked == pytest.approx(batches[gain.argmax()], rel=1e-3)


@pytest.mark.parametrize("overhead", [1e-3, 0.05, 3.0])
@pytest.mark.parametrize("noise_scale", [20.0, 5e4])
def test_goodput_is_greatest_at_the_square_root_law(overhead: float, noise_scale: float) -> None:
    per_sample = 2e-4
    batches = np.geomspace(0.01, 1e8, 400_001)
    # Samples a second, times what each is worth beside one of a tiny batch.
    rates = batches / (overhead + per_sample * batches) * (noise_scale / (noise_scale + batches))
    best = best_goodput(noise_scale, overhead, per_sample)
    assert best == pytest.approx(batches[rates.argmax()], rel=1e-3)
    law = SqrtNoise(start=1, size=2, exchange_rate=overhead / per_sample)
    assert best == pytest.approx(law.desired(1, readings(noise_scale)), rel=1e-12)


def test_goodput_where_a_line_through_the_times_has_no_optimum() -> None:
    assert best_goodput(NOISE_SCALE, -0.1, 1e-3) == best_goodput(NOISE_SCALE, 0.0, 1e-3) == 0
    assert best_goodput(NOISE_SCALE, 0.1, 0.0) == best_goodput(NOISE_SCALE, 0.1, -1e-9) == math.inf
    assert math.isnan(best_goodput(math.nan, 0.1, 0.0))


@each_policy
@pytest.mark.parametrize("start", [3, 7, 10, 27, 333])
def test_policies_agree_where_theory_says_so(policy: Callable[..., NoiseRamp], start: int) -> None:
    # η = 1/√2, δ = 1, lr / loss = 1 / ‖G‖², r = a/b = B_noise: each then asks for B_noise.
    assert rest(policy(start=start, size=start * 2**12), readings()) == rung_below(1000, start)


# Readings that say nothing, and readings that say enough

NEEDS = {
    "sqrt_noise": ["noise_scale", "noise_scale_error"],
    "norm_test": ["grad_trace", "grad_sq_norm", "noise_scale", "noise_scale_error"],
    "divebatch": ["noise_scale", "noise_scale_error"],
    "cabs": ["grad_trace", "loss", "lr"],
    "goodput": ["noise_scale", "noise_scale_error"],
}
ASKS, DOES_NOT = readings(1e9), readings(1.0)


def measured(policy: Callable[..., NoiseRamp], **keys: int) -> NoiseRamp:
    """A ramp from 64 that has nothing left to try out."""
    ramp = policy(**{"start": 64, "size": 1024} | keys)
    if isinstance(ramp, Goodput):
        ramp.step_times.add(32, seconds(32))
        ramp.step_times.add(64, seconds(64))
    return ramp


@pytest.mark.parametrize(("name", "reading"), [(n, r) for n, rs in NEEDS.items() for r in rs])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_without_a_reading_that_it_needs_a_policy_asks_for_nothing(
    name: str, reading: str, value: float | None
) -> None:
    ramp, state = measured(POLICIES[name]), dict(ASKS)
    if value is None:
        del state[reading]
    else:
        state[reading] = value
    assert math.isnan(ramp.desired(128, state))
    # Two votes, then a boundary without one: the count begins anew.
    assert sizes_after(ramp, [ASKS, ASKS, state, ASKS, ASKS, ASKS]) == [64] * 5 + [128]
    assert sizes_after(measured(POLICIES[name]), [state] * 20) == [64] * 20


@each_policy
def test_readings_that_a_policy_does_not_need_may_be_missing(
    policy: Callable[..., NoiseRamp],
) -> None:
    (name,) = (name for name, each in POLICIES.items() if each is policy)
    state = {reading: ASKS[reading] for reading in NEEDS[name]}
    assert sizes_after(measured(policy), [state] * 3) == [64, 64, 128]
    assert sizes_after(measured(policy), [{}] * 9) == [64] * 9


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan])
def test_cabs_asks_for_nothing_at_a_loss_that_is_not_positive(loss: float) -> None:
    assert math.isnan(CABS(start=64, size=128).desired(128, readings(loss=loss)))


def test_cabs_does_not_grow_where_the_learning_rate_is_zero() -> None:
    assert CABS(start=64, size=128).desired(128, readings(lr=0.0)) == 0


# As `NoiseScale` has it where the mean of ‖G‖² is not positive.
LOST = {"noise_scale": math.inf, "noise_scale_error": math.inf, "noise_resolved": 0.0}


@pytest.mark.parametrize("grad", [0.0, -1e-3])
def test_where_the_squared_norm_is_lost_only_tests_that_can_do_without_it_vote(
    grad: float,
) -> None:
    state = readings(1e9) | LOST | {"grad_sq_norm": grad}
    voting = {
        name for name, policy in POLICIES.items()
        if sizes_after(measured(policy), [state] * 3)[-1] > 64
    }  # fmt: skip
    assert voting == {"norm_test", "cabs"}
    # All of ‖ḡ‖² counts as noise then, and 1/η² of it is asked for.
    assert NormTest(start=1, size=2, eta=0.5).desired(128, state) == 4 * 128


@pytest.mark.parametrize("trace", [0.0, -10.0])
def test_without_noise_there_is_nothing_to_average_out(trace: float) -> None:
    state = readings() | {"grad_trace": trace, "noise_scale": trace / 0.25}
    for policy in POLICIES.values():
        assert math.isnan(measured(policy).desired(128, state))
        assert math.isnan(measured(policy).desired(128, state | LOST | {"grad_sq_norm": 0.0}))


def test_the_least_noise_scale_divides_by_the_upper_end_of_the_squared_norm() -> None:
    trace, grad, error = 300.0, 0.2, 0.15  # ‖G‖² within 1.96 errors of zero: unresolved
    state = readings(trace / grad, noise_resolved=0.0, noise_scale_error=trace * error / grad**2)
    assert least_noise_scale(state) == pytest.approx(trace / (grad + 1.96 * error))


def test_an_unresolved_noise_scale_that_is_surely_large_votes() -> None:
    state = readings(16_000, noise_scale_error=16_000, noise_resolved=0.0)
    least = 16_000 / 2.96
    assert rest(DiveBatch(start=64, size=64 * 2**12), state) == rung_below(least, 64)


# When a ramp does what it is asked


@each_policy
def test_only_votes_in_a_row_raise_the_batch_one_rung_at_a_time(
    policy: Callable[..., NoiseRamp],
) -> None:
    states = [ASKS if vote == "y" else DOES_NOT for vote in "nyynyyyyyyynyyy"]
    assert sizes_after(measured(policy), states) == [64] * 6 + [128] * 3 + [256] * 5 + [512]


@each_policy
@pytest.mark.parametrize("votes", [1, 2, 5])
@pytest.mark.parametrize("factor", [2, 4])
def test_a_ramp_takes_its_rungs_and_stays_at_the_cap(
    policy: Callable[..., NoiseRamp], votes: int, factor: int
) -> None:
    ramp = measured(policy, votes=votes, factor=factor)
    rungs = [64 * factor**i for i in range(10) if 64 * factor**i <= 1024]
    assert list(ramp.sizes()) == rungs
    taken = sizes_after(ramp, [ASKS] * votes * 7)
    assert taken == [rungs[min(i // votes, len(rungs) - 1)] for i in range(1, votes * 7 + 1)]


@each_policy
def test_the_batch_never_shrinks(policy: Callable[..., NoiseRamp]) -> None:
    ramp = measured(policy)
    assert sizes_after(ramp, [ASKS] * 6 + [DOES_NOT] * 20) == [64, 64] + [128] * 3 + [256] * 21


@each_policy
def test_whatever_is_read_the_batch_rises_by_single_rungs_at_boundaries(
    policy: Callable[..., NoiseRamp],
) -> None:
    ramp = policy(start=64, size=4096, votes=2)
    generator = np.random.default_rng(1)
    states = [readings(1000 * math.exp(3 * generator.standard_normal())) for _ in range(200)]
    taken = boundaries(ramp, states)
    sizes = [64] + [size for _, size in taken]
    assert {after // before for before, after in itertools.pairwise(sizes)} == {1, 2}
    assert sizes == sorted(sizes)
    assert set(sizes) == set(ramp.sizes())  # and it came to all of them
    # Between boundaries nothing moves, and what was decided is a function of the samples.
    for (begin, size), (end, _) in itertools.pairwise(taken):
        assert [ramp.at(begin), ramp.at((begin + end) // 2), ramp.at(end - 1)] == [size] * 3


def test_a_second_reading_at_one_boundary_is_no_second_vote() -> None:
    ramp = DiveBatch(start=64, size=1024, votes=2)
    for samples in (64, 64, 64, 128, 128, 192, 192):
        ramp.observe(samples, ASKS)
    assert ramp.stages == [(0, 64), (128, 128)]
    resumed = DiveBatch(start=64, size=1024, votes=2)
    resumed.load_state_dict(ramp.state_dict())
    resumed.observe(192, ASKS)  # evaluated again after the checkpoint
    assert resumed.batch_size == 128
    resumed.observe(320, ASKS)
    assert resumed.batch_size == 256


STATES = [
    readings(1000 * math.exp(2 * z), step_seconds=0.1 + 1e-4 * k)
    for k, z in enumerate(np.random.default_rng(2).standard_normal(24))
]


@each_policy
@pytest.mark.parametrize("stop", range(len(STATES)))
def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(
    policy: Callable[..., NoiseRamp], stop: int
) -> None:
    whole, first, second = (policy(start=64, size=4096, votes=2) for _ in range(3))
    expected = boundaries(whole, STATES)
    assert expected[-1][1] >= 256
    before = boundaries(first, STATES[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    seen = before[-1][0] if before else 0
    assert before + boundaries(second, STATES[stop:], seen) == expected
    assert second.state_dict() == whole.state_dict()


def test_a_state_with_other_rungs_is_refused() -> None:
    ramp = NormTest(start=64, size=1024)
    boundaries(ramp, [ASKS] * 6)
    other = NormTest(start=64, factor=4, size=1024)
    sentence = "reached a batch size of 128, and .* allow 64, 256, 1024: resume with the keys"
    with pytest.raises(ValueError, match=sentence):
        other.load_state_dict(ramp.state_dict())


@each_policy
def test_a_plan_takes_it_and_divides_every_rung(policy: Callable[..., NoiseRamp]) -> None:
    ramp = policy(start=48, size=384)
    plan = Plan(
        ramp=ramp, curve=Constant(), budget_samples=10_000, base_lr=0.1, base_batch=48, rule="sqrt"
    )
    assert plan.is_open
    assert [split.global_batch_size for split in plan.splits(2, 8)] == [48, 96, 192, 384]
    with pytest.raises(ValueError, match=r"size of 48 is not divisible by 64 .* neither are 96 \("):
        plan.check_divisible(4, 16)
    for samples in (48, 96, 144):
        plan.observe(samples, **ASKS, step_seconds=0.1)
    assert [plan.at(samples).batch_size for samples in (0, 143, 144)] == [48, 48, 96]
    assert plan.at(144).lr == pytest.approx(0.1 * math.sqrt(2))


# Step times


def test_a_line_is_fitted_to_relative_errors() -> None:
    times = {64: 0.11, 128: 0.12, 256: 0.18, 512: 0.22, 1024: 0.5}
    step_times = StepTimes()
    for size, value in times.items():
        step_times.add(size, value)
    sizes, values = np.array([*times], float), np.array([*times.values()])
    design = np.stack([1 / values, sizes / values], 1)
    expected = np.linalg.lstsq(design, np.ones(5), rcond=None)[0]
    assert step_times.fit() == pytest.approx(tuple(expected), rel=1e-9)


def test_one_batch_size_says_that_a_step_costs_the_same_whatever_its_batch() -> None:
    step_times = StepTimes()
    for value in (9.0, 0.2, 0.1):
        step_times.add(64, value)
    assert step_times.fit() == (0.2, 0.0)


def test_two_batch_sizes_give_their_line_whatever_the_first_steps_took() -> None:
    step_times = StepTimes()
    for size in (64, 256):
        for value in (30.0, seconds(size), seconds(size)):
            step_times.add(size, value)
    assert step_times.fit() == pytest.approx((0.1, 1e-4))


def test_step_times_follow_the_machine() -> None:
    step_times = StepTimes()
    for value in [0.1] * 50 + [0.4] * 8:
        step_times.add(64, value)
    assert step_times.medians() == {64: 0.4}


def test_goodput_tries_one_rung_and_stays_where_time_is_all_the_samples() -> None:
    ramp = Goodput(start=64, size=1024)
    for k in range(1, 60):
        ramp.observe(10**5 * k, ASKS | {"step_seconds": 1e-3 * ramp.batch_size})
    assert ramp.batch_size == 128


def test_goodput_waits_until_the_batch_in_hand_was_measured() -> None:
    ramp = Goodput(start=64, size=1024)
    timed = ASKS | {"step_seconds": 0.1}
    for samples, state in enumerate([ASKS] * 8 + [timed] * 3 + [ASKS] * 8, 1):
        ramp.observe(samples, state)
    assert ramp.stages == [(0, 64), (11, 128)]


def test_goodput_rests_at_the_last_rung_below_its_optimum() -> None:
    for noise_scale in (300.0, 5000.0, 80_000.0):
        optimum = math.sqrt(noise_scale * NOISE_SCALE)
        assert rest(Goodput(start=64, size=2**17), readings(noise_scale)) == rung_below(optimum, 64)


# Refusals


@pytest.mark.parametrize(
    ("policy", "keys", "sentence"),
    [
        (NormTest, {"start": 0}, r"^batch\.start must be a whole number of at least 1 .*got 0$"),
        (NormTest, {"size": 64}, r"^batch\.start must be below batch\.size, got 64 and 64; use"),
        (NormTest, {"size": 1000}, r"batch\.size must be .* got 1000; the nearest is 512 or 1024$"),
        (NormTest, {"factor": 1}, r"^batch\.factor must be a whole number of at least 2 .*got 1$"),
        (NormTest, {"factor": 1.5}, r"^batch\.factor must be .* at least 2 .*got 1\.5$"),
        (NormTest, {"votes": 0}, r"^batch\.votes must be a whole number of at least 1 .*got 0$"),
        (NormTest, {"eta": 0}, r"^batch\.eta must be a number > 0, got 0$"),
        (NormTest, {"eta": 1}, r"^batch\.eta must be below 1, got 1: the norm test is content"),
        (DiveBatch, {"delta": -1}, r"^batch\.delta must be a number > 0, got -1$"),
        (SqrtNoise, {"exchange_rate": 0}, r"^batch\.exchange_rate must be a number > 0, got 0$"),
    ],
)
def test_what_makes_no_ramp_is_refused(
    policy: Callable[..., NoiseRamp], keys: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        policy(**{"start": 64, "size": 1024} | keys)


def test_counts_may_be_written_as_people_write_them() -> None:
    ramp: Any = NormTest(start="64", size="1_024", factor="4", votes="2")  # type: ignore[arg-type]
    assert [ramp.start, ramp.size, ramp.factor, ramp.votes] == [64, 1024, 4, 2]


# A run

# Half of the noise is in a few directions: estimates that scatter as those of networks do.
SPECTRUM = 1 / np.arange(1.0, 31)


def gradient_norms(
    generator: np.random.Generator, noise_scale: float, small: int, big: int
) -> dict[str, Any]:
    """Squared norms of big / small Gaussian gradients of ‖G‖² = 1 / noise_scale and tr Σ = 1."""
    n, d = big // small, len(SPECTRUM)
    variances = SPECTRUM / SPECTRUM.sum()
    mean = math.sqrt(1 / noise_scale / d) + np.sqrt(variances / big) * generator.standard_normal(d)
    big_sq_norm = (mean**2).sum()
    within = (variances / small * generator.chisquare(n - 1, d)).sum() / n
    return {
        "small_sq_norm": big_sq_norm + within, "big_sq_norm": big_sq_norm,
        "small_batch": small, "big_batch": big,
    }  # fmt: skip


def simulate(
    ramp: NoiseRamp, noise_scale_at: Callable[[float], float], seed: int, budget: int = 2_000_000
) -> Iterator[tuple[int, int, bool]]:
    """Train on noise, evaluating at a geometric grid; samples, batch size from there on, resolved
    of each boundary.
    """
    generator, noise = np.random.default_rng(seed), NoiseScale(half_life_samples=20_000)
    plan = Plan(
        ramp=ramp, curve=Constant(), budget_samples=budget, base_lr=0.1, base_batch=ramp.start
    )
    due = 1
    for step, point in enumerate(plan, 1):
        scale = noise_scale_at(point.samples / budget)
        noise.update(**gradient_norms(generator, scale, 8, point.batch_size))
        if step < due:
            continue
        due, samples = max(step + 1, math.ceil(1.03 * step)), point.samples + point.batch_size
        now = noise.reading()
        plan.observe(
            samples,
            noise_scale=now.noise_scale, noise_scale_error=now.standard_error,
            noise_resolved=float(now.resolved), grad_sq_norm=now.grad_sq_norm,
            grad_trace=now.trace, loss=1.0, lr=point.lr,
        )  # fmt: skip
        yield samples, plan.at(samples).batch_size, now.resolved


@pytest.mark.parametrize("seed", range(4))
def test_the_square_root_law_follows_a_noise_scale_that_rises(seed: int) -> None:
    def noise_scale_at(share: float) -> float:
        return float(40 * 100**share)  # 40 to 4,000

    rate = 600.0  # asks for 155 at first, for 1,549 at last
    ramp = SqrtNoise(start=128, size=8192, exchange_rate=rate)
    for samples, size, _ in simulate(ramp, noise_scale_at, seed):
        asked = rung_below(math.sqrt(rate * noise_scale_at(samples / 2e6)), 128)
        assert asked / 2 <= size <= asked
    assert ramp.batch_size in (512, 1024)


@pytest.mark.parametrize("seed", range(4))
def test_a_ramp_does_not_wait_for_a_squared_norm_that_the_noise_hides(seed: int) -> None:
    ramp = SqrtNoise(start=64, size=8192, exchange_rate=100)
    run = [*simulate(ramp, lambda share: 20_000, seed, budget=1_000_000)]  # asks for 1,414
    assert 256 <= ramp.batch_size <= 1024
    assert np.mean([resolved for *_, resolved in run]) < 0.2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eta", [0.5, math.sqrt(0.5)])
def test_a_norm_test_ramp_in_noise_comes_within_a_rung_of_its_fixed_point(
    seed: int, eta: float
) -> None:
    ramp = NormTest(start=64, size=64 * 2**8, eta=eta)
    [*simulate(ramp, lambda share: 1400, seed, budget=600_000)]
    asked = rung_below(1400 * (1 / eta**2 - 1), 64)
    assert asked / 2 <= ramp.batch_size <= asked


@each_policy
def test_a_boundary_without_a_new_measurement_is_passed_by(
    policy: Callable[..., NoiseRamp],
) -> None:
    """Of eight boundaries one is measured: three of those raise the batch, and never fewer."""
    ramp = policy(start=64, size=512, votes=3)
    states = [readings(noise_samples=float(64 * 8 * (place // 8))) for place in range(24)]
    before = boundaries(ramp, states[:12])
    again = policy(start=64, size=512, votes=3)
    again.load_state_dict(json.loads(json.dumps(ramp.state_dict())))
    after = boundaries(again, states[12:], begin=before[-1][0])
    sizes = [size for _, size in before + after]
    assert sizes == [64] * 16 + [128] * 8
