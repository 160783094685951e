"""The global batch size as a function of the samples seen."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from largebatch.schedules.counts import whole_number


class Ramp(ABC):
    """Which global batch size the step takes that begins after `samples` samples."""

    @abstractmethod
    def at(self, samples: int) -> int:
        """The global batch size, in samples."""

    @abstractmethod
    def sizes(self) -> Iterator[int]:
        """Every batch size of the ramp, in order."""

    @property
    def ends_at(self) -> int:
        """Samples after which the batch size stays as it is."""
        return 0


@dataclass(frozen=True, kw_only=True)
class ConstantBatch(Ramp):
    """`size` samples at every step.

    Raises:
        ValueError: size is no whole number of at least 1.
    """

    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole_number(self.size, "batch.size", 1))

    def at(self, samples: int) -> int:
        del samples
        return self.size

    def sizes(self) -> Iterator[int]:
        yield self.size


@dataclass(frozen=True, kw_only=True)
class RampupBatch(Ramp):
    """Megatron-LM's three numbers: from `start` by `increment` to `size` over `ramp_samples`.

    With n = (size - start) / increment, the batch after c samples is start + floor(c n /
    ramp_samples) increments, and `size` from c = ramp_samples on. Megatron-LM (`--rampup-batch-
    size`, until its removal in 2026) computes the floor from the float ramp_samples / n, which lags
    one increment at c = ramp_samples for some numbers; integers do not.

    Raises:
        ValueError: a value out of range, or increments that do not add up to size.
    """

    start: int
    increment: int
    ramp_samples: int
    size: int

    def __post_init__(self) -> None:
        for name in ("start", "increment", "ramp_samples", "size"):
            object.__setattr__(self, name, whole_number(getattr(self, name), f"batch.{name}", 1))
        if self.start >= self.size:
            raise ValueError(
                f"batch.start must be below batch.size, got {self.start} and {self.size}; "
                "use batch=constant for a batch that does not grow"
            )
        rest = (self.size - self.start) % self.increment
        if rest:
            below = self.size - rest
            nearest = f"{below} or {below + self.increment}"
            if below == self.start:
                nearest = f"{below + self.increment}"
            raise ValueError(
                f"batch.increment must divide batch.size - batch.start = {self.size - self.start}, "
                f"got {self.increment}; the nearest batch.size is {nearest}"
            )

    @property
    def num_increments(self) -> int:
        return (self.size - self.start) // self.increment

    @property
    def ends_at(self) -> int:
        return self.ramp_samples

    def at(self, samples: int) -> int:
        taken = min(self.num_increments, samples * self.num_increments // self.ramp_samples)
        return self.start + taken * self.increment

    def sizes(self) -> Iterator[int]:
        yield from range(self.start, self.size + 1, self.increment)
