"""Counts are whole numbers, written as people write them."""

import math


def whole_number(value: object, name: str, minimum: int = 0) -> int:
    """`value` as an int: `512`, `4e6`, `"4e6"`, `"1_000"`.

    Raises:
        ValueError: not a whole number, or below `minimum`; the sentence carries `name` and the
        value.
    """
    try:
        if isinstance(value, bool):
            raise ValueError("a truth value is no count")
        number = value if isinstance(value, int) else float(value)  # type: ignore[arg-type]
        # An exact comparison: 4e6 is a count, 4.5 and inf are not.
        if not math.isfinite(number) or number != int(number) or number < minimum:
            raise ValueError("out of range")
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{name} must be a whole number of at least {minimum} (4e6 is fine), got {value!r}"
        ) from None
    return int(number)


def real_number(
    value: object,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """`value` as a finite float within its bounds.

    Raises:
        ValueError: not a number or outside the bounds; the sentence carries `name`, value and
        bounds.
    """
    try:
        if isinstance(value, bool):
            raise ValueError("a truth value is no number")
        number = float(value)  # type: ignore[arg-type]
        if (
            not math.isfinite(number)
            or (above is not None and number <= above)
            or (least is not None and number < least)
            or (most is not None and number > most)
        ):
            raise ValueError("out of range")
    except (TypeError, ValueError, OverflowError):
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">", above), (">=", least), ("<=", most))
            if bound is not None
        ]
        wanted = "a number" + (" " + " and ".join(bounds) if bounds else "")
        raise ValueError(f"{name} must be {wanted}, got {value!r}") from None
    return number
