"""Fields of schedules with what they may hold: `start: int = count("batch.start", least=1)`."""

from dataclasses import MISSING, field, fields
from functools import partial
from typing import Any

from largebatch.common.numbers import real_number, whole_number


def count(name: str, default: Any = MISSING, *, least: int = 0) -> Any:
    """A whole number from `least` on, called `name` where it is refused; or None, as by default."""
    check = partial(whole_number, name=name, minimum=least)
    return field(default=default, metadata={"check": check, "optional": default is None})


def real(name: str, default: Any = MISSING, optional: bool = False, **bounds: float) -> Any:
    """A number within bounds (`above`, `least`, `most`); None where that is the default, or where
    it is `optional`.
    """
    check, optional = partial(real_number, name=name, **bounds), optional or default is None
    return field(default=default, metadata={"check": check, "optional": optional})


class Checked:
    """Base of dataclasses with such fields."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type] # subclasses are dataclasses
            value, spec = getattr(self, each.name, None), each.metadata
            if "check" in spec and not (value is None and spec["optional"]):
                object.__setattr__(self, each.name, spec["check"](value))
