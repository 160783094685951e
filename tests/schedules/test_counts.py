"""Counts are whole numbers, written as people write them, and anything else is refused by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from largebatch.common.numbers import real_number, whole_number


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (512, 512),
        (4e6, 4_000_000),
        ("4e6", 4_000_000),
        ("1_000", 1000),
        ("512", 512),
        (0, 0),
        ("250B", 250_000_000_000),
        ("768", 768),
        ("1.5K", 1500),
        ("2.87T", 2_870_000_000_000),
    ],
)
def test_a_count_is_read_as_people_write_it(written: Any, count: int) -> None:
    number = whole_number(written, "budget.samples")
    assert number == count
    assert type(number) is int


@pytest.mark.parametrize("count", [2**53 + 1, 2**63 + 1])
@pytest.mark.parametrize("written", [int, str, "{:_}".format, "{}.0".format, "{}e0".format])
def test_a_large_count_keeps_every_digit(count: int, written: Callable[[int], Any]) -> None:
    assert whole_number(written(count), "seed") == count


@pytest.mark.parametrize("written", [10**400, 1e30, "1e30", "1e999999999", "99999999T", 2**64])
def test_a_number_that_nothing_counts_is_refused_at_once(written: Any) -> None:
    with pytest.raises(ValueError, match=r"^seed must be a whole number below 2\^64.*, got ."):
        whole_number(written, "seed")


@pytest.mark.parametrize(
    "written",
    [
        4.5,
        "4.5",
        "1.0005K",
        "4k",
        "B",
        "4G",
        "-1K",
        -1,
        math.inf,
        -math.inf,
        math.nan,
        "many",
        "",
        None,
        True,
        [512],
        {},
        1j,
        "1e-999999999",
    ],
    ids=lambda written: repr(written)[:9],
)
def test_what_is_no_count_is_refused_with_its_name_and_value(written: Any) -> None:
    with pytest.raises(ValueError, match=r"^batch\.size must be a whole number") as refusal:
        whole_number(written, "batch.size")
    assert str(refusal.value).endswith(f"at least 0 (4e6 is fine), got {written!r}")


def test_a_count_below_its_minimum_is_refused_with_the_minimum() -> None:
    assert whole_number(1, "batch.size", 1) == 1
    with pytest.raises(ValueError, match=r"^batch\.size must be .* at least 1 .*, got 0$"):
        whole_number(0, "batch.size", 1)


@pytest.mark.parametrize("written", [1, 1.0, "1", "1e0", "1.0"])
def test_a_number_is_read_as_people_write_it(written: Any) -> None:
    number = real_number(written, "optim.lr")
    assert number == 1.0
    assert type(number) is float


@pytest.mark.parametrize(
    "written",
    ["fast", None, True, math.inf, math.nan, [0.1], 1j, 10**400],
    ids=lambda written: repr(written)[:9],
)
def test_what_is_no_finite_number_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match=r"^optim\.lr must be a number, got "):
        real_number(written, "optim.lr")


def test_each_bound_is_kept_and_said() -> None:
    assert real_number(0.0, "lr.final_fraction", least=0.0, most=1.0) == 0.0
    assert real_number(1.0, "lr.final_fraction", least=0.0, most=1.0) == 1.0
    for beyond in (-1e-9, 1.000001):
        with pytest.raises(ValueError, match=r"must be a number >= 0 and <= 1, got ") as refusal:
            real_number(beyond, "lr.final_fraction", least=0.0, most=1.0)
        assert str(refusal.value) == (
            f"lr.final_fraction must be a number >= 0 and <= 1, got {beyond!r}"
        )
    with pytest.raises(ValueError, match=r"^optim\.lr must be a number > 0, got 0$"):
        real_number(0, "optim.lr", above=0.0)
