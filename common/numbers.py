"""Counts are whole numbers, written as people write them."""

import math
import operator
import re
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Final

SUFFIXES: Final = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""Decimal, as token counts are written."""


MOST: Final = 2**64 - 1
"""The largest whole number: torch takes no larger seed, and no count comes near it."""


def whole_number(value: object, name: str, minimum: int = 0) -> int:
    """`value` as an int, to the last digit: `512`, `4e6`, `"4e6"`, `"1_000"`, `"250B"`.

    Raises:
        ValueError: not a whole number, below `minimum` or above `MOST`; the sentence carries `name`
            and the value.
    """
    try:
        if isinstance(value, bool):
            raise ValueError("a truth value is no count")
        number = _exact(value)
        # An exact comparison: 4e6 is a count, 4.5 and inf are not.
        if not minimum <= number < math.inf or (number <= MOST and number != int(number)):
            raise ValueError("out of range")
    except (TypeError, ValueError, ArithmeticError):
        raise ValueError(
            f"{name} must be a whole number of at least {minimum} (4e6 is fine), got {value!r}"
        ) from None
    if number > MOST:
        raise ValueError(f"{name} must be a whole number below 2^64 = 1.8e19, got {value!s:.30}")
    return int(number)


def _exact(value: object) -> int | float | Decimal | Fraction:
    """`value` without a digit lost: a float holds 2^53 = 9.0e15 of them at most."""
    if isinstance(value, str):
        # 2.87T is a count, though the float 2.87 times 1e12 is none.
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT])", value)
        return Fraction(match[1]) * SUFFIXES[match[2]] if match else Decimal(value)
    if isinstance(value, float):
        return value
    return operator.index(value)  # type: ignore[arg-type]


def real_number(
    value: object,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """`value` as a finite float within its bounds, and of a size that FP32 holds.

    Raises:
        ValueError: not a number or outside the bounds; the sentence carries `name`, value and
        bounds.
    """
    try:
        if isinstance(value, bool):
            raise ValueError("a truth value is no number")
        number = check_fp32(float(value))  # type: ignore[arg-type]
        if (
            not math.isfinite(number)
            or (above is not None and number <= above)
            or (least is not None and number < least)
            or (most is not None and number > most)
        ):
            raise ValueError("out of range")
    except (TypeError, ValueError, OverflowError) as error:
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">", above), (">=", least), ("<=", most))
            if bound is not None
        ]
        wanted = "a number" + (" " + " and ".join(bounds) if bounds else "")
        wanted += " that FP32 holds (1.2e-38 to 3.4e38)" if isinstance(error, _NoFP32) else ""
        raise ValueError(f"{name} must be {wanted}, got {value!r}") from None
    return number


class _NoFP32(ValueError):
    """A number that FP32 does not hold."""


FP32_LEAST: Final = 2.0**-126
"""The smallest positive number that FP32 holds with all its digits."""
FP32_MOST: Final = (2 - 2.0**-23) * 2.0**127


def check_fp32(number: float) -> float:
    """`number`, which devices compute with in FP32: smaller ones count as 0 there, larger ones as
    infinite.

    Raises:
        ValueError: it is finite and one of these.
    """
    if number and math.isfinite(number) and not FP32_LEAST <= abs(number) <= FP32_MOST:
        raise _NoFP32
    return number


def check_fits(length: int, name: str, budget_samples: int) -> None:
    """Refuse a part of a run that is longer than the run."""
    if length > budget_samples:
        raise ValueError(
            f"{name} is {length}, longer than the run of {budget_samples}: lower it, "
            f"or raise budget.samples to {length} or more"
        )


_EARLIEST: Final = 1e9
"""A number below it, September 2001, is no date: it was meant as seconds from now."""


def moment(value: object, name: str) -> float:
    """`value`, a date with a time of day or seconds since 1970, as seconds since 1970.

    Raises:
        ValueError: it is neither; the sentence carries `name` and value.
    """
    try:
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= _EARLIEST:
            return datetime.fromtimestamp(value).timestamp()
    except (ValueError, OverflowError, OSError):
        pass
    raise ValueError(
        f"{name} must be a date and a time of day, such as 2026-11-30T18:00 (in this machine's "
        f"zone) or 2026-11-30T18:00+00:00, or seconds since 1970, got {value!r}"
    )
