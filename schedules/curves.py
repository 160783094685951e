"""The learning rate's curve over a run, as a factor on its peak.

A curve is a function of the samples seen before the step. Warm-up counts the batch in hand as well:
the factor rises linearly, min(1, (samples + batch) / warmup_samples), so that the first step is not
wasted at zero and the peak is met by the step that completes the warm-up. The decay runs from the
end of the warm-up to the budget, whatever batch sizes lie between.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from largebatch.schedules.counts import real_number, whole_number


@dataclass(frozen=True, kw_only=True)
class Curve(ABC):
    """A factor in [0, 1] on the peak learning rate.

    Attributes:
        warmup_samples: samples over which the factor rises linearly to 1; 0 for no warm-up.

    Raises:
        ValueError: a value out of range.
    """

    warmup_samples: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "warmup_samples", whole_number(self.warmup_samples, "lr.warmup_samples")
        )

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The factor at `progress` in [0, 1] from the end of the warm-up to the budget."""

    def factor(self, samples: int, batch_size: int, budget_samples: int) -> float:
        """The factor for a step of `batch_size` samples that begins after `samples` samples."""
        warmup = min(1.0, (samples + batch_size) / max(1, self.warmup_samples))
        decaying = max(1, budget_samples - self.warmup_samples)
        progress = min(1.0, max(0, samples - self.warmup_samples) / decaying)
        return warmup * self.decay(progress)


@dataclass(frozen=True, kw_only=True)
class Constant(Curve):
    """The peak, after any warm-up."""

    def decay(self, progress: float) -> float:
        del progress
        return 1.0


@dataclass(frozen=True, kw_only=True)
class _Decaying(Curve):
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction = real_number(self.final_fraction, "lr.final_fraction", least=0.0, most=1.0)
        object.__setattr__(self, "final_fraction", fraction)


@dataclass(frozen=True, kw_only=True)
class Cosine(_Decaying):
    """Half a cosine from the peak to `final_fraction` of it (Loshchilov & Hutter, 1608.03983)."""

    def decay(self, progress: float) -> float:
        half_wave = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.final_fraction + (1.0 - self.final_fraction) * half_wave


@dataclass(frozen=True, kw_only=True)
class Polynomial(_Decaying):
    """(1 - progress)^power from the peak to `final_fraction`; 1 is linear, 2 is LARS's own
    schedule.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "power", real_number(self.power, "lr.power", above=0.0))

    def decay(self, progress: float) -> float:
        return self.final_fraction + (1.0 - self.final_fraction) * math.pow(
            1.0 - progress, self.power
        )
