"""Fields of configurations with what they may hold, and the pass that makes it so.

    every_samples: int | None = count(None, least=1)

Users write counts as "4e6" and "250B". Before the merge that checks types, `convert` turns them
into the numbers that the annotations promise, and refuses the rest by the key's full name.
"""

from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from functools import partial
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig

from largebatch.common.errors import ConfigError
from largebatch.common.numbers import moment, real_number, whole_number

Check = Callable[[Any, str], Any]
"""Takes a value and the key's name; raises ValueError."""


def spec(default: Any, check: Check) -> Any:
    """A field whose value is what `check` makes of it; None stays None where it is the default."""
    optional = default is None
    return field(default=default, metadata={"check": check, "optional": optional})


def count(default: int | None, *, least: int = 0, word: str | None = None) -> Any:
    """A whole number from `least` on, or `word`."""

    def check(value: Any, name: str) -> Any:
        return value if word is not None and value == word else whole_number(value, name, least)

    return spec(default, check)


def each_count(*, least: int = 0) -> dict[str, Any]:
    """Metadata of a field that is a list of whole numbers."""

    def check(values: Any, name: str) -> Any:
        return [whole_number(value, name, least) for value in values]

    return {"check": check, "optional": False}


def real(
    default: float | None,
    *,
    above: float | None = None,
    least: float | None = None,
    optional: bool = False,
) -> Any:
    """A number within bounds; `optional` where it may be null and is not by default."""
    made = partial(real_number, above=above, least=least)
    return field(default=default, metadata={"check": made, "optional": optional or default is None})


def time_of_day(default: float | None) -> Any:
    """A date with a time of day, as seconds since 1970."""
    return spec(default, moment)


def choice(default: str | None, *words: str) -> Any:
    """One of these words."""

    def check(value: Any, name: str) -> Any:
        if (value in (None, "") and default is None) or not isinstance(value, str | int | float):
            return value  # refused with the types, or with all empty words
        if str(value) not in words:
            null = "null or " * (default is None)
            raise ConfigError(f"{name} must be {null}one of {', '.join(words)}, got {str(value)!r}")
        return str(value)

    return spec(default, check)


def convert(config: "DictConfig | dict[str, Any]", schema: type, above: str = "") -> None:
    """Convert the values of `config` in place to what the fields of the dataclass `schema` say.

    Raises:
        ValueError: a value that is refused; the sentence carries its full name.
    """
    hints = get_type_hints(schema)
    for declared in fields(schema):
        name = declared.name
        if name not in config:  # or `???`: the merge has a default or refuses it
            continue
        within = [kind for kind in (hints[name], *get_args(hints[name])) if is_dataclass(kind)]
        value = config[name]
        if within and isinstance(value, DictConfig):
            assert isinstance(within[0], type)
            convert(value, within[0], f"{above}{name}.")
        check = declared.metadata.get("check")
        if check is not None and not (value is None and declared.metadata["optional"]):
            config[name] = check(value, f"{above}{name}")
