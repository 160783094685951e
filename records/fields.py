"""An object of a record, whose fields are taken by type.

fields.take("steps", whole())            a whole number >= 0, or RecordError
fields.take("lr", optional(positive))    or None where it is null
fields.find("time", moment)              None where there is none; what is wrong is noted
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

from largebatch.common.text import printable, shown
from largebatch.records.names import MOST_RANKS

T = TypeVar("T")
Check = Callable[[Any], T]
"""Returns the value by its type; raises ValueError("must be …")."""

LARGEST: Final = 2**63 - 1
"""Of whole numbers: what files of other programs hold, too."""
LAST_MOMENT: Final = 253_402_300_800.0
"""Seconds since 1970 at the end of the year 9999, the last that has a date."""


class RecordError(ValueError):
    """A file does not hold what it should: one sentence that names it and the field."""


class Fields:
    """One JSON object.

    Attributes:
        where: the file, the line of a .jsonl, and the field where this is an object within.
        problems: sentences on what `find` has not taken; shared with what is within.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, problems: list[str] | None = None
    ) -> None:
        self.values, self.where = values, where
        self.problems: list[str] = [] if problems is None else problems

    def take(self, key: str, check: Check[T]) -> T:
        """Return the field `key`.

        Raises:
            RecordError: it is missing, or not what `check` wants.
        """
        if key not in self.values:
            raise RecordError(f"{self.where}: the key {printable(key)} is missing")
        try:
            return check(self.values[key])
        except ValueError as error:
            raise RecordError(f"{self.where}: {printable(key)} {error}") from None

    def find(self, key: str, check: Check[T]) -> T | None:
        """Return the field `key`; None where it is missing, null, or noted as wrong."""
        if self.values.get(key) is None:
            return None
        try:
            return self.take(key, check)
        except RecordError as error:
            self.problems.append(str(error))
            return None

    def inside(self, key: str) -> "Fields":
        """Return the object `key`.

        Raises:
            RecordError: it is missing, or no object.
        """
        values = self.take(key, mapping)
        return Fields(values, f"{self.where}: {printable(key)}", self.problems)

    def find_inside(self, key: str) -> "Fields":
        """Return the object `key`; an empty one where it is missing, null, or noted as wrong."""
        values = self.find(key, mapping) or {}
        return Fields(values, f"{self.where}: {printable(key)}", self.problems)

    def each(self, key: str) -> Iterator["Fields"]:
        """Yield the objects of the list `key`; what is none of them is noted."""
        for number, value in enumerate(self.find(key, listing) or []):
            where = f"{self.where}: {printable(key)}[{number}]"
            if isinstance(value, dict):
                yield Fields(value, where, self.problems)
            else:
                self.problems.append(f"{where} must be an object, got {shown(value)}")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


def must_be(what: str, value: Any) -> ValueError:
    """Make the error of a check."""
    return ValueError(f"must be {what}, got {shown(value)}")


def whole(least: int = 0, most: int = LARGEST) -> Check[int]:
    """Take a whole number within these."""

    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            upto = "" if most == LARGEST else f" and <= {most}"
            raise must_be(f"a whole number >= {least}{upto}", value)
        return value

    return check


def number(value: Any) -> float:
    """Take a finite number."""
    if type(value) in (int, float):
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if math.isfinite(result):
            return result
    raise must_be("a finite number", value)


def number_or_none(value: Any) -> float | None:
    """Take a number; null and what is not finite, such as the loss of a diverged run, are None."""
    if value is None or (type(value) is float and not math.isfinite(value)):
        return None
    return number(value)


def positive(value: Any) -> float:
    """Take a finite number above 0."""
    if type(value) in (int, float) and value > 0:
        return number(value)
    raise must_be("> 0 and finite", value)


def within(least: float, most: float) -> Check[float]:
    """Take a number within these."""

    def check(value: Any) -> float:
        if type(value) in (int, float) and least <= value <= most:
            return float(value)
        raise must_be(f"a number from {least:g} to {most:g}", value)

    return check


def moment(value: Any) -> float:
    """Take a time in seconds since 1970, of a year that has a date."""
    if type(value) in (int, float) and 0 <= value < LAST_MOMENT:
        return float(value)
    raise must_be("seconds since 1970", value)


def text(value: Any) -> str:
    """Take text that is not empty; `printable`, as it will be shown."""
    if not isinstance(value, str) or not value:
        raise must_be("text", value)
    return printable(value)


def one_of(*choices: str) -> Check[str]:
    """Take one of these words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise must_be(f"one of {', '.join(choices)}", value)
        return value

    return check


def flag(value: Any) -> bool:
    """Take true or false."""
    if not isinstance(value, bool):
        raise must_be("true or false", value)
    return value


def mapping(value: Any) -> dict[str, Any]:
    """Take an object."""
    if not isinstance(value, dict):
        raise must_be("an object", value)
    return value


def listing(value: Any) -> list[Any]:
    """Take a list of anything."""
    if not isinstance(value, list):
        raise must_be("a list", value)
    return value


def list_of(check: Check[T]) -> Check[list[T]]:
    """Take a list whose entries `check` takes."""

    def each(value: Any) -> list[T]:
        return [check(entry) for entry in listing(value)]

    return each


def optional(check: Check[T]) -> Check[T | None]:
    """Take null, too."""

    def either(value: Any) -> T | None:
        return None if value is None else check(value)

    return either


RANKS: Final = list_of(whole(0, MOST_RANKS))
"""Take a list of ranks."""
