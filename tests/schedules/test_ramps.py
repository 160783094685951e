"""The batch size against samples seen, at numbers that Megatron-LM's own formula gives."""

import re
from typing import Any

import pytest

from largebatch.schedules import (
    Constant,
    ConstantBatch,
    GeometricBatch,
    Plan,
    Ramp,
    RampupBatch,
    StagedBatch,
)


def switches(ramp: Ramp, until: int) -> tuple[list[tuple[int, int, int]], int, int]:
    """Each change as (samples, step, new size); steps and samples of the first `until` samples."""
    changes, samples, steps, size = [], 0, 0, ramp.at(0)
    while samples < until:
        if ramp.at(samples) != size:
            size = ramp.at(samples)
            changes.append((samples, steps, size))
        samples, steps = samples + size, steps + 1
    return changes, steps, samples


def test_the_worked_example_of_megatron() -> None:
    # --rampup-batch-size 16 8 300000 with a global batch size of 1024
    ramp = RampupBatch(start=16, increment=8, ramp_samples=300_000, size=1024)
    assert ramp.num_rises == 126
    changes, steps, samples = switches(ramp, 300_000)
    assert changes[:3] == [(2384, 149, 24), (4784, 249, 32), (7152, 323, 40)]
    assert (steps, samples) == (1319, 300_096)
    assert ramp.at(samples) == 1024


def test_the_ramp_of_bloom() -> None:
    # --rampup-batch-size 192 16 9765625 with a global batch size of 2048
    ramp = RampupBatch(start=192, increment=16, ramp_samples=9_765_625, size=2048)
    changes, steps, samples = switches(ramp, 9_765_625)
    assert changes[:2] == [(84_288, 439, 208), (168_528, 844, 224)]
    assert (steps, samples) == (12_658, 9_765_808)
    assert ramp.at(samples) == 2048


def test_an_increment_comes_at_the_sample_that_completes_its_share() -> None:
    ramp = RampupBatch(start=10, increment=10, ramp_samples=400, size=50)
    marks = [0, 99, 100, 199, 200, 299, 300, 399, 400, 401, 10**12]
    assert [ramp.at(samples) for samples in marks] == [10, 10, 20, 20, 30, 30, 40, 40, 50, 50, 50]


def megatron(start: int, increment: int, ramp_samples: int, size: int, seen: int) -> int:
    """Megatron-LM's arithmetic of `--rampup-batch-size`, floats included."""
    samples_each = ramp_samples / ((size - start) // increment)
    return size if seen > ramp_samples else start + int(seen / samples_each) * increment


def test_a_rise_comes_where_megatron_has_it_also_where_floats_lag_behind() -> None:
    late = 0
    for increments in range(1, 40):
        for ramp_samples in (1000, 4096, 9_765, 12_345):
            numbers = (16, 16, ramp_samples, 16 + 16 * increments)
            ramp = RampupBatch(start=16, increment=16, ramp_samples=ramp_samples, size=numbers[3])
            shares = [rise * ramp_samples // increments for rise in range(1, increments + 1)]
            for seen in {share + off for share in shares for off in (-1, 0, 1, 2)}:
                assert ramp.at(seen) == megatron(*numbers, seen)
            late += ramp.at(ramp_samples) < ramp.size
            assert ramp.at(ramp.ends_at) == ramp.size
            # `next_change` says the first sample count of each rise, late or not.
            seen, rises = 0, []
            while (change := ramp.next_change(seen)) is not None:
                assert ramp.at(change) > ramp.at(change - 1)
                rises.append(seen := change)
            assert len(rises) == increments
    assert late  # else nothing was seen of it


@pytest.mark.parametrize(
    "ramp",
    [
        RampupBatch(start=64, increment=64, ramp_samples=10_000, size=1024),
        GeometricBatch(start=64, ramp_samples=9_990, size=1024),
        StagedBatch(spec="0:64 9990:1024"),
        StagedBatch(spec="0:64 10000:1024"),
    ],
    ids=str,
)
def test_a_ramp_whose_last_size_no_step_takes_is_refused(ramp: Ramp) -> None:
    with pytest.raises(ValueError, match="the first step of 1024 would begin after") as refusal:
        ramp.check(10_000)
    budget = int(str(refusal.value).split("budget.samples to ")[1].split()[0])
    plan = Plan(ramp=ramp, curve=Constant(), budget_samples=budget, base_lr=0.1, base_batch=64)
    assert [*plan][-1].batch_size == 1024
    with pytest.raises(ValueError, match="the first step of 1024"):
        ramp.check(budget - 1)


def test_a_ramp_of_more_sizes_than_a_run_has_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch\.increment .* at most 100000 sizes, got 1"):
        RampupBatch(start=1, increment=1, ramp_samples=10**12, size=10**12)


def test_a_ramp_never_falls_and_keeps_to_its_sizes() -> None:
    ramp = RampupBatch(start=24, increment=12, ramp_samples=777, size=96)
    taken = [ramp.at(samples) for samples in range(800)]
    assert taken == sorted(taken)
    assert sorted(set(taken)) == list(ramp.sizes()) == [24, 36, 48, 60, 72, 84, 96]
    assert ramp.ends_at == 777


def test_a_constant_batch_is_a_ramp_that_has_ended() -> None:
    batch = ConstantBatch(size="4e2")  # type: ignore[arg-type]
    assert [batch.at(0), batch.at(10**12)] == [400, 400]
    assert list(batch.sizes()) == [400]
    assert batch.ends_at == 0


@pytest.mark.parametrize("size", [0, -64, 2.5, "large", None])
def test_a_batch_that_is_no_count_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"^batch\.size must be .* at least 1") as refusal:
        ConstantBatch(size=size)
    assert f"got {size!r}" in str(refusal.value)


@pytest.mark.parametrize("name", ["start", "increment", "ramp_samples", "size"])
@pytest.mark.parametrize("value", [0, 1.5])
def test_each_number_of_a_ramp_is_a_count(name: str, value: Any) -> None:
    numbers: dict[str, Any] = {"start": 8, "increment": 8, "ramp_samples": 100, "size": 32}
    with pytest.raises(ValueError, match=rf"^batch\.{name} must be .* at least 1 .*got {value}$"):
        RampupBatch(**numbers | {name: value})


@pytest.mark.parametrize("start", [32, 64])
def test_a_ramp_that_does_not_rise_is_refused_with_the_way_out(start: int) -> None:
    with pytest.raises(ValueError, match=rf"got {start} and 32; use batch=constant"):
        RampupBatch(start=start, increment=8, ramp_samples=100, size=32)


@pytest.mark.parametrize(("size", "ways_out"), [(30, [24, 32]), (20, [24]), (17, [24])])
def test_increments_that_miss_the_size_are_refused_with_sizes_that_would_do(
    size: int, ways_out: list[int]
) -> None:
    with pytest.raises(ValueError, match=rf"must divide .* = {size - 16}, got 8") as refusal:
        RampupBatch(start=16, increment=8, ramp_samples=100, size=size)
    offered = str(refusal.value).partition("nearest batch.size")[2]
    assert [int(number) for number in re.findall(r"\d+", offered)] == ways_out
    for way_out in ways_out:
        assert RampupBatch(start=16, increment=8, ramp_samples=100, size=way_out).size == way_out


def test_the_step_schedule_of_megatron() -> None:
    # --step-batch-size-schedule, its documentation's example, at sequences of 4,096 tokens:
    # thresholds are divided and rounded down.
    spec = "0:768 250B:1536 500B:3072 750B:6144"
    ramp = StagedBatch(spec=spec, unit="tokens", tokens_per_sample=4096)
    marks = [61_035_155, 61_035_156, 122_070_311, 122_070_312, 183_105_467, 183_105_468]
    assert [ramp.at(samples) for samples in marks] == [768, 1536, 1536, 3072, 3072, 6144]
    assert StagedBatch(spec=spec).at(250 * 10**9 - 1) == 768
    assert StagedBatch(spec=spec).at(250 * 10**9) == 1536
    assert list(ramp.sizes()) == [768, 1536, 3072, 6144]


def test_the_ramp_of_olmo_falls_on_whole_sequences() -> None:
    # 2505.23971: twice at 167,772,160,000 and four times at 503,316,480,000 tokens
    spec = "0:512 167_772_160_000:1024 503_316_480_000:2048"
    ramp = StagedBatch(spec=spec, unit="tokens", tokens_per_sample=4096)
    changes, _, _ = switches(ramp, 200_000_000)
    assert [(samples, size) for samples, _, size in changes] == [
        (40_960_000, 1024),
        (122_880_000, 2048),
    ]


def test_a_geometric_ramp_doubles_at_even_distances() -> None:
    ramp = GeometricBatch(start=64, ramp_samples=300, size=512)
    marks = [0, 99, 100, 199, 200, 299, 300, 10**9]
    assert [ramp.at(samples) for samples in marks] == [64, 64, 128, 128, 256, 256, 512, 512]
    tripled = GeometricBatch(start=10, factor=3, ramp_samples=100, size=90)
    assert [tripled.at(samples) for samples in (0, 49, 50, 99, 100)] == [10, 10, 30, 30, 90]


@pytest.mark.parametrize(
    "ramp",
    [
        ConstantBatch(size=32),
        RampupBatch(start=16, increment=8, ramp_samples=3001, size=1024),
        RampupBatch(start=1, increment=1, ramp_samples=50, size=200),
        GeometricBatch(start=1, ramp_samples=1000, size=1024),
        StagedBatch(spec="0:5 7:6 1000:7"),
    ],
    ids=str,
)
def test_the_next_change_is_where_the_size_changes(ramp: Ramp) -> None:
    samples = 0
    while (change := ramp.next_change(samples)) is not None:
        assert samples < change <= ramp.ends_at
        assert {ramp.at(place) for place in range(samples, change)} == {ramp.at(samples)}
        assert ramp.at(change) > ramp.at(samples)
        samples = change
    assert samples == ramp.ends_at
    assert ramp.at(10**12) == ramp.at(samples)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("", r'^batch\.spec must be entries like "0:768 250B:1536", got \'\'$'),
        ("768", r"^batch\.spec must be entries like .*, got \'768\'$"),
        ("0:768 1K", r"must be entries like"),
        ("0:768 1G:9", r"^a threshold of batch\.spec must be a whole number .*got '1G'$"),
        ("0:768 1K:half", r"^a batch size of batch\.spec must be .* at least 1 .*got 'half'$"),
        ("0:0", r"^a batch size of batch\.spec must be .* at least 1 .*got '0'$"),
        ("1:768", r"^batch\.spec must begin at 0, got '1:768'$"),
        ("0:8 2K:16 1K:32", r"^the thresholds of batch\.spec must rise, got "),
        ("0:8 1K:16 1K:32", r"^the thresholds of batch\.spec must rise, got "),
    ],
)
def test_stages_that_are_none_are_refused(spec: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        StagedBatch(spec=spec)


def test_stages_that_fall_together_are_refused() -> None:
    with pytest.raises(ValueError, match="must rise after division by 4096 tokens a sample"):
        StagedBatch(spec="0:8 4096:16 8191:32", unit="tokens", tokens_per_sample=4096)
    with pytest.raises(ValueError, match="must be samples or tokens, got 'steps'"):
        StagedBatch(spec="0:8", unit="steps")


@pytest.mark.parametrize(("size", "ways_out"), [(100, [64, 128]), (17, [32]), (255, [128, 256])])
def test_a_size_that_factors_miss_is_refused_with_sizes_that_would_do(
    size: int, ways_out: list[int]
) -> None:
    with pytest.raises(ValueError, match=rf"= 16 times a power .* got {size}; ") as refusal:
        GeometricBatch(start=16, ramp_samples=100, size=size)
    offered = str(refusal.value).partition("the nearest is")[2]
    assert [int(number) for number in re.findall(r"\d+", offered)] == ways_out
    for way_out in ways_out:
        assert GeometricBatch(start=16, ramp_samples=100, size=way_out).at(100) == way_out
