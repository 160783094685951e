"""The global batch size as a function of the samples seen.

Rises come with the first step that begins at or after their sample count; no batch is cut for one.
Ramps that follow the learning rate's curve are in `coupled.py`, those that are decided during the
run in `adaptive.py`.
"""

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final

from largebatch.common.numbers import whole_number
from largebatch.schedules.fields import Checked, count

_MOST_SIZES: Final = 100_000

Stage = tuple[int, int]
"""Samples from which it holds, and the global batch size."""


class Ramp(Checked, ABC):
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

    def next_change(self, samples: int) -> int | None:
        """The first sample count after `samples` from which the batch size may be another; None
        where it stays, or is not decided yet.
        """
        del samples
        return None

    @property
    def end(self) -> str:
        """What sets `ends_at`: the key, and its value."""
        return f"the ramp ends at {self.ends_at} samples"

    def check(self, budget_samples: int) -> None:
        """Refuse a run in which no step takes the last batch size."""
        samples = 0
        while (change := self.next_change(samples)) is not None:
            batch_size = self.at(samples)
            samples -= (change - samples) // -batch_size * batch_size
        if samples >= budget_samples:
            raise ValueError(
                f"{self.end}: the first step of {self.at(samples)} would begin after {samples}, "
                f"where the run of {budget_samples} is over; lower it, or raise budget.samples to "
                f"{samples + 1} or more"
            )


@dataclass(frozen=True, kw_only=True)
class ConstantBatch(Ramp):
    """`size` samples at every step.

    Raises:
        ValueError: size is no whole number of at least 1.
    """

    size: int = count("batch.size", least=1)

    def at(self, samples: int) -> int:
        del samples
        return self.size

    def sizes(self) -> Iterator[int]:
        yield self.size


class _EvenRamp(Ramp):
    """`num_rises` rises at even distances over `ramp_samples`: the i-th at i ramp_samples /
    num_rises.
    """

    ramp_samples: int

    @property
    @abstractmethod
    def num_rises(self) -> int: ...

    @abstractmethod
    def size_after(self, rises: int) -> int: ...

    @property
    def ends_at(self) -> int:
        return self.ramp_samples

    def at(self, samples: int) -> int:
        return self.size_after(self._rises(samples))

    def _rises(self, samples: int) -> int:
        """How many rises come at or before `samples`."""
        return min(self.num_rises, samples * self.num_rises // self.ramp_samples)

    def sizes(self) -> Iterator[int]:
        return (self.size_after(rises) for rises in range(self.num_rises + 1))

    def next_change(self, samples: int) -> int | None:
        rises = self._rises(samples)
        if rises == self.num_rises:
            return None
        change = -((rises + 1) * self.ramp_samples // -self.num_rises)  # rounded up
        while self._rises(change) == rises:  # a subclass may round otherwise
            change += 1
        return change

    @property
    def end(self) -> str:
        return f"batch.ramp_samples is {self.ramp_samples}"


@dataclass(frozen=True, kw_only=True)
class RampupBatch(_EvenRamp):
    """Megatron-LM's three numbers: from `start` by `increment` to `size` over `ramp_samples`.

    With n = (size - start) / increment, the batch after c samples is start + int(c / (ramp_samples
    / n)) increments, and `size` where c > ramp_samples. In floats, as Megatron-LM
    (`--rampup-batch-size`, until its removal in 2026) computes it, so that a run takes the steps
    that it took there: for some numbers a rise that is due at a whole c comes one sample later.

    Raises:
        ValueError: a value out of range, or increments that do not add up to size.

    >>> ramp = RampupBatch(start=64, increment=64, ramp_samples=1000, size=256)
    >>> [ramp.at(samples) for samples in (0, 333, 334, 667, 1000)]
    [64, 64, 128, 192, 256]
    """

    start: int = count("batch.start", least=1)
    increment: int = count("batch.increment", least=1)
    ramp_samples: int = count("batch.ramp_samples", least=1)
    size: int = count("batch.size", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rises(self.start, self.size)
        if self.num_rises > _MOST_SIZES:
            raise ValueError(
                f"batch.increment must make at most {_MOST_SIZES} sizes, got {self.increment} from "
                f"batch.start = {self.start} to batch.size = {self.size}"
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
    def num_rises(self) -> int:
        return (self.size - self.start) // self.increment

    @property
    def ends_at(self) -> int:
        late = self._rises(self.ramp_samples) < self.num_rises
        return self.ramp_samples + late

    def _rises(self, samples: int) -> int:
        if samples > self.ramp_samples:
            return self.num_rises
        return min(self.num_rises, int(samples / (self.ramp_samples / self.num_rises)))

    def size_after(self, rises: int) -> int:
        return self.start + rises * self.increment


@dataclass(frozen=True, kw_only=True)
class GeometricBatch(_EvenRamp):
    """Times `factor` at even distances in samples, from `start` to `size` over `ramp_samples`.

    With `size` = start * factor^n the i-th rise comes at i / n of `ramp_samples`, the last one at
    its end.

    Raises:
        ValueError: a value out of range, or a size that is no power of `factor` above start.
    """

    start: int = count("batch.start", least=1)
    factor: int = count("batch.factor", 2, least=2)
    ramp_samples: int = count("batch.ramp_samples", least=1)
    size: int = count("batch.size", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rises(self.start, self.size)
        below = self.size_after(self.num_rises)
        if below != self.size:
            near = [size for size in (below, below * self.factor) if size > self.start]
            raise ValueError(
                f"batch.size must be batch.start = {self.start} times a power of batch.factor = "
                f"{self.factor}, got {self.size}; the nearest is {' or '.join(map(str, near))}"
            )

    @property
    def num_rises(self) -> int:
        rises = 0
        while self.size_after(rises + 1) <= self.size:
            rises += 1
        return rises

    def size_after(self, rises: int) -> int:
        return int(self.start * self.factor**rises)


class StagesRamp(Ramp):
    """A batch size from each of several sample counts on, the first of them 0."""

    stages: Sequence[Stage]

    @property
    def ends_at(self) -> int:
        return self.stages[-1][0]

    def at(self, samples: int) -> int:
        return self.stages[self.index(samples)][1]

    def sizes(self) -> Iterator[int]:
        return (size for _, size in self.stages)

    def next_change(self, samples: int) -> int | None:
        after = self.index(samples) + 1
        return self.stages[after][0] if after < len(self.stages) else None

    def index(self, samples: int) -> int:
        """Which stage holds after `samples` samples."""
        return bisect_right(self.stages, samples, key=itemgetter(0)) - 1


UNITS = ("samples", "tokens")


@dataclass(frozen=True, kw_only=True)
class StagedBatch(StagesRamp):
    """Batch sizes by hand, as Megatron-LM's `--step-batch-size-schedule`: "0:768 250B:1536".

    Each entry is THRESHOLD:SIZE, the size in samples; thresholds rise from 0 and may carry K, M, B
    or T, powers of 1,000. In tokens they are divided by `tokens_per_sample` (a sequence's length)
    and rounded down, as there.

    Attributes:
        spec: the entries, separated by blanks.
        unit: of the thresholds: "samples" or "tokens".
        tokens_per_sample: for thresholds in tokens.

    Raises:
        ValueError: an entry that cannot be read, or thresholds that do not rise from 0.
    """

    spec: str
    unit: str = "samples"
    tokens_per_sample: int = count("budget.tokens_per_sample", 1, least=1)
    stages: tuple[Stage, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in UNITS:
            raise ValueError(f"batch.unit must be samples or tokens, got {self.unit!r}")
        per = 1 if self.unit == "samples" else self.tokens_per_sample
        entries = pairs(self.spec, "batch.spec", "0:768 250B:1536")
        stages = tuple(
            (whole_number(threshold, "a threshold of batch.spec") // per, size)
            for threshold, size in entries
        )
        thresholds = [samples for samples, _ in stages]
        if thresholds[0] != 0:
            raise ValueError(f"batch.spec must begin at 0, got {self.spec!r}")
        if thresholds != sorted(set(thresholds)):
            divided = f" after division by {per} tokens a sample" if per > 1 else ""
            raise ValueError(f"the thresholds of batch.spec must rise{divided}, got {self.spec!r}")
        object.__setattr__(self, "stages", stages)

    @property
    def end(self) -> str:
        return f"the last stage of batch.spec begins at {self.ends_at} samples"


def pairs(spec: str, name: str, example: str) -> list[tuple[str, int]]:
    """The entries "LEFT:SIZE" of `spec`, sizes as whole numbers.

    Raises:
        ValueError: an entry that is no pair; the sentence carries `name` and the entry.
    """
    entries = []
    for entry in re.split(r"[\s,]+", str(spec).strip()):
        left, colon, size = entry.partition(":")
        if not (left and colon and size):
            raise ValueError(f'{name} must be entries like "{example}", got {spec!r}')
        entries.append((left, whole_number(size, f"a batch size of {name}", 1)))
    return entries


def check_rises(start: int, size: int) -> None:
    """Refuse a ramp that ends no higher than it begins."""
    if start >= size:
        raise ValueError(
            f"batch.start must be below batch.size, got {start} and {size}; "
            "use batch=constant for a batch that does not grow"
        )
