"""The plan of a run: the batch size and learning rate of every step, known before it starts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from largebatch.schedules.counts import real_number, whole_number
from largebatch.schedules.curves import Curve
from largebatch.schedules.ramps import Ramp
from largebatch.schedules.scaling import Rule, scale_lr


class Point(NamedTuple):
    """What one step takes."""

    samples: int
    """Samples seen before the step."""
    batch_size: int
    """Global batch size of the step, in samples."""
    lr: float
    """Learning rate of the step: scaled for its batch size, times the curve's factor."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Ramp, curve, rule and budget joined. A function of samples: nothing to checkpoint.

    Attributes:
        ramp: the batch size at each sample.
        curve: the learning rate's factor at each sample.
        budget_samples: the run ends with the first step that reaches it; batches are never cut.
        base_lr: peak learning rate at `base_batch`; `rule` makes it that of the batch in hand.

    Raises:
        ValueError: a warm-up or a ramp that the budget would cut off, an unknown rule, a value out
        of
            range.
    """

    ramp: Ramp
    curve: Curve
    budget_samples: int
    base_lr: float
    base_batch: int
    rule: str | Rule = "none"

    def __post_init__(self) -> None:
        budget = whole_number(self.budget_samples, "budget.samples", 1)
        object.__setattr__(self, "budget_samples", budget)
        base_batch = whole_number(self.base_batch, "scaling.base_batch", 1)
        object.__setattr__(self, "base_batch", base_batch)
        object.__setattr__(self, "base_lr", real_number(self.base_lr, "optim.lr", above=0.0))
        lengths = {
            "lr.warmup_samples": self.curve.warmup_samples,
            "batch.ramp_samples": self.ramp.ends_at,
        }
        for name, length in lengths.items():
            if length > budget:
                raise ValueError(
                    f"{name} is {length}, longer than the run of {budget}: lower it, "
                    f"or raise budget.samples to {length} or more"
                )
        self.at(0)

    def at(self, samples: int) -> Point:
        """The step that begins after `samples` samples."""
        batch_size = self.ramp.at(samples)
        peak = scale_lr(self.base_lr, self.base_batch, batch_size, self.rule)
        factor = self.curve.factor(samples, batch_size, self.budget_samples)
        return Point(samples, batch_size, peak * factor)

    @property
    def peak_lr(self) -> float:
        """The learning rate at the ramp's last batch size, before the curve's factor."""
        last = self.ramp.at(max(self.budget_samples, self.ramp.ends_at))
        return scale_lr(self.base_lr, self.base_batch, last, self.rule)

    def __iter__(self) -> Iterator[Point]:
        return self.steps_from(0)

    def steps_from(self, samples: int) -> Iterator[Point]:
        """Every step from the one that begins after `samples` samples to the budget."""
        while samples < self.budget_samples:
            point = self.at(samples)
            yield point
            samples += point.batch_size

    def check_divisible(self, data_parallel_size: int, micro_batch_size: int | None) -> None:
        """Refuse batch sizes that ranks and micro-batches do not divide.

        Raises:
            ValueError: the first such batch size, and the nearest ones that would do.
        """
        unit = data_parallel_size * (micro_batch_size or 1)
        for size in self.ramp.sizes():
            if size % unit:
                below = size - size % unit
                nearest = f"{below} or {below + unit}" if below else f"{unit}"
                raise ValueError(
                    f"a batch size of {size} is not divisible by {unit} "
                    f"({data_parallel_size} rank(s) times micro-batch {micro_batch_size or 1}); "
                    f"the nearest batch size is {nearest}, or change engine.micro_batch_size"
                )
