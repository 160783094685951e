"""The options of an optimizer: what a variant resolves to, and what is refused."""

from collections.abc import Mapping
from typing import Any


def require(holds: bool, name: str, accepted: str, value: object) -> None:
    """Refuse an option. Write `holds` so that NaN fails it: `0 <= x`, not `not x < 0`."""
    if not holds:
        raise ValueError(f"{name} must be {accepted}, got {value}")


def require_one_of(options: Mapping[str, Any], name: str, accepted: tuple[Any, ...]) -> None:
    known, value = ", ".join(repr(value) for value in accepted), options[name]
    # By type too: 1 is in (False, True).
    holds = isinstance(value, type(accepted[0])) and value in accepted
    require(holds, name, f"one of {known}", repr(value))


def require_bounds(options: Mapping[str, Any], name: str) -> None:
    """Refuse anything but (lowest, highest) with 0 <= lowest <= highest."""
    bounds = options[name]
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    holds = pair and 0 <= bounds[0] <= bounds[1]
    require(holds, name, "(lowest, highest) with 0 <= lowest <= highest", bounds)


def resolved(
    variants: Mapping[str, Mapping[str, Any]], variant: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The keywords of a variant, with those that the caller gave in their place.

    Raises:
        ValueError: there is no such variant.
    """
    require(variant in variants, "variant", f"one of {', '.join(variants)}", repr(variant))
    return {**variants[variant], **{k: v for k, v in given.items() if v is not None}}
